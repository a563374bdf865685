"""Effects: everything the core can ask of the shell. Frozen data with a human `reason`.

The rules of this file
- A command is a value: tests compare it, the journal stores it, the executor carries it out.
- The shell answers every slow command with exactly one event; its failure is an event too.

    Spawn → Spawned | SpawnFailed          Stop, Sweep → SetEmpty (Exited may come first)
    Load → Loaded | LoadFailed             Unload → Unloaded | UnloadFailed
    Sleep, Wake, LookAsleep → SleepSeen
    Unload comes while a Load is unanswered only if that Load is overdue: its answer must then come before Unloaded, or never
    StartProbe → ProbeResult, repeated, until StopProbes or the end of the generation
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
    restarts: int = 0  # this one counted


@dataclass(frozen=True, slots=True)
class Stop(RunCommand):
    """Stop the whole process set by its stop policy; `force` skips the grace. A second Stop of a generation escalates."""

    reason: str
    force: bool = False


@dataclass(frozen=True, slots=True)
class Sweep(RunCommand):
    """The leader is dead by itself: kill what is left of its set, then say SetEmpty."""

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
    """Have an idle engine give its memory back without ending. The core grants nothing on it any more."""


@dataclass(frozen=True, slots=True)
class Wake(PlacementCommand):
    """Have it take its memory again, and hear it speak before anybody else does."""


@dataclass(frozen=True, slots=True)
class LookAsleep(PlacementCommand):
    """Ask an adopted engine whether it sleeps: the daemon before may have put it to sleep."""


@dataclass(frozen=True, slots=True)
class Grant(Command):
    """The request may go to `process` now. `queued_s` is its whole wait, `load_s` the part that was a load (0: warm)."""

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
    """`code` is one of the contract's: model_not_found, model_too_large, queue_full, queue_timeout, model_failed,
    model_blocked, draining."""

    request_id: int
    code: str
    reason: str
    retry_after_s: float | None = None


@dataclass(frozen=True, slots=True)
class ReadAhead(Command):
    """Bring the next model's file into the page cache while its victim drains."""

    model: str
    reason: str

    def names(self) -> tuple[str, ...]:
        return (self.model,)


@dataclass(frozen=True, slots=True)
class Persist(Command):
    """Keep this about a process over a restart of the daemon."""

    name: str
    remembered: Remembered
    reason: str

    def names(self) -> tuple[str, ...]:
        return (self.name,)


@dataclass(frozen=True, slots=True)
class LearnFootprint(Command):
    """The highest measured footprint of a model, filed under its `footprint_hash`."""

    model: str
    footprint_hash: str
    bytes: Mapping[str, int] = field(default_factory=dict)
    reason: str = ""

    def names(self) -> tuple[str, ...]:
        return (self.model,)


@dataclass(frozen=True, slots=True)
class Finished(Command):
    """Shutdown is complete: nothing of ours runs."""

    reason: str
