"""Probes: run again and again, each answer an event. The core judges them; here they are only asked.

The rules of this file
- One task per process and kind of probe; a new StartProbe of the same kind replaces it, StopProbes and death end it.
- A startup probe is asked often at first, since a model server can be up within milliseconds; it ends with its first success.
- What answers must be ours: the first success of a generation counts only if the listener belongs to the process' own set.
- A completion probe is spared while real answers arrive: a request that succeeded within the period is the better proof.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from fleetd.core.commands import StartProbe, StopProbes
from fleetd.core.contract import ProbeKind, ProbeSpec
from fleetd.core.events import Event, ProbeResult
from fleetd.daemon.launches import LaunchPlan
from fleetd.daemon.machine import Machine
from fleetd.daemon.processes import Processes, Run
from fleetd.daemon.tasks import Tasks
from fleetd.engines.base import ProbeOutcome
from fleetd.errors import FleetError

if TYPE_CHECKING:
    from aiohttp import ClientSession

_FIRST_PERIOD_S = 0.005
_GROWTH = 1.25


class Prober:
    """Runs the probes of all processes. `last_success(process)` is when a real request last succeeded, monotonic."""

    def __init__(
        self,
        machine: Machine,
        http: Callable[[], ClientSession],
        dispatch: Callable[[Event], None],
        processes: Processes,
        plan_of: Callable[[str], LaunchPlan | None],
        tasks: Tasks,
        last_success: Callable[[str], float] = lambda _: 0.0,
    ) -> None:
        self._machine = machine
        self._http = http
        self._dispatch = dispatch
        self._processes = processes
        self._plan_of = plan_of
        self._tasks = tasks
        self._last_success = last_success
        self._running: dict[tuple[str, ProbeKind], asyncio.Task[None]] = {}
        self._ours: dict[str, int] = {}  # process to the generation whose listener was proven

    def start(self, command: StartProbe) -> None:
        plan = self._plan_of(command.name)
        spec = getattr(plan.probes, command.probe) if plan is not None else None
        if plan is None or spec is None:
            self._dispatch(ProbeResult(command.name, command.generation, command.probe, True, "no probe"))
            return
        key = (command.name, command.probe)
        old = self._running.pop(key, None)
        if old is not None:
            old.cancel()
        self._running[key] = self._tasks.start(
            self._repeat(command, plan, spec), f"{command.probe} probe of {command.name}"
        )

    def stop(self, command: StopProbes) -> None:
        self.process_died(command.name)

    def process_died(self, name: str) -> None:
        """End all probes of a process."""
        for kind in ProbeKind:
            task = self._running.pop((name, kind), None)
            if task is not None and task is not asyncio.current_task():
                task.cancel()

    async def _repeat(self, command: StartProbe, plan: LaunchPlan, spec: ProbeSpec) -> None:
        startup = command.probe is ProbeKind.STARTUP
        pause_s = min(spec.period_s, _FIRST_PERIOD_S) if startup else spec.period_s
        if command.probe is ProbeKind.LIVENESS:
            await asyncio.sleep(spec.period_s)
        said: str | None = None
        while True:
            began = time.monotonic()
            outcome = await self._once(command, plan, spec)
            if outcome.ok or not startup or outcome.detail != said:
                said = outcome.detail
                self._dispatch(ProbeResult(command.name, command.generation, command.probe, outcome.ok, outcome.detail))
            if startup and outcome.ok:
                return
            await asyncio.sleep(max(0.001, pause_s - (time.monotonic() - began)))
            pause_s = min(spec.period_s, pause_s * _GROWTH)

    async def _once(self, command: StartProbe, plan: LaunchPlan, spec: ProbeSpec) -> ProbeOutcome:
        """Ask once; everything that goes wrong is an answer. A probe of our own making that fails is said as such."""
        run = self._processes.run_of(command.name, command.generation)
        try:
            async with asyncio.timeout(spec.timeout_s):
                if spec.completion:
                    outcome = await self._completion(command.name, plan, spec)
                else:
                    outcome = await self._machine.probe(spec, plan, run.handle if run is not None else None)
                if outcome.ok and run is not None:
                    return await self._proven(run, plan, outcome)
                return outcome
        except TimeoutError:
            return ProbeOutcome(False, f"no answer within {spec.timeout_s:g} s")
        except FleetError as error:
            return ProbeOutcome(False, str(error))
        except OSError as error:
            return ProbeOutcome(False, error.strerror or str(error))
        except Exception as error:  # noqa: BLE001 - a probe that cannot be asked has failed, and the loop must go on
            return ProbeOutcome(False, f"unexpected failure: {type(error).__name__}: {error}")

    async def _completion(self, name: str, plan: LaunchPlan, spec: ProbeSpec) -> ProbeOutcome:
        if time.monotonic() - self._last_success(name) < spec.period_s:
            return ProbeOutcome(True, "a real request just succeeded")
        if plan.endpoint is None:
            return ProbeOutcome(False, "it has no port to ask")
        return await plan.engine.alive(self._http(), plan.endpoint, plan.own_model, spec.timeout_s)

    async def _proven(self, run: Run, plan: LaunchPlan, outcome: ProbeOutcome) -> ProbeOutcome:
        """Return `outcome` if what listens on the port is ours."""
        port = plan.context.port
        if port is None or run.handle is None or self._ours.get(run.name) == run.generation:
            return outcome
        if not await self._machine.answers_on(run.handle, port):
            return ProbeOutcome(False, f"another program answers on port {port}")
        self._ours[run.name] = run.generation
        return outcome
