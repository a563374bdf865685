"""Apply each event to the state, one small function per event type.

Invariants:
- A handler changes the state; `reconcile` draws the conclusions.
- An event of an older generation, or about something unknown, changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fleetd.core.data import events as e
from fleetd.core.data.fleet_state import FleetState
from fleetd.core.data.journal import PrerequisitesChanged, StartPhaseChanged, Subject
from fleetd.core.data.specs import ExitKind, ExitReport, ProbeKind
from fleetd.core.data.state import SERVING, Placement, Process, ProcessState, Residency
from fleetd.core.models.candidates import in_sleep_transition
from fleetd.core.models.measurement import learn, learn_asleep
from fleetd.core.models.reconcile import ModelLoader
from fleetd.core.operator_handlers import OperatorHandlers
from fleetd.core.processes.reconcile import ProcessSupervisor
from fleetd.core.requests.admission import Admission
from fleetd.core.spec_update import SpecUpdate
from fleetd.units import show_size

_MEMORY_STRIKES = 2


class EventHandlers:
    def __init__(
        self,
        state: FleetState,
        supervisor: ProcessSupervisor,
        loader: ModelLoader,
        admission: Admission,
        change: SpecUpdate,
    ) -> None:
        orders = OperatorHandlers(state, supervisor, loader, admission)
        self.state, self.supervisor, self.loader = state, supervisor, loader
        self.admission, self.change = admission, change
        self.table: dict[type[e.Event], Callable[[Any, float], None]] = {
            e.Tick: lambda _event, _now: None,
            e.SpecChanged: self.change.apply,
            e.Spawned: self.spawned,
            e.SpawnFailed: self.spawn_failed,
            e.Adopted: lambda _event, _now: None,  # only inside SpecChanged
            e.Exited: self.exited,
            e.SetEmpty: self.set_empty,
            e.ProbeResult: self.probe_result,
            e.StartProgress: self.start_progress,
            e.ProcessPrerequisitesChanged: self.prerequisites_changed,
            e.MemorySampled: self.memory_sampled,
            e.RestartDue: self.restart_due,
            e.StartDue: self.start_due,
            e.Loaded: self.loaded,
            e.LoadFailed: self.load_failed,
            e.LoadProgress: self.load_progress,
            e.ModelPrerequisitesChanged: lambda event, now: self.loader.requires(event.model, event.missing, now),
            e.Unloaded: self.unloaded,
            e.UnloadFailed: self.unload_failed,
            e.SleepSeen: self.sleep_seen,
            e.ResidentsObserved: self.residents_observed,
            e.RequestArrived: self.admission.arrive,
            e.RequestCancelled: lambda event, _now: self.cancelled(event),
            e.RequestFinished: self.finished,
            e.StartRequested: orders.start_requested,
            e.StopRequested: orders.stop_requested,
            e.RestartRequested: orders.restart_requested,
            e.DrainRequested: orders.drain_requested,
            e.LoadRequested: orders.load_requested,
            e.UnloadRequested: orders.unload_requested,
            e.PinRequested: orders.pin_requested,
            e.ShutdownRequested: orders.shutdown_requested,
        }

    def _current(self, name: str, generation: int) -> Process | None:
        process = self.state.processes.get(name)
        if process is None or process.generation != generation:
            return None
        self.state.wake(name)
        return process

    # -- processes ------------------------------------------------------------------------------------------------------

    def spawned(self, event: e.Spawned, now: float) -> None:
        process = self._current(event.name, event.generation)
        if process is not None and process.state is ProcessState.STARTING and not process.spawned:
            self.supervisor.spawned(process, event.pid, now)

    def spawn_failed(self, event: e.SpawnFailed, now: float) -> None:
        process = self._current(event.name, event.generation)
        if process is None or process.state is not ProcessState.STARTING or process.spawned:
            return
        kind = ExitKind.CRASH if event.recoverable else ExitKind.BAD_CONFIG
        report = ExitReport(None, kind=kind, reason=f"cannot start: {event.message}")
        process.last_exit, process.last_exit_s = report, now
        self.supervisor.termination.start_failed(process, report, now)

    def exited(self, event: e.Exited, now: float) -> None:
        process = self._current(event.name, event.generation)
        if process is None or process.state not in SERVING | {ProcessState.STARTING, ProcessState.STOPPING}:
            return
        if process.state is ProcessState.STARTING and not process.spawned:
            process.spawned = True  # it died before the spawn was reported: either order may happen
        self.supervisor.termination.died(process, event.report, now)

    def set_empty(self, event: e.SetEmpty, now: float) -> None:
        process = self._current(event.name, event.generation)
        if process is not None and process.state is ProcessState.STOPPING:
            self.supervisor.termination.set_empty(process, event.survivors, now)

    def probe_result(self, event: e.ProbeResult, now: float) -> None:
        process = self._current(event.name, event.generation)
        if process is None:
            return
        probes = process.spec.probes
        process.paused = event.paused
        if event.probe is ProbeKind.STARTUP:
            if process.state is ProcessState.STARTING and not process.startup_done:
                process.startup_detail = event.detail if not event.ok else ""
                if event.ok:
                    self.supervisor.startup_passed(process, now)
                elif event.final and process.spec.capabilities.owns_process:
                    self.supervisor.termination.kill(process, now, event.detail, final=True)
        elif event.probe is ProbeKind.READINESS and probes.readiness is not None:
            process.readiness.add(probes.readiness, event.ok, event.detail)
            self.supervisor.maybe_ready(process, now)
        elif event.probe is ProbeKind.LIVENESS and probes.liveness is not None and process.state in SERVING:
            placements = self.state.placements_on(event.name)
            if not event.ok and any(in_sleep_transition(p, probes.liveness.timeout_s, now) for p in placements):
                return  # an engine that falls asleep or wakes does not answer; that has its own deadline
            turned = process.liveness.add(probes.liveness, event.ok, event.detail)
            if turned and not event.ok:
                reason = f"liveness probe failed {process.liveness.streak} times: {event.detail}"
                self.supervisor.termination.kill(process, now, reason)

    def start_progress(self, event: e.StartProgress, now: float) -> None:
        process = self._current(event.name, event.generation)
        if process is not None and process.state is ProcessState.STARTING:
            if process.phase != event.phase:
                self.state.journal.note(StartPhaseChanged(event.name, event.phase))
            process.progress_s, process.phase = now, event.phase

    def prerequisites_changed(self, event: e.ProcessPrerequisitesChanged, _now: float) -> None:
        process = self.state.processes.get(event.name)
        if process is None or process.missing == event.missing:
            return
        process.missing = event.missing
        self.state.journal.note(PrerequisitesChanged(event.name, Subject.PROCESS, event.missing))
        self.state.wake(event.name)

    def memory_sampled(self, event: e.MemorySampled, now: float) -> None:
        process = self._current(event.name, event.generation)
        if process is None or process.state not in SERVING:
            return
        process.rss_bytes = event.rss_bytes
        limit = process.spec.memory_limit_bytes
        over = limit is not None and event.rss_bytes > limit
        process.memory_strikes = process.memory_strikes + 1 if over else 0
        if process.memory_strikes >= _MEMORY_STRIKES:
            process.request_restart(f"memory limit exceeded: {show_size(event.rss_bytes)} of {show_size(limit or 0)}")
        if process.spec.own_model is not None and event.device_bytes:
            for placement in self.state.placements_on(event.name):
                if placement.state is Residency.LOADED:
                    learn(self.state, placement, event.device_bytes)
                elif placement.state is Residency.ASLEEP:
                    learn_asleep(self.state, placement, event.device_bytes, now)

    def restart_due(self, event: e.RestartDue, now: float) -> None:
        process = self.state.processes.get(event.name)
        if process is None:
            return
        if process.state in SERVING or process.state is ProcessState.STARTING:
            if event.in_turn:
                self.state.rolling.setdefault(event.name, event.reason)
            else:
                process.request_restart(event.reason)
        elif event.revive:
            self._start_again(process, now, event.reason)
        self.state.wake(event.name)

    def start_due(self, event: e.StartDue, now: float) -> None:
        process = self.state.processes.get(event.name)
        if process is None:
            return
        if process.state is ProcessState.STOPPING and process.outcome is not None and process.spec.enabled:
            self.supervisor.termination.restart_after_stop(process, event.reason)  # it has ended: its set is swept
        else:
            self._start_again(process, now, event.reason)
        self.state.wake(event.name)

    def _start_again(self, process: Process, now: float, reason: str) -> None:
        """Start a process that has ended, unless an operator stopped it."""
        if process.stopped or process.state not in (ProcessState.FAILED, ProcessState.EXITED, ProcessState.BACKOFF):
            return
        process.record.reset()
        if process.state is ProcessState.BACKOFF:
            process.next_start_s = now
        else:
            self.supervisor.termination.revive(process, now, reason)

    # -- models -----------------------------------------------------------------------------------------------------------

    def _placement(
        self, event: e.Loaded | e.LoadFailed | e.LoadProgress | e.Unloaded | e.UnloadFailed | e.SleepSeen
    ) -> Placement | None:
        model = self.state.models.get(event.model)
        placement = model.placements.get(event.process) if model is not None else None
        if placement is None or placement.generation != event.generation:
            return None
        self.state.wake(event.process)
        return placement

    def loaded(self, event: e.Loaded, now: float) -> None:
        placement = self._placement(event)
        if placement is not None and placement.ordered:
            self.loader.loaded(placement, event.device_bytes, now)

    def load_failed(self, event: e.LoadFailed, now: float) -> None:
        placement = self._placement(event)
        if placement is not None and placement.state is Residency.LOADING and placement.ordered:
            self.loader.load_failed(placement, event.message, now, final=not event.recoverable)

    def load_progress(self, event: e.LoadProgress, now: float) -> None:
        placement = self._placement(event)
        if placement is not None and placement.state is Residency.LOADING and placement.ordered:
            placement.ordered_s, placement.reason = now, event.phase

    def unloaded(self, event: e.Unloaded, now: float) -> None:
        placement = self._placement(event)
        if placement is not None and placement.state is Residency.UNLOADING and placement.ordered:
            self.loader.forget_placement(placement, now)

    def unload_failed(self, event: e.UnloadFailed, now: float) -> None:
        placement = self._placement(event)
        process = self.state.processes.get(event.process)
        if (
            placement is not None
            and process is not None
            and placement.state is Residency.UNLOADING
            and placement.ordered
        ):
            self.loader.unload_failed(placement, process, event.message, now)

    def sleep_seen(self, event: e.SleepSeen, now: float) -> None:
        placement = self._placement(event)
        if placement is None or placement.step is None or not placement.ordered:
            return
        if self.loader.sleeping.seen(placement, event.state, event.message, now):
            self.loader.loaded(placement, {}, now)

    def residents_observed(self, event: e.ResidentsObserved, now: float) -> None:
        process = self._current(event.process, event.generation)
        if process is not None and process.state in SERVING and process.spec.own_model is None:
            self.change.observed(process, {name: dict(size) for name, size in event.device_bytes.items()}, now)

    # -- requests -----------------------------------------------------------------------------------------------------------

    def cancelled(self, event: e.RequestCancelled) -> None:
        for request_id in (event.request_id, *event.others):
            self.admission.queue.leave(request_id)

    def finished(self, event: e.RequestFinished, now: float) -> None:
        _, granted_s = self.state.granted.get(event.request_id, (None, now))
        placement = self.admission.finish(event.request_id, now)
        if placement is None:
            return
        self.state.wake(placement.process)
        process = self.state.processes.get(placement.process)
        if not event.refused or process is None or process.state is not ProcessState.READY:
            return
        if process.ready_s is not None and granted_s >= process.ready_s:  # otherwise the request was on an earlier run
            process.readiness.refute(event.refused)
