"""Actions of an operator: send an event to the fleet, then wait until the goal is reached or cannot be reached.

Invariants:
- Several names are handled in the order of their dependencies: started from the bottom, stopped from the top.
- A start or a stop is on disk before the answer.
- An action continues when its client stops waiting.
- A wait is tied to a generation, a placement or an order, never to a state that may pass by; a later order ends it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence

from fleetd.control.port import ActOptions
from fleetd.control.wire import PROCESS_VERBS, ActionResult, ResultCode
from fleetd.core.data import events as e
from fleetd.core.data.commands import Reject
from fleetd.core.data.state import RESTING, RUNNING, Model, Process, ProcessState, Residency
from fleetd.daemon.api.gateway import DaemonFleetPort
from fleetd.daemon.async_tools import ChangeSignal
from fleetd.daemon.context import DaemonContext
from fleetd.daemon.effects.processes import Processes
from fleetd.errors import ApiError, HostError

SAVED_WITHIN_S = 2.0
SETTLE_S = 1.0  # a process that died before has to stay up this long before a start counts as done
_PERSISTED = frozenset({"start", "stop"})
_S = ProcessState
Finding = tuple[ResultCode, str]

_EVENTS: Mapping[str, Callable[[str], e.Event]] = {
    "start": e.StartRequested,
    "stop": e.StopRequested,
    "restart": e.RestartRequested,
    "drain": e.DrainRequested,
    "undrain": lambda name: e.DrainRequested(name, drain=False),
    "pin": e.PinRequested,
    "unpin": lambda name: e.PinRequested(name, pin=False),
}


class Actions:
    """Carries out `act` of the control API."""

    def __init__(
        self,
        context: DaemonContext,
        changes: ChangeSignal,
        processes: Processes,
        port: DaemonFleetPort,
        saved: Callable[[], Awaitable[str | None]],
    ) -> None:
        """`saved` returns once everything is on disk; otherwise why it is not."""
        self._saved = saved
        self._queries = context.queries
        self._dispatch = context.dispatch
        self._changes = changes
        self._processes = processes
        self._port = port

    async def act(self, verb: str, names: Sequence[str], options: ActOptions) -> list[ActionResult]:
        """Apply one verb to each name; the results are in the order of `names`."""
        if verb == "signal":
            return [await self._signal(name, options.signal or "") for name in names]
        ordered = self._ordered(names, stopping=verb == "stop") if verb in PROCESS_VERBS else list(names)
        unsteady = {name for name in ordered if verb in ("start", "restart") and self._is_unsteady(name)}
        checks = {name: self._send(verb, name, options) for name in ordered}
        unsaved = await self._wait_until_saved()
        findings: dict[str, tuple[ResultCode, str | None]] = dict.fromkeys(names, (ResultCode.ACCEPTED, None))
        if options.wait:
            found = await asyncio.gather(*(self._await(checks[name], options.timeout_s) for name in ordered))
            findings = dict(zip(ordered, found, strict=True))
        if verb == "load":
            findings = {name: self._still_loaded(name, *one) for name, one in findings.items()}
        elif verb in PROCESS_VERBS and options.wait:
            if unsteady:
                await self._changes.wait_for(lambda: self._any_left(unsteady), SETTLE_S)
            findings = {name: self._at_the_end(name, checks[name], *one) for name, one in findings.items()}
        results = [self._result(name, *findings[name]) for name in names]
        return [{**result, "warning": unsaved} for result in results] if unsaved and verb in _PERSISTED else results

    async def _wait_until_saved(self) -> str | None:
        """Return a warning if the request is not saved in SAVED_WITHIN_S, else None."""
        try:
            why = await asyncio.wait_for(asyncio.shield(self._saved()), SAVED_WITHIN_S)
        except TimeoutError:
            why = f"the disk did not respond within {SAVED_WITHIN_S:g} s"
        return f"succeeded but could not be saved; it will be lost when the daemon restarts: {why}" if why else None

    async def settled(
        self, names: Sequence[str], generations: Mapping[str, int], options: ActOptions
    ) -> list[ActionResult]:
        """Wait until each process runs a newer generation and reached its goal."""

        def check_of(name: str) -> Callable[[], Finding | None]:
            return lambda: self._started(name, generations[name] if generations.get(name) else None)

        found = await asyncio.gather(*(self._await(check_of(name), options.timeout_s) for name in names))
        findings = zip(names, found, strict=True)
        return [self._result(name, *self._at_the_end(name, check_of(name), *one)) for name, one in findings]

    def _at_the_end(
        self, name: str, check: Callable[[], Finding | None], code: ResultCode, reason: str | None
    ) -> tuple[ResultCode, str | None]:
        """Check again after all waits: each result reports the state at the end."""
        found, process = check(), self._queries.process(name)
        if found is not None or code is not ResultCode.OK or process is None:
            return found or (code, reason)
        return ResultCode.FAILED, f"was {reason}, then {process.state}: {process.reason}"

    def _is_unsteady(self, name: str) -> bool:
        """Return whether it died before and nothing but time shows whether it stays up now."""
        process = self._queries.process(name)
        if process is None or process.spec.probes.startup or process.spec.probes.readiness:
            return False
        return process.state in (_S.FAILED, _S.BACKOFF) and process.spec.capabilities.owns_process

    def _any_left(self, names: Collection[str]) -> bool | None:
        """Return True once one of the processes is no longer up, and its end is settled; else None."""
        found = [self._queries.process(name) for name in names]
        up = (_S.READY, _S.STOPPING)
        return True if any(process is not None and process.state not in up for process in found) else None

    def _send(self, verb: str, name: str, options: ActOptions) -> Callable[[], Finding | None]:
        """Send the event to the fleet, and return a check of whether it is done."""
        process = self._queries.process(name)
        generation = process.generation if process is not None else 0
        if verb == "load":
            return self._request_load(name)
        if verb == "unload":
            return self._request_unload(name)
        if verb == "restart" and name in options.broad and process is not None and _passed_over(process):
            return lambda: (ResultCode.OK, "does not run; left as it is")
        if verb == "restart" and options.rolling:
            self._dispatch(e.RestartDue(name, "restarted by an operator, in turn", revive=True, in_turn=True))
        else:
            self._dispatch(_EVENTS[verb](name))
        if verb in ("start", "restart"):
            overtaken = self._overtaken(name, lambda one: not one.stopped, "overtaken by a stop")
            since = generation if verb == "restart" else None
            return lambda: self._started(name, since) or overtaken()
        if verb == "stop":
            overtaken = self._overtaken(name, lambda one: one.stopped, "overtaken by a start")
            return lambda: self._stopped(name, generation) or overtaken()
        if verb == "drain":
            overtaken = self._overtaken(name, lambda one: one.drained, "overtaken by an undrain")
            return lambda: self._drained(name) or overtaken()
        return lambda: (ResultCode.OK, "")

    def _overtaken(self, name: str, holds: Callable[[Process], bool], reason: str) -> Callable[[], Finding | None]:
        """Return a check of whether a later order took back what this one recorded."""
        recorded = False

        def check() -> Finding | None:
            nonlocal recorded
            process = self._queries.process(name)
            if process is None:
                return None
            if holds(process):
                recorded = True
                return None
            return (ResultCode.FAILED, reason) if recorded else None

        check()  # now: the first look of the wait comes after the disk
        return check

    async def _await(self, check: Callable[[], Finding | None], timeout_s: float) -> tuple[ResultCode, str | None]:
        found = await self._changes.wait_for(check, timeout_s)
        return found if found is not None else (ResultCode.TIMEOUT, None)

    def _result(self, name: str, code: ResultCode, reason: str | None) -> ActionResult:
        process, model = self._queries.process(name), self._queries.model(name)
        state = (
            str(model.state)
            if process is None and model is not None
            else str(process.state)
            if process is not None
            else None
        )
        if not reason and process is not None:
            reason = process.reason
        result: ActionResult = {"name": name, "result": str(code), "state": state, "reason": reason or None}
        if code is not ResultCode.OK:
            result["hint"] = self._hint(process, model)
        elif process is not None and process.stopped and process.spec.own_model is not None:
            result["hint"] = (
                f"requests for {process.spec.own_model} fail until: fleetctl start {name}; "
                f"to free only its memory: fleetctl unload {process.spec.own_model}"
            )
        return result

    def _hint(self, process: Process | None, model: Model | None) -> str | None:
        now = time.monotonic()
        if process is not None and not (model is not None and model.failure):
            return self._queries.process_advice(process, now).hint
        return self._queries.model_advice(model, now).hint if model is not None else None

    # -- checks ---------------------------------------------------------------------------------------------------------

    def _started(self, name: str, since: int | None) -> Finding | None:
        process = self._queries.process(name)
        if process is None:
            return ResultCode.FAILED, "no longer in the fleet"
        fresh = since is None or process.generation > since
        if process.state is _S.READY and fresh and process.restart_wanted is None:
            return ResultCode.OK, "ready"
        if process.state is _S.EXITED and fresh:
            return ResultCode.OK, process.reason
        if process.state is _S.FAILED or (process.state is _S.BLOCKED and not self._queries.can_start(process)):
            return ResultCode.FAILED, process.reason
        if process.state is _S.STOPPED and not self._queries.is_wanted(process):
            if process.spec.on_demand and not process.stopped:
                return ResultCode.OK, "starts when its model is requested"
            return ResultCode.FAILED, process.reason
        return None

    def _stopped(self, name: str, generation: int) -> Finding | None:
        process = self._queries.process(name)
        if process is not None and process.generation > generation and not process.stopped:
            return ResultCode.OK, "stopped, then started again"
        if process is None or process.state not in RUNNING:
            if process is not None and process.state is _S.FAILED and process.survivors:
                return ResultCode.FAILED, process.reason
            return ResultCode.OK, "stopped"
        return None

    def _drained(self, name: str) -> Finding | None:
        process = self._queries.process(name)
        if process is None or not self._queries.in_flight(name):
            return ResultCode.OK, "no request in flight"
        return None

    def _request_load(self, name: str) -> Callable[[], Finding | None]:
        rejections: list[str] = []
        known = self._queries.model(name)
        loads, wakes = (known.loads, known.wakes) if known is not None else (0, 0)

        def reject(command: Reject) -> None:
            rejections.append(command.reason)
            self._changes.notify()

        request_id = self._port.watch_load(reject)
        self._dispatch(e.LoadRequested(name, request_id))

        def check() -> Finding | None:
            model = self._queries.model(name)
            found: Finding | None = None
            if model is None:
                found = ResultCode.FAILED, "no longer in the fleet"
            elif rejections:
                found = ResultCode.FAILED, rejections[0]
            elif model.loads > loads or model.state is Residency.LOADED:
                woken = "woken" if model.wakes > wakes else "was already loaded"
                found = ResultCode.OK, "loaded" if model.loads > loads else woken
            elif not model.placements and not model.waiting:
                found = ResultCode.FAILED, model.failure or self._reason_left(name)
            if found is not None:
                self._port.unwatch_load(request_id)
            return found

        return check

    def _still_loaded(self, name: str, code: ResultCode, reason: str | None) -> tuple[ResultCode, str | None]:
        """Return the result, or a failure if the model has left memory since."""
        model = self._queries.model(name)
        if code is not ResultCode.OK or (model is not None and model.state is Residency.LOADED):
            return code, reason
        return ResultCode.FAILED, self._reason_left(name)

    def _reason_left(self, name: str) -> str:
        reason = self._queries.reason_left(name)
        return f"loaded, then left memory: {reason or f'see fleetctl story {name}'}"

    def _request_unload(self, name: str) -> Callable[[], Finding | None]:
        """Unload what is in memory now. A load that a later request starts does not prolong the wait."""
        known = self._queries.model(name)
        leaving = list(known.placements.values()) if known is not None else []
        self._dispatch(e.UnloadRequested(name))

        def check() -> Finding | None:
            model = self._queries.model(name)
            placements = list(model.placements.values()) if model is not None else []
            if any(one is placement for one in placements for placement in leaving):
                return None
            if placements:
                return ResultCode.OK, f"unloaded, loaded again: {placements[0].reason}"
            return ResultCode.OK, "not in memory"

        return check

    # -- signals and order ---------------------------------------------------------------------------------------------------------

    async def _signal(self, name: str, signal: str) -> ActionResult:
        try:
            sent = await self._processes.signal(name, signal)
        except HostError as error:
            raise ApiError(400, "invalid_request", str(error)) from error
        if sent:
            return self._result(name, ResultCode.OK, f"{signal} sent")
        return self._result(name, ResultCode.FAILED, "not running")

    def _ordered(self, names: Sequence[str], *, stopping: bool) -> list[str]:
        """Return names in the order of their dependencies; reversed for a stop."""
        wanted, done, order = set(names), set(), []

        def visit(name: str, path: tuple[str, ...]) -> None:
            process = self._queries.process(name)
            if name in done or name in path or process is None:
                return
            for dependency in process.spec.depends_on:
                visit(dependency.name, (*path, name))
            done.add(name)
            if name in wanted:
                order.append(name)

        for name in names:
            visit(name, ())
        return order[::-1] if stopping else order


def _passed_over(process: Process) -> bool:
    """Return whether `restart all` leaves it alone: it was stopped by hand, or waits for a request."""
    return process.state in RESTING and (process.stopped or process.spec.on_demand or not process.spec.enabled)
