"""What an operator asks, and what it changes.

The rules of this file
- A wish is written down as a fact; reconciliation draws the conclusions, as from any other event.
- A wish that must survive a restart of the daemon (start, stop) is persisted at once.
- A person who starts something gives it a new chance: counters of deaths and failed loads begin again.
"""

from __future__ import annotations

from fleetd.core.data import events as e
from fleetd.core.data.fleet_state import Facts
from fleetd.core.data.journal import PinChanged
from fleetd.core.data.state import SERVING, ProcessState, Residency
from fleetd.core.models.reconcile import Residencies
from fleetd.core.models.retention import due
from fleetd.core.processes.reconcile import Supervision
from fleetd.core.requests.admission import Admission


class Orders:
    def __init__(self, facts: Facts, supervision: Supervision, residencies: Residencies, admission: Admission) -> None:
        self.facts, self.supervision = facts, supervision
        self.residencies, self.admission = residencies, admission

    def start_asked(self, event: e.StartAsked, now: float) -> None:
        process = self.facts.processes.get(event.name)
        if process is None:
            return
        process.stopped = process.drained = False
        process.asked = process.spec.on_demand and process.spec.own_model is None
        process.record.reset()
        if process.state in (ProcessState.FAILED, ProcessState.EXITED):
            self.supervision.ending.revive(process, now, "started by an operator")
        elif process.state is ProcessState.BACKOFF:
            process.next_start_s = now
        self.residencies.forgive(process.name, now)
        own = self.facts.models.get(process.spec.own_model or "")
        if own is not None and own.state not in (Residency.LOADED, Residency.LOADING):
            due(self.facts, own)
        self.facts.wake(event.name)
        self.facts.persist(process, "started by an operator")

    def stop_asked(self, event: e.StopAsked, now: float) -> None:
        process = self.facts.processes.get(event.name)
        if process is None:
            return
        process.stopped, process.asked = True, False
        if process.spec.own_model is not None:
            self.facts.due.discard(process.spec.own_model)
        ended = process.state in (ProcessState.FAILED, ProcessState.EXITED)
        if ended and not process.survivors:
            self.supervision.ending.revive(process, now, "stopped by an operator")
        process.restart_wanted = None
        self.facts.wake(event.name)
        self.facts.persist(process, "stopped by an operator")

    def restart_asked(self, event: e.RestartAsked, now: float) -> None:
        process = self.facts.processes.get(event.name)
        if process is None:
            return
        if process.state in SERVING or process.state is ProcessState.STARTING:
            process.restart_wanted = "restarted by an operator"
            own = self.facts.models.get(process.spec.own_model or "")
            if own is not None and own.state is Residency.ASLEEP:
                due(self.facts, own)  # a sleeper has no room reserved to be started in: it comes when there is
        elif process.state is ProcessState.STOPPING:
            process.outcome, process.restart_wanted = None, "restarted by an operator"
        else:
            self.start_asked(e.StartAsked(event.name), now)
            return
        process.stopped = process.drained = False
        process.record.reset()
        self.residencies.forgive(process.name, now)
        self.facts.wake(event.name)
        self.facts.persist(process, "restarted by an operator")

    def drain_asked(self, event: e.DrainAsked, _now: float) -> None:
        process = self.facts.processes.get(event.name)
        if process is not None:
            process.drained = event.drain
            self.facts.wake(event.name)

    def load_asked(self, event: e.LoadAsked, now: float) -> None:
        self.admission.wish(event, now)

    def unload_asked(self, event: e.UnloadAsked, now: float) -> None:
        model = self.facts.models.get(self.facts.names.get(event.model, event.model))
        if model is None:
            return
        model.preload_due = False
        self.facts.due.discard(model.name)
        self.admission.line.withdraw(model, "unloaded by an operator")
        for placement in list(model.placements.values()):
            self.residencies.leave(placement, now, "unloaded by an operator")

    def pin_asked(self, event: e.PinAsked, _now: float) -> None:
        model = self.facts.models.get(self.facts.names.get(event.model, event.model))
        if model is not None:
            model.pinned_by_hand = event.pin
            for placement in model.placements.values() if event.pin else ():
                self.residencies.sleeping.call_off(placement, "pinned by an operator")
            self.facts.journal.note(PinChanged(model.name, event.pin))

    def shutdown_asked(self, event: e.ShutdownAsked, _now: float) -> None:
        if event.force and not self.facts.forced:
            self.facts.forced = True
            self.supervision.ending.escalate()
        self.facts.shutting_down = True
        for name, process in self.facts.processes.items():
            self.facts.wake(name)
            if process.state is ProcessState.EXITED:
                self.facts.persist(process, "shutting down")
