"""Grant requests, queue them, and load models for the queue.

Invariants:
- Every request ends as exactly one of granted, rejected, cancelled. Every wait has a deadline, and the queue has a limit.
- Requests that a loaded model can serve are granted first, in order; then the first waiting request gets its model.
- The first waiting request claims its devices: no later request may start on them.
- A busy model keeps its grants until the waiting request exceeds the fairness bound; from then on it only drains. So A B C A B C
  costs two swaps, and no request waits forever.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from fleetd.core.data.commands import Grant, ReadAhead
from fleetd.core.data.events import LoadRequested, RequestArrived
from fleetd.core.data.fleet_state import FleetState, QueuedRequest
from fleetd.core.data.journal import LoadRequestDone
from fleetd.core.data.state import Model, Placement, Process, ProcessState, Residency
from fleetd.core.models.candidates import best_process, bytes_to_wake, sleeping_placement
from fleetd.core.models.eviction import Evict, Fits, Never, Wait, demand_at, plan
from fleetd.core.models.reconcile import ModelLoader
from fleetd.core.requests.queue import RejectionTerms, RequestQueue
from fleetd.core.requests.routing import elsewhere, resolve, serving

_RETRY_AFTER_S = 2.0
_NAME_SHOWN = 200


class Admission:
    def __init__(self, state: FleetState, loader: ModelLoader) -> None:
        self.state = state
        self.loader = loader
        self.queue = RequestQueue(state)

    # -- the warm path ---------------------------------------------------------

    def take(self, request_id: int, name: str, now: float) -> Placement | None:
        """Grant a request for a loaded model at once; None: the request needs the queue."""
        state = self.state
        model = state.models.get(state.names.get(name, name))
        if model is None or model.waiting or state.shutting_down or model.spec.routes:
            return None
        placement = serving(state, model, (), state.draining)
        if placement is None:
            return None
        self._count(model, placement, now)
        state.granted[request_id] = (placement, now)
        return placement

    def finish(self, request_id: int, now: float) -> Placement | None:
        """Free the slot of a request; return its placement, or None if it was not granted."""
        entry = self.state.granted.pop(request_id, None)
        if entry is None:
            return None
        placement = entry[0]
        placement.in_flight -= 1
        placement.last_used_s = now
        model = self.state.models.get(placement.model)
        if model is not None:
            model.last_used_s = now
        return placement

    def _count(self, model: Model, placement: Placement, now: float) -> None:
        model.demand = demand_at(model, now) + 1.0
        model.demand_s = model.last_used_s = placement.last_used_s = now
        placement.in_flight += 1

    # -- the line -----------------------------------------------------------------------------------------------------------

    def arrive(self, event: RequestArrived, now: float) -> None:
        state = self.state
        model, fallback = resolve(state, event.model, now)
        if model is not None and event.avoid:
            model, fallback = elsewhere(state, model, fallback, event.avoid, now)
        if state.shutting_down:
            self.queue.reject(event.request_id, "draining", "the fleet is shutting down", _RETRY_AFTER_S)
        elif model is None:
            shown = event.model if len(event.model) <= _NAME_SHOWN else event.model[:_NAME_SHOWN] + "..."
            self.queue.reject(event.request_id, "model_not_found", f"the model {shown!r} does not exist in this fleet")
        else:
            patience_s, priority = self.queue.deadline(model, now), model.spec.priority
            waiting = QueuedRequest(event.request_id, model.name, now, patience_s, priority, event.avoid, fallback)
            placement = None if model.waiting else serving(state, model, event.avoid, state.draining)
            if placement is None:
                self.queue.enter(waiting, now)
            else:
                self._grant(waiting, model, placement, now)

    def request_load(self, event: LoadRequested, now: float) -> None:
        """Queue a load that an operator requested; it needs no grant."""
        model, _ = resolve(self.state, event.model, now)
        if model is None:
            self.queue.reject(
                event.request_id, "model_not_found", f"the model {event.model!r} does not exist in this fleet"
            )
            return
        model.clear_failure(now)
        until = now + model.spec.load_timeout_s
        self.queue.enter(
            QueuedRequest(event.request_id, model.name, now, until, model.spec.priority, client=False), now
        )

    def _order(self, now: float) -> list[QueuedRequest]:
        bound = self.state.spec.queue.max_wait_s
        for waiting in self.state.queue.values():
            waiting.overdue = now >= waiting.arrived_s + bound
        return sorted(
            self.state.queue.values(), key=lambda w: (0, 0, w.arrived_s) if w.overdue else (1, -w.priority, w.arrived_s)
        )

    def reconcile(self, now: float) -> None:
        """Grant, reject and load for the queue as far as possible."""
        self.state.draining, self.state.claimed = set(), set()
        if not self.state.queue:
            return
        for waiting in list(self.state.queue.values()):
            self.queue.refuse_hopeless(waiting, now)
        line = self._order(now)
        draining = self.state.draining = self._drains(line, now)
        for waiting in line:
            if waiting.request_id in self.state.queue:
                self._serve_warm(waiting, draining, now)
        awaited: set[tuple[str, str]] = set()
        for waiting in line:
            if waiting.request_id in self.state.queue:
                self._load_for(waiting, self.state.claimed, awaited, now)

    # -- from memory ----------------------------------------------------------------------------------------------------------

    def _drains(self, line: list[QueuedRequest], now: float) -> set[tuple[str, str]]:
        """Return the placements that get no more grants.

        The first request waited beyond the fairness bound for them, or outranks every request that they could serve.
        """
        awaited: set[tuple[str, str]] = set()
        models = self.state.models
        lowest = min((model.spec.priority for model in self.state.resident().values()), default=0)
        for waiting in line:
            if waiting.request_id not in self.state.queue or not (waiting.overdue or waiting.priority > lowest):
                return set()
            model = models[waiting.model]
            asleep = sleeping_placement(self.state, model)
            if model.placements and (asleep is None or _spreads(model)):
                awaited.update(placement.key for placement in model.placements.values())
                continue
            where = self._where(waiting, model, asleep)
            if where is None:
                continue
            verdict = plan(
                where[1],
                (model.name, where[0].name),
                self.state.resident(),
                self.state.ledger,
                now,
                awaited,
            )
            leaving: tuple[Placement, ...] = ()
            if isinstance(verdict, Evict):  # idle now: they must leave, not be granted again
                leaving = verdict.victims
            elif isinstance(verdict, Wait):
                leaving = verdict.drain
            if not waiting.overdue and any(models[p.model].spec.priority >= waiting.priority for p in leaving):
                leaving = ()
            still_there = all(name in self.state.placed.get(process, ()) for name, process in waiting.closes)
            if not (leaving and waiting.closes and still_there):
                waiting.closes = frozenset(placement.key for placement in leaving)
            return set(waiting.closes)
        return set()

    def _serve_warm(self, waiting: QueuedRequest, draining: set[tuple[str, str]], now: float) -> None:
        model = self.state.models[waiting.model]
        if not waiting.client:
            if self.queue.has_loaded(model):
                self.queue.leave(waiting.request_id)
                self.state.journal.note(LoadRequestDone(model.name))  # no request waits for it now: reconcile again
            return
        placement = serving(self.state, model, waiting.avoid, draining)
        if placement is None and waiting.avoid and set(waiting.avoid) >= set(model.placements):
            placement = serving(self.state, model, (), draining)
        if placement is None:
            return
        self.queue.leave(waiting.request_id)
        self._grant(waiting, model, placement, now)

    def _grant(self, waiting: QueuedRequest, model: Model, placement: Placement, now: float) -> None:
        self._count(model, placement, now)
        self.state.granted[waiting.request_id] = (placement, now)
        load_s = 0.0 if waiting.load_began_s is None else now - max(waiting.load_began_s, waiting.arrived_s)
        wait_s = now - waiting.arrived_s
        where = (placement.process, placement.generation)
        self.state.emit(Grant(waiting.request_id, model.name, *where, wait_s, load_s, waiting.reason))

    def _awaited(self, name: str) -> str:
        """Return the last answer of an external server that is not ready, or ""."""
        process = self.state.processes.get(name)
        if process is None or process.spec.capabilities.owns_process or process.state is not ProcessState.STARTING:
            return ""
        return f", which is not ready: {process.startup_detail}" if process.startup_detail else ""

    # -- from disk --------------------------------------------------------------------------------------------------------------

    def _load_for(self, waiting: QueuedRequest, claimed: set[str], awaited: set[tuple[str, str]], now: float) -> None:
        """Load the model of a waiting request; if it must wait, claim its devices."""
        model = self.state.models[waiting.model]
        coming = [p for p in model.placements.values() if p.state is Residency.LOADING and not p.closing]
        awaited.update(p.key for p in model.placements.values())
        if coming:
            waiting.load_began_s = waiting.load_began_s or coming[0].order_s
            waiting.reason = f"{model.name} is loading on {coming[0].process}{self._awaited(coming[0].process)}"
            return
        asleep = sleeping_placement(self.state, model)
        where = self._where(waiting, model, asleep)
        if where is None:
            waiting.reason = f"every server that may hold {model.name} is busy or not ready"
            return
        if self.state.unobserved:
            waiting.reason = f"checking which models {min(self.state.unobserved)} has after a restart of fleetd"
            return
        process, need = where
        spread = _spreads(model)
        if claimed & set(need):
            waiting.reason = "an earlier request waits for the same device"
            return
        verdict = plan(need, (model.name, process.name), self.state.resident(), self.state.ledger, now, awaited)
        if isinstance(verdict, Fits):
            waiting.load_began_s = now
            self._begin(waiting, model, process, asleep, now)
        elif isinstance(verdict, Never):
            if not spread:
                self.queue.out(
                    waiting,
                    "model_blocked" if verdict.pinned else "model_too_large",
                    verdict.reason,
                    now,
                    RejectionTerms(30.0 if verdict.pinned else None, verdict.hint, final=True),
                )
        elif not spread:
            self._wait_for_room(waiting, model, verdict, claimed, now)

    def _where(
        self, waiting: QueuedRequest, model: Model, asleep: Placement | None
    ) -> tuple[Process, Mapping[str, int]] | None:
        """Return the process for the model and the bytes needed; None: none for now."""
        if asleep is not None:
            return self.state.processes[asleep.process], bytes_to_wake(self.state, asleep)
        process = best_process(self.state, model, waiting.avoid) or best_process(self.state, model)
        return None if process is None else (process, model.footprint.bytes)

    def _begin(
        self, waiting: QueuedRequest, model: Model, process: Process, asleep: Placement | None, now: float
    ) -> None:
        reason = f"wanted by request {waiting.request_id}"
        waiting.reason = f"{model.name} is loading on {process.name}"
        if asleep is None:
            self.loader.start(model, process, now, reason, for_request=True)
        else:
            waiting.reason = f"{model.name} is waking on {process.name}"
            self.loader.sleeping.wake(asleep, now, reason, for_request=True)

    def _wait_for_room(
        self, waiting: QueuedRequest, model: Model, verdict: Evict | Wait, claimed: set[str], now: float
    ) -> None:
        first = not claimed
        claimed.update(model.footprint.bytes)
        if isinstance(verdict, Evict):
            names = ", ".join(victim.model for victim in verdict.victims)
            waiting.reason = f"waiting for {names} to be unloaded"
            for victim in verdict.victims:
                if victim in verdict.sleepers:
                    waiting.reason = f"waiting for {names} to go to sleep"
                    self.loader.sleeping.begin(victim, now, f"evicted for {model.name}", model.name)
                else:
                    self.loader.leave(
                        victim, now, f"evicted for {model.name}", returns=True, evicted=True, by=model.name
                    )
        else:
            waiting.reason = verdict.reason
        if first and waiting.load_began_s is None:
            self.state.emit(ReadAhead(model.name, f"next in line while it waits: {waiting.reason}"))
        waiting.load_began_s = waiting.load_began_s or now

    def deadlines(self) -> Iterator[float]:
        """Yield the times at which the queue may move without an event."""
        for waiting in self.state.queue.values():
            yield waiting.deadline_s
            for name in waiting.fallback:
                other = self.state.models.get(self.state.names.get(name, name))
                if other is not None and other.failure:
                    yield other.retry_s
            if not waiting.overdue:
                yield waiting.arrived_s + self.state.spec.queue.max_wait_s


def _spreads(model: Model) -> bool:
    """Return whether it is loaded but busy or unhealthy: evict for no second copy."""
    return any(placement.state is not Residency.ASLEEP for placement in model.placements.values())
