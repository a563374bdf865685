"""Apply the requests of an operator: start, stop, restart, drain, load, unload, pin, shut down.

Invariants:
- A request is recorded in the state; reconciliation draws the conclusions, as for any event.
- A start or a stop is persisted at once: it survives a restart of the daemon.
- A start by an operator resets the counters of deaths and failed loads.
"""

from __future__ import annotations

from fleetd.core.data import events as e
from fleetd.core.data.fleet_state import FleetState
from fleetd.core.data.journal import PinChanged
from fleetd.core.data.state import SERVING, ProcessState, Residency
from fleetd.core.models.reconcile import ModelLoader
from fleetd.core.models.retention import cancel_preload, due
from fleetd.core.processes.reconcile import ProcessSupervisor
from fleetd.core.requests.admission import Admission


class OperatorHandlers:
    def __init__(
        self, state: FleetState, supervisor: ProcessSupervisor, loader: ModelLoader, admission: Admission
    ) -> None:
        self.state, self.supervisor = state, supervisor
        self.loader, self.admission = loader, admission

    def start_requested(self, event: e.StartRequested, now: float) -> None:
        process = self.state.processes.get(event.name)
        if process is None:
            return
        process.stopped = process.drained = False
        process.start_requested = process.spec.on_demand and process.spec.own_model is None
        process.record.reset()
        if process.state in (ProcessState.FAILED, ProcessState.EXITED):
            self.supervisor.termination.revive(process, now, "started by an operator")
        elif process.state is ProcessState.BACKOFF:
            process.next_start_s = now
        self.loader.forgive(process.name, now)
        own = self.state.models.get(process.spec.own_model or "")
        if own is not None and own.state not in (Residency.LOADED, Residency.LOADING):
            due(self.state, own)
        self.state.wake(event.name)
        self.state.persist(process, "started by an operator")

    def stop_requested(self, event: e.StopRequested, now: float) -> None:
        process = self.state.processes.get(event.name)
        if process is None:
            return
        process.stopped, process.start_requested = True, False
        if process.spec.own_model is not None:
            cancel_preload(self.state, process.spec.own_model)
        ended = process.state in (ProcessState.FAILED, ProcessState.EXITED)
        if ended and not process.survivors:
            self.supervisor.termination.revive(process, now, "stopped by an operator")
        process.cancel_restart()
        self.state.wake(event.name)
        self.state.persist(process, "stopped by an operator")

    def restart_requested(self, event: e.RestartRequested, now: float) -> None:
        process = self.state.processes.get(event.name)
        if process is None:
            return
        if process.state in SERVING or process.state is ProcessState.STARTING:
            process.cancel_restart()
            process.request_restart("restarted by an operator")
            own = self.state.models.get(process.spec.own_model or "")
            if own is not None and own.state is Residency.ASLEEP:
                due(self.state, own)  # no memory is reserved to start a sleeper: it is loaded once there is room
        elif process.state is ProcessState.STOPPING:
            self.supervisor.termination.restart_after_stop(process, "restarted by an operator")
        else:
            self.start_requested(e.StartRequested(event.name), now)
            return
        process.stopped = process.drained = False
        process.record.reset()
        self.loader.forgive(process.name, now)
        self.state.wake(event.name)
        self.state.persist(process, "restarted by an operator")

    def drain_requested(self, event: e.DrainRequested, _now: float) -> None:
        process = self.state.processes.get(event.name)
        if process is not None:
            process.drained = event.drain
            self.state.wake(event.name)

    def load_requested(self, event: e.LoadRequested, now: float) -> None:
        self.admission.request_load(event, now)

    def unload_requested(self, event: e.UnloadRequested, now: float) -> None:
        model = self.state.models.get(self.state.names.get(event.model, event.model))
        if model is None:
            return
        cancel_preload(self.state, model.name)
        self.admission.queue.withdraw(model, "unloaded by an operator")
        for placement in list(model.placements.values()):
            self.loader.leave(placement, now, "unloaded by an operator")

    def pin_requested(self, event: e.PinRequested, _now: float) -> None:
        model = self.state.models.get(self.state.names.get(event.model, event.model))
        if model is not None:
            model.pinned_by_operator = event.pin
            for placement in model.placements.values() if event.pin else ():
                self.loader.sleeping.call_off(placement, "pinned by an operator")
            self.state.journal.note(PinChanged(model.name, event.pin))

    def shutdown_requested(self, event: e.ShutdownRequested, _now: float) -> None:
        if event.force and not self.state.forced:
            self.state.forced = True
            self.supervisor.termination.escalate()
        self.state.shutting_down = True
        for name, process in self.state.processes.items():
            self.state.wake(name)
            if process.state is ProcessState.EXITED:
                self.state.persist(process, "shutting down")
