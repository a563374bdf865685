"""Ending a process set, to the last member.

Invariants:
- Stopped means: nothing of the set lives and its port is free. A dead leader alone proves nothing.
- The leader is asked first (signal, command or message) and woken (SIGCONT), since engines end their own workers best.
  What outlives the leader is asked once itself, then killed at the deadline.
- At the deadline the leader is frozen before the set is collected, so that it cannot fork out of the hunt.
- What SIGKILL does not end within 5 s (it hangs in the kernel) is reported as a survivor.
"""

from __future__ import annotations

import asyncio
import signal as signals
import time
from collections.abc import Awaitable, Callable

from fleetd.host.process.exit_watch import signal_number
from fleetd.host.process.handle import ProcessHandle
from fleetd.host.process.process_set import Lineage, SetScanner
from fleetd.host.system import ports
from fleetd.host.types import KillScope, StopPolicy

SWEEP = StopPolicy(timeout_s=0.5)
_KILL_LIMIT_S = 5.0
_PORT_LIMIT_S = 1.0
_FIRST_DELAY_S = 0.001
_LONGEST_DELAY_S = 0.05


class Stopper:
    """Carries out stops and sweeps. `run_command` returns whether it succeeded."""

    def __init__(
        self,
        scanner: SetScanner,
        scan: Callable[[Lineage, str], Awaitable[dict[int, int]]],
        run_command: Callable[[ProcessHandle, tuple[str, ...], float], Awaitable[bool]],
    ) -> None:
        self._scanner, self._scan, self._run_command = scanner, scan, run_command

    async def stop(self, handle: ProcessHandle, policy: StopPolicy, *, force: bool) -> tuple[int, ...]:
        """Ask, wait, kill. Returns the pids that would not die."""
        if not force:
            deadline = time.monotonic() + policy.timeout_s
            asked = asyncio.ensure_future(self._ask(handle, policy))
            try:
                left = await self._wait_empty(handle, policy, deadline)
            finally:
                if not asked.done():
                    asked.cancel()
                await asyncio.gather(asked, return_exceptions=True)
            if not left:
                return await self._finish(handle, ())
        return await self._finish(handle, await self._kill(handle.lineage, policy.kill, handle))

    async def sweep(self, handle: ProcessHandle, scope: str) -> tuple[int, ...]:
        """Kill what a dead leader left, quickly."""
        policy = StopPolicy(timeout_s=SWEEP.timeout_s, kill=scope)
        left = await self._wait_empty(handle, policy, time.monotonic() + policy.timeout_s)
        survivors = await self._kill(handle.lineage, scope, handle) if left else ()
        return await self._finish(handle, survivors)

    async def end_lineage(self, lineage: Lineage) -> tuple[int, ...]:
        """Kill all members of a lineage without a leader, such as leftovers of a crash."""
        left = await self._scan(lineage, KillScope.SET)
        if not left:
            return ()
        self._ask_rest(left)
        deadline = time.monotonic() + SWEEP.timeout_s
        delay = _FIRST_DELAY_S
        while left and time.monotonic() < deadline:
            await asyncio.sleep(delay)
            delay = min(delay * 1.6, _LONGEST_DELAY_S)
            left = await self._scan(lineage, KillScope.SET)
        return await self._kill(lineage, KillScope.SET, None) if left else ()

    async def _ask(self, handle: ProcessHandle, policy: StopPolicy) -> None:
        """Ask the leader to exit: command, message, or, if these fail, the signal."""
        if handle.exited.is_set():
            return
        asked = False
        if policy.command:
            asked = await self._run_command(handle, policy.command, policy.timeout_s)
        elif policy.message is not None and handle.channel is not None:
            asked = handle.channel.send(policy.message)
        if handle.exited.is_set():
            return
        leader = {handle.lineage.pid: handle.lineage.start}
        if not asked:
            self._scanner.signal(leader, signal_number(policy.signal))
        self._scanner.signal(leader, signals.SIGCONT)

    def _ask_rest(self, targets: dict[int, int]) -> None:
        self._scanner.signal(targets, signals.SIGTERM)
        self._scanner.signal(targets, signals.SIGCONT)

    async def _wait_empty(self, handle: ProcessHandle, policy: StopPolicy, deadline: float) -> dict[int, int]:
        """Return the members left at the deadline or at a forced stop."""
        await _either(handle.exited, handle.force, deadline)
        asked_rest, delay = False, _FIRST_DELAY_S
        while True:
            left = await self._scan(handle.lineage, policy.kill)
            if not left and (handle.exited.is_set() or time.monotonic() >= deadline):
                return left
            if handle.force.is_set() or time.monotonic() >= deadline:
                return left
            if left and handle.exited.is_set() and not asked_rest:
                asked_rest = True
                self._ask_rest(left)
            await _either(handle.force, None, min(deadline, time.monotonic() + delay))
            delay = min(delay * 1.6, _LONGEST_DELAY_S)

    async def _kill(self, lineage: Lineage, scope: str, handle: ProcessHandle | None) -> tuple[int, ...]:
        leader = {lineage.pid: lineage.start}
        if handle is not None:
            handle.killed_by_us = True
            if handle.alive:
                self._scanner.signal(leader, signals.SIGSTOP)
        deadline, delay = time.monotonic() + _KILL_LIMIT_S, _FIRST_DELAY_S
        while True:
            left = await self._scan(lineage, scope)
            waiting = handle is not None and not handle.exited.is_set()
            if not left and not waiting:
                return ()
            if time.monotonic() >= deadline:
                return tuple(sorted(left))
            if scope == KillScope.SET and lineage.cgroup is not None:
                lineage.cgroup.kill()
            self._scanner.signal(left, signals.SIGKILL)
            if handle is not None and waiting:
                await _either(handle.exited, None, time.monotonic() + delay)
            else:
                await asyncio.sleep(delay)
            delay = min(delay * 1.6, _LONGEST_DELAY_S)

    async def _finish(self, handle: ProcessHandle, survivors: tuple[int, ...]) -> tuple[int, ...]:
        """Wait briefly for the port: sockets can close just after the death."""
        record = handle.record
        if record.port is not None and not survivors:
            deadline, delay = time.monotonic() + _PORT_LIMIT_S, _FIRST_DELAY_S
            while not ports.is_free(record.host, record.port) and time.monotonic() < deadline:
                await asyncio.sleep(delay)
                delay = min(delay * 2, _LONGEST_DELAY_S)
        return survivors


async def _either(first: asyncio.Event, second: asyncio.Event | None, deadline: float) -> None:
    """Wait until one of the events is set or the deadline (monotonic) has come."""
    if first.is_set() or (second is not None and second.is_set()):
        return
    waits = {asyncio.ensure_future(event.wait()) for event in (first, second) if event is not None}
    try:
        await asyncio.wait(waits, timeout=max(0.0, deadline - time.monotonic()), return_when=asyncio.FIRST_COMPLETED)
    finally:
        for wait in waits:
            wait.cancel()
