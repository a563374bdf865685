"""The machine: events in, commands out.

The rules of this file
- `handle(event, now)` is the only way in, `next_deadline()` the only wish for time. No clock, no random source, no I/O.
- An event changes facts (`intake`); then supervision, residency and admission reconcile, until nothing more is decided.
- Warm requests take a short cut that gives the same answer: `take` and `give`, which `handle` uses too.
- Handling the same facts twice gives no new command.
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
    """The whole of the decisions. Not thread-safe: one owner."""

    def __init__(self, spec: FleetSpec, rng: Random, journal: Journal | None = None) -> None:
        self.state = FleetState(rng=rng, journal=journal or Journal())
        self.supervisor = ProcessSupervisor(self.state)
        self.loader = ModelLoader(self.state)
        self.admission = Admission(self.state, self.loader)
        self.change = SpecUpdate(self.state, self.supervisor, self.loader)
        self.queries = FleetQueries(self.state, self.supervisor)
        self._handlers = EventHandlers(self.state, self.supervisor, self.loader, self.admission, self.change)
        self._now = 0.0  # when facts were last reconciled
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
        """Take in one fact at monotonic time `now`; return what is to be done, in order.

        Raises InvalidTransition (a bug) with the story of its subject.
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
        """Do what RequestArrived does, where it is a Grant at once, without the price of an event and a command.

        Returns the placement that was granted; None: nothing was done, hand in the event.
        """
        return None if self.state.journal.keep_all else self.admission.take(request_id, model, now)

    def give(self, request_id: int, now: float) -> bool:
        """Do what RequestFinished does, where no command follows. False: nothing was done, hand in the event."""
        return not self.state.journal.keep_all and self._finish_warm(request_id, now)

    def _warm(self, event: Event, now: float, commands: list[Command]) -> list[Command]:
        """What took the short cut is entered only in a journal that keeps everything."""
        if self.state.journal.keep_all:
            self.state.journal.record(now, event, commands)
        return commands

    def _finish_warm(self, request_id: int, now: float) -> bool:
        """Give back a slot that nobody waits for: it frees no memory, so what is due to be loaded has no more room than before.

        The only deadline it can bring nearer is its own idle time.
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
        """Run all three until none of them says anything new."""
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
            raise FleetError(f"the machine does not settle: {state.journal.pending()[-8:]}")
        self.change.sweep_models()
        if state.shutting_down and not state.finished and not state.queue and state.all_rest():
            state.finished = True
            left = [process.name for process in state.processes.values() if process.survivors]
            what = "nothing of the fleet runs any more"
            state.emit(Finished(f"{what}, but for what cannot be killed: {', '.join(left)}" if left else what))

    def next_deadline(self) -> float | None:
        """Return the monotonic time at which a Tick may change something; None: never, as things stand.

        What is past was acted on when facts were last reconciled, or waits for an event: it never asks for a Tick.
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
