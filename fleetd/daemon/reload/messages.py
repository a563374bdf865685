"""The messages between the daemon and the worker process that reads fleet.yaml.

Invariants:
- The daemon never imports pydantic, YAML or the schema for a configuration: it receives plain dataclasses. The
  configuration itself is opaque to it, and is returned to the worker for the next comparison.
- An engine is sent as its name, and options that are only values as values.
- Both ends are the same program of the same user: messages are pickled, and an invalid one is a HostError.
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
from fleetd.resolver.resolved import Edit, FleetPaths, ResolvedFleet, Surroundings

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Places:
    """The first answer: the fleet's folders, an input of the second half."""

    paths: FleetPaths


@dataclass(frozen=True, slots=True)
class ReadInputs:
    """The inputs of the second half of a reading.

    `running` are the processes that hold their ports now, `before` is `kept` of the active configuration (None: none).
    """

    around: Surroundings
    running: frozenset[str]
    hostname: str
    before: bytes | None = None


@dataclass(frozen=True, slots=True)
class Reading:
    """The result of reading a file.

    `edits` are the differences from the active configuration; `kept` is the input of the next comparison; `shown` is the
    normalised configuration, secrets hidden, as compressed JSON.
    """

    resolved: ResolvedFleet
    edits: tuple[Edit, ...]
    kept: bytes
    shown: bytes


@dataclass(frozen=True, slots=True)
class Refusal:
    """The file cannot be used: every problem, and all files that it consists of."""

    problems: tuple[Problem, ...]
    hint: str | None
    files: tuple[Path, ...]


@dataclass(frozen=True, slots=True)
class Failure:
    """Another failure, in one sentence."""

    message: str


def pack(value: Any) -> bytes:
    """Return a value as a message."""
    own: dict[type, Any] = {**copyreg.dispatch_table}
    if isinstance(value, Reading):
        for plan in value.resolved.plans.values():
            own[type(plan.engine)] = _engine
            if plan.context.options.travels_plain:
                own[type(plan.context.options)] = _values
    target = io.BytesIO()
    pickler = pickle.Pickler(target, pickle.HIGHEST_PROTOCOL)
    pickler.dispatch_table = own
    pickler.dump(value)
    return target.getvalue()


def unpack(message: bytes, kind: type[T]) -> T:
    """Return the value of a message.

    Raises ConfigError for a refusal, HostError for a failure and for an invalid message.
    """
    try:
        found = pickle.loads(message)  # noqa: S301 - from our own child, over a pipe of our own
    except Exception as error:
        raise HostError(f"config worker sent an invalid response: {type(error).__name__}: {error}") from error
    if isinstance(found, Refusal):
        raise ConfigError(found.problems, hint=found.hint, files=found.files)
    if isinstance(found, Failure):
        raise HostError(found.message)
    if not isinstance(found, kind):
        raise HostError(f"config worker sent an invalid response: {type(found).__name__}")
    return found


def _engine(engine: Any) -> Any:
    return recall, (engine.name,)


def _values(options: Any) -> Any:
    return SimpleNamespace, (), dict(options)
