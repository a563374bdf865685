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


@dataclass(frozen=True, slots=True)
class Tick(Event):
    """The deadline that `next_deadline()` named has come."""


@dataclass(frozen=True, slots=True)
class Adopted(Event):
    """A live child of an earlier daemon, identity proven. Counts as the run `generation`."""

    name: str
    generation: int
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
class Spawned(Event):
    name: str
    generation: int
    pid: int


@dataclass(frozen=True, slots=True)
class SpawnFailed(Event):
    """Nothing runs. `recoverable` False means that only an edit of fleet.yaml or of the machine helps."""

    name: str
    generation: int
    message: str
    recoverable: bool = True


@dataclass(frozen=True, slots=True)
class Exited(Event):
    """The leader is dead. Descendants may live: the core orders a sweep."""

    name: str
    generation: int
    report: ExitReport


@dataclass(frozen=True, slots=True)
class SetEmpty(Event):
    """Answer to Stop and Sweep: nothing of the process set lives, its port is free, its memory is back.

    `survivors` is not empty when something could not be killed (D state): it stays visible and is not retried in a hurry.
    """

    name: str
    generation: int
    survivors: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class ProbeResult(Event):
    name: str
    generation: int
    probe: ProbeKind
    ok: bool
    detail: str = ""
    final: bool = False  # asking again cannot bring another answer: only an edit of fleet.yaml or of the machine helps


@dataclass(frozen=True, slots=True)
class StartProgress(Event):
    """The engine is still downloading, compiling or loading: the start deadline is counted again from now."""

    name: str
    generation: int
    phase: str


@dataclass(frozen=True, slots=True)
class RequirementsChanged(Event):
    """Paths or volumes that a process requires and that are absent now; empty: all there."""

    name: str
    missing: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class MemorySampled(Event):
    """Resident bytes of the whole process set (`rss_bytes`), and what it holds per device where that can be seen."""

    name: str
    generation: int
    rss_bytes: int
    device_bytes: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class RestartDue(Event):
    """Schedule, watched file or another outside reason: restart, without counting as a death.

    `revive`: what gave up, ended or waits for its next try starts now; without it only what runs is restarted.
    `in_turn`: it may wait until the other replicas of its name serve.
    """

    name: str
    reason: str
    revive: bool = False
    in_turn: bool = False


# -- models -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Loaded(Event):
    """`device_bytes` is what the engine measured, empty when it cannot tell."""

    model: str
    process: str
    generation: int
    device_bytes: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class LoadFailed(Event):
    model: str
    process: str
    generation: int
    message: str
    recoverable: bool = True


@dataclass(frozen=True, slots=True)
class LoadProgress(Event):
    """The model is still being made for its server (copied, quantised): the load's deadline is counted again from now."""

    model: str
    process: str
    generation: int
    phase: str


@dataclass(frozen=True, slots=True)
class ModelRequirementsChanged(Event):
    """What a held model is read from and that is absent now (its drive is unplugged); empty: all there."""

    model: str
    missing: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Unloaded(Event):
    model: str
    process: str
    generation: int


@dataclass(frozen=True, slots=True)
class UnloadFailed(Event):
    model: str
    process: str
    generation: int
    message: str


@dataclass(frozen=True, slots=True)
class SleepSeen(Event):
    """Answer to Sleep, Wake and LookAsleep. What is not the state that was ordered is a failure, told by `message`."""

    model: str
    process: str
    generation: int
    state: SleepState
    message: str = ""


@dataclass(frozen=True, slots=True)
class ResidentsObserved(Event):
    """What a many-model server says it holds, by model name of the fleet. Absent models are gone."""

    process: str
    generation: int
    device_bytes: Mapping[str, Mapping[str, int]] = field(default_factory=dict)


# -- requests -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class RequestArrived(Event):
    """A client wants `model`. Answered by exactly one Grant or Reject, unless RequestCancelled comes first."""

    request_id: int
    model: str
    avoid: tuple[str, ...] = ()  # processes that already failed this request


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
class StartAsked(Event):
    name: str


@dataclass(frozen=True, slots=True)
class StopAsked(Event):
    """Durable until StartAsked."""

    name: str


@dataclass(frozen=True, slots=True)
class RestartAsked(Event):
    name: str


@dataclass(frozen=True, slots=True)
class DrainAsked(Event):
    """Out of routing; in flight goes on."""

    name: str
    drain: bool = True


@dataclass(frozen=True, slots=True)
class LoadAsked(Event):
    """Joins the line as `request_id` (unique, as for requests); a Reject of that id says that it cannot be done."""

    model: str
    request_id: int


@dataclass(frozen=True, slots=True)
class UnloadAsked(Event):
    model: str


@dataclass(frozen=True, slots=True)
class PinAsked(Event):
    model: str
    pin: bool = True


@dataclass(frozen=True, slots=True)
class ShutdownAsked(Event):
    """Drain, then stop everything in reverse order of dependency. `force`: no drain, no grace."""

    force: bool = False
