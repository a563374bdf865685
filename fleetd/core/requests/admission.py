"""The line of requests: who is served now, who waits, who is told no.

The rules of this file
- Every request ends in exactly one of granted, rejected, cancelled. Every wait has a deadline, the line has a limit.
- Warm models first: whoever can be served by what is in memory is served, in order. Then the head of the line gets its model.
- First in line holds the line: what an earlier request needs room on, no later request may start on.
- A busy model keeps its grants while a head waits for it to leave, until the head has waited for the fairness bound; from then
  on it only drains. So A B C A B C costs two swaps, and nobody waits for ever.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from fleetd.core.data.commands import Grant, ReadAhead
from fleetd.core.data.events import LoadAsked, RequestArrived
from fleetd.core.data.fleet_state import Facts, Waiting
from fleetd.core.data.journal import LoadRequestDone
from fleetd.core.data.state import Model, Placement, Process, ProcessState, Residency
from fleetd.core.models.candidates import holder, sleeper, to_wake
from fleetd.core.models.eviction import Evict, Fits, Never, Wait, demand_at, plan
from fleetd.core.models.reconcile import Residencies
from fleetd.core.requests.queue import Line
from fleetd.core.requests.routing import elsewhere, resolve, serving

_RETRY_AFTER_S = 2.0
_NAME_SHOWN = 200


class Admission:
    def __init__(self, facts: Facts, residencies: Residencies) -> None:
        self.facts = facts
        self.residencies = residencies
        self.line = Line(facts)

    # -- the warm path: one dictionary look-up away from its answer ---------------------------------------------------------

    def take(self, request_id: int, name: str, now: float) -> Placement | None:
        """Grant at once what needs no thought, and say where; None: it does."""
        facts = self.facts
        model = facts.models.get(facts.names.get(name, name))
        if model is None or model.waiting or facts.shutting_down or model.spec.routes:
            return None
        placement = serving(facts, model, (), facts.closed)
        if placement is None:
            return None
        self._count(model, placement, now)
        facts.granted[request_id] = (placement, now)
        return placement

    def finish(self, request_id: int, now: float) -> Placement | None:
        """Give the slot back; return the placement, or None when the request was not granted."""
        entry = self.facts.granted.pop(request_id, None)
        if entry is None:
            return None
        placement = entry[0]
        placement.in_flight -= 1
        placement.last_used_s = now
        model = self.facts.models.get(placement.model)
        if model is not None:
            model.last_used_s = now
        return placement

    def _count(self, model: Model, placement: Placement, now: float) -> None:
        model.demand = demand_at(model, now) + 1.0
        model.demand_s = model.last_used_s = placement.last_used_s = now
        placement.in_flight += 1

    # -- the line -----------------------------------------------------------------------------------------------------------

    def arrive(self, event: RequestArrived, now: float) -> None:
        facts = self.facts
        model, fallback = resolve(facts, event.model, now)
        if model is not None and event.avoid:
            model, fallback = elsewhere(facts, model, fallback, event.avoid, now)
        if facts.shutting_down:
            self.line.reject(event.request_id, "draining", "the fleet is shutting down", _RETRY_AFTER_S)
        elif model is None:
            said = event.model if len(event.model) <= _NAME_SHOWN else event.model[:_NAME_SHOWN] + "..."
            self.line.reject(event.request_id, "model_not_found", f"the model {said!r} does not exist in this fleet")
        else:
            patience_s, priority = self.line.deadline(model, now), model.spec.priority
            waiting = Waiting(event.request_id, model.name, now, patience_s, priority, event.avoid, fallback)
            placement = None if model.waiting else serving(facts, model, event.avoid, facts.closed)
            if placement is None:
                self.line.enter(waiting, now)
            else:
                self._grant(waiting, model, placement, now)

    def wish(self, event: LoadAsked, now: float) -> None:
        """An operator wants a model in memory: a place in the line that needs no grant."""
        model, _ = resolve(self.facts, event.model, now)
        if model is None:
            self.line.reject(
                event.request_id, "model_not_found", f"the model {event.model!r} does not exist in this fleet"
            )
            return
        model.failure, model.failure_final, model.retry_s = None, False, now
        until = now + model.spec.load_timeout_s
        self.line.enter(Waiting(event.request_id, model.name, now, until, model.spec.priority, client=False), now)

    def _order(self, now: float) -> list[Waiting]:
        bound = self.facts.spec.queue.max_wait_s
        for waiting in self.facts.queue.values():
            waiting.overdue = now >= waiting.arrived_s + bound
        return sorted(
            self.facts.queue.values(), key=lambda w: (0, 0, w.arrived_s) if w.overdue else (1, -w.priority, w.arrived_s)
        )

    def reconcile(self, now: float) -> None:
        """Serve the line as far as it goes."""
        self.facts.closed, self.facts.held = set(), set()
        if not self.facts.queue:
            return
        for waiting in list(self.facts.queue.values()):
            self.line.give_up(waiting, now)
        line = self._order(now)
        closed = self.facts.closed = self._drains(line, now)
        for waiting in line:
            if waiting.request_id in self.facts.queue:
                self._serve_warm(waiting, closed, now)
        awaited: set[tuple[str, str]] = set()
        for waiting in line:
            if waiting.request_id in self.facts.queue:
                self._bring(waiting, self.facts.held, awaited, now)

    # -- from memory ----------------------------------------------------------------------------------------------------------

    def _drains(self, line: list[Waiting], now: float) -> set[tuple[str, str]]:
        """Return the placements that give no more grants: a head has waited beyond the bound for them to leave, or comes before
        all that they could be given to."""
        awaited: set[tuple[str, str]] = set()
        models = self.facts.models
        lowest = min((model.spec.priority for model in self.facts.resident().values()), default=0)
        for waiting in line:
            if waiting.request_id not in self.facts.queue or not (waiting.overdue or waiting.priority > lowest):
                return set()
            model = models[waiting.model]
            asleep = sleeper(self.facts, model)
            if model.placements and (asleep is None or _spreads(model)):
                awaited.update(placement.key for placement in model.placements.values())
                continue
            where = self._where(waiting, model, asleep)
            if where is None:
                continue
            verdict = plan(
                where[1],
                (model.name, where[0].name),
                self.facts.resident(),
                self.facts.ledger,
                now,
                awaited,
            )
            leaving: tuple[Placement, ...] = ()
            if isinstance(verdict, Evict):  # idle by now: theirs to leave, not to be given out again
                leaving = verdict.victims
            elif isinstance(verdict, Wait):
                leaving = verdict.drain
            if not waiting.overdue and any(models[p.model].spec.priority >= waiting.priority for p in leaving):
                leaving = ()
            still_there = all(name in self.facts.placed.get(process, ()) for name, process in waiting.closes)
            if not (leaving and waiting.closes and still_there):
                waiting.closes = frozenset(placement.key for placement in leaving)
            return set(waiting.closes)
        return set()

    def _serve_warm(self, waiting: Waiting, closed: set[tuple[str, str]], now: float) -> None:
        model = self.facts.models[waiting.model]
        if not waiting.client:
            if self.line.has_loaded(model):
                self.line.leave(waiting.request_id)
                self.facts.journal.note(LoadRequestDone(model.name))  # no request waits for it now: reconcile again
            return
        placement = serving(self.facts, model, waiting.avoid, closed)
        if placement is None and waiting.avoid and set(waiting.avoid) >= set(model.placements):
            placement = serving(self.facts, model, (), closed)
        if placement is None:
            return
        self.line.leave(waiting.request_id)
        self._grant(waiting, model, placement, now)

    def _grant(self, waiting: Waiting, model: Model, placement: Placement, now: float) -> None:
        self._count(model, placement, now)
        self.facts.granted[waiting.request_id] = (placement, now)
        load_s = 0.0 if waiting.load_began_s is None else now - max(waiting.load_began_s, waiting.arrived_s)
        wait_s = now - waiting.arrived_s
        where = (placement.process, placement.generation)
        self.facts.emit(Grant(waiting.request_id, model.name, *where, wait_s, load_s, waiting.why))

    def _awaited(self, name: str) -> str:
        """Say what a server that is not ours answers instead of being ready: nobody here can do more than tell it."""
        process = self.facts.processes.get(name)
        if process is None or process.spec.capabilities.owns_process or process.state is not ProcessState.STARTING:
            return ""
        return f", which is not ready: {process.startup_detail}" if process.startup_detail else ""

    # -- from disk --------------------------------------------------------------------------------------------------------------

    def _bring(self, waiting: Waiting, held: set[str], awaited: set[tuple[str, str]], now: float) -> None:
        """Bring the model of a request that no memory serves; hold its devices against later starts when it has to wait."""
        model = self.facts.models[waiting.model]
        coming = [p for p in model.placements.values() if p.state is Residency.LOADING and not p.closing]
        awaited.update(p.key for p in model.placements.values())
        if coming:
            waiting.load_began_s = waiting.load_began_s or coming[0].order_s
            waiting.why = f"{model.name} is loading on {coming[0].process}{self._awaited(coming[0].process)}"
            return
        asleep = sleeper(self.facts, model)
        where = self._where(waiting, model, asleep)
        if where is None:
            waiting.why = f"every server that may hold {model.name} is busy or not ready"
            return
        if self.facts.unseen:
            waiting.why = f"looking at what {min(self.facts.unseen)} holds after a restart of the daemon"
            return
        process, need = where
        spread = _spreads(model)
        if held & set(need):
            waiting.why = "an earlier request holds the line"
            return
        verdict = plan(need, (model.name, process.name), self.facts.resident(), self.facts.ledger, now, awaited)
        if isinstance(verdict, Fits):
            waiting.load_began_s = now
            self._begin(waiting, model, process, asleep, now)
        elif isinstance(verdict, Never):
            if not spread:
                self.line.out(
                    waiting,
                    "model_blocked" if verdict.pinned else "model_too_large",
                    verdict.reason,
                    now,
                    30.0 if verdict.pinned else None,
                )
        elif not spread:
            self._wait_for_room(waiting, model, verdict, held, now)

    def _where(
        self, waiting: Waiting, model: Model, asleep: Placement | None
    ) -> tuple[Process, Mapping[str, int]] | None:
        """Return where to bring the model, and the bytes that takes; None: no server can take it now."""
        if asleep is not None:
            return self.facts.processes[asleep.process], to_wake(self.facts, asleep)
        process = holder(self.facts, model, waiting.avoid) or holder(self.facts, model)
        return None if process is None else (process, model.footprint.bytes)

    def _begin(self, waiting: Waiting, model: Model, process: Process, asleep: Placement | None, now: float) -> None:
        reason = f"wanted by request {waiting.request_id}"
        waiting.why = f"{model.name} is loading on {process.name}"
        if asleep is None:
            self.residencies.start(model, process, now, reason, for_line=True)
        else:
            waiting.why = f"{model.name} is waking on {process.name}"
            self.residencies.sleeping.wake(asleep, now, reason, for_line=True)

    def _wait_for_room(self, waiting: Waiting, model: Model, verdict: Evict | Wait, held: set[str], now: float) -> None:
        first = not held
        held.update(model.footprint.bytes)
        if isinstance(verdict, Evict):
            names = ", ".join(victim.model for victim in verdict.victims)
            waiting.why = f"waiting for {names} to be unloaded"
            for victim in verdict.victims:
                if victim in verdict.sleepers:
                    waiting.why = f"waiting for {names} to go to sleep"
                    self.residencies.sleeping.begin(victim, now, f"evicted for {model.name}", model.name)
                else:
                    self.residencies.leave(
                        victim, now, f"evicted for {model.name}", returns=True, evicted=True, by=model.name
                    )
        else:
            waiting.why = verdict.reason
        if first and waiting.load_began_s is None:
            self.facts.emit(ReadAhead(model.name, f"next in line while it waits: {waiting.why}"))
        waiting.load_began_s = waiting.load_began_s or now

    def deadlines(self) -> Iterator[float]:
        """Yield when the line may move by time alone: an end of patience, a head that becomes overdue, a fallback that may be tried
        again."""
        for waiting in self.facts.queue.values():
            yield waiting.deadline_s
            for name in waiting.fallback:
                other = self.facts.models.get(self.facts.names.get(name, name))
                if other is not None and other.failure:
                    yield other.retry_s
            if not waiting.overdue:
                yield waiting.arrived_s + self.facts.spec.queue.max_wait_s


def _spreads(model: Model) -> bool:
    """Return whether it is in memory elsewhere, but full, leaving or unhealthy: nobody is evicted for one more of it."""
    return any(placement.state is not Residency.ASLEEP for placement in model.placements.values())
