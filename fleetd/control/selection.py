"""From what a person typed to names: exact, `all`, globs, and the base name of replicas.

The rules of this file
- Either every pattern means something, or nothing is done: ApiError 404 `unknown_name` names all that do not.
- The order of the words is kept; a name is taken once.
- A route is never in memory itself: `all` and globs pass over it, and who names it is told the models that it leads to.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase

from fleetd.control.port import Names
from fleetd.errors import ApiError


def processes(patterns: Sequence[str], names: Names) -> list[str]:
    """Return the processes that the patterns name. Raises ApiError 404."""

    def find(pattern: str) -> list[str]:
        if pattern in names.processes:
            return [pattern]
        return [name for name, base in names.processes.items() if pattern in ("all", base) or _like(name, pattern)]

    known = dict.fromkeys((*names.processes, *names.processes.values()))
    return _select(patterns, find, "process", known, other=_models_hint(names))


def models(patterns: Sequence[str], names: Names) -> list[str]:
    """Return the models that the patterns name, aliases resolved. Raises ApiError 404, and 409 for a route."""

    def meant(pattern: str) -> list[str]:
        if pattern in names.models:
            return [pattern]
        by_alias = [name for name, aliases in names.models.items() if pattern in aliases]
        return by_alias or [name for name in names.models if pattern == "all" or _like(name, pattern)]

    def find(pattern: str) -> list[str]:
        found = meant(pattern)
        held = [name for name in found if name not in names.routes]
        if found and not held and pattern != "all":
            raise _a_route(pattern, names.routes[found[0]])
        return held

    known = dict.fromkeys((*names.models, *(alias for aliases in names.models.values() for alias in aliases)))
    return _select(patterns, find, "model", known, other=_processes_hint(names))


def _like(name: str, pattern: str) -> bool:
    return any(mark in pattern for mark in "*?[") and fnmatchcase(name, pattern)


def _models_hint(names: Names) -> Callable[[str], str | None]:
    def hint(word: str) -> str | None:
        model = next((name for name, aliases in names.models.items() if word == name or word in aliases), None)
        return model and f"{word} is a model, not a process: fleetctl load {word}"

    return hint


def _processes_hint(names: Names) -> Callable[[str], str | None]:
    def hint(word: str) -> str | None:
        known = word in names.processes or word in names.processes.values()
        return f"{word} is a process, not a model: fleetctl start {word}" if known else None

    return hint


def _a_route(pattern: str, targets: Sequence[str]) -> ApiError:
    return ApiError(409, "is_a_route", f"{pattern} is a route: name its models ({', '.join(targets)}).")


def _select(
    patterns: Sequence[str],
    find: Callable[[str], list[str]],
    noun: str,
    known: Iterable[str],
    other: Callable[[str], str | None],
) -> list[str]:
    if not patterns:
        raise ApiError(400, "invalid_request", f"Name at least one {noun}, or say all.")
    chosen: dict[str, None] = {}
    unknown: list[str] = []
    for pattern in patterns:
        found = find(pattern)
        if not found and pattern != "all":
            unknown.append(pattern)
        chosen.update(dict.fromkeys(found))
    if unknown:
        raise _unknown(unknown, noun, list(known), other)
    return list(chosen)


def _unknown(unknown: list[str], noun: str, known: list[str], other: Callable[[str], str | None]) -> ApiError:
    shown = [word if len(word) <= 100 else word[:100] + "…" for word in unknown[:10]]
    listed = ", ".join(repr(word) for word in shown)
    message = f"There is no {noun} named {listed}."
    hints = []
    for word in shown:
        close = get_close_matches(word, known, n=1)
        hint = other(word) or (f"did you mean {close[0]}?" if close else None)
        if hint:
            hints.append(hint)
    if not hints and known:
        hints = [f"known: {', '.join(sorted(known)[:12])}{', …' if len(known) > 12 else ''}"]
    return ApiError(404, "unknown_name", message, hint="; ".join(hints) or None)
