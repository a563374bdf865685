"""The core's entry point: `handle(event, now)` returns commands, `next_deadline()` the next time that matters.

Invariants:
- No clock, no random source and no I/O: time and randomness are arguments.
- An event changes the state (`handlers`); then processes, models and requests reconcile until nothing changes.
- Requests for a loaded model take a shortcut (`take`, `give`) that gives the same answer.
- The same state handled twice gives no new command.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fleetd.core.data.commands import Command, Finished, Grant
from fleetd.core.data.events import Event, RequestArrived, RequestFinished, SpecChanged
from fleetd.core.data.fleet_state import FleetState
from fleetd.core.data.journal import Journal
from fleetd.core.data.specs import FleetSpec
from fleetd.core.data.state import Model, Placement, Process, ProcessState, Residency
from fleetd.core.handlers import EventHandlers
from fleetd.core.models.ledger import Ledger
from fleetd.core.models.preload import preload
from fleetd.core.models.reconcile import ModelLoader
from fleetd.core.models.retention import ttl_deadline
from fleetd.core.processes.reconcile import ProcessSupervisor
from fleetd.core.queries import FleetQueries
from fleetd.core.requests.admission import Admission
from fleetd.core.spec_update import SpecUpdate
from fleetd.errors import FleetError

if TYPE_CHECKING:
    from random import Random

_ROUNDS_MAX = 64


class Fleet:
    """All decisions about one fleet. Not thread-safe."""

    def __init__(self, spec: FleetSpec, rng: Random, journal: Journal | None = None) -> None:
        self.state = FleetState(rng=rng, journal=journal or Journal())
        self.supervisor = ProcessSupervisor(self.state)
        self.loader = ModelLoader(self.state)
        self.admission = Admission(self.state, self.loader)
        self.change = SpecUpdate(self.state, self.supervisor, self.loader)
        self.queries = FleetQueries(self.state, self.supervisor)
        self._handlers = EventHandlers(self.state, self.supervisor, self.loader, self.admission, self.change)
        self._now = 0.0  # when the state was last reconciled
        self._deadline: float | None = None
        self._deadline_known = False
        if spec.processes or spec.models or spec.devices:
            self.change.apply(SpecChanged(spec), 0.0)

    @property
    def processes(self) -> dict[str, Process]:
        return self.state.processes

    @property
    def models(self) -> dict[str, Model]:
        return self.state.models

    @property
    def ledger(self) -> Ledger:
        return self.state.ledger

    @property
    def journal(self) -> Journal:
        return self.state.journal

    def handle(self, event: Event, now: float) -> list[Command]:
        """Handle an event at monotonic `now`; return the resulting commands in order.

        Raises InvalidTransition (a bug) with the last notes on its subject.
        """
        if type(event) is RequestArrived:
            placement = None if event.avoid else self.admission.take(event.request_id, event.model, now)
            if placement is not None:
                grant = Grant(event.request_id, placement.model, placement.process, placement.generation)
                return self._warm(event, now, [grant])
        elif type(event) is RequestFinished and not event.refused and self._finish_warm(event.request_id, now):
            return self._warm(event, now, [])
        self._handlers.table[type(event)](event, now)
        self._reconcile(now)
        self._now = now
        commands, self.state.out = self.state.out, []
        self.state.journal.record(now, event, commands)
        self._deadline_known = False
        return commands

    def take(self, request_id: int, model: str, now: float) -> Placement | None:
        """Grant a request at once, without the cost of an event and a command.

        Returns the placement; None: nothing was done, send RequestArrived.
        """
        return None if self.state.journal.keep_all else self.admission.take(request_id, model, now)

    def give(self, request_id: int, now: float) -> bool:
        """Finish a request if no command follows. False: send RequestFinished instead."""
        return not self.state.journal.keep_all and self._finish_warm(request_id, now)

    def _warm(self, event: Event, now: float, commands: list[Command]) -> list[Command]:
        """Record the shortcut in a journal that keeps everything."""
        if self.state.journal.keep_all:
            self.state.journal.record(now, event, commands)
        return commands

    def _finish_warm(self, request_id: int, now: float) -> bool:
        """Free a slot that no request waits for; it frees no memory.

        The only deadline that may become earlier is the idle time of the placement.
        """
        state = self.state
        entry = state.granted.get(request_id)
        if entry is None or state.queue or state.shutting_down:
            return entry is None
        placement = entry[0]
        process = state.processes.get(placement.process)
        if (
            placement.closing
            or process is None
            or process.state is not ProcessState.READY
            or process.restart_wanted
            or state.ledger.over
        ):
            return False
        self.admission.finish(request_id, now)
        if self._deadline_known and not placement.in_flight:
            idle = ttl_deadline(state, placement) if placement.state is Residency.LOADED else None
            if idle is not None and (self._deadline is None or idle < self._deadline):
                self._deadline = idle
        return True

    def _reconcile(self, now: float) -> None:
        """Reconcile processes, models and requests until nothing changes."""
        state = self.state
        for _ in range(_ROUNDS_MAX):
            before = (len(state.out), state.journal.noted)
            self.supervisor.reconcile(now)
            self.loader.reconcile(now)
            self.admission.reconcile(now)
            preload(state, self.loader, now)
            if (len(state.out), state.journal.noted) == before:
                break
        else:
            raise FleetError(f"the fleet does not settle: {state.journal.pending()[-8:]}")
        self.change.sweep_models()
        if state.shutting_down and not state.finished and not state.queue and state.all_rest():
            state.finished = True
            left = [process.name for process in state.processes.values() if process.survivors]
            what = "all processes stopped"
            state.emit(Finished(f"{what}, except those that cannot be killed: {', '.join(left)}" if left else what))

    def next_deadline(self) -> float | None:
        """Return the monotonic time of the next useful Tick; None: no such time.

        Past times were handled at the last reconciliation, or wait for an event: they need no Tick.
        """
        if not self._deadline_known:
            times = (time for time in self._deadlines() if time > self._now)
            self._deadline, self._deadline_known = min(times, default=None), True
        return self._deadline

    def _deadlines(self) -> list[float]:
        state = self.state
        times = [time for name in state.awake for time in self.supervisor.deadlines(state.processes[name])]
        for model in state.resident().values():
            for placement in model.placements.values():
                times.extend(self.loader.deadlines(placement))
        times.extend(state.models[name].retry_s for name in state.due if state.models[name].retry_s)
        times.extend(self.admission.deadlines())
        times.extend(state.unobserved.values())
        return times
