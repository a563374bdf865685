"""Sleep, Wake and CheckSleep carried out by engines that can sleep.

Invariants:
- Every command is answered by one SleepSeen, also when the process exits on the way. Every error is FAILED: the core then
  kills the process, because the content of its memory is unknown.
- What a wake needs (the sleep level, the earlier answer) is kept per run of the process, and is on disk before the sleep
  is reported. It is withdrawn before a wake begins: an adopted engine that sleeps without it has failed half-way.
- The calls go straight to the engine's own port, which is on loopback; the gateway has no route that leads to them.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

from fleetd.core.data.commands import CheckSleep, Sleep, Wake
from fleetd.core.data.events import SleepSeen
from fleetd.core.data.specs import ModelSpec, SleepState
from fleetd.daemon.context import DaemonContext
from fleetd.daemon.effects.model_loads import ModelLoads
from fleetd.engines.base import Endpoint, Sleeper, SleepRecord
from fleetd.errors import EngineError, FleetError
from fleetd.host.state_store import StateStore
from fleetd.resolver.launch_plan import LaunchPlan

LOOK_TIMEOUT_S = 10.0
PREFIX = "asleep:"
C = TypeVar("C", Sleep, Wake, CheckSleep)


class Sleepers:
    """Carry out Sleep, Wake and CheckSleep; an exit cancels the call."""

    def __init__(self, context: DaemonContext, loads: ModelLoads, store: StateStore) -> None:
        self._store = store
        self._http = context.http
        self._dispatch = context.dispatch
        self._config = context.config
        self._loads = loads
        self._known: dict[str, tuple[int, SleepRecord]] = {}  # process to generation and what its last sleep returned

    def sleep(self, command: Sleep) -> None:
        self._carry_out(command, self._sleep, self._spec(command.model).sleep_timeout_s)

    def wake(self, command: Wake) -> None:
        self._carry_out(command, self._wake, self._spec(command.model).load_timeout_s)

    def look(self, command: CheckSleep) -> None:
        self._carry_out(command, self._look, LOOK_TIMEOUT_S)

    def _spec(self, model: str) -> ModelSpec:
        return self._config.model_specs.get(model) or ModelSpec(model)

    def _carry_out(self, command: C, work: Callable[[C, float], Awaitable[SleepState]], timeout_s: float) -> None:
        title = f"{type(command).__name__.lower()} {command.model} on {command.process}"
        self._loads.call(command.process, self._answered(command, work, timeout_s), title)

    async def _answered(self, command: C, work: Callable[[C, float], Awaitable[SleepState]], timeout_s: float) -> None:
        state, failure = SleepState.FAILED, ""
        try:
            async with asyncio.timeout(timeout_s):
                state = await work(command, timeout_s)
        except TimeoutError:
            failure = f"no answer within {timeout_s:g} s"
        except FleetError as error:
            failure = error.sentence
        except asyncio.CancelledError:
            self._seen(command, state, f"{command.process} ended")
            raise
        except Exception as error:  # noqa: BLE001 - a command without an answer would wedge the model
            failure = f"unexpected failure: {type(error).__name__}: {error}"
        self._seen(command, state, failure)

    def _seen(self, command: Sleep | Wake | CheckSleep, state: SleepState, failure: str) -> None:
        self._dispatch(SleepSeen(command.model, command.process, command.generation, state, failure))

    def _target(self, process: str) -> tuple[LaunchPlan, Endpoint, Sleeper]:
        plan = self._config.plans.get(process)
        if plan is None or plan.endpoint is None:
            raise EngineError(f"{process} is no longer in fleet.yaml", recoverable=False)
        if plan.engine.sleep is None:
            raise EngineError(f"{process}: the engine {plan.engine_name} cannot sleep", recoverable=False)
        return plan, plan.endpoint, plan.engine.sleep

    def _known_of(self, process: str, generation: int) -> SleepRecord | None:
        known = self._known.get(process)
        return known[1] if known is not None and known[0] == generation else None

    async def _keep(self, process: str, generation: int, asleep: SleepRecord, sleeps: bool) -> None:
        self._known[process] = (generation, asleep)
        value = {"generation": generation, "level": asleep.level, "said": asleep.canary, "sleeps": sleeps}
        self._store.put(PREFIX + process, value)
        await self._store.flush()

    async def _sleep(self, command: Sleep, timeout_s: float) -> SleepState:
        plan, endpoint, engine = self._target(command.process)
        before = self._known_of(command.process, command.generation)
        found = await engine.sleep(self._http.session, endpoint, plan.context.options, before, timeout_s)
        await self._keep(command.process, command.generation, found, sleeps=True)
        return SleepState.ASLEEP

    async def _wake(self, command: Wake, timeout_s: float) -> SleepState:
        _, endpoint, engine = self._target(command.process)
        before = self._known_of(command.process, command.generation)
        if before is None:
            raise EngineError(f"the sleep level of {command.model} is unknown")
        await self._keep(command.process, command.generation, before, sleeps=False)
        await engine.wake(self._http.session, endpoint, before, timeout_s)
        return SleepState.AWAKE

    async def _look(self, command: CheckSleep, timeout_s: float) -> SleepState:
        _, endpoint, engine = self._target(command.process)
        sleeps = await engine.is_asleep(self._http.session, endpoint, timeout_s)
        kept = await self._store.get(PREFIX + command.process)
        known = kept if isinstance(kept, dict) and kept.get("generation") == command.generation else {}
        if isinstance(known.get("level"), int):
            self._known[command.process] = (command.generation, SleepRecord(known["level"], known.get("said")))
        if sleeps and not (known.get("sleeps") is True and command.process in self._known):
            raise EngineError("it is asleep, and its last transition was interrupted")
        return SleepState.ASLEEP if sleeps else SleepState.AWAKE
