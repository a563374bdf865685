"""Merge a new desired fleet, adopted processes and observed residents into the state.

Invariants:
- An unchanged entry keeps its process, its placements and its counters.
- A process whose `launch_hash` changed restarts after it drained; all other fields take effect at once.
- An entry that left the configuration is stopped or unloaded first, and forgotten once nothing of it is left.
"""

from __future__ import annotations

from collections.abc import Collection

from fleetd.core.data.events import Adopted, Exited, SpecChanged
from fleetd.core.data.fleet_state import FleetState, spec_hash
from fleetd.core.data.specs import ExitKind, ExitReport, ModelSpec, ProcessSpec, Remembered
from fleetd.core.data.state import SERVING, Model, Process, ProcessState, Residency, SleepStep
from fleetd.core.models.candidates import reservation_of
from fleetd.core.models.measurement import learn
from fleetd.core.models.reconcile import ModelLoader
from fleetd.core.models.retention import cancel_preload, due, stays_loaded
from fleetd.core.processes.reconcile import ProcessSupervisor

LOOK_S = 10.0  # no new loads for this long after an adopted server is up and its models are unknown
START_PATIENCE_S = 60.0  # the same before it answers, if its start has no deadline
OBSERVATION_AGE_S = 5.0  # the age that an observation of a server may have on arrival


class SpecUpdate:
    def __init__(self, state: FleetState, supervisor: ProcessSupervisor, loader: ModelLoader) -> None:
        self.state = state
        self.supervisor = supervisor
        self.loader = loader

    def apply(self, event: SpecChanged, now: float) -> None:
        state = self.state
        state.spec = event.spec
        state.ledger.limit(event.spec.devices)
        self._models_leave(event, now)
        for name, process in state.processes.items():
            if name not in event.spec.processes:
                process.removed = True
                state.wake(name)
        for name, kept in event.remembered.items():
            state.retired[name] = max(state.retired.get(name, 0), kept.generation)
        before = {name: process.spec for name, process in state.processes.items()}
        stopped = self._stopped_entries()
        for spec in event.spec.processes.values():
            self._process(spec, event.remembered.get(spec.name), now, stopped)
            if spec.name in event.missing:
                state.processes[spec.name].missing = event.missing[spec.name]
                state.wake(spec.name)  # so that it becomes BLOCKED even without a request
        state.names = {
            alias: model.name for model in event.spec.models.values() for alias in (model.name, *model.aliases)
        }
        hosted: dict[str, list[str]] = {}
        for model in event.spec.models.values():
            self._model(model, now)
            for holder in model.holders:
                hosted.setdefault(holder, []).append(model.name)
        state.hosted = {name: tuple(models) for name, models in hosted.items()}
        for name in event.spec.models:
            self.loader.requires(name, event.missing_models.get(name, ()), now)
        for spec in event.spec.processes.values():
            own = state.models.get(spec.own_model or "")
            if own is not None and not own.placements and not spec.on_demand and _was_on_demand(before.get(spec.name)):
                due(state, own)
        for adopted in event.adopted:
            self._adopt(adopted, now)
        for exited in event.died:
            self._died(exited, now)

    def _stopped_entries(self) -> set[str]:
        """Return the entries that an operator stopped; new replicas are stopped too."""
        running = {process.spec.base for process in self.state.processes.values() if not process.stopped}
        return {process.spec.base for process in self.state.processes.values()} - running

    def _process(
        self, spec: ProcessSpec, remembered: Remembered | None, now: float, stopped: Collection[str] = ()
    ) -> None:
        process = self.state.processes.get(spec.name)
        if process is None:
            process = self.state.processes[spec.name] = Process(spec, since_s=now)
            process.generation = self.state.retired.pop(spec.name, 0)
            if spec.base in stopped:
                process.stopped, process.reason = True, "stopped by an operator"
                self.state.persist(process, "its entry is stopped")
        else:
            if process.removed:  # it had left the configuration and still runs
                process.record.reset()
            self._respec(process, spec, now)
        if remembered is not None and process.state is ProcessState.STOPPED:
            self._remember(process, remembered)
        process.removed = False
        if not spec.on_demand or process.state not in (ProcessState.STOPPED, ProcessState.FAILED):
            self.state.wake(spec.name)

    def _remember(self, process: Process, remembered: Remembered) -> None:
        process.stopped = remembered.stopped
        process.restarts = remembered.restarts
        process.generation = max(process.generation, remembered.generation)
        process.last_exit, process.last_exit_s = remembered.last_exit, remembered.last_exit_s
        process.again = remembered.again
        if process.stopped:
            process.reason = "stopped by an operator"
        edited = remembered.spec_hash not in ("", spec_hash(process.spec))
        if process.stopped or edited:
            return
        process.record.deaths, process.record.slow = remembered.deaths, remembered.slow
        process.record.times.extend(remembered.died_s)
        if remembered.failed is not None:
            process.state, process.reason = ProcessState.FAILED, remembered.failed
        elif remembered.exited is not None:
            process.state, process.reason = ProcessState.EXITED, remembered.exited
            process.last_exit = ExitReport(remembered.code, kind=ExitKind.EXPECTED, reason=remembered.exited)

    def _respec(self, process: Process, spec: ProcessSpec, now: float) -> None:
        old, process.spec = process.spec, spec
        if old == spec:
            return
        changed = old.launch_hash != spec.launch_hash
        running = process.state in SERVING or process.state is ProcessState.STARTING
        if process.state is ProcessState.FAILED or (process.state is ProcessState.EXITED and changed):
            process.record.reset()
            self.supervisor.termination.revive(process, now, "the configuration changed")
            self.loader.forgive(process.name, now)
        elif process.state is ProcessState.BACKOFF:
            process.next_start_s = now
        elif changed and running:
            process.cancel_restart()
            process.request_restart("the configuration changed")
        if old.probes != spec.probes and running and process.spawned and not changed:
            self.supervisor.reprobe(process, now)

    def _model(self, spec: ModelSpec, now: float) -> None:
        model = self.state.models.get(spec.name)
        if model is None:
            model = self.state.models[spec.name] = Model(spec, demand_s=now)
            if stays_loaded(self.state, model):
                due(self.state, model)
            return
        old, model.spec = model.spec, spec
        if old == spec:
            return
        model.clear_failure(now)
        if old.footprint_hash != spec.footprint_hash:
            model.learned.clear()
            model.learned_asleep.clear()
        model.sleepless_until_s = now
        if (old.footprint, old.asleep) != (spec.footprint, spec.asleep):
            for placement in model.placements.values():
                self.state.ledger.correct(placement.key, reservation_of(model, placement))
        for process, placement in list(model.placements.items()):
            if process not in spec.holders or old.served_as != spec.served_as:
                self.loader.leave(placement, now, "the configuration changed", returns=True)
            elif self.state.ledger.never_fits(model.footprint.bytes):  # a restart in place would not reserve the room
                self.loader.leave(placement, now, "it can no longer fit", returns=True)
        if stays_loaded(self.state, model) and not model.placements:
            due(self.state, model)

    def _models_leave(self, event: SpecChanged, now: float) -> None:
        for name in [name for name in self.state.models if name not in event.spec.models]:
            model = self.state.models[name]
            cancel_preload(self.state, name)
            for placement in list(model.placements.values()):
                self.loader.leave(placement, now, "no longer in the configuration", returns=True)
            self.state.leaving.add(name)
        self.state.leaving -= set(event.spec.models)

    def sweep_models(self) -> None:
        """Forget the models that left the configuration and memory."""
        for name in list(self.state.leaving):
            model = self.state.models[name]
            if not model.placements and not model.waiting:
                del self.state.models[name]
                self.state.leaving.discard(name)

    def _adopt(self, event: Adopted, now: float) -> None:
        """Continue a child of an earlier daemon."""
        process = self.state.processes.get(event.name)
        if process is None or process.state in SERVING:
            return
        if process.state is not ProcessState.STOPPED:
            process.state = ProcessState.STOPPED  # the persisted state is older than the observation
        process.generation, process.again = event.generation, False
        self.state.move(process, ProcessState.STARTING, now, f"adopted: pid {event.pid}, generation {event.generation}")
        self.supervisor.begin_run(process, now)
        process.started_s = now - event.age_s
        can_sleep = process.spec.capabilities.can_sleep
        if process.spec.capabilities.many_models:
            startup = process.spec.probes.startup
            patience_s = 0.0 if startup is None else startup.deadline_s or START_PATIENCE_S
            self.state.unobserved[process.name] = now + patience_s + LOOK_S
        elif can_sleep:  # while it starts it cannot sleep: its memory is fully reserved
            self.state.unobserved[process.name] = now + LOOK_S
        own = process.spec.own_model
        model = self.state.models.get(own) if own is not None else None
        if model is not None:
            placement = self.state.place(model, process.name, now, "adopted")
            placement.generation = event.generation
            if can_sleep:  # it may be asleep, or have slept before
                placement.step, placement.slept = SleepStep.CHECK, True
            self.state.ledger.correct(placement.key, reservation_of(model, placement))
            cancel_preload(self.state, model.name)
        self.state.wake(process.name)
        self.supervisor.spawned(process, event.pid, now)

    def _died(self, event: Exited, now: float) -> None:
        """Count an exit while the daemon was down as a death."""
        process = self.state.processes.get(event.name)
        if process is None or process.state is not ProcessState.STOPPED or process.generation > event.generation:
            return
        process.generation = event.generation
        process.last_exit, process.last_exit_s = event.report, now
        if process.stopped or not process.spec.enabled:
            return
        process.state = ProcessState.STOPPING  # as if this daemon had seen the exit and emptied the set
        self.supervisor.termination.settle_death(process, event.report, now)

    def observed(self, process: Process, served: dict[str, dict[str, int]], now: float) -> None:
        """Merge the models that a server reports; `served` is by model name."""
        state = self.state
        state.unobserved.pop(process.name, None)
        for placement in list(state.placements_on(process.name)):
            if placement.state is not Residency.LOADED:
                continue
            if served.get(placement.model):
                learn(state, placement, served[placement.model])
            elif placement.model not in served and not placement.in_flight and _settled(placement.loaded_s, now):
                placement.reason = f"{process.name} no longer holds it"
                self.loader.forget_placement(placement, now)
        for name, measured in sorted(served.items()):
            model = state.models.get(name)
            if model is None or process.name in model.placements or process.name not in model.spec.holders:
                continue
            if not _settled(state.freed.get((name, process.name)), now):
                continue
            state.ledger.correct((name, process.name), measured or model.footprint.bytes)
            placement = state.place(model, process.name, now, "found on the server")
            placement.generation, placement.ordered = process.generation, True
            self.loader.loaded(placement, measured, now)
        for key in [key for key, freed_s in state.freed.items() if _settled(freed_s, now)]:
            del state.freed[key]


def _settled(since_s: float | None, now: float) -> bool:
    """Return whether an observation now can include a change at `since_s`."""
    return since_s is None or now - since_s >= OBSERVATION_AGE_S


def _was_on_demand(spec: ProcessSpec | None) -> bool:
    return spec is not None and spec.on_demand
