"""The engines by name: the built-in ones, and those that other packages add in the entry-point group `fleetd.engines`.

The rules of this file
- Lazy: a name is a string until it is loaded; a fleet without vLLM never imports the engine for it.
- A built-in engine cannot be replaced: an entry point of the same name is refused, with the package that brings it.
- An engine module ends with `ENGINE = ItsClass()`; an entry point names such an object, or a class without arguments.
"""

from __future__ import annotations

import difflib
import importlib
from functools import cache
from typing import TYPE_CHECKING, cast

from fleetd.errors import EngineError

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

    from fleetd.engines.base import Engine

GROUP = "fleetd.engines"
BUILT_IN = {
    "external": "fleetd.engines.external",
    "llamacpp": "fleetd.engines.llamacpp.engine",
    "lmstudio": "fleetd.engines.lmstudio.engine",
    "ollama": "fleetd.engines.ollama.engine",
    "process": "fleetd.engines.generic.engine",
    "vllm": "fleetd.engines.vllm.engine",
}
_MEMBERS = (
    "name",
    "capabilities",
    "options",
    "api",
    "validate",
    "launch",
    "probes",
    "concurrency",
    "estimate",
    "classify_exit",
)
_AWAITED = ("load", "unload", "loaded", "alive")


def names() -> tuple[str, ...]:
    """Return every engine that can be loaded, sorted."""
    return tuple(sorted({*BUILT_IN, *_added()}))


@cache
def load(name: str) -> Engine:
    """Return the engine `name`. Raises EngineError: unknown (with the nearest name), shadowing, or broken."""
    added = _added()
    if name in BUILT_IN:
        if name in added:
            raise EngineError(
                f"the package {_package(added[name])} brings an engine named {name!r}, which is fleetd's own",
                hint=f"uninstall {_package(added[name])}, or have it name its engine otherwise",
                recoverable=False,
            )
        return _built_in(name)
    if name in added:
        return _from_entry_point(name, added[name])
    known = names()
    near = difflib.get_close_matches(name.lower(), known, n=1)
    hint = f"did you mean {near[0]!r}?" if near else None
    raise EngineError(f"there is no engine {name!r}; there are {', '.join(known)}", hint=hint, recoverable=False)


@cache
def recall(name: str) -> Engine:
    """Return an engine that was found before, by another process of ours: the built-in ones without a look at the packages."""
    return _built_in(name) if name in BUILT_IN else load(name)


def _built_in(name: str) -> Engine:
    return cast("Engine", importlib.import_module(BUILT_IN[name]).ENGINE)


def _added() -> dict[str, EntryPoint]:
    from importlib.metadata import entry_points

    return {entry.name: entry for entry in entry_points(group=GROUP)}


def _package(entry: EntryPoint) -> str:
    return entry.dist.name if entry.dist is not None else entry.value


def _from_entry_point(name: str, entry: EntryPoint) -> Engine:
    try:
        found = entry.load()
        engine = found() if isinstance(found, type) else found
    except Exception as error:
        message = f"the engine {name!r} of {_package(entry)} cannot be loaded: {type(error).__name__}: {error}"
        raise EngineError(message, recoverable=False) from error
    missing = [member for member in (*_MEMBERS, *_AWAITED) if not hasattr(engine, member)]
    if missing:
        message = f"the engine {name!r} of {_package(entry)} is incomplete: it lacks {', '.join(missing)}"
        raise EngineError(message, recoverable=False)
    if engine.name != name:
        message = f"the engine {name!r} of {_package(entry)} calls itself {engine.name!r}"
        raise EngineError(message, recoverable=False)
    return cast("Engine", engine)
