"""Load and unload models, and follow the processes that they are on.

Invariants:
- A reservation is taken when a load is decided and freed only after its memory was seen to be free.
- A model with its own process follows that process; a model on a server is loaded and unloaded by command.
- A failed load is remembered with the time of the next try; the requests that waited for it are rejected.
- An unload waits for the answer of a load: a server would load the model all the same. Only an overdue load is unloaded.
- A load that was started for a request is dropped if no request waits for it before the command was sent.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from fleetd.core.data.commands import Load, Unload
from fleetd.core.data.fleet_state import FleetState
from fleetd.core.data.journal import (
    LoadRepeated,
    ModelLeaving,
    ModelLoadFailed,
    ModelLost,
    ModelUnloadFailed,
    PrerequisitesChanged,
    Subject,
)
from fleetd.core.data.specs import describe_exit
from fleetd.core.data.state import RESTING, SERVING, Model, Placement, Process, ProcessState, Residency, SleepStep
from fleetd.core.models.candidates import usable
from fleetd.core.models.measurement import eviction_note, learn, over_budget_victims
from fleetd.core.models.retention import cancel_preload, due, stays_loaded, ttl_deadline
from fleetd.core.models.sleep import SleepControl
from fleetd.core.processes.start_gate import stop_waits

UNLOAD_ATTEMPTS = 3
LOAD_GRACE_S = 10.0  # the daemon's own timeout comes first
LINGER_S = 0.2  # a dying server is noticed within this time after its calls broke
FAILURE_BASE_S = 5.0
FAILURE_MAX_S = 300.0


class ModelLoader:
    def __init__(self, state: FleetState) -> None:
        self.state = state
        self.sleeping = SleepControl(state)

    # -- orders -------------------------------------------------------------------------------------------------------

    def start(self, model: Model, process: Process, now: float, reason: str, for_request: bool = False) -> Placement:
        """Reserve memory and start a load. Raises CapacityError (a bug of the caller)."""
        need = model.footprint.bytes
        self.state.ledger.reserve((model.name, process.name), need)
        placement = self.state.place(model, process.name, now, reason)
        placement.generation, placement.for_request = process.generation, for_request
        cancel_preload(self.state, model.name)
        return placement

    def leave(
        self,
        placement: Placement,
        now: float,
        reason: str,
        *,
        returns: bool = False,
        evicted: bool = False,
        by: str = "",
    ) -> None:
        """Unload as soon as nothing is in flight; no new grants from now on.

        `returns`: a model that should stay in memory may come back; `by`: the model that it is `evicted` for.
        """
        if placement.state is Residency.UNLOADING:
            placement.returns = placement.returns and returns
            return
        if placement.closing is None:
            note = ModelLeaving(placement.model, placement.process, reason)
            self.state.journal.note(eviction_note(self.state, placement, now, reason, by) if evicted else note)
        placement.closing, placement.evicted, placement.returns = reason, evicted, returns
        if placement.step is SleepStep.SLEEP:
            placement.step, placement.ordered = None, False
        self._leave_if_idle(placement, now)

    def _leave_if_idle(self, placement: Placement, now: float) -> None:
        loading = placement.state is Residency.LOADING and not placement.ordered
        if (
            placement.closing
            and not placement.in_flight
            and placement.step is not SleepStep.SLEEP
            and (loading or placement.state in (Residency.LOADED, Residency.ASLEEP))
        ):
            self.state.move_placement(placement, Residency.UNLOADING, now, placement.closing)

    # -- reconciliation -----------------------------------------------------------------------------------------------

    def reconcile(self, now: float) -> None:
        for name in sorted(self.state.placed):
            process = self.state.processes.get(name)
            for placement in list(self.state.placements_on(name)):
                if process is None:
                    self.state.drop(placement, now)
                elif process.spec.own_model is not None:
                    self._follow(placement, process, now)
                else:
                    self._serve(placement, process, now)
                if placement.closing:
                    self._leave_if_idle(placement, now)
                elif placement.state in (Residency.LOADED, Residency.ASLEEP):
                    self._expire(placement, now)
        for placement in over_budget_victims(self.state):
            self.leave(placement, now, "measured memory exceeds the budget", evicted=True)

    def _cannot_start(self, process: Process) -> bool:
        """Return whether a process at rest will not start again."""
        return self.state.shutting_down or not usable(process)

    def _unwanted(self, placement: Placement) -> bool:
        """Return whether a load for the queue is unsent and no request waits for it."""
        model = self.state.models[placement.model]
        return (
            placement.for_request
            and not placement.ordered
            and not model.waiting
            and not stays_loaded(self.state, model)
        )

    def _follow(self, placement: Placement, process: Process, now: float) -> None:
        """Follow the process of a model that has its own."""
        model = self.state.models[placement.model]
        if self.sleeping.attend(placement, process, now):
            return
        state = process.state
        if placement.state is Residency.UNLOADING:
            if process.empty:
                self.forget_placement(placement, now)
        elif placement.state is Residency.LOADING:
            if state in (ProcessState.READY, ProcessState.DRAINING):
                self._loaded(placement, process.generation, now)
            elif process.survivors:
                self.state.move_placement(placement, Residency.UNLOADING, now, process.reason)
                placement.returns = True
            elif state in (ProcessState.FAILED, ProcessState.EXITED) and not process.impossible:
                self.fail(model, process.reason, now, final=True)
                self.forget_placement(placement, now, again=False)
            elif state in RESTING and (self._cannot_start(process) or self._unwanted(placement)):
                self.forget_placement(placement, now)
            elif state is ProcessState.BACKOFF and process.generation > placement.generation:
                how = describe_exit(process.crash) if process.crash is not None else process.reason
                self.fail(model, how, now, retry_s=process.next_start_s)
                placement.generation = process.generation
                if not stays_loaded(self.state, model):
                    self.forget_placement(placement, now)
        elif state not in SERVING:
            self._lose(placement, process, now)

    def _lose(self, placement: Placement, process: Process, now: float) -> None:
        """Take a loaded model back to LOADING: its process died, or restarts on request."""
        placement.generation, placement.order_s = process.generation, now
        if process.outcome is not None or process.state in (ProcessState.BACKOFF, ProcessState.FAILED):
            self.state.journal.note(ModelLost(placement.model, process.name, process.reason))
            reason = f"lost: {process.name} died: {process.reason}"
        else:
            reason = f"{process.name} is {process.state}: {process.reason}"
        self.state.move_placement(placement, Residency.LOADING, now, reason)

    def _serve(self, placement: Placement, process: Process, now: float) -> None:
        """Order loads and unloads of a model on a server."""
        ended = process.empty or (placement.generation != process.generation and not process.survivors)
        if placement.state is not Residency.LOADING:
            if ended:
                self.forget_placement(placement, now)
            elif placement.state is Residency.UNLOADING:
                self._order_unload(placement, process, now)
        elif not placement.ordered:
            self._order_load(placement, process, now)
        elif ended:  # a requested restart: a death is handled below, before the set is empty
            placement.ordered, placement.generation = False, process.generation
            self.state.journal.note(LoadRepeated(placement.model, process.name))
            self._order_load(placement, process, now)
        elif process.state is ProcessState.STOPPING and process.outcome is not None:
            reason = f"{process.name} exited while loading: {process.reason}"
            self.fail(self.state.models[placement.model], reason, now)
            self.state.move_placement(placement, Residency.UNLOADING, now, reason)
        elif process.survivors:
            self.state.move_placement(placement, Residency.UNLOADING, now, process.reason)
        elif now >= self._load_deadline(placement):
            timeout_s = self.state.models[placement.model].spec.load_timeout_s
            self.fail(self.state.models[placement.model], f"not loaded within {timeout_s:g} s", now)
            self.state.move_placement(placement, Residency.UNLOADING, now, "the load took too long")

    def _order_load(self, placement: Placement, process: Process, now: float) -> None:
        if process.drained or (process.state in RESTING and self._cannot_start(process)) or self._unwanted(placement):
            self.forget_placement(placement, now)
        elif process.state in (ProcessState.READY, ProcessState.UNHEALTHY) and not self._waits_for_lane(
            placement, process
        ):
            placement.generation, placement.ordered, placement.ordered_s = process.generation, True, now
            self.state.emit(Load(placement.model, process.name, process.generation, placement.reason))

    def _order_unload(self, placement: Placement, process: Process, now: float) -> None:
        if placement.ordered or process.state not in SERVING or now < placement.retry_s:
            return
        if placement.lingers:
            self.forget_placement(placement, now)
        elif not self._waits_for_lane(placement, process):
            placement.ordered, placement.ordered_s = True, now
            self.state.emit(Unload(placement.model, process.name, process.generation, placement.reason))

    def _waits_for_lane(self, placement: Placement, process: Process) -> bool:
        """Note and return whether a measuring start blocks the lane for loads."""
        return self.state.waits_for_lane(placement, stop_waits(self.state, process))

    def _load_deadline(self, placement: Placement) -> float:
        return placement.ordered_s + self.state.models[placement.model].spec.load_timeout_s + LOAD_GRACE_S

    def _loaded(self, placement: Placement, generation: int, now: float) -> None:
        model = self.state.models[placement.model]
        if placement.slept and placement.generation != generation:  # a new run took no memory for a sleep
            placement.slept = False
            self.state.ledger.correct(placement.key, model.footprint.bytes)
        placement.generation, placement.loaded_s, placement.last_used_s = generation, now, now
        self.state.move_placement(placement, Residency.LOADED, now, "loaded")
        model.loads += 1
        model.load_s = now - placement.order_s
        model.load_succeeded()
        cancel_preload(self.state, model.name)

    def loaded(self, placement: Placement, measured: Mapping[str, int], now: float) -> None:
        """Handle the report of a server that the model is loaded."""
        if placement.state is not Residency.LOADING:
            return
        self._loaded(placement, placement.generation, now)
        if measured:
            learn(self.state, placement, measured)

    def load_failed(self, placement: Placement, message: str, now: float, final: bool) -> None:
        """Report the failure, free the memory after `LINGER_S`: a sweep must come first."""
        self.fail(self.state.models[placement.model], message, now, final=final)
        self.state.move_placement(placement, Residency.UNLOADING, now, f"load failed: {message}")
        placement.lingers, placement.retry_s = True, now + LINGER_S

    def unload_failed(self, placement: Placement, process: Process, message: str, now: float) -> None:
        """Retry a few times; a server that cannot unload is restarted."""
        placement.ordered = False
        placement.attempts += 1
        placement.retry_s = now + 0.5 * 2.0 ** min(placement.attempts, 6)
        self.state.journal.note(ModelUnloadFailed(placement.model, process.name, message, placement.attempts))
        if placement.attempts >= UNLOAD_ATTEMPTS:
            process.request_restart(f"cannot unload {placement.model}: {message}")

    def forget_placement(self, placement: Placement, now: float, again: bool = True) -> None:
        """Remove a placement whose memory is free. `again`: it may be loaded again."""
        model = self.state.models[placement.model]
        if placement.state is Residency.UNLOADING and placement.evicted:
            model.evictions += 1
        self.state.note_placement(placement, Residency.ABSENT, placement.closing or placement.reason)
        self.state.drop(placement, now)
        if again and placement.returns and stays_loaded(self.state, model) and not model.placements:
            due(self.state, model)

    def fail(self, model: Model, message: str, now: float, final: bool = False, retry_s: float | None = None) -> None:
        """Record a failed load; reconciliation rejects the requests that wait for it."""
        pause = min(FAILURE_MAX_S, FAILURE_BASE_S * 2.0 ** min(model.failures, 10))
        model.load_failed(message, now, retry_s if retry_s is not None else now + pause, final)
        self.state.journal.note(ModelLoadFailed(model.name, message, final))
        if not final and stays_loaded(self.state, model):
            due(self.state, model)

    def forgive(self, process: str, now: float) -> None:
        """Allow loads on a process again at once."""
        for name in self.state.hosted.get(process, ()):
            model = self.state.models.get(name)
            if model is not None:
                model.clear_failure(now)
                model.sleepless_until_s = now

    def requires(self, name: str, missing: tuple[str, ...], now: float) -> None:
        """Unload a model whose files went missing; load it again once they are back."""
        model = self.state.models.get(name)
        if model is None or model.missing == missing:
            return
        model.missing = missing
        self.state.journal.note(PrerequisitesChanged(name, Subject.MODEL, missing))
        if missing:
            for placement in list(model.placements.values()):
                self.leave(placement, now, f"missing: {', '.join(missing)}", returns=True)
        else:
            model.clear_failure(now)
            if stays_loaded(self.state, model) and not model.placements:
                due(self.state, model)

    # -- by time ----------------------------------------------------------------------------------------------------------

    def _expire(self, placement: Placement, now: float) -> None:
        deadline = ttl_deadline(self.state, placement)
        if deadline is not None and now >= deadline:
            ttl_s = self.state.models[placement.model].spec.ttl_s
            self.leave(placement, now, f"idle for {ttl_s:g} s")

    def deadlines(self, placement: Placement) -> Iterator[float]:
        """Yield the times at which `reconcile` may decide otherwise without an event."""
        if placement.step is not None:
            yield from self.sleeping.deadlines(placement)
        elif placement.state is Residency.LOADING and placement.ordered:
            yield self._load_deadline(placement)
        elif placement.state is Residency.UNLOADING and not placement.ordered:
            yield placement.retry_s
        ttl = ttl_deadline(self.state, placement)
        if ttl is not None and placement.closing is None:
            yield ttl
