"""Events: everything that can happen to a fleet, as frozen values.

Invariants:
- An event reports an observation or an operator's request; `Fleet.handle(event, now)` decides what follows.
- An event about a run of a process has its `generation`; the core drops events of older generations.
- `request_id` is unique for the life of the daemon.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from fleetd.core.data.specs import ExitReport, FleetSpec, ProbeKind, Remembered, SleepState


@dataclass(frozen=True, slots=True)
class Event:
    """Base of all events."""

    def names(self) -> tuple[str, ...]:
        """Return the processes and models that this event is about."""
        return ()


@dataclass(frozen=True, slots=True)
class ProcessEvent(Event):
    """Base of events about a process."""

    name: str

    def names(self) -> tuple[str, ...]:
        return (self.name,)


@dataclass(frozen=True, slots=True)
class RunEvent(ProcessEvent):
    """Base of events about one run of a process."""

    generation: int


@dataclass(frozen=True, slots=True)
class ModelEvent(Event):
    """Base of events about a model."""

    model: str

    def names(self) -> tuple[str, ...]:
        return (self.model,)


@dataclass(frozen=True, slots=True)
class PlacementEvent(ModelEvent):
    """Base of events about a model on one run of a process."""

    process: str
    generation: int

    def names(self) -> tuple[str, ...]:
        return (self.model, self.process)


@dataclass(frozen=True, slots=True)
class Tick(Event):
    """The time that `next_deadline()` returned has come."""


@dataclass(frozen=True, slots=True)
class Adopted(RunEvent):
    """A live child of an earlier daemon, with verified identity. It continues the run `generation`."""

    pid: int
    age_s: float = 0.0


@dataclass(frozen=True, slots=True)
class SpecChanged(Event):
    """The desired fleet: at start, and again after every applied change of the configuration.

    `remembered`, `adopted` and `died` come with the first one only; adopted processes are not spawned again. `died` are
    runs that exited while the daemon was down, and whose sets are empty.
    `missing` comes with every one, so that nothing starts before its prerequisites were checked.
    """

    spec: FleetSpec
    remembered: Mapping[str, Remembered] = field(default_factory=dict)
    adopted: tuple[Adopted, ...] = ()
    missing: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # missing prerequisites, by process
    missing_models: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # the same for models on servers
    died: tuple[Exited, ...] = ()


# -- processes ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Spawned(RunEvent):
    pid: int


@dataclass(frozen=True, slots=True)
class SpawnFailed(RunEvent):
    """Nothing runs. `recoverable` False means that only a change of fleet.yaml or of the machine helps."""

    message: str
    recoverable: bool = True


@dataclass(frozen=True, slots=True)
class Exited(RunEvent):
    """The leader is dead. Descendants may live: the core orders a sweep."""

    report: ExitReport


@dataclass(frozen=True, slots=True)
class SetEmpty(RunEvent):
    """Answer to Stop and Sweep: the process set is empty, its port and its memory are free.

    `survivors` are processes that could not be killed (D state): they stay visible and are swept again later.
    """

    survivors: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class ProbeResult(RunEvent):
    probe: ProbeKind
    ok: bool
    detail: str = ""
    final: bool = False  # a retry gives the same answer: only a change of fleet.yaml or of the machine helps
    paused: bool = False  # the process was stopped by a signal (SIGSTOP)


@dataclass(frozen=True, slots=True)
class StartProgress(RunEvent):
    """The engine is still downloading, compiling or loading: the start deadline is counted again from now."""

    phase: str


@dataclass(frozen=True, slots=True)
class RequirementsChanged(ProcessEvent):
    """The missing paths or volumes of a process; empty: all are available."""

    missing: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class MemorySampled(RunEvent):
    """Resident bytes of the whole process set (`rss_bytes`), and what it holds per device where known."""

    rss_bytes: int
    device_bytes: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class RestartDue(ProcessEvent):
    """A schedule, a watched file or another trigger asks for a restart. It does not count as a death.

    `revive`: a process that failed, exited or waits for a retry starts now; otherwise only a running one restarts.
    `in_turn`: it waits until the other replicas of its name serve.
    """

    reason: str
    revive: bool = False
    in_turn: bool = False


# -- models -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Loaded(PlacementEvent):
    """A model is loaded. `device_bytes` is what the engine measured; empty: unknown."""

    device_bytes: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class LoadFailed(PlacementEvent):
    message: str
    recoverable: bool = True


@dataclass(frozen=True, slots=True)
class LoadProgress(PlacementEvent):
    """The model is still being made for its server (copied, quantised): the load's deadline is counted again from now."""

    phase: str


@dataclass(frozen=True, slots=True)
class ModelRequirementsChanged(ModelEvent):
    """The missing files or volumes of a model on a server; empty: all are available."""

    missing: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Unloaded(PlacementEvent):
    pass


@dataclass(frozen=True, slots=True)
class UnloadFailed(PlacementEvent):
    message: str


@dataclass(frozen=True, slots=True)
class SleepSeen(PlacementEvent):
    """Answer to Sleep, Wake and CheckSleep. Any other state than the requested one is a failure, explained by `message`."""

    state: SleepState
    message: str = ""


@dataclass(frozen=True, slots=True)
class ResidentsObserved(Event):
    """The models that a many-model server reports, by their name in the fleet. Models not in it are unloaded."""

    process: str
    generation: int
    device_bytes: Mapping[str, Mapping[str, int]] = field(default_factory=dict)

    def names(self) -> tuple[str, ...]:
        return (self.process,)


# -- requests -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class RequestArrived(Event):
    """A client wants `model`. Answered by exactly one Grant or Reject, unless RequestCancelled comes first."""

    request_id: int
    model: str
    avoid: tuple[str, ...] = ()  # processes that already failed this request

    def names(self) -> tuple[str, ...]:
        return (self.model,)


@dataclass(frozen=True, slots=True)
class RequestCancelled(Event):
    """The client left before a grant (after a grant: RequestFinished). `others` left at the same moment."""

    request_id: int
    others: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class RequestFinished(Event):
    """A granted request is over. `failed` is True when the upstream broke it; `refused` is the reason if no connection was possible."""

    request_id: int
    failed: bool = False
    refused: str = ""


# -- the operator -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class StartRequested(ProcessEvent):
    pass


@dataclass(frozen=True, slots=True)
class StopRequested(ProcessEvent):
    """Durable until StartRequested."""


@dataclass(frozen=True, slots=True)
class RestartRequested(ProcessEvent):
    pass


@dataclass(frozen=True, slots=True)
class DrainRequested(ProcessEvent):
    """Take a process out of routing; requests in flight continue."""

    drain: bool = True


@dataclass(frozen=True, slots=True)
class LoadRequested(ModelEvent):
    """Queue a load as `request_id` (unique, as for requests); a Reject of that id reports that it failed."""

    request_id: int


@dataclass(frozen=True, slots=True)
class UnloadRequested(ModelEvent):
    pass


@dataclass(frozen=True, slots=True)
class PinRequested(ModelEvent):
    pin: bool = True


@dataclass(frozen=True, slots=True)
class ShutdownRequested(Event):
    """Drain, then stop everything in reverse order of dependency. `force`: no drain, no grace."""

    force: bool = False
