"""Looking at what the fleet uses: cpu and memory of every process set, the devices, and what many-model servers hold.

The rules of this file
- One look at the process table for all sets, in a thread, every two seconds; the devices at every third. While nobody asks,
  nothing moves and nothing is limited, every six seconds do.
- A sample becomes an event only where the core has use for it: a process with a memory limit, a model's own process, or a
  change worth a number on the screen. An idle fleet stays quiet.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from typing import TYPE_CHECKING

from fleetd.core.data.events import Event, MemorySampled
from fleetd.core.data.state import SERVING, Process
from fleetd.daemon.effects.machine import Machine
from fleetd.daemon.effects.model_loads import Residency
from fleetd.daemon.effects.processes import Processes, Run
from fleetd.host.system.memory import Devices, DeviceSample
from fleetd.host.types import Usage
from fleetd.resolver.launch_plan import LaunchPlan
from fleetd.resolver.resolved import MachineDevice, machine_devices

if TYPE_CHECKING:
    from fleetd.core.queries import FleetQueries

PERIOD_S, QUIET_S = 2.0, 6.0
_ASKED_S = 15.0
_YOUNG_S = 60.0
_BUSY_PERCENT = 1.0
_DEVICES_EVERY = 3  # periods
_RESIDENTS_EVERY = 3
_WORTH_SAYING = 0.01


class Sampling:
    """Keeps the last samples and tells the fleet what it needs of them."""

    def __init__(
        self,
        machine: Machine,
        processes: Processes,
        residency: Residency,
        queries: FleetQueries,
        dispatch: Callable[[Event], None],
        devices: Devices,
        inner_pid: Callable[[LaunchPlan], Awaitable[int | None]],
    ) -> None:
        self._inner_pid = inner_pid
        self._machine = machine
        self._processes = processes
        self._residency = residency
        self._queries = queries
        self._dispatch = dispatch
        self._devices = devices
        self._said: dict[
            str, tuple[int, int, bool]
        ] = {}  # process to generation, bytes, and whether it was settled asleep
        self.devices: dict[str, DeviceSample] = {}
        self._asked_at = 0.0
        self._wake = asyncio.Event()

    def asked(self) -> None:
        """Somebody looks: keep the numbers fresh for a while."""
        now = time.monotonic()
        if now - self._asked_at > _ASKED_S:
            self._wake.set()
        self._asked_at = now

    async def look_at_devices(self) -> list[MachineDevice]:
        """Sample the devices once; return what there is."""
        samples = await asyncio.to_thread(self._devices.sample)
        self.devices = {sample.name: sample for sample in samples}
        return machine_devices(samples)

    async def run(self) -> None:
        """Sample for ever."""
        turn = 0
        while True:
            await self._pause()
            turn += 1
            await self.sample()
            if turn % _DEVICES_EVERY == 0:
                await self.look_at_devices()
            if turn % _RESIDENTS_EVERY == 0:
                await self._observe_residents()

    async def _pause(self) -> None:
        self._wake.clear()
        period_s = QUIET_S if self._is_quiet() else PERIOD_S
        with suppress(TimeoutError):
            async with asyncio.timeout(period_s):
                await self._wake.wait()

    def _is_quiet(self) -> bool:
        """True when nobody asks, no model is young, nothing works, and no process has a limit to be held to."""
        now = time.monotonic()
        if now - self._asked_at <= _ASKED_S:
            return False
        for run in self._processes.live():
            process = self._queries.process(run.name)
            if process is None or process.spec.memory_limit_bytes is not None:
                return False
            if (
                process.spec.own_model is not None and now - process.started_s < _YOUNG_S
            ):  # it still grows, and is measured
                return False
            if run.cpu_percent is None or run.cpu_percent > _BUSY_PERCENT:
                return False
        return True

    async def sample(self) -> None:
        """Look at every live process set once."""
        runs = list(self._processes.live())
        if not runs:
            return
        await self._look_into_containers(runs)
        usages = await self._machine.usage_all([run.handle for run in runs])
        now = time.monotonic()
        for run, usage in zip(runs, usages, strict=True):
            if not run.dead:
                self._take(run, usage, now)

    async def _look_into_containers(self, runs: list[Run]) -> None:
        """Ask once per run where its container's first process is, as soon as it serves."""
        for run in runs:
            process = self._queries.process(run.name)
            serves = process is not None and process.generation == run.generation and process.state in SERVING
            if run.plan.contained is not None and not run.looked_inside and serves:
                run.looked_inside = True
                run.inner_pid = await self._inner_pid(run.plan)
                await self._machine.count_guest(run.handle, run.inner_pid)

    def _take(self, run: Run, usage: Usage, now: float) -> None:
        if run.sampled_at and now > run.sampled_at:
            used_s = max(0.0, usage.cpu_s - run.usage.cpu_s)
            run.cpu_percent = round(100.0 * used_s / (now - run.sampled_at), 1)
        run.usage, run.sampled_at = usage, now
        process = self._queries.process(run.name)
        if process is None or process.generation != run.generation:
            return
        generation, said, settled = self._said.get(run.name, (0, 0, False))
        sleeps = self._queries.is_settled_asleep(run.name, now)
        limited = process.spec.memory_limit_bytes is not None
        moved = abs(usage.rss_bytes - said) > _WORTH_SAYING * max(said, 1 << 20)
        if limited or generation != run.generation or moved or sleeps is not settled:
            self._said[run.name] = (run.generation, usage.rss_bytes, sleeps)
            self._dispatch(
                MemorySampled(run.name, run.generation, usage.rss_bytes, self._on_devices(process, run, usage))
            )

    def _on_devices(self, process: Process, run: Run, usage: Usage) -> Mapping[str, int]:
        """Return what a model's own process holds per device, as far as it can be seen."""
        if process.spec.own_model is None:
            return {}
        if run.plan.contained is not None and run.inner_pid is None:
            return {}  # a client's own few megabytes say nothing of its container
        device = run.plan.device
        if device in ("host", "unified"):
            return {device: usage.rss_bytes}
        sample = self.devices.get(device)
        held = sum(sample.pid_bytes.get(pid, 0) for pid in usage.pids) if sample is not None else 0
        return {device: held} if held else {}

    def context_length(self, model: str, process: str) -> int | None:
        """Return the context that a server says it loaded a model with; None: it does not say."""
        return self._residency.context_length(model, process)

    async def _observe_residents(self) -> None:
        for process in list(self._queries.processes()):
            if process.spec.capabilities.many_models and process.state in SERVING:
                await self._residency.observe(process.name, process.generation)
