"""Facts: everything that can happen to the fleet. Frozen, comparable, small.

The rules of this file
- An event says what *was seen*; it never says what to do. `Fleet.handle(event, now)` turns facts into commands.
- Whatever concerns a run of a process carries its `generation`; the core drops events of older generations.
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
    """The deadline that `next_deadline()` named has come."""


@dataclass(frozen=True, slots=True)
class Adopted(RunEvent):
    """A live child of an earlier daemon, identity proven. Counts as the run `generation`."""

    pid: int
    age_s: float = 0.0


@dataclass(frozen=True, slots=True)
class SpecChanged(Event):
    """The desired fleet: at start, and again after every applied change of the configuration.

    `remembered`, `adopted` and `died` come with the first one only; adopted processes are not spawned again. `died` are
    runs that ended while no daemon watched, nothing of whose sets lives any more.
    `missing` comes with every one, so that nothing starts before what it requires was looked at.
    """

    spec: FleetSpec
    remembered: Mapping[str, Remembered] = field(default_factory=dict)
    adopted: tuple[Adopted, ...] = ()
    missing: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # required paths that are absent, by process
    missing_models: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # the same for held models
    died: tuple[Exited, ...] = ()


# -- processes ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Spawned(RunEvent):
    pid: int


@dataclass(frozen=True, slots=True)
class SpawnFailed(RunEvent):
    """Nothing runs. `recoverable` False means that only an edit of fleet.yaml or of the machine helps."""

    message: str
    recoverable: bool = True


@dataclass(frozen=True, slots=True)
class Exited(RunEvent):
    """The leader is dead. Descendants may live: the core orders a sweep."""

    report: ExitReport


@dataclass(frozen=True, slots=True)
class SetEmpty(RunEvent):
    """Answer to Stop and Sweep: nothing of the process set lives, its port is free, its memory is back.

    `survivors` is not empty when something could not be killed (D state): it stays visible and is not retried in a hurry.
    """

    survivors: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class ProbeResult(RunEvent):
    probe: ProbeKind
    ok: bool
    detail: str = ""
    final: bool = False  # asking again cannot bring another answer: only an edit of fleet.yaml or of the machine helps


@dataclass(frozen=True, slots=True)
class StartProgress(RunEvent):
    """The engine is still downloading, compiling or loading: the start deadline is counted again from now."""

    phase: str


@dataclass(frozen=True, slots=True)
class RequirementsChanged(ProcessEvent):
    """Paths or volumes that a process requires and that are absent now; empty: all there."""

    missing: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class MemorySampled(RunEvent):
    """Resident bytes of the whole process set (`rss_bytes`), and what it holds per device where that can be seen."""

    rss_bytes: int
    device_bytes: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class RestartDue(ProcessEvent):
    """Schedule, watched file or another outside reason: restart, without counting as a death.

    `revive`: what gave up, ended or waits for its next try starts now; without it only what runs is restarted.
    `in_turn`: it may wait until the other replicas of its name serve.
    """

    reason: str
    revive: bool = False
    in_turn: bool = False


# -- models -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Loaded(PlacementEvent):
    """`device_bytes` is what the engine measured, empty when it cannot tell."""

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
    """What a held model is read from and that is absent now (its drive is unplugged); empty: all there."""

    missing: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Unloaded(PlacementEvent):
    pass


@dataclass(frozen=True, slots=True)
class UnloadFailed(PlacementEvent):
    message: str


@dataclass(frozen=True, slots=True)
class SleepSeen(PlacementEvent):
    """Answer to Sleep, Wake and LookAsleep. What is not the state that was ordered is a failure, told by `message`."""

    state: SleepState
    message: str = ""


@dataclass(frozen=True, slots=True)
class ResidentsObserved(Event):
    """What a many-model server says it holds, by model name of the fleet. Absent models are gone."""

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
    """The client left before a grant (after a grant: RequestFinished)."""

    request_id: int


@dataclass(frozen=True, slots=True)
class RequestFinished(Event):
    """A granted request is over. `failed` is True when the upstream broke it; `refused` says why there was not even a connection."""

    request_id: int
    failed: bool = False
    refused: str = ""


# -- the operator -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class StartAsked(ProcessEvent):
    pass


@dataclass(frozen=True, slots=True)
class StopAsked(ProcessEvent):
    """Durable until StartAsked."""


@dataclass(frozen=True, slots=True)
class RestartAsked(ProcessEvent):
    pass


@dataclass(frozen=True, slots=True)
class DrainAsked(ProcessEvent):
    """Out of routing; in flight goes on."""

    drain: bool = True


@dataclass(frozen=True, slots=True)
class LoadAsked(ModelEvent):
    """Joins the line as `request_id` (unique, as for requests); a Reject of that id says that it cannot be done."""

    request_id: int


@dataclass(frozen=True, slots=True)
class UnloadAsked(ModelEvent):
    pass


@dataclass(frozen=True, slots=True)
class PinAsked(ModelEvent):
    pin: bool = True


@dataclass(frozen=True, slots=True)
class ShutdownAsked(Event):
    """Drain, then stop everything in reverse order of dependency. `force`: no drain, no grace."""

    force: bool = False
