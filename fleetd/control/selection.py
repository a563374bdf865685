"""Resolve what a user typed to names: exact names, `all`, globs, and the base names of replicas.

Invariants:
- If any pattern matches nothing, nothing is selected: ApiError 404 `unknown_name` lists all that do not match.
- The order of the patterns is kept; a name is selected once.
- A route is never in memory itself: `all` and globs skip it, and naming it is an error that lists the models behind it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase

from fleetd.control.port import Names
from fleetd.errors import ApiError

# verb for a process → what an operator who names a model means by it
_FOR_MODELS = {
    "start": "load",
    "stop": "unload",
    "restart": "unload",
    "drain": "unload",
    "undrain": "load",
    "logs": "status",
    "signal": "unload",
}
# verb for a model → the same for a process
_FOR_PROCESSES = {"load": "start", "unload": "stop", "pin": "start", "unpin": "stop", "explain": "status"}


def processes(patterns: Sequence[str], names: Names, verb: str = "start") -> list[str]:
    """Return the processes that the patterns select for `verb`. Raises ApiError 404."""

    def find(pattern: str) -> list[str]:
        if pattern in names.processes:
            return [pattern]
        return [name for name, base in names.processes.items() if pattern in ("all", base) or _like(name, pattern)]

    known = dict.fromkeys((*names.processes, *names.processes.values()))
    return _select(patterns, find, "process", known, other=_models_hint(names, verb))


def models(patterns: Sequence[str], names: Names, verb: str = "load") -> list[str]:
    """Return the models that patterns or aliases select for `verb`. Raises ApiError 404, 409."""

    def matching(pattern: str) -> list[str]:
        if pattern in names.models:
            return [pattern]
        by_alias = [name for name, aliases in names.models.items() if pattern in aliases]
        return by_alias or [name for name in names.models if pattern == "all" or _like(name, pattern)]

    def find(pattern: str) -> list[str]:
        found = matching(pattern)
        loadable = [name for name in found if name not in names.routes]
        if found and not loadable and pattern != "all":
            raise _route_error(pattern, names.routes[found[0]])
        return loadable

    known = dict.fromkeys((*names.models, *(alias for aliases in names.models.values() for alias in aliases)))
    return _select(patterns, find, "model", known, other=lambda word: process_hint(word, names, verb))


def _like(name: str, pattern: str) -> bool:
    return any(mark in pattern for mark in "*?[") and fnmatchcase(name, pattern)


def _models_hint(names: Names, verb: str) -> Callable[[str], str | None]:
    def hint(word: str) -> str | None:
        model = next((name for name, aliases in names.models.items() if word == name or word in aliases), None)
        if model is None:
            return None
        if model in names.routes:
            return f"{word} is a route; its models are {', '.join(names.routes[model])}"
        return f"{word} is a model, not a process: fleetctl {_FOR_MODELS.get(verb, 'status')} {word}"

    return hint


def process_hint(word: str, names: Names, verb: str) -> str | None:
    """Return what to type instead if `word` is a process and `verb` needs a model; None for no process."""
    known = word in names.processes or word in names.processes.values()
    return f"{word} is a process, not a model: fleetctl {_FOR_PROCESSES.get(verb, 'status')} {word}" if known else None


def _route_error(pattern: str, targets: Sequence[str]) -> ApiError:
    return ApiError(409, "is_a_route", f"{pattern} is a route: name its models ({', '.join(targets)}).")


def _select(
    patterns: Sequence[str],
    find: Callable[[str], list[str]],
    noun: str,
    known: Iterable[str],
    other: Callable[[str], str | None],
) -> list[str]:
    if not patterns:
        raise ApiError(400, "invalid_request", f"Name at least one {noun}, or use all.")
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
