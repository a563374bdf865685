"""Sample the memory and cpu of process sets, the devices, and the models that many-model servers hold.

Invariants:
- One pass over the process table serves all sets, in a thread, every `PERIOD_S`; devices and servers are sampled every
  third period. While the fleet is idle and no client reads the status, the period is `QUIET_S`.
- A sample becomes an event only when the core needs it: a process with a memory limit, or a changed value.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress

from fleetd.core.data.events import MemorySampled
from fleetd.core.data.state import SERVING, Process
from fleetd.daemon.context import DaemonContext
from fleetd.daemon.effects.model_loads import ModelLoads
from fleetd.daemon.effects.processes import Processes
from fleetd.daemon.effects.run import Run
from fleetd.host.host import Host
from fleetd.host.system.memory import Devices, DeviceSample
from fleetd.host.types import Usage

PERIOD_S, QUIET_S = 2.0, 6.0
_READ_S = 15.0  # status counts as being read for this long after a request
_YOUNG_S = 60.0
_BUSY_PERCENT = 1.0
_DEVICES_EVERY = 3  # periods
_RESIDENTS_EVERY = 3
_MIN_CHANGE = 0.01


class Sampler:
    """The last samples. `samples` are the first ones of the devices."""

    def __init__(
        self,
        context: DaemonContext,
        host: Host,
        processes: Processes,
        loads: ModelLoads,
        devices: Devices,
        samples: Sequence[DeviceSample],
    ) -> None:
        self._queries = context.queries
        self._dispatch = context.dispatch
        self._host = host
        self._processes = processes
        self._loads = loads
        self._devices = devices
        self.devices = {sample.name: sample for sample in samples}
        # Per process: generation, bytes, and whether it was settled asleep, as last dispatched.
        self._dispatched: dict[str, tuple[int, int, bool]] = {}
        self._requested_at = 0.0
        self._wake = asyncio.Event()

    def requested(self) -> None:
        """Sample at the fast period for a while: a client reads the status."""
        now = time.monotonic()
        if now - self._requested_at > _READ_S:
            self._wake.set()
        self._requested_at = now

    async def run(self) -> None:
        """Sample for ever."""
        count = 0
        while True:
            await self._pause()
            count += 1
            await self._sample()
            if count % _DEVICES_EVERY == 0:
                samples = await asyncio.to_thread(self._devices.sample)
                self.devices = {sample.name: sample for sample in samples}
            if count % _RESIDENTS_EVERY == 0:
                await self._observe_residents()

    async def _pause(self) -> None:
        self._wake.clear()
        period_s = QUIET_S if self._is_quiet() else PERIOD_S
        with suppress(TimeoutError):
            async with asyncio.timeout(period_s):
                await self._wake.wait()

    def _is_quiet(self) -> bool:
        """Return whether no client reads, no model is young, no process busy or limited."""
        now = time.monotonic()
        if now - self._requested_at <= _READ_S:
            return False
        for run in self._processes.live():
            process = self._queries.process(run.name)
            if process is None or process.spec.memory_limit_bytes is not None:
                return False
            if process.spec.own_model is not None and now - process.started_s < _YOUNG_S:  # it still grows
                return False
            if run.cpu_percent is None or run.cpu_percent > _BUSY_PERCENT:
                return False
        return True

    async def _sample(self) -> None:
        """Sample every live process set once."""
        runs = [(run, run.handle) for run in self._processes.live() if run.handle is not None]
        if not runs:
            return
        await self._find_container_pids()
        usages = await self._host.usage_all([handle for _, handle in runs])
        now = time.monotonic()
        for (run, _), usage in zip(runs, usages, strict=True):
            if not run.dead:
                self._take(run, usage, now)

    async def _find_container_pids(self) -> None:
        """Find the first process of each container, once per run and as soon as it serves."""
        for run in self._processes.live():
            process = self._queries.process(run.name)
            serves = process is not None and process.generation == run.generation and process.state in SERVING
            if run.plan.contained is not None and not run.inner_pid_requested and serves:
                run.inner_pid_requested = True
                run.inner_pid = await self._processes.inner_pid(run.plan)
                if run.handle is not None:
                    run.handle.guest = run.inner_pid

    def _take(self, run: Run, usage: Usage, now: float) -> None:
        if run.sampled_at and now > run.sampled_at:
            used_s = max(0.0, usage.cpu_s - run.usage.cpu_s)
            run.cpu_percent = round(100.0 * used_s / (now - run.sampled_at), 1)
        run.usage, run.sampled_at = usage, now
        process = self._queries.process(run.name)
        if process is None or process.generation != run.generation:
            return
        generation, last_bytes, last_asleep = self._dispatched.get(run.name, (0, 0, False))
        asleep = self._queries.is_settled_asleep(run.name, now)
        limited = process.spec.memory_limit_bytes is not None
        changed = abs(usage.rss_bytes - last_bytes) > _MIN_CHANGE * max(last_bytes, 1 << 20)
        if limited or generation != run.generation or changed or asleep is not last_asleep:
            self._dispatched[run.name] = (run.generation, usage.rss_bytes, asleep)
            device_bytes = self._device_bytes(process, run, usage)
            self._dispatch(MemorySampled(run.name, run.generation, usage.rss_bytes, device_bytes))

    def _device_bytes(self, process: Process, run: Run, usage: Usage) -> Mapping[str, int]:
        """Return what a model's own process holds per device, as far as it is visible."""
        if process.spec.own_model is None:
            return {}
        if run.plan.contained is not None and run.inner_pid is None:
            return {}  # only the client is visible: its few megabytes are not those of its container
        device = run.plan.device
        if device in ("host", "unified"):
            return {device: usage.rss_bytes}
        sample = self.devices.get(device)
        held = sum(sample.pid_bytes.get(pid, 0) for pid in usage.pids) if sample is not None else 0
        return {device: held} if held else {}

    async def _observe_residents(self) -> None:
        for process in list(self._queries.processes()):
            if process.spec.capabilities.many_models and process.state in SERVING:
                await self._loads.observe(process.name, process.generation)
