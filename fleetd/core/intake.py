"""From an event to changed facts, one small function per event.

The rules of this file
- Nothing is decided here that `reconcile` can decide: an event changes facts, reconciliation draws the conclusions.
- An event of an older generation, or about something the fleet does not have, changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fleetd.core import events as e
from fleetd.core.admission import Admission
from fleetd.core.change import Change
from fleetd.core.contract import ExitKind, ExitReport, ProbeKind
from fleetd.core.facts import Facts
from fleetd.core.measuring import learn
from fleetd.core.residency import Residencies
from fleetd.core.state import SERVING, Placement, Process, ProcessState, Residency
from fleetd.core.supervision import Supervision

_MEMORY_STRIKES = 2


class Intake:
    def __init__(
        self, facts: Facts, supervision: Supervision, residencies: Residencies, admission: Admission, change: Change
    ) -> None:
        self.facts, self.supervision, self.residencies = facts, supervision, residencies
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
            e.RequirementsChanged: self.requirements_changed,
            e.MemorySampled: self.memory_sampled,
            e.RestartDue: self.restart_due,
            e.Loaded: self.loaded,
            e.LoadFailed: self.load_failed,
            e.Unloaded: self.unloaded,
            e.UnloadFailed: self.unload_failed,
            e.ResidentsObserved: self.residents_observed,
            e.RequestArrived: self.admission.arrive,
            e.RequestCancelled: lambda event, _now: self.cancelled(event),
            e.RequestFinished: self.finished,
            e.StartAsked: self.start_asked,
            e.StopAsked: self.stop_asked,
            e.RestartAsked: self.restart_asked,
            e.DrainAsked: self.drain_asked,
            e.LoadAsked: self.load_asked,
            e.UnloadAsked: self.unload_asked,
            e.PinAsked: self.pin_asked,
            e.ShutdownAsked: self.shutdown_asked,
        }

    def _current(self, name: str, generation: int) -> Process | None:
        process = self.facts.processes.get(name)
        if process is None or process.generation != generation:
            return None
        self.facts.wake(name)
        return process

    # -- processes ------------------------------------------------------------------------------------------------------

    def spawned(self, event: e.Spawned, now: float) -> None:
        process = self._current(event.name, event.generation)
        if process is not None and process.state is ProcessState.STARTING and not process.spawned:
            self.supervision.spawned(process, event.pid, now)

    def spawn_failed(self, event: e.SpawnFailed, now: float) -> None:
        process = self._current(event.name, event.generation)
        if process is None or process.state is not ProcessState.STARTING or process.spawned:
            return
        kind = ExitKind.CRASH if event.recoverable else ExitKind.BAD_CONFIG
        report = ExitReport(None, kind=kind, reason=f"cannot start: {event.message}")
        process.last_exit, process.last_exit_s = report, now
        self.supervision.ending.start_failed(process, report, now)

    def exited(self, event: e.Exited, now: float) -> None:
        process = self._current(event.name, event.generation)
        if process is None or process.state not in SERVING | {ProcessState.STARTING, ProcessState.STOPPING}:
            return
        if process.state is ProcessState.STARTING and not process.spawned:
            process.spawned = True  # dead before the spawn was reported: the order of the two is not promised
        self.supervision.ending.died(process, event.report, now)

    def set_empty(self, event: e.SetEmpty, now: float) -> None:
        process = self._current(event.name, event.generation)
        if process is not None and process.state is ProcessState.STOPPING:
            self.supervision.ending.set_empty(process, event.survivors, now)

    def probe_result(self, event: e.ProbeResult, now: float) -> None:
        process = self._current(event.name, event.generation)
        if process is None:
            return
        probes = process.spec.probes
        if event.probe is ProbeKind.STARTUP:
            if process.state is ProcessState.STARTING and not process.startup_done:
                process.phase = event.detail if not event.ok else ""
                if event.ok:
                    self.supervision.startup_passed(process, now)
        elif event.probe is ProbeKind.READINESS and probes.readiness is not None:
            process.readiness.add(probes.readiness, event.ok, event.detail)
            self.supervision.maybe_ready(process, now)
        elif event.probe is ProbeKind.LIVENESS and probes.liveness is not None and process.state in SERVING:
            turned = process.liveness.add(probes.liveness, event.ok, event.detail)
            if turned and not event.ok:
                reason = f"liveness probe failed {process.liveness.streak} times: {event.detail}"
                self.supervision.ending.kill(process, now, reason)

    def start_progress(self, event: e.StartProgress, now: float) -> None:
        process = self._current(event.name, event.generation)
        if process is not None and process.state is ProcessState.STARTING:
            process.progress_s, process.phase = now, event.phase

    def requirements_changed(self, event: e.RequirementsChanged, now: float) -> None:
        process = self.facts.processes.get(event.name)
        if process is None or process.missing == event.missing:
            return
        process.missing = event.missing
        self.facts.journal.note(
            event.name, f"absent now: {', '.join(event.missing)}" if event.missing else "all it requires is there"
        )
        self.facts.wake(event.name)

    def memory_sampled(self, event: e.MemorySampled, _now: float) -> None:
        process = self._current(event.name, event.generation)
        if process is None or process.state not in SERVING:
            return
        process.rss_bytes = event.rss_bytes
        limit = process.spec.memory_limit_bytes
        over = limit is not None and event.rss_bytes > limit
        process.memory_strikes = process.memory_strikes + 1 if over else 0
        if process.memory_strikes >= _MEMORY_STRIKES and process.restart_wanted is None:
            process.restart_wanted = f"over its memory limit: {event.rss_bytes} > {limit} bytes"
        if process.spec.own_model is not None and event.device_bytes:
            for placement in self.facts.placements_on(event.name):
                if placement.state is Residency.LOADED:
                    learn(self.facts, placement, event.device_bytes)

    def restart_due(self, event: e.RestartDue, _now: float) -> None:
        process = self.facts.processes.get(event.name)
        if process is not None and process.state in SERVING and process.restart_wanted is None:
            process.restart_wanted = event.reason
            self.facts.wake(event.name)

    # -- models -----------------------------------------------------------------------------------------------------------

    def _placement(self, event: e.Loaded | e.LoadFailed | e.Unloaded | e.UnloadFailed) -> Placement | None:
        model = self.facts.models.get(event.model)
        placement = model.placements.get(event.process) if model is not None else None
        if placement is None or placement.generation != event.generation:
            return None
        self.facts.wake(event.process)
        return placement

    def loaded(self, event: e.Loaded, now: float) -> None:
        placement = self._placement(event)
        if placement is not None and placement.ordered:
            self.residencies.loaded(placement, event.device_bytes, now)

    def load_failed(self, event: e.LoadFailed, now: float) -> None:
        placement = self._placement(event)
        if placement is not None and placement.state is Residency.LOADING and placement.ordered:
            self.residencies.fail(self.facts.models[event.model], event.message, now, final=not event.recoverable)
            self.residencies.gone(placement)

    def unloaded(self, event: e.Unloaded, _now: float) -> None:
        placement = self._placement(event)
        if placement is not None and placement.state is Residency.UNLOADING and placement.ordered:
            self.residencies.gone(placement)

    def unload_failed(self, event: e.UnloadFailed, _now: float) -> None:
        placement = self._placement(event)
        process = self.facts.processes.get(event.process)
        if (
            placement is not None
            and process is not None
            and placement.state is Residency.UNLOADING
            and placement.ordered
        ):
            self.residencies.unload_failed(placement, process, event.message)

    def residents_observed(self, event: e.ResidentsObserved, now: float) -> None:
        process = self._current(event.process, event.generation)
        if process is not None and process.state in SERVING and process.spec.own_model is None:
            self.change.observed(process, {name: dict(size) for name, size in event.device_bytes.items()}, now)

    # -- requests -----------------------------------------------------------------------------------------------------------

    def cancelled(self, event: e.RequestCancelled) -> None:
        self.admission.line.leave(event.request_id)

    def finished(self, event: e.RequestFinished, now: float) -> None:
        placement = self.admission.finish(event, now)
        if placement is not None:
            self.facts.wake(placement.process)

    # -- the operator ---------------------------------------------------------------------------------------------------------

    def start_asked(self, event: e.StartAsked, now: float) -> None:
        process = self.facts.processes.get(event.name)
        if process is None:
            return
        process.stopped = process.drained = process.impossible = False
        process.record.reset()
        if process.state in (ProcessState.FAILED, ProcessState.EXITED):
            process.move(ProcessState.STOPPED, now, "started by an operator")
        elif process.state is ProcessState.BACKOFF:
            process.next_start_s = now
        self._forgive(process, now)
        own = process.spec.own_model
        if own is not None and not self.facts.models[own].placements:
            self.residencies.due(self.facts.models[own])
        self.facts.wake(event.name)
        self.facts.persist(process, "started by an operator")

    def _forgive(self, process: Process, now: float) -> None:
        for model in self.facts.models.values():
            if process.name in model.spec.holders:
                model.failure, model.failure_final, model.retry_s = None, False, now

    def stop_asked(self, event: e.StopAsked, now: float) -> None:
        process = self.facts.processes.get(event.name)
        if process is None:
            return
        process.stopped = True
        own = process.spec.own_model
        if own is not None:
            self.facts.due.discard(own)
        if process.state in (ProcessState.FAILED, ProcessState.EXITED):
            process.move(ProcessState.STOPPED, now, "stopped by an operator")
        process.restart_wanted = None
        self.facts.wake(event.name)
        self.facts.persist(process, "stopped by an operator")

    def restart_asked(self, event: e.RestartAsked, now: float) -> None:
        process = self.facts.processes.get(event.name)
        if process is None:
            return
        if process.state in SERVING or process.state is ProcessState.STARTING:
            process.stopped = False
            process.record.reset()
            process.restart_wanted = "restarted by an operator"
            self.facts.wake(event.name)
        elif process.state is ProcessState.STOPPING:
            process.stopped, process.outcome, process.restart_wanted = False, None, "restarted by an operator"
        else:
            self.start_asked(e.StartAsked(event.name), now)

    def drain_asked(self, event: e.DrainAsked, _now: float) -> None:
        process = self.facts.processes.get(event.name)
        if process is not None:
            process.drained = event.drain
            self.facts.wake(event.name)

    def load_asked(self, event: e.LoadAsked, now: float) -> None:
        model = self.facts.models.get(self.facts.names.get(event.model, event.model))
        if model is not None:
            self.admission.wish(event.request_id, model, now)

    def unload_asked(self, event: e.UnloadAsked, now: float) -> None:
        model = self.facts.models.get(self.facts.names.get(event.model, event.model))
        if model is None:
            return
        self.facts.due.discard(model.name)
        for placement in list(model.placements.values()):
            self.residencies.leave(placement, now, "unloaded by an operator")

    def pin_asked(self, event: e.PinAsked, _now: float) -> None:
        model = self.facts.models.get(self.facts.names.get(event.model, event.model))
        if model is not None:
            model.pinned_by_hand = event.pin
            self.facts.journal.note(model.name, "pinned by an operator" if event.pin else "unpinned by an operator")

    def shutdown_asked(self, event: e.ShutdownAsked, _now: float) -> None:
        if event.force and not self.facts.forced:
            self.facts.forced = True
            self.supervision.ending.escalate()
        self.facts.shutting_down = True
        for name in self.facts.processes:
            self.facts.wake(name)
