"""Models: which are in memory, which come, which go.

The rules of this file
- A reservation is taken when a load is decided and given back when the memory was seen to be free, never earlier.
- A model that is a process of its own follows its process; a model held by a server is loaded and unloaded by order.
- A failed load is remembered with the time before which it is not tried again; the requests that waited for it are told.
- What should stay (preload, or a process that always runs) comes back by itself, but evicts nobody for it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from fleetd.core.commands import Load, Unload
from fleetd.core.facts import Facts
from fleetd.core.measuring import learn, over_budget_victims
from fleetd.core.planner import Fits, Never, plan
from fleetd.core.state import RESTING, SERVING, Model, Placement, Process, ProcessState, Residency

UNLOAD_ATTEMPTS = 3
FAILURE_BASE_S = 5.0
FAILURE_MAX_S = 300.0


class Residencies:
    def __init__(self, facts: Facts) -> None:
        self.facts = facts

    # -- orders -------------------------------------------------------------------------------------------------------

    def start(self, model: Model, process: Process, now: float, reason: str) -> Placement:
        """Reserve and begin to load. Raises CapacityError when the room is not there (a bug of the caller)."""
        need = model.footprint.bytes
        self.facts.ledger.reserve((model.name, process.name), need)
        placement = self.facts.place(model, process.name, now, reason)
        placement.generation = process.generation
        model.preload_due = False
        self.facts.due.discard(model.name)
        self.facts.journal.note(model.name, f"ABSENT -> LOADING on {process.name}: {reason}")
        return placement

    def leave(self, placement: Placement, now: float, reason: str, evicted: bool = False) -> None:
        """Unload as soon as nothing is in flight; no new grants from now on."""
        if placement.state is Residency.UNLOADING:
            return
        if placement.closing is None:
            self.facts.journal.note(placement.model, f"leaving {placement.process}: {reason}")
        placement.closing, placement.evicted = reason, evicted
        self._leave_if_idle(placement, now)

    def _leave_if_idle(self, placement: Placement, now: float) -> None:
        if (
            placement.closing
            and not placement.in_flight
            and placement.state in (Residency.LOADED, Residency.ASLEEP, Residency.LOADING)
        ):
            self._move(placement, Residency.UNLOADING, now, placement.closing)

    # -- reconciliation -----------------------------------------------------------------------------------------------

    def reconcile(self, now: float) -> None:
        for name in sorted(key for key, models in self.facts.placed.items() if models):
            process = self.facts.processes.get(name)
            for placement in list(self.facts.placements_on(name)):
                if process is None:
                    self.facts.drop(placement)
                elif process.spec.own_model is not None:
                    self._follow(placement, process, now)
                else:
                    self._serve(placement, process, now)
                if placement.closing:
                    self._leave_if_idle(placement, now)
                elif placement.state is Residency.LOADED:
                    self._expire(placement, now)
        self._preload(now)
        for placement in over_budget_victims(self.facts):
            self.leave(placement, now, "measured memory exceeds the budget", evicted=True)

    def _follow(self, placement: Placement, process: Process, now: float) -> None:
        """A model that is its process."""
        model = self.facts.models[placement.model]
        state = process.state
        if placement.state is Residency.UNLOADING:
            if state in RESTING:
                self.gone(placement)
        elif placement.state is Residency.LOADING:
            if state in (ProcessState.READY, ProcessState.DRAINING):
                self._loaded(placement, process.generation, now)
            elif state in (ProcessState.FAILED, ProcessState.EXITED):
                self.fail(model, process.reason, now, final=True)
                self.gone(placement, again=False)
            elif state in RESTING and not self.usable(process):
                self.gone(placement)
            elif state is ProcessState.BACKOFF and process.generation > placement.generation:
                self.fail(model, process.reason, now, retry_s=process.next_start_s)
                placement.generation = process.generation
                if not self.stays(model):
                    self.gone(placement)
        elif state not in SERVING:
            placement.generation = process.generation
            self._move(placement, Residency.LOADING, now, f"{process.name} is {state}: {process.reason}")

    def _serve(self, placement: Placement, process: Process, now: float) -> None:
        """A model held by a server."""
        lost = placement.generation != process.generation or process.state in RESTING
        if placement.state is Residency.LOADING:
            if placement.ordered and lost and process.state in RESTING:
                self.fail(
                    self.facts.models[placement.model], f"{process.name} ended while loading: {process.reason}", now
                )
                self.gone(placement)
            elif process.state in RESTING and (
                process.stopped or process.state in (ProcessState.FAILED, ProcessState.EXITED)
            ):
                self.fail(
                    self.facts.models[placement.model], f"{process.name} is {process.state}: {process.reason}", now
                )
                self.gone(placement)
            elif not placement.ordered and process.state in (ProcessState.READY, ProcessState.UNHEALTHY):
                placement.generation, placement.ordered = process.generation, True
                self.facts.emit(Load(placement.model, process.name, process.generation, placement.reason))
            elif placement.ordered and not lost and now >= self._load_deadline(placement):
                timeout_s = self.facts.models[placement.model].spec.load_timeout_s
                self.fail(self.facts.models[placement.model], f"not loaded within {timeout_s:g} s", now)
                self._move(placement, Residency.UNLOADING, now, "the load took too long")
        elif lost:
            if process.state in RESTING or process.state in SERVING:
                self.gone(placement)
        elif (
            placement.state is Residency.UNLOADING
            and not placement.ordered
            and process.state in SERVING
            and now >= placement.since_s + self._pause(placement)
        ):
            placement.ordered = True
            self.facts.emit(Unload(placement.model, process.name, process.generation, placement.reason))

    def _pause(self, placement: Placement) -> float:
        return 0.0 if not placement.attempts else 0.5 * 2.0**placement.attempts

    def _load_deadline(self, placement: Placement) -> float:
        return placement.since_s + self.facts.models[placement.model].spec.load_timeout_s

    def stays(self, model: Model) -> bool:
        """Return whether the configuration wants this model in memory without being asked."""
        holders = [self.facts.processes[name].spec for name in model.spec.holders if name in self.facts.processes]
        return model.spec.preload or any(spec.own_model is not None and not spec.on_demand for spec in holders)

    def _loaded(self, placement: Placement, generation: int, now: float) -> None:
        model = self.facts.models[placement.model]
        placement.generation, placement.loaded_s, placement.last_used_s = generation, now, now
        self._move(placement, Residency.LOADED, now, "loaded")
        model.loads += 1
        model.load_s = now - placement.order_s
        model.failure, model.failure_final, model.failures, model.retry_s = None, False, 0, 0.0

    def loaded(self, placement: Placement, measured: Mapping[str, int], now: float) -> None:
        """The server says that it holds the model."""
        if placement.state is not Residency.LOADING:
            return
        self._loaded(placement, placement.generation, now)
        if measured:
            learn(self.facts, placement, measured)

    def unload_failed(self, placement: Placement, process: Process, message: str) -> None:
        """Try again a few times; a server that cannot unload is restarted."""
        placement.ordered = False
        placement.attempts += 1
        if placement.attempts >= UNLOAD_ATTEMPTS and process.restart_wanted is None:
            process.restart_wanted = f"cannot unload {placement.model}: {message}"
            placement.attempts = 0

    def gone(self, placement: Placement, again: bool = True) -> None:
        """The memory was seen to be free: unloaded by order, or by itself."""
        model = self.facts.models[placement.model]
        if placement.state is Residency.UNLOADING and placement.evicted:
            model.evictions += 1
        left_by_itself = placement.state is not Residency.UNLOADING
        self.facts.journal.note(
            model.name, f"{placement.state} -> ABSENT on {placement.process}: {placement.closing or placement.reason}"
        )
        self.facts.drop(placement)
        if again and self.stays(model) and (left_by_itself or not model.spec.preload) and not model.placements:
            self.due(model)

    def fail(self, model: Model, message: str, now: float, final: bool = False, retry_s: float | None = None) -> None:
        """Remember a failed load; the requests that wait for it will be told."""
        model.failures += 1
        pause = min(FAILURE_MAX_S, FAILURE_BASE_S * 2.0 ** min(model.failures - 1, 10))
        model.failure, model.failure_s, model.failure_final = message, now, final
        model.retry_s = retry_s if retry_s is not None else now + pause
        self.facts.journal.note(model.name, f"load failed: {message}")
        if self.stays(model) and not final:
            self.due(model)

    # -- what stays, what goes ------------------------------------------------------------------------------------------

    def due(self, model: Model) -> None:
        """Want it loaded without being asked, as soon as there is room."""
        if model.name in self.facts.leaving:
            return
        model.preload_due = True
        self.facts.due.add(model.name)

    def _expire(self, placement: Placement, now: float) -> None:
        deadline = self.ttl_deadline(placement)
        if deadline is not None and now >= deadline:
            ttl_s = self.facts.models[placement.model].spec.ttl_s
            self.leave(placement, now, f"idle for {ttl_s:g} s")

    def ttl_deadline(self, placement: Placement) -> float | None:
        """Return when an idle placement leaves by itself; None: not as things stand."""
        model = self.facts.models[placement.model]
        spec = model.spec
        if (
            placement.state is not Residency.LOADED
            or placement.in_flight
            or model.waiting
            or model.pinned
            or not spec.ttl_s
        ):
            return None
        process = self.facts.processes.get(placement.process)
        if process is not None and process.spec.own_model is not None and not process.spec.on_demand:
            return None
        return placement.last_used_s + spec.ttl_s

    def _preload(self, now: float) -> None:
        """Load what should stay, where there is room without evicting anybody; one per server at a time."""
        if self.facts.shutting_down:
            return
        for name in sorted(self.facts.due, key=lambda key: (-self.facts.models[key].spec.priority, key)):
            model = self.facts.models[name]
            if model.placements or now < model.retry_s or model.failure_final:
                continue
            process = self.holder(model)
            if process is None:
                continue
            verdict = plan(model.footprint.bytes, (name, process.name), self.facts.resident(), self.facts.ledger, now)
            if isinstance(verdict, Fits):
                self.start(model, process, now, "preload" if model.spec.preload else "always running")
            elif isinstance(verdict, Never) and not verdict.pinned:
                self.fail(model, verdict.reason, now, final=True)

    def holder(self, model: Model, avoid: tuple[str, ...] = ()) -> Process | None:
        """Return the best process for a new placement: usable, not holding it yet, with the fewest models on it."""
        usable = [
            process
            for index, name in enumerate(model.spec.holders)
            if (process := self.facts.processes.get(name)) is not None
            and self.usable(process)
            and name not in model.placements
            and name not in avoid
        ]
        if not usable:
            return None
        return min(
            usable,
            key=lambda process: (
                process.state is not ProcessState.READY and not process.spec.on_demand,
                len(self.facts.placed.get(process.name, ())),
            ),
        )

    def usable(self, process: Process) -> bool:
        """Return whether a model may be placed on it now or soon."""
        if process.stopped or process.removed or not process.spec.enabled or process.missing or process.drained:
            return False
        return process.state not in (ProcessState.FAILED, ProcessState.EXITED)

    def deadlines(self, placement: Placement) -> Iterator[float]:
        if placement.state is Residency.LOADING and placement.ordered:
            yield self._load_deadline(placement)
        elif placement.state is Residency.UNLOADING and placement.attempts and not placement.ordered:
            yield placement.since_s + self._pause(placement)
        ttl = self.ttl_deadline(placement)
        if ttl is not None and placement.closing is None:
            yield ttl

    def _move(self, placement: Placement, state: Residency, now: float, reason: str) -> None:
        self.facts.journal.note(placement.model, f"{placement.state} -> {state} on {placement.process}: {reason}")
        placement.move(state, now, reason)
        self.facts.wake(placement.process)
