"""Actions of an operator: an event to the fleet, then a look until the goal is reached or cannot be.

The rules of this file
- Each verb is one row: the event that it posts, and how its end looks.
- The order of several names follows their dependencies: started from the bottom, stopped from the top.
- What lasts (a stop) is in its file before the answer.
- Waiting is for people: what was asked for goes on when they stop waiting.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence

from fleetd.control.port import ActOptions
from fleetd.control.wire import PROCESS_VERBS, Outcome, OutcomeCode
from fleetd.core.data import events as e
from fleetd.core.data.commands import Reject
from fleetd.core.data.state import RUNNING, ProcessState, Residency
from fleetd.daemon.api.gateway import DaemonFleetPort
from fleetd.daemon.async_tools import ChangeSignal
from fleetd.daemon.context import DaemonContext
from fleetd.daemon.effects.processes import Processes
from fleetd.errors import ApiError, HostError
from fleetd.host.host import Host

KEPT_WITHIN_S = 2.0
_REMEMBERED = frozenset({"start", "stop"})
_S = ProcessState
Judgement = tuple[OutcomeCode, str]

_EVENTS: Mapping[str, Callable[[str], e.Event]] = {
    "start": e.StartAsked,
    "stop": e.StopAsked,
    "restart": e.RestartAsked,
    "drain": e.DrainAsked,
    "undrain": lambda name: e.DrainAsked(name, drain=False),
    "unload": e.UnloadAsked,
    "pin": e.PinAsked,
    "unpin": lambda name: e.PinAsked(name, pin=False),
}


class Verbs:
    """Carries out `act` of the control plane."""

    def __init__(
        self,
        context: DaemonContext,
        changes: ChangeSignal,
        host: Host,
        processes: Processes,
        port: DaemonFleetPort,
        kept: Callable[[], Awaitable[str | None]],
    ) -> None:
        """`kept` returns once everything is on the disk, with what the disk refused."""
        self._kept = kept
        self._queries = context.queries
        self._dispatch = context.dispatch
        self._changes = changes
        self._processes = processes
        self._host = host
        self._port = port

    async def act(self, verb: str, names: Sequence[str], options: ActOptions) -> list[Outcome]:
        """Do one verb to each name; the outcomes come in the order of `names`."""
        if verb == "signal":
            return [await self._signal(name, options.signal or "") for name in names]
        ordered = self._ordered(names, stopping=verb == "stop") if verb in PROCESS_VERBS else list(names)
        looks = {name: self._post(verb, name) for name in ordered}
        lost = await self._keep()
        judged: dict[str, tuple[OutcomeCode, str | None]] = dict.fromkeys(names, (OutcomeCode.ACCEPTED, None))
        if options.wait:
            found = await asyncio.gather(*(self._await(looks[name], options.timeout_s) for name in ordered))
            judged = dict(zip(ordered, found, strict=True))
        if verb == "load":
            judged = {name: self._still_loaded(name, *one) for name, one in judged.items()}
        elif verb in PROCESS_VERBS and options.wait:
            judged = {name: self._by_now(name, looks[name], *one) for name, one in judged.items()}
        outcomes = [self._outcome(name, *judged[name]) for name in names]
        return [{**outcome, "warning": lost} for outcome in outcomes] if lost and verb in _REMEMBERED else outcomes

    async def _keep(self) -> str | None:
        """Return why what was asked for does not outlive the daemon, if so; a disk that hangs is waited for this long only."""
        try:
            why = await asyncio.wait_for(asyncio.shield(self._kept()), KEPT_WITHIN_S)
        except TimeoutError:
            why = f"the disk did not take it within {KEPT_WITHIN_S:g} s"
        return f"this does not outlive fleetd: {why}" if why else None

    async def settled(self, names: Sequence[str], generations: Mapping[str, int], options: ActOptions) -> list[Outcome]:
        """Wait until each process runs a newer generation than given and is where it should be."""

        def look_at(name: str) -> Callable[[], Judgement | None]:
            return lambda: self._started(name, generations[name] if generations.get(name) else None)

        found = await asyncio.gather(*(self._await(look_at(name), options.timeout_s) for name in names))
        judged = zip(names, found, strict=True)
        return [self._outcome(name, *self._by_now(name, look_at(name), *one)) for name, one in judged]

    def _by_now(
        self, name: str, look: Callable[[], Judgement | None], code: OutcomeCode, reason: str | None
    ) -> tuple[OutcomeCode, str | None]:
        """Judge once more when all others were waited for too: the state that stands beside it is the state of then."""
        found, process = look(), self._queries.process(name)
        if found is not None or code is not OutcomeCode.OK or process is None:
            return found or (code, reason)
        return OutcomeCode.FAILED, f"it was {reason}, and is {process.state} by now: {process.reason}"

    def _post(self, verb: str, name: str) -> Callable[[], Judgement | None]:
        """Tell the fleet, and return how to see that it is done."""
        process = self._queries.process(name)
        generation = process.generation if process is not None else 0
        if verb == "load":
            return self._ask_load(name)
        self._dispatch(_EVENTS[verb](name))
        if verb in ("start", "restart"):
            return lambda: self._started(name, generation if verb == "restart" else None)
        if verb == "stop":
            return lambda: self._stopped(name)
        if verb == "drain":
            return lambda: self._drained(name)
        if verb == "unload":
            return lambda: self._unloaded(name)
        return lambda: (OutcomeCode.OK, "")

    async def _await(self, look: Callable[[], Judgement | None], timeout_s: float) -> tuple[OutcomeCode, str | None]:
        found = await self._changes.wait_for(look, timeout_s)
        return found if found is not None else (OutcomeCode.TIMEOUT, None)

    def _outcome(self, name: str, code: OutcomeCode, reason: str | None) -> Outcome:
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
        return {"name": name, "result": str(code), "state": state, "reason": reason or None}

    # -- how an end looks -----------------------------------------------------------------------------------------------

    def _started(self, name: str, since: int | None) -> Judgement | None:
        process = self._queries.process(name)
        if process is None:
            return OutcomeCode.FAILED, "it is no longer in the fleet"
        fresh = since is None or process.generation > since
        if process.state is _S.READY and fresh and process.restart_wanted is None:
            return OutcomeCode.OK, "ready"
        if process.state is _S.EXITED and fresh:
            return OutcomeCode.OK, process.reason
        if process.state is _S.FAILED or (process.state is _S.BLOCKED and not self._queries.can_start(process)):
            return OutcomeCode.FAILED, process.reason
        if process.state is _S.STOPPED and not self._queries.is_wanted(process):
            if process.spec.on_demand and not process.stopped:
                return OutcomeCode.OK, "it starts when its model is wanted"
            return OutcomeCode.FAILED, process.reason
        return None

    def _stopped(self, name: str) -> Judgement | None:
        process = self._queries.process(name)
        if process is None or process.state not in RUNNING:
            if process is not None and process.state is _S.FAILED and "cannot be killed" in process.reason:
                return OutcomeCode.FAILED, process.reason
            return OutcomeCode.OK, "stopped"
        return None

    def _drained(self, name: str) -> Judgement | None:
        process = self._queries.process(name)
        if process is None or not self._queries.in_flight(name):
            return OutcomeCode.OK, "nothing is in flight"
        return None

    def _ask_load(self, name: str) -> Callable[[], Judgement | None]:
        refused: list[str] = []
        known = self._queries.model(name)
        loads, wakes = (known.loads, known.wakes) if known is not None else (0, 0)

        def reject(command: Reject) -> None:
            refused.append(command.reason)
            self._changes.notify()

        request_id = self._port.wish(reject)
        self._dispatch(e.LoadAsked(name, request_id))

        def look() -> Judgement | None:
            model = self._queries.model(name)
            found: Judgement | None = None
            if model is None:
                found = OutcomeCode.FAILED, "it is no longer in the fleet"
            elif refused:
                found = OutcomeCode.FAILED, refused[0]
            elif model.state is Residency.LOADED:
                woken = "woken" if model.wakes > wakes else "it was loaded already"
                found = OutcomeCode.OK, "loaded" if model.loads > loads else woken
            elif not model.placements and not model.waiting:
                found = OutcomeCode.FAILED, model.failure or self._left_again(name)
            if found is not None:
                self._port.forget_wish(request_id)
            return found

        return look

    def _still_loaded(self, name: str, code: OutcomeCode, reason: str | None) -> tuple[OutcomeCode, str | None]:
        """Return the same, or a failure where the model left again while others were waited for."""
        model = self._queries.model(name)
        if code is not OutcomeCode.OK or (model is not None and model.state is Residency.LOADED):
            return code, reason
        return OutcomeCode.FAILED, self._left_again(name)

    def _left_again(self, name: str) -> str:
        start = f"{name}: leaving "
        notes = (note for entry in self._queries.journal_of(name) for note in entry.notes if note.startswith(start))
        *_, last = ("", *notes)
        why = last.removeprefix(start).partition(": ")[2]
        return f"it was loaded, and is no longer: {why or f'fleetctl story {name} says why'}"

    def _unloaded(self, name: str) -> Judgement | None:
        model = self._queries.model(name)
        return (OutcomeCode.OK, "not in memory") if model is None or not model.placements else None

    # -- the rest ---------------------------------------------------------------------------------------------------------

    async def _signal(self, name: str, signal: str) -> Outcome:
        run = self._processes.runs.get(name)
        if run is None or run.handle is None or run.dead:
            return self._outcome(name, OutcomeCode.FAILED, "it is not running")
        try:
            sent = await self._host.signal(run.handle, signal)
        except HostError as error:
            raise ApiError(400, "invalid_request", str(error)) from error
        return self._outcome(
            name, OutcomeCode.OK if sent else OutcomeCode.FAILED, f"{signal} sent" if sent else "it is gone"
        )

    def _ordered(self, names: Sequence[str], *, stopping: bool) -> list[str]:
        """Return names so that what others need comes first; reversed for a stop."""
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
