"""Find engines by name: the built-in ones, and those that packages register in the entry-point group `fleetd.engines`.

Invariants:
- An engine module is imported when the engine is loaded; a fleet without vLLM never imports its engine.
- A built-in engine cannot be replaced: an entry point of the same name is rejected with the package that registers it.
- Every engine is checked against the contract when it is loaded.
"""

from __future__ import annotations

import difflib
import importlib
from functools import cache
from inspect import getattr_static
from typing import TYPE_CHECKING, cast

from fleetd.engines.base import Engine, ModelServer, ModelStore, Sleeper, StartupLog
from fleetd.errors import EngineError

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

GROUP = "fleetd.engines"
BUILT_IN = {
    "external": "fleetd.engines.external.engine",
    "llamacpp": "fleetd.engines.llamacpp.engine",
    "lmstudio": "fleetd.engines.lmstudio.engine",
    "ollama": "fleetd.engines.ollama.engine",
    "process": "fleetd.engines.generic.engine",
    "vllm": "fleetd.engines.vllm.engine",
}
PARTS: dict[str, type] = {"server": ModelServer, "sleep": Sleeper, "store": ModelStore, "startup": StartupLog}
_MISSING = object()


def names() -> tuple[str, ...]:
    """Return the names of all engines that can be loaded, sorted."""
    return tuple(sorted({*BUILT_IN, *_entry_points()}))


@cache
def load(name: str) -> Engine:
    """Return the engine `name`. Raises EngineError: unknown, shadowing, incomplete."""
    added = _entry_points()
    if name in BUILT_IN:
        if name in added:
            raise EngineError(
                f"package {_package(added[name])} registers an engine named {name!r}, which is built into fleetd",
                hint=f"uninstall {_package(added[name])}, or rename its engine",
                recoverable=False,
            )
        return _built_in(name)
    if name in added:
        return _from_entry_point(name, added[name])
    known = names()
    near = difflib.get_close_matches(name.lower(), known, n=1)
    hint = f"did you mean {near[0]!r}?" if near else None
    raise EngineError(f"unknown engine {name!r}: there are {', '.join(known)}", hint=hint, recoverable=False)


@cache
def recall(name: str) -> Engine:
    """Return an engine that another process loaded; built-in ones without a scan."""
    return _built_in(name) if name in BUILT_IN else load(name)


def _built_in(name: str) -> Engine:
    return _checked(name, importlib.import_module(BUILT_IN[name]).ENGINE, "fleetd")


def _entry_points() -> dict[str, EntryPoint]:
    from importlib.metadata import entry_points

    return {entry.name: entry for entry in entry_points(group=GROUP)}


def _package(entry: EntryPoint) -> str:
    return entry.dist.name if entry.dist is not None else entry.value


def _from_entry_point(name: str, entry: EntryPoint) -> Engine:
    """Load an entry point: an engine, or a class to construct without arguments."""
    try:
        found = entry.load()
        engine = found() if isinstance(found, type) else found
    except Exception as error:
        message = f"engine {name!r} of {_package(entry)} cannot be loaded: {type(error).__name__}: {error}"
        raise EngineError(message, recoverable=False) from error
    return _checked(name, engine, _package(entry))


def _checked(name: str, engine: object, package: str) -> Engine:
    problems = contract_problems(engine)
    if problems:
        raise EngineError(f"engine {name!r} of {package} is incomplete: {'; '.join(problems)}", recoverable=False)
    checked = cast("Engine", engine)
    if checked.name != name:
        raise EngineError(f"engine {name!r} of {package} calls itself {checked.name!r}", recoverable=False)
    return checked


def contract_problems(engine: object) -> list[str]:
    """Return the violations of the contract of `Engine`; `options` is not evaluated."""
    problems = _member_problems(engine, Engine, "")
    if problems:
        return problems
    checked = cast("Engine", engine)
    for part, protocol in PARTS.items():
        found = getattr(checked, part)
        if found is not None:
            problems += _member_problems(found, protocol, f"{part}.")
    if checked.capabilities.many_models != (checked.server is not None):
        problems.append("capabilities.many_models must be set exactly where there is a server")
    return problems


def _member_problems(candidate: object, protocol: type, prefix: str) -> list[str]:
    """Return the missing members of `protocol`, and methods that cannot be called."""
    members = {name: value for name, value in vars(protocol).items() if not name.startswith("_")}
    missing = [f"{prefix}{name}" for name in members if getattr_static(candidate, name, _MISSING) is _MISSING]
    if missing:
        return [f"it lacks {', '.join(missing)}"]
    methods = [name for name, value in members.items() if not isinstance(value, property)]
    return [f"{prefix}{name} is not a method" for name in methods if not callable(getattr(candidate, name))]
