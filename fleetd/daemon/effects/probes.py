"""Probes: begun and ended by command; every answer is an event. The host asks, the core judges.

The rules of this file
- One probe per process and kind; a new StartProbe of the same kind replaces it, StopProbes and death end it, and a startup
  probe ends with its first success.
- A completion probe is spared while real answers arrive: a good answer, or a piece of one, within the period is the better
  proof; one that comes while the probe waits makes it good after all.
- A server that sleeps answers no completion, and is well; but one that nobody put to sleep would let requests wait for ever.
- A server with all slots taken may leave the probe waiting: that is no failure, for `_BUSY_S` after the last sign of life.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

from fleetd.core.data.commands import StartProbe, StopProbes
from fleetd.core.data.events import Event, ProbeResult
from fleetd.core.data.specs import ProbeKind, ProbeSpec
from fleetd.daemon.effects.machine import Machine, Probe
from fleetd.daemon.effects.processes import Processes
from fleetd.errors import FleetError
from fleetd.host.probe import Answer, Completion
from fleetd.resolver.launch_plan import LaunchPlan

if TYPE_CHECKING:
    from aiohttp import ClientSession

_REFUSED = re.compile(r"GET \S+: (401|403)\b")
_KEY = "options.api_key"
_BUSY_S = 600.0
_BEFORE_THE_PROBER = 0.95  # of the timeout: the prober's own would cut the excuse off


class Traffic(Protocol):
    """What real requests showed. Times are monotonic seconds."""

    @property
    def heard_s(self) -> Callable[[str], float]:
        """When a good answer of a process, or a piece of one, last came; 0: never."""
        ...

    def full_since(self, process: str) -> float | None:
        """Since when all slots of a model on a process are taken; None: one is free."""
        ...


class Probing:
    """The probes of all processes. `traffic` tells what real requests showed of a process."""

    def __init__(
        self,
        machine: Machine,
        http: Callable[[], ClientSession],
        dispatch: Callable[[Event], None],
        processes: Processes,
        plan_of: Callable[[str], LaunchPlan | None],
        traffic: Traffic,
        may_sleep: Callable[[str], bool] = lambda _: False,
    ) -> None:
        self._may_sleep = may_sleep
        self._machine = machine
        self._http = http
        self._dispatch = dispatch
        self._processes = processes
        self._plan_of = plan_of
        self._traffic = traffic
        self._running: dict[tuple[str, ProbeKind], Probe] = {}
        self.answers: dict[tuple[str, ProbeKind], tuple[float, Answer]] = {}  # the last one, with its wall-clock time

    def start(self, command: StartProbe) -> None:
        plan = self._plan_of(command.name)
        spec: ProbeSpec | None = getattr(plan.probes, command.probe) if plan is not None else None
        if plan is None or spec is None:
            self._dispatch(ProbeResult(command.name, command.generation, command.probe, True, "no probe"))
            return
        key = (command.name, command.probe)
        self._end(key)
        run = self._processes.run_of(command.name, command.generation)

        def answered(answer: Answer) -> None:
            self.answers[key] = (time.time(), answer)
            if answer.ok and command.probe is ProbeKind.STARTUP:
                self._end(key)
            said = answer.detail if answer.ok or not _REFUSED.match(answer.detail) else plan.about(answer.detail, _KEY)
            result = ProbeResult(command.name, command.generation, command.probe, answer.ok, said, answer.final)
            self._dispatch(result)

        completion = self._completion(command.name, plan, spec) if spec.completion else None
        handle = run.handle if run is not None else None
        self._running[key] = self._machine.probe(
            plan, handle, command.generation, command.probe, spec, answered, completion
        )

    def stop(self, command: StopProbes) -> None:
        self.process_died(command.name)

    def process_died(self, name: str) -> None:
        """End all probes of a process."""
        for kind in ProbeKind:
            self._end((name, kind))

    def close(self) -> None:
        """End all probes."""
        for key in list(self._running):
            self._end(key)

    def _end(self, key: tuple[str, ProbeKind]) -> None:
        probe = self._running.pop(key, None)
        if probe is not None:
            probe.close()

    def _excused(self, name: str, began: float, answer: Answer) -> Answer:
        """Return a failed answer as a good one where real requests show that the server only had no time for it."""
        heard = self._traffic.heard_s(name)
        if heard >= began:
            return Answer(True, "busy: it answers real requests meanwhile")
        full = self._traffic.full_since(name)
        if full is not None and time.monotonic() - max(full, heard) < _BUSY_S:
            return Answer(True, "busy: all its slots are taken")
        return answer

    def _completion(self, name: str, plan: LaunchPlan, spec: ProbeSpec) -> Completion:
        async def ask(timeout_s: float) -> Answer:
            began = time.monotonic()
            if began - self._traffic.heard_s(name) < spec.period_s:
                return Answer(True, "it answers real requests")
            if plan.endpoint is None:
                return Answer(False, "it has no port to ask")
            try:
                async with asyncio.timeout(timeout_s * _BEFORE_THE_PROBER):
                    outcome = await plan.engine.alive(self._http(), plan.endpoint, plan.own_model, timeout_s)
                answer = Answer(outcome.ok, plan.about(outcome.detail, outcome.key), outcome.final)
                if outcome.asleep and not self._may_sleep(name):
                    return Answer(False, "it sleeps, and fleetd did not put it to sleep")
            except TimeoutError:
                answer = Answer(False, f"no answer within {timeout_s:g} s")
            except FleetError as error:
                answer = Answer(False, plan.told(error))
            return answer if answer.ok else self._excused(name, began, answer)

        return ask
