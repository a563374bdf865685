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
    """A live, verified child of an earlier daemon, which continues its generation."""

    pid: int
    age_s: float = 0.0


@dataclass(frozen=True, slots=True)
class SpecChanged(Event):
    """The desired fleet, at start and after every change of the configuration.

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
    """Nothing runs. `recoverable` False: only a changed file or machine helps."""

    message: str
    recoverable: bool = True


@dataclass(frozen=True, slots=True)
class Exited(RunEvent):
    """The leader is dead. Descendants may live: the core orders a sweep."""

    report: ExitReport


@dataclass(frozen=True, slots=True)
class SetEmpty(RunEvent):
    """Answer to Stop and Sweep: the set is empty, its port and memory are free.

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
    """The engine still downloads, compiles or loads: the start deadline is renewed."""

    phase: str


@dataclass(frozen=True, slots=True)
class ProcessPrerequisitesChanged(ProcessEvent):
    """The missing paths or volumes of a process; empty: all are available."""

    missing: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class MemorySampled(RunEvent):
    """Resident bytes of the process set, and its bytes per device where known."""

    rss_bytes: int
    device_bytes: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class RestartDue(ProcessEvent):
    """A schedule, watched file or other trigger asks for a restart; no death.

    `revive`: a process that failed, exited or waits for a retry starts now; otherwise only a running one restarts.
    `in_turn`: it waits until the other replicas of its name serve.
    """

    reason: str
    revive: bool = False
    in_turn: bool = False


@dataclass(frozen=True, slots=True)
class StartDue(ProcessEvent):
    """A schedule asks for a start: a process that has ended starts now; one that runs or that an operator stopped does not."""

    reason: str


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
    """The model is still being built for its server: the load deadline is renewed."""

    phase: str


@dataclass(frozen=True, slots=True)
class ModelPrerequisitesChanged(ModelEvent):
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
    """Answer to Sleep, Wake and CheckSleep; an unrequested state is a failure."""

    state: SleepState
    message: str = ""


@dataclass(frozen=True, slots=True)
class ResidentsObserved(Event):
    """The models that a server reports, by fleet name; others are unloaded."""

    process: str
    generation: int
    device_bytes: Mapping[str, Mapping[str, int]] = field(default_factory=dict)

    def names(self) -> tuple[str, ...]:
        return (self.process,)


# -- requests -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class RequestArrived(Event):
    """A client requests `model`; one Grant or Reject follows, unless cancelled."""

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
    """A granted request is over.

    `failed`: the upstream broke it; `refused`: why no connection was possible.
    """

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
    """Queue a load as the unique `request_id`; a Reject of it reports a failure."""

    request_id: int


@dataclass(frozen=True, slots=True)
class UnloadRequested(ModelEvent):
    pass


@dataclass(frozen=True, slots=True)
class PinRequested(ModelEvent):
    pin: bool = True


@dataclass(frozen=True, slots=True)
class ShutdownRequested(Event):
    """Drain, then stop all in reverse dependency order. `force`: at once, no grace."""

    force: bool = False
