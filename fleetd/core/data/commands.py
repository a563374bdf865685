"""Commands: everything that the core asks of the daemon, as frozen values with a `reason` for people.

Invariants:
- The daemon answers every slow command with exactly one event; its failure is an event too.

    Spawn → Spawned | SpawnFailed          Stop, Sweep → SetEmpty (Exited may come first)
    Load → Loaded | LoadFailed             Unload → Unloaded | UnloadFailed
    Sleep, Wake, CheckSleep → SleepSeen
    StartProbe → ProbeResult, repeated, until StopProbes or the end of the generation

An Unload comes while a Load is unanswered only if that Load is overdue; the Load's answer must then come before Unloaded, or never.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from fleetd.core.data.specs import ProbeKind, Remembered


@dataclass(frozen=True, slots=True)
class Command:
    """Base of all commands."""

    def names(self) -> tuple[str, ...]:
        """Return the processes and models that this command is about."""
        return ()


@dataclass(frozen=True, slots=True)
class RunCommand(Command):
    """Base of commands about one run of a process."""

    name: str
    generation: int

    def names(self) -> tuple[str, ...]:
        return (self.name,)


@dataclass(frozen=True, slots=True)
class PlacementCommand(Command):
    """Base of commands about a model on one run of a process."""

    model: str
    process: str
    generation: int
    reason: str

    def names(self) -> tuple[str, ...]:
        return (self.model, self.process)


@dataclass(frozen=True, slots=True)
class Spawn(RunCommand):
    reason: str
    restarts: int = 0  # including this one


@dataclass(frozen=True, slots=True)
class Stop(RunCommand):
    """Stop the process set; `force` skips the grace. A second Stop escalates."""

    reason: str
    force: bool = False


@dataclass(frozen=True, slots=True)
class Sweep(RunCommand):
    """The leader died: kill the rest of its set, then answer with SetEmpty."""

    reason: str


@dataclass(frozen=True, slots=True)
class StartProbe(RunCommand):
    probe: ProbeKind
    reason: str


@dataclass(frozen=True, slots=True)
class StopProbes(RunCommand):
    reason: str


@dataclass(frozen=True, slots=True)
class Load(PlacementCommand):
    """Load a model on a server that is up."""


@dataclass(frozen=True, slots=True)
class Unload(PlacementCommand):
    """Unload a model from a server."""


@dataclass(frozen=True, slots=True)
class Sleep(PlacementCommand):
    """Let an idle engine free its memory without exiting; grants stop meanwhile."""


@dataclass(frozen=True, slots=True)
class Wake(PlacementCommand):
    """Wake the engine and verify it with one token before any request is granted."""


@dataclass(frozen=True, slots=True)
class CheckSleep(PlacementCommand):
    """Ask an adopted engine if it sleeps: the previous daemon may have caused it."""


@dataclass(frozen=True, slots=True)
class Grant(Command):
    """The request may go to `process`; `load_s` is the part of the wait for a load."""

    request_id: int
    model: str  # after routes, aliases and fallback
    process: str
    generation: int
    queued_s: float = 0.0
    load_s: float = 0.0
    reason: str = ""

    def names(self) -> tuple[str, ...]:
        return (self.model, self.process)


@dataclass(frozen=True, slots=True)
class Reject(Command):
    """The request gets an error.

    `code`: model_not_found, model_too_large, queue_full, queue_timeout, model_failed, model_blocked or draining.
    """

    request_id: int
    code: str
    reason: str
    retry_after_s: float | None = None
    model: str = ""  # the model that was asked for, if the fleet has it
    hint: str | None = None  # what to do next
    final: bool = False  # a retry cannot help before somebody acts

    def names(self) -> tuple[str, ...]:
        return (self.model,) if self.model else ()


@dataclass(frozen=True, slots=True)
class ReadAhead(Command):
    """Read the file of the next model into the page cache while its victim drains."""

    model: str
    reason: str

    def names(self) -> tuple[str, ...]:
        return (self.model,)


@dataclass(frozen=True, slots=True)
class Persist(Command):
    """Persist this about a process, for the next daemon."""

    name: str
    remembered: Remembered
    reason: str

    def names(self) -> tuple[str, ...]:
        return (self.name,)


@dataclass(frozen=True, slots=True)
class LearnFootprint(Command):
    """The highest measured footprint of a model, stored under its `footprint_hash`."""

    model: str
    footprint_hash: str
    bytes: Mapping[str, int] = field(default_factory=dict)
    reason: str = ""

    def names(self) -> tuple[str, ...]:
        return (self.model,)


@dataclass(frozen=True, slots=True)
class Finished(Command):
    """The shutdown is complete: no process of the fleet runs."""

    reason: str
