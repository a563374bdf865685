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
from fleetd.core.data.fleet_state import Facts
from fleetd.core.data.journal import Journal
from fleetd.core.data.specs import FleetSpec
from fleetd.core.data.state import Model, Placement, Process, ProcessState, Residency
from fleetd.core.handlers import Intake
from fleetd.core.models.ledger import Ledger
from fleetd.core.models.reconcile import Residencies
from fleetd.core.models.retention import preload
from fleetd.core.processes.reconcile import Supervision
from fleetd.core.queries import FleetQueries
from fleetd.core.requests.admission import Admission
from fleetd.core.spec_update import Change
from fleetd.errors import FleetError

if TYPE_CHECKING:
    from random import Random

_ROUNDS_MAX = 64


class Fleet:
    """The whole of the decisions. Not thread-safe: one owner."""

    def __init__(self, spec: FleetSpec, rng: Random, journal: Journal | None = None) -> None:
        self.facts = Facts(rng=rng, journal=journal or Journal())
        self.supervision = Supervision(self.facts)
        self.residencies = Residencies(self.facts)
        self.admission = Admission(self.facts, self.residencies)
        self.change = Change(self.facts, self.supervision, self.residencies)
        self.queries = FleetQueries(self.facts, self.supervision)
        self._intake = Intake(self.facts, self.supervision, self.residencies, self.admission, self.change)
        self._now = 0.0  # when facts were last reconciled
        self._deadline: float | None = None
        self._deadline_known = False
        if spec.processes or spec.models or spec.devices:
            self.change.apply(SpecChanged(spec), 0.0)

    @property
    def processes(self) -> dict[str, Process]:
        return self.facts.processes

    @property
    def models(self) -> dict[str, Model]:
        return self.facts.models

    @property
    def ledger(self) -> Ledger:
        return self.facts.ledger

    @property
    def journal(self) -> Journal:
        return self.facts.journal

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
        self._intake.table[type(event)](event, now)
        self._reconcile(now)
        self._now = now
        commands, self.facts.out = self.facts.out, []
        self.facts.journal.record(now, event, commands)
        self._deadline_known = False
        return commands

    def take(self, request_id: int, model: str, now: float) -> Placement | None:
        """Do what RequestArrived does, where it is a Grant at once, without the price of an event and a command.

        Returns the placement that was granted; None: nothing was done, hand in the event.
        """
        return None if self.facts.journal.keep_all else self.admission.take(request_id, model, now)

    def give(self, request_id: int, now: float) -> bool:
        """Do what RequestFinished does, where no command follows. False: nothing was done, hand in the event."""
        return not self.facts.journal.keep_all and self._finish_warm(request_id, now)

    def _warm(self, event: Event, now: float, commands: list[Command]) -> list[Command]:
        """What took the short cut is entered only in a journal that keeps everything."""
        if self.facts.journal.keep_all:
            self.facts.journal.record(now, event, commands)
        return commands

    def _finish_warm(self, request_id: int, now: float) -> bool:
        """Give back a slot that nobody waits for: it frees no memory, so what is due to be loaded has no more room than before.

        The only deadline it can bring nearer is its own idle time.
        """
        facts = self.facts
        entry = facts.granted.get(request_id)
        if entry is None or facts.queue or facts.shutting_down:
            return entry is None
        placement = entry[0]
        process = facts.processes.get(placement.process)
        if (
            placement.closing
            or process is None
            or process.state is not ProcessState.READY
            or process.restart_wanted
            or facts.ledger.over
        ):
            return False
        self.admission.finish(request_id, now)
        if self._deadline_known and not placement.in_flight:
            idle = self.residencies.ttl_deadline(placement) if placement.state is Residency.LOADED else None
            if idle is not None and (self._deadline is None or idle < self._deadline):
                self._deadline = idle
        return True

    def _reconcile(self, now: float) -> None:
        """Run all three until none of them says anything new."""
        facts = self.facts
        for _ in range(_ROUNDS_MAX):
            before = (len(facts.out), facts.journal.noted)
            self.supervision.reconcile(now)
            self.residencies.reconcile(now)
            self.admission.reconcile(now)
            preload(facts, self.residencies, now)
            if (len(facts.out), facts.journal.noted) == before:
                break
        else:
            raise FleetError(f"the machine does not settle: {facts.journal.pending()[-8:]}")
        self.change.sweep_models()
        if facts.shutting_down and not facts.finished and not facts.queue and facts.all_rest():
            facts.finished = True
            left = [process.name for process in facts.processes.values() if process.survivors]
            what = "nothing of the fleet runs any more"
            facts.emit(Finished(f"{what}, but for what cannot be killed: {', '.join(left)}" if left else what))

    def next_deadline(self) -> float | None:
        """Return the monotonic time at which a Tick may change something; None: never, as things stand.

        What is past was acted on when facts were last reconciled, or waits for an event: it never asks for a Tick.
        """
        if not self._deadline_known:
            times = (time for time in self._deadlines() if time > self._now)
            self._deadline, self._deadline_known = min(times, default=None), True
        return self._deadline

    def _deadlines(self) -> list[float]:
        facts = self.facts
        times = [time for name in facts.awake for time in self.supervision.deadlines(facts.processes[name])]
        for model in facts.resident().values():
            for placement in model.placements.values():
                times.extend(self.residencies.deadlines(placement))
        times.extend(facts.models[name].retry_s for name in facts.due if facts.models[name].retry_s)
        times.extend(self.admission.deadlines())
        times.extend(facts.unseen.values())
        return times
