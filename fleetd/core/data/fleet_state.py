"""The state that all parts of the core share, and the list of commands that they emit.

Invariants:
- One `FleetState` per fleet; only the core writes to it, inside `Fleet.handle`.
- `awake` names the processes that reconciliation visits; idle on-demand processes cost nothing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from fleetd.core.data.commands import Command, Persist
from fleetd.core.data.journal import Journal, LaneWait, ProcessForgotten, StateChanged, Subject
from fleetd.core.data.specs import FleetSpec, ProcessSpec, Remembered
from fleetd.core.data.state import RESTING, Model, Placement, Process, ProcessState, Residency
from fleetd.core.models.ledger import Ledger
from fleetd.errors import InvalidTransition

if TYPE_CHECKING:
    from random import Random


@dataclass(slots=True)
class QueuedRequest:
    """One waiting request, or (client False) a load that an operator requested."""

    request_id: int
    model: str
    arrived_s: float
    deadline_s: float
    priority: int = 0
    avoid: tuple[str, ...] = ()
    fallback: tuple[str, ...] = ()
    client: bool = True
    load_began_s: float | None = None
    reason: str = "arrived"
    overdue: bool = False  # has waited for the fairness bound
    closes: frozenset[tuple[str, str]] = (
        frozenset()
    )  # drain for it: chosen once, so that time alone does not change them


@dataclass(slots=True)
class FleetState:
    rng: Random
    spec: FleetSpec = field(default_factory=FleetSpec)
    processes: dict[str, Process] = field(default_factory=dict)
    models: dict[str, Model] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)  # model names and aliases to model names
    ledger: Ledger = field(default_factory=Ledger)
    journal: Journal = field(default_factory=Journal)
    queue: dict[int, QueuedRequest] = field(default_factory=dict)  # by request id, in order of arrival
    granted: dict[int, tuple[Placement, float]] = field(
        default_factory=dict
    )  # request id to placement and time of grant
    placed: dict[str, set[str]] = field(default_factory=dict)  # process to models placed on it
    hosted: dict[str, tuple[str, ...]] = field(default_factory=dict)  # process to models that may be on it
    freed: dict[tuple[str, str], float] = field(default_factory=dict)  # when a placement's memory was last seen free
    unobserved: dict[str, float] = field(
        default_factory=dict
    )  # adopted servers whose models are unknown, and until when to wait
    retired: dict[str, int] = field(default_factory=dict)  # last generation of forgotten processes
    leaving: set[str] = field(default_factory=set)  # models that left the configuration
    awake: set[str] = field(default_factory=set)
    rolling: dict[str, str] = field(default_factory=dict)  # processes that wait for a rolling restart, and why
    due: set[str] = field(default_factory=set)  # models whose preload is due
    out: list[Command] = field(default_factory=list)
    draining: set[tuple[str, str]] = field(default_factory=set)  # placements without new grants, for an overdue request
    claimed: set[str] = field(default_factory=set)  # devices on which a waiting request needs room
    shutting_down: bool = False
    forced: bool = False
    finished: bool = False

    def emit(self, command: Command) -> None:
        self.out.append(command)

    def waits_for_lane(self, placement: Placement, waits: str) -> bool:
        """Note a new reason why a placement waits for its lane; return whether it waits."""
        if waits and waits != placement.waits:
            self.journal.note(LaneWait(placement.model, waits))
        placement.waits = waits
        return bool(waits)

    def wake(self, name: str) -> None:
        if name in self.processes:
            self.awake.add(name)

    def settle(self, process: Process) -> None:
        """Stop visiting an on-demand process at rest that nothing wants."""
        spec = process.spec
        if (
            spec.on_demand
            and process.state in RESTING
            and process.state is not ProcessState.BACKOFF
            and not (process.start_requested or process.impossible or process.survivors or process.removed)
            and not self.placed.get(spec.name)
        ):
            self.awake.discard(spec.name)

    def forget(self, process: Process) -> None:
        """Drop a process that left the configuration.

        Its generation is kept, so that a late event does not match a successor of that name.
        """
        if not self.placed.get(process.name):
            self.processes.pop(process.name, None)
            self.awake.discard(process.name)
            self.retired[process.name] = process.generation
            self.journal.note(ProcessForgotten(process.name))

    def all_rest(self) -> bool:
        return all(process.state in RESTING for process in self.processes.values())

    def placements_on(self, process: str) -> Iterator[Placement]:
        for model in sorted(self.placed.get(process, ())):
            yield self.models[model].placements[process]

    def resident(self) -> dict[str, Model]:
        """Return the models that have a placement."""
        return {name: self.models[name] for names in self.placed.values() for name in names}

    def place(self, model: Model, process: str, now: float, reason: str) -> Placement:
        """Add a placement in LOADING; the caller makes its reservation."""
        placement = Placement(
            model.name, process, footprint_hash=model.spec.footprint_hash, last_used_s=now, order_s=now
        )
        self.move_placement(placement, Residency.LOADING, now, reason)
        model.placements[process] = placement
        self.placed.setdefault(process, set()).add(model.name)
        return placement

    def drop(self, placement: Placement, now: float) -> None:
        """Remove a placement and free its reservation; its memory was seen to be free."""
        model = self.models[placement.model]
        model.placements.pop(placement.process, None)
        placed = self.placed.get(placement.process)
        if placed is not None:
            placed.discard(placement.model)
            if not placed:
                del self.placed[placement.process]
        self.ledger.release(placement.key)
        self.freed[placement.key] = now
        self.wake(placement.process)

    def move(self, process: Process, state: ProcessState, now: float, reason: str) -> None:
        """Move a process and note it. Raises InvalidTransition with its last notes."""
        self.journal.note(StateChanged(process.name, Subject.PROCESS, process.state, state, reason))
        try:
            process.move(state, now, reason)
        except InvalidTransition as error:
            notes = map(repr, self.journal.notes_on(process.name)[-12:])
            raise InvalidTransition(error.subject, error.start, error.finish, tuple(notes)) from None
        self.wake(process.name)

    def move_placement(self, placement: Placement, state: Residency, now: float, reason: str) -> None:
        """Change the state of a placement and note it. Raises InvalidTransition."""
        self.note_placement(placement, state, reason)
        placement.move(state, now, reason)
        self.wake(placement.process)

    def note_placement(self, placement: Placement, state: Residency, reason: str) -> None:
        """Note that a placement enters `state`."""
        self.journal.note(
            StateChanged(placement.model, Subject.MODEL, placement.state, state, reason, placement.process)
        )

    def persist(self, process: Process, reason: str) -> None:
        """Persist the fields that outlive the daemon.

        A requested shutdown also resets exited processes: the next daemon starts them again.
        """
        kept = process.state is ProcessState.EXITED and not self.shutting_down
        over = kept or process.state is ProcessState.FAILED
        self.emit(
            Persist(
                process.name,
                Remembered(
                    stopped=process.stopped,
                    restarts=process.restarts,
                    deaths=process.record.deaths,
                    died_s=process.record.last(process.spec.restart.crash_loop.count),
                    slow=process.record.slow,
                    failed=process.reason if process.state is ProcessState.FAILED else None,
                    generation=process.generation,
                    exited=process.reason if kept else None,
                    code=process.last_exit.code if kept and process.last_exit is not None else None,
                    again=process.again or process.state is ProcessState.BACKOFF,
                    last_exit=replace(process.last_exit, log_tail=()) if process.last_exit is not None else None,
                    last_exit_s=process.last_exit_s,
                    spec_hash=spec_hash(process.spec) if over else "",
                ),
                reason,
            )
        )


def spec_hash(spec: ProcessSpec) -> str:
    """Return a hash of all fields of a spec, equal across runs of the program."""
    return hashlib.sha256(repr(spec).encode()).hexdigest()[:16]
