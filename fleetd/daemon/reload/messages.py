"""What passes between the daemon and the process that reads fleet.yaml for it.

The rules of this file
- The daemon never loads pydantic, YAML or the schema for a configuration: all that it gets are plain dataclasses. What it keeps
  of the configuration itself is opaque to it, and handed back for the next comparison.
- An engine travels as its name; options that are only values travel as such.
- Both ends are the same program of the same user; a message is pickled, and anything unexpected in it is one clear error.
"""

from __future__ import annotations

import copyreg
import io
import pickle
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar

from fleetd.engines.registry import recall
from fleetd.errors import ConfigError, HostError, Problem
from fleetd.resolver.resolved import Assembly, Edit, FleetPaths, Surroundings

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Places:
    """The first answer: where the fleet lives, so that the rest can be looked up there."""

    paths: FleetPaths


@dataclass(frozen=True, slots=True)
class Circumstances:
    """What the second half of a reading needs. `running` are the processes that hold their ports now, `before` is `kept` of the
    configuration that runs (None: nothing runs yet)."""

    around: Surroundings
    running: frozenset[str]
    hostname: str
    before: bytes | None = None


@dataclass(frozen=True, slots=True)
class Reading:
    """What a file amounts to. `edits` lead from what runs to it; `kept` is for the next comparison; `shown` is the normalised
    configuration, secrets hidden, as compressed JSON."""

    assembly: Assembly
    edits: tuple[Edit, ...]
    kept: bytes
    shown: bytes


@dataclass(frozen=True, slots=True)
class Refusal:
    """The file cannot be used: every problem, and all files that it is made of."""

    problems: tuple[Problem, ...]
    hint: str | None
    files: tuple[Path, ...]


@dataclass(frozen=True, slots=True)
class Failure:
    """Something else went wrong, in one sentence."""

    message: str


def pack(value: Any) -> bytes:
    """Return a message."""
    own: dict[type, Any] = {**copyreg.dispatch_table}
    if isinstance(value, Reading):
        for plan in value.assembly.plans.values():
            own[type(plan.engine)] = _engine
            if plan.context.options.travels_plain:
                own[type(plan.context.options)] = _values
    target = io.BytesIO()
    pickler = pickle.Pickler(target, pickle.HIGHEST_PROTOCOL)
    pickler.dispatch_table = own
    pickler.dump(value)
    return target.getvalue()


def unpack(message: bytes, kind: type[T]) -> T:
    """Return what a message holds. Raises ConfigError for a refusal, HostError for a failure and for anything unexpected."""
    try:
        found = pickle.loads(message)  # noqa: S301 - from our own child, over a pipe of our own
    except Exception as error:
        raise HostError(
            f"the reader of the configuration answered nonsense: {type(error).__name__}: {error}"
        ) from error
    if isinstance(found, Refusal):
        raise ConfigError(found.problems, hint=found.hint, files=found.files)
    if isinstance(found, Failure):
        raise HostError(found.message)
    if not isinstance(found, kind):
        raise HostError(f"the reader of the configuration answered nonsense: {type(found).__name__}")
    return found


def _engine(engine: Any) -> Any:
    return recall, (engine.name,)


def _values(options: Any) -> Any:
    return SimpleNamespace, (), dict(options)
