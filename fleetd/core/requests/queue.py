"""The queue of requests: entering, leaving, and every rejection.

Invariants:
- A rejection has a reason in one sentence with the numbers, and where possible a time to retry after.
- A refused request first tries the fallback models of its model.
"""

from __future__ import annotations

from dataclasses import dataclass

from fleetd.core.advice import load_hint, loading_detail, needs_operator, serving_hint
from fleetd.core.data.commands import Reject
from fleetd.core.data.fleet_state import FleetState, QueuedRequest
from fleetd.core.data.journal import RequestFellBack
from fleetd.core.data.state import Model, Process, ProcessState, Residency
from fleetd.core.models.candidates import best_process, can_still_serve, out_of_reach
from fleetd.core.requests.routing import relieved, serving

_RETRY_AFTER_S = 2.0


@dataclass(frozen=True, slots=True)
class RejectionTerms:
    """What a client can do about a rejection: the seconds to wait, the next command, and whether a retry cannot help."""

    retry_after_s: float | None = None
    hint: str | None = None
    final: bool = False


_PLAIN = RejectionTerms()


class RequestQueue:
    def __init__(self, state: FleetState) -> None:
        self.state = state

    def deadline(self, model: Model, arrived_s: float) -> float:
        return arrived_s + model.spec.queue_timeout_s

    def enter(self, waiting: QueuedRequest, now: float) -> None:
        state = self.state
        model = state.models[waiting.model]
        full = len(state.queue) >= state.spec.queue.max
        no_place = (
            model.waiting >= model.spec.queue_max and serving(state, model, waiting.avoid, state.draining) is None
        )
        if (full or no_place) and waiting.client:
            whose = "the fleet's queue" if full else f"the queue of {model.name}"
            self.refuse(waiting, "queue_full", f"{whose} is full", now, RejectionTerms(self.patience(model)))
            return
        state.queue[waiting.request_id] = waiting
        model.waiting += 1

    def leave(self, request_id: int) -> QueuedRequest | None:
        """Take a request out of the queue."""
        waiting = self.state.queue.pop(request_id, None)
        if waiting is not None:
            model = self.state.models.get(waiting.model)
            if model is not None:
                model.waiting -= 1
        return waiting

    def refuse_hopeless(self, waiting: QueuedRequest, now: float) -> None:
        """Reject a request whose model failed or is blocked, or whose time is over."""
        state = self.state
        model = state.models.get(waiting.model)
        if model is None or model.name in state.leaving:
            self.leave(waiting.request_id)
            self.refuse(waiting, "model_not_found", f"the model {waiting.model!r} is no longer in this fleet", now)
        elif state.shutting_down:
            self.leave(waiting.request_id)
            self.reject(waiting.request_id, "draining", "the fleet is shutting down", _RETRY_AFTER_S)
        elif now >= waiting.deadline_s:
            self._time_out(waiting, model, now)
        elif model.missing and not self.has_loaded(model):
            reason = f"{model.name} cannot be served: missing: {', '.join(model.missing)}"
            hint = "it loads as soon as what is missing is there"
            self.out(waiting, "model_blocked", reason, now, RejectionTerms(30.0, hint))
        elif (
            model.failure
            and (model.failure_final or model.failure_s >= waiting.arrived_s or now < model.retry_s)
            and not self.has_loaded(model)
        ):
            self.out(
                waiting,
                "model_failed",
                f"{model.name} failed to load: {model.failure}",
                now,
                RejectionTerms(max(1.0, model.retry_s - now), load_hint(model), final=model.failure_final),
            )
        elif (
            not any(can_still_serve(state, p) for p in model.placements.values()) and best_process(state, model) is None
        ):
            self.blocked(waiting, model, now)
        elif relieved(state, model, waiting.fallback, now) or self._foreign(model):
            self.out(
                waiting,
                "model_failed",
                f"{model.name} cannot be served: {self._standings(model)}",
                now,
                RejectionTerms(self.patience(model), serving_hint(state, model)),
            )

    def _foreign(self, model: Model) -> bool:
        """Return whether only external servers have the model and none of them answers."""
        processes = [p for name in model.spec.holders if (p := self.state.processes.get(name)) is not None]
        return out_of_reach(self.state, model) and not any(p.spec.capabilities.owns_process for p in processes)

    def withdraw(self, model: Model, reason: str) -> None:
        """Cancel the loads of a model that an operator requested."""
        for waiting in [w for w in self.state.queue.values() if w.model == model.name and not w.client]:
            self.leave(waiting.request_id)
            self.reject(waiting.request_id, "model_blocked", f"{model.name} was {reason}", model=model.name)

    def has_loaded(self, model: Model) -> bool:
        return any(p.state is Residency.LOADED and p.step is None for p in model.placements.values())

    def blocked(self, waiting: QueuedRequest, model: Model, now: float) -> None:
        """Reject a request without a possible process, with the state of each."""
        processes = [p for name in model.spec.holders if (p := self.state.processes.get(name)) is not None]
        if any(p.drained and not p.stopped for p in processes):
            code = "draining"
        elif any(p.state in (ProcessState.FAILED, ProcessState.EXITED) and not p.impossible for p in processes):
            code = "model_failed"
        else:
            code = "model_blocked"
        refusal = RejectionTerms(30.0, serving_hint(self.state, model), final=needs_operator(self.state, model))
        self.out(waiting, code, f"{model.name} cannot be served: {self._standings(model)}", now, refusal)

    def _time_out(self, waiting: QueuedRequest, model: Model, now: float) -> None:
        """Reject a request whose time is over: its load is slow, or there was no room."""
        loading = next((p for p in model.placements.values() if p.state is Residency.LOADING and not p.closing), None)
        if loading is not None:
            text = loading_detail(self.state, loading, now)
            hint = f"raise models.{model.name}.queue.timeout"
        else:
            text, hint = (
                f"no room within {now - waiting.arrived_s:.1f} s: {waiting.reason}",
                f"fleetctl explain {model.name}",
            )
        self.out(waiting, "queue_timeout", text, now, RejectionTerms(hint=hint))

    def _standings(self, model: Model) -> str:
        processes = [p for name in model.spec.holders if (p := self.state.processes.get(name)) is not None]
        return "; ".join(f"{p.name} is {self._standing(p)}" for p in processes) or "no process serves it"

    def _standing(self, process: Process) -> str:
        if process.stopped:
            return "stopped by an operator"
        if process.drained:
            return "drained by an operator"
        if process.missing:
            return f"{process.state}: missing: {', '.join(process.missing)}"
        return f"{process.state}: {process.startup_detail or process.reason}"

    def out(self, waiting: QueuedRequest, code: str, reason: str, now: float, refusal: RejectionTerms = _PLAIN) -> None:
        self.leave(waiting.request_id)
        self.refuse(waiting, code, reason, now, refusal)

    def refuse(
        self, waiting: QueuedRequest, code: str, reason: str, now: float, refusal: RejectionTerms = _PLAIN
    ) -> None:
        """Reject, or queue for a fallback model; a timeout is final."""
        for index, name in enumerate(waiting.fallback if code != "queue_timeout" else ()):
            model = self.state.models.get(self.state.names.get(name, name))
            if model is None or model.spec.routes or model.name == waiting.model:
                continue
            self.state.journal.note(RequestFellBack(model.name, waiting.request_id, waiting.model, reason))
            waiting.model, waiting.fallback = model.name, waiting.fallback[index + 1 :]
            waiting.deadline_s, waiting.load_began_s = self.deadline(model, waiting.arrived_s), None
            self.enter(waiting, now)
            return
        known = waiting.model if waiting.model in self.state.models else ""
        hint, final = refusal.hint, refusal.final
        self.state.emit(Reject(waiting.request_id, code, reason, refusal.retry_after_s, known, hint, final))

    def reject(
        self, request_id: int, code: str, reason: str, retry_after_s: float | None = None, model: str = ""
    ) -> None:
        self.state.emit(Reject(request_id, code, reason, retry_after_s, model))

    def patience(self, model: Model) -> float:
        return max(1.0, min(120.0, model.load_s or _RETRY_AFTER_S))
