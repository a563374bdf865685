"""The states of processes and models, and all moves between them.

Invariants:
- A move that the tables do not have raises InvalidTransition.
- A state changes only through `Process.move` and `Placement.move`.
- A *process* and a *loaded model* differ: a `Placement` is one model on one process, the unit of residency, of memory
  reservation and of requests in flight.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from fleetd.core.data.specs import ExitReport, Footprint, FootprintSource, ModelSpec, ProcessSpec
from fleetd.core.processes.health import Verdict
from fleetd.core.processes.restart_policy import RestartRecord
from fleetd.errors import InvalidTransition


class ProcessState(StrEnum):
    STOPPED = "STOPPED"
    STARTING = "STARTING"
    READY = "READY"
    UNHEALTHY = "UNHEALTHY"
    DRAINING = "DRAINING"
    STOPPING = "STOPPING"
    BACKOFF = "BACKOFF"
    EXITED = "EXITED"
    FAILED = "FAILED"
    BLOCKED = "BLOCKED"


class Residency(StrEnum):
    ABSENT = "ABSENT"
    LOADING = "LOADING"
    LOADED = "LOADED"
    ASLEEP = "ASLEEP"
    UNLOADING = "UNLOADING"
    FAILED = "FAILED"


class SleepStep(StrEnum):
    """The step of a sleep that is under way or due on a placement."""

    SLEEP = "sleep"  # while LOADED: no new grants, asleep once idle and its lane is free
    WAKE = "wake"  # while LOADING
    CHECK = "check"  # while LOADING: an adopted engine may be asleep


_S = ProcessState
PROCESS_MOVES: Mapping[ProcessState, frozenset[ProcessState]] = {
    _S.STOPPED: frozenset({_S.STARTING, _S.BLOCKED, _S.FAILED}),
    _S.BLOCKED: frozenset({_S.STARTING, _S.STOPPED, _S.FAILED}),
    _S.STARTING: frozenset({_S.READY, _S.STOPPING, _S.STOPPED, _S.BACKOFF, _S.FAILED}),
    _S.READY: frozenset({_S.UNHEALTHY, _S.DRAINING, _S.STOPPING}),
    _S.UNHEALTHY: frozenset({_S.READY, _S.DRAINING, _S.STOPPING}),
    _S.DRAINING: frozenset({_S.READY, _S.UNHEALTHY, _S.STOPPING}),
    _S.STOPPING: frozenset({_S.STOPPED, _S.BACKOFF, _S.EXITED, _S.FAILED}),
    _S.BACKOFF: frozenset({_S.STARTING, _S.BLOCKED, _S.STOPPED, _S.FAILED}),
    _S.EXITED: frozenset({_S.STOPPED}),
    _S.FAILED: frozenset({_S.STOPPED, _S.STOPPING}),  # STOPPING: survivors are swept again
}
_R = Residency
RESIDENCY_MOVES: Mapping[Residency, frozenset[Residency]] = {
    _R.ABSENT: frozenset({_R.LOADING, _R.FAILED}),
    _R.LOADING: frozenset({_R.LOADED, _R.ASLEEP, _R.UNLOADING, _R.ABSENT, _R.FAILED}),
    _R.LOADED: frozenset({_R.ASLEEP, _R.UNLOADING, _R.LOADING, _R.ABSENT}),
    _R.ASLEEP: frozenset({_R.LOADING, _R.UNLOADING, _R.ABSENT}),
    _R.UNLOADING: frozenset({_R.ABSENT, _R.LOADED}),
    _R.FAILED: frozenset({_R.ABSENT, _R.LOADING}),
}

RUNNING = frozenset({_S.STARTING, _S.READY, _S.UNHEALTHY, _S.DRAINING, _S.STOPPING})  # a process set may exist
RESTING = frozenset({_S.STOPPED, _S.EXITED, _S.FAILED, _S.BLOCKED, _S.BACKOFF})  # no process of it runs
SERVING = frozenset({_S.READY, _S.UNHEALTHY, _S.DRAINING})


@dataclass(slots=True)
class Process:
    """One process: its observed state, and what is requested of it."""

    spec: ProcessSpec
    state: ProcessState = ProcessState.STOPPED
    reason: str = "not started yet"
    generation: int = 0
    pid: int | None = None
    spawned: bool = False  # Spawned (or Adopted) was seen for this generation
    since_s: float = 0.0  # when the state was entered
    started_s: float = 0.0  # when this generation was started
    ready_s: float | None = None  # when this generation became READY first
    progress_s: float = 0.0  # start of the start deadline
    phase: str = ""  # phase of the start, as its engine reports it
    startup_detail: str = ""  # last detail of the startup probe
    restarts: int = 0
    record: RestartRecord = field(default_factory=RestartRecord)
    next_start_s: float | None = None
    startup_done: bool = False
    readiness: Verdict = field(default_factory=Verdict)
    liveness: Verdict = field(default_factory=Verdict)
    missing: tuple[str, ...] = ()
    survivors: tuple[
        int, ...
    ] = ()  # PIDs of its set that cannot be killed: its memory is not free, and nothing may start
    last_exit: ExitReport | None = None
    last_exit_s: float | None = None
    rss_bytes: int = 0
    memory_strikes: int = 0
    # requests
    stopped: bool = False  # an operator stopped it; persisted
    start_requested: bool = False  # an operator started this on-demand process; no model needs it
    removed: bool = False  # no longer in the configuration
    restart_wanted: str | None = None  # restart once drained, and why
    leave_s: float | None = None  # since when it drains to stop
    drained: bool = False  # an operator took it out of routing
    outcome: ExitReport | None = None  # the death to count once the set is empty; None: a requested stop
    crash: ExitReport | None = None  # how its last run died; None: it ended on request, or runs again
    crash_s: float = 0.0  # when it died
    paused: bool = False  # the last failed probe found it stopped by a signal (SIGSTOP)
    impossible: bool = False  # FAILED only because a dependency cannot come
    again: bool = False  # the next start counts as a restart

    @property
    def name(self) -> str:
        return self.spec.name

    @property
    def empty(self) -> bool:
        """Return whether nothing of its set lives, so that its memory is free."""
        return self.state in RESTING and not self.survivors

    def request_restart(self, reason: str) -> None:
        """Want a restart once it has drained; an earlier reason stays."""
        self.restart_wanted = self.restart_wanted or reason

    def cancel_restart(self) -> None:
        self.restart_wanted = None

    def move(self, state: ProcessState, now: float, reason: str) -> None:
        """Enter `state`. Raises InvalidTransition if the table does not have the move."""
        if state not in PROCESS_MOVES[self.state]:
            raise InvalidTransition(f"process {self.name}", self.state, state, (f"wanted because: {reason}",))
        self.state, self.reason, self.since_s = state, reason, now
        if state in RESTING:
            self.pid, self.spawned = None, False


@dataclass(slots=True)
class Placement:
    """One model on one process."""

    model: str
    process: str
    state: Residency = Residency.ABSENT
    footprint_hash: str = ""  # of the options that it was placed with
    generation: int = 0  # of the process; a load of an older one is void
    reason: str = ""
    since_s: float = 0.0
    order_s: float = 0.0  # when the load was decided on
    ordered: bool = False  # a command was sent and its answer is awaited
    ordered_s: float = 0.0  # when it was sent
    for_request: bool = False  # started for a request or an operator
    loaded_s: float | None = None
    in_flight: int = 0
    last_used_s: float = 0.0
    closing: str | None = None  # no new grants; unload when idle
    evicted: bool = False  # it leaves to make room
    returns: bool = True  # it is loaded again if the configuration keeps it in memory
    attempts: int = 0  # failed unloads in a row
    retry_s: float = 0.0  # no new unload before
    waits: str = ""  # the start on its lane that its load or unload waits for
    step: SleepStep | None = None
    slept: bool = False  # it slept in this run of its process and keeps the host memory that this took
    lingers: bool = False  # its load failed: removed at retry_s, unless its server dies first

    @property
    def key(self) -> tuple[str, str]:
        return (self.model, self.process)

    @property
    def sleeps(self) -> bool:
        """Return whether its engine may be asleep."""
        return self.state is Residency.ASLEEP or self.step is not None

    def move(self, state: Residency, now: float, reason: str) -> None:
        if state not in RESIDENCY_MOVES[self.state]:
            raise InvalidTransition(
                f"model {self.model} on {self.process}", self.state, state, (f"wanted because: {reason}",)
            )
        self.state, self.reason, self.since_s, self.ordered, self.step = state, reason, now, False, None


@dataclass(slots=True)
class Model:
    """One model: its spec, its placements and its counters."""

    spec: ModelSpec
    placements: dict[str, Placement] = field(default_factory=dict)  # by process; ABSENT ones are not kept
    pinned_by_operator: bool | None = None
    missing: tuple[str, ...] = ()  # missing files or volumes that it is loaded from
    waiting: int = 0
    loads: int = 0
    evictions: int = 0
    sleeps: int = 0
    wakes: int = 0
    load_s: float | None = None  # the last load
    wake_s: float | None = None  # the last wake
    sleepless_until_s: float = 0.0  # a sleep or a wake failed: it is unloaded, not put to sleep, until then
    demand: float = 0.0  # decayed count of requests
    demand_s: float = 0.0
    last_used_s: float | None = None
    failure: str | None = None  # why the last load failed
    failure_s: float = 0.0
    failure_final: bool = False
    retry_s: float = 0.0  # no new load before
    failures: int = 0
    learned: dict[str, int] = field(default_factory=dict)
    learned_asleep: dict[str, int] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.spec.name

    @property
    def pinned(self) -> bool:
        return self.spec.pin if self.pinned_by_operator is None else self.pinned_by_operator

    @property
    def footprint(self) -> Footprint:
        """Return bytes per device: declared or measured, else learned, else estimated."""
        spec = self.spec.footprint
        if spec.source is not FootprintSource.ESTIMATED or not self.learned:
            return spec.raised(self.learned)
        return Footprint({**spec.bytes, **self.learned}, FootprintSource.LEARNED)

    @property
    def asleep(self) -> dict[str, int] | None:
        """Return the bytes per device that it uses asleep; None: it cannot sleep."""
        return None if self.spec.asleep is None else {**self.spec.asleep, **self.learned_asleep}

    @property
    def state(self) -> Residency:
        """Return the best state of all placements."""
        states = {placement.state for placement in self.placements.values()}
        for residency in (Residency.LOADED, Residency.ASLEEP, Residency.LOADING, Residency.UNLOADING):
            if residency in states:
                return residency
        return Residency.FAILED if self.failure else Residency.ABSENT

    @property
    def in_flight(self) -> int:
        return sum(placement.in_flight for placement in self.placements.values())

    def clear_failure(self, retry_s: float) -> None:
        """Forget that loads failed; the next load may start from `retry_s` on."""
        self.failure, self.failure_final, self.retry_s = None, False, retry_s

    def load_succeeded(self) -> None:
        self.clear_failure(0.0)
        self.failures = 0

    def load_failed(self, reason: str, now: float, retry_s: float, final: bool) -> None:
        """Remember a failed load; `final`: only an edit or an operator can help."""
        self.failures += 1
        self.failure, self.failure_s, self.failure_final, self.retry_s = reason, now, final, retry_s


def diagram() -> Iterator[str]:
    """Yield both tables as lines of a Mermaid diagram, shown in core/README.md."""
    tables: tuple[
        tuple[str, Mapping[ProcessState, frozenset[ProcessState]] | Mapping[Residency, frozenset[Residency]]], ...
    ] = (
        ("process", PROCESS_MOVES),
        ("residency", RESIDENCY_MOVES),
    )
    for title, table in tables:
        yield f"%% {title}"
        yield "stateDiagram-v2"
        for start, ends in table.items():
            for end in sorted(ends):
                yield f"    {start} --> {end}"
