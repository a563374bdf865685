"""The machine's processes: spawn, exit, stop, sweep, adopt, usage.

Invariants:
- Created and used on one event loop; blocking work runs in the host's own threads.
- `on_exit` is called on the loop once per handle, within milliseconds of the leader's death, after spawn has returned.
- A handle's record leaves the disk when its set is seen to be empty, not before.
- `close` releases everything and kills nothing: processes outlive the daemon unless they were stopped.
"""

from __future__ import annotations

import asyncio
import functools
import hashlib
import os
import re
import socket
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import ParamSpec, TypeVar

from fleetd.errors import HostError
from fleetd.host.logs.fifo import reopen
from fleetd.host.logs.match import LogScanner
from fleetd.host.logs.registry import LogRegistry
from fleetd.host.process import cgroup, identity
from fleetd.host.process.command import CommandResult, end_marked, run_command, stop_command_result
from fleetd.host.process.exit_watch import CHILDREN, ExitStatus, ExitWatch, become_subreaper, signal_number
from fleetd.host.process.handle import OnExit, ProcessHandle, Records
from fleetd.host.process.node_ipc import NodeChannel
from fleetd.host.process.oom import OomWatch
from fleetd.host.process.process_set import PROBE_VARIABLE, Lineage, SetScanner, family
from fleetd.host.process.spawn import Spawner, Started
from fleetd.host.process.stop import Stopper
from fleetd.host.process.table import TICKS_PER_S, ProcessTable, boot_id, system_table
from fleetd.host.system import ports
from fleetd.host.types import (
    Capture,
    Execution,
    HandleRecord,
    HostPaths,
    KillScope,
    PortOwner,
    Program,
    RawExit,
    SpawnRequest,
    StopCommandResult,
    StopPolicy,
    Usage,
)

P = ParamSpec("P")
T = TypeVar("T")

_HOUSEKEEPING_S, _QUIET_S = 0.5, 1.0  # while logs grow, and while none does


class Host:
    """The processes, logs and records of one daemon."""

    def __init__(
        self,
        paths: HostPaths,
        *,
        table: ProcessTable | None = None,
        logs_total_bytes: int | None = None,
        report_lost_log: Callable[[str, str], None] = lambda _name, _sentence: None,
    ) -> None:
        self.paths = paths
        self.table = table or system_table()
        self.records = Records(paths.handles)
        self._pool = ThreadPoolExecutor(8, thread_name_prefix="fleetd-host")
        self._scanner = SetScanner(self.table)
        self._stopper = Stopper(self._scanner, self._scan, self._stop_command)
        self._boot_id = boot_id()
        self._cgroups = cgroup.detect(f"fleetd-{hashlib.sha256(str(paths.state).encode()).hexdigest()[:8]}")
        self._hunts: set[asyncio.Task[tuple[int, ...]]] = set()
        self._entering: set[asyncio.Future[bool]] = set()
        self._handles: dict[str, ProcessHandle] = {}
        self._oom = OomWatch()
        self._chores: asyncio.Task[None] | None = None
        self._closed = self._leaving = False
        self.logs = LogRegistry(
            paths.logs,
            self._pool,
            total_bytes=logs_total_bytes,
            spool_path=self.records.spool_path,
            report_lost=report_lost_log,
        )
        self._spawner = Spawner(self.table, self.records, self.logs, self._cgroups, self._boot_id)

    # -- life ------------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Become subreaper and start housekeeping. Call once, before anything else."""
        become_subreaper()
        await self.thread(end_marked, self.table, PROBE_VARIABLE, self.records.place)
        await self.thread(self.logs.recover)
        if self._cgroups is not None:
            await self.thread(self._cgroups.purge)
        self._chores = asyncio.get_running_loop().create_task(self._housekeeping(), name="host-housekeeping")

    async def close(self) -> None:
        """Release everything; no process is touched."""
        self._closed = True
        if self._chores is not None:
            self._chores.cancel()
            await asyncio.gather(self._chores, return_exceptions=True)
        for handle in list(self._handles.values()):
            if handle.watch is not None:
                handle.watch.close()
            if handle.channel is not None:
                handle.channel.close()
            for waiting in (handle.stopping, handle.sweeping):
                if waiting is not None and not waiting.done():
                    waiting.cancel()
                    await asyncio.gather(waiting, return_exceptions=True)
            await asyncio.gather(*handle.background, return_exceptions=True)
        await asyncio.gather(*self._entering, *self._hunts, return_exceptions=True)
        CHILDREN.reap_unknown()
        if self._cgroups is not None:
            self._cgroups.purge()
        await self.logs.close()
        self._pool.shutdown(wait=True, cancel_futures=True)

    async def thread(self, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run a blocking call in one of the host's threads."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, functools.partial(call, *args, **kwargs))

    async def _housekeeping(self) -> None:
        while True:
            await asyncio.sleep(_HOUSEKEEPING_S if self.logs.grew else _QUIET_S)
            self._oom.sample()
            CHILDREN.reap_unknown()
            await self.logs.housekeep()

    # -- spawn and death ------------------------------------------------------------------------------------------

    async def spawn(self, request: SpawnRequest, on_exit: OnExit) -> ProcessHandle:
        """Start a process. Raises HostError when nothing was started.

        `on_exit` is called on the loop when the leader dies, never before this returns.
        """
        loop = asyncio.get_running_loop()
        starting = loop.run_in_executor(self._pool, self._spawner.spawn, request)
        try:
            started = await asyncio.shield(starting)
        except asyncio.CancelledError:
            starting.add_done_callback(self._abandon)
            raise
        handle = ProcessHandle(started.record, started.lineage, on_exit)
        self._attach(handle)
        self.logs.attach(handle, started.pipe)
        if started.channel is not None:
            handle.channel = NodeChannel(loop, started.channel)
        self._enter_cgroup(handle)
        return handle

    def _abandon(self, starting: asyncio.Future[Started]) -> None:
        """Undo a start whose caller has gone."""
        if not starting.cancelled() and starting.exception() is None:
            self._spawner.abandon(starting.result())
            self._hunt(starting.result().lineage)

    def _enter_cgroup(self, handle: ProcessHandle) -> None:
        """Move the process into its cgroup leaf in a thread: it takes about 10 ms."""
        if self._cgroups is None:
            return
        leaf = self._cgroups.leaf(handle.name, handle.generation)
        entering = asyncio.get_running_loop().run_in_executor(self._pool, leaf.enter, handle.pid)
        self._entering.add(entering)

        def entered(done: asyncio.Future[bool]) -> None:
            self._entering.discard(done)
            if not done.cancelled() and done.result():
                if handle.lineage.token in self._handles:
                    handle.lineage.cgroup = leaf
                else:
                    leaf.remove()

        entering.add_done_callback(entered)

    def _attach(self, handle: ProcessHandle) -> None:
        loop = asyncio.get_running_loop()
        self._handles[handle.lineage.token] = handle
        try:
            handle.watch = ExitWatch(loop, handle.pid, lambda: self._died(handle))
        except ProcessLookupError:
            loop.call_soon(self._died, handle)

    def _died(self, handle: ProcessHandle) -> None:
        if handle.exit is not None or self._closed or self._leaving:
            return
        status = CHILDREN.collect(handle.pid) if handle.child else ExitStatus()
        if status is None:  # kqueue can report the exit before its status can be collected
            asyncio.get_running_loop().call_later(0.001, self._died, handle)
            return
        leaf = handle.lineage.cgroup
        oom = leaf is not None and leaf.oom_kills() > 0
        if status.signal == "SIGKILL" and not handle.killed_by_us and not oom:
            oom = self._oom.recent()
        handle.exit = RawExit(
            name=handle.name,
            generation=handle.generation,
            pid=handle.pid,
            code=status.code,
            signal=status.signal,
            core_dumped=status.core_dumped,
            oom=oom,
            uptime_s=handle.uptime_s,
            at=time.time(),
        )
        self.logs.ended(handle)
        if handle.channel is not None:
            handle.channel.close()
        handle.exited.set()
        handle.on_exit(handle.exit)

    # -- stop and sweep --------------------------------------------------------------------------------------------

    async def stop(self, handle: ProcessHandle, policy: StopPolicy, force: bool = False) -> tuple[int, ...]:
        """Stop the whole set; return the pids that survive SIGKILL (empty: all gone).

        `force` skips the grace. A second call during the first escalates it; both return the same result.
        """
        if handle.stopping is not None and not handle.stopping.done():
            handle.force.set()
        else:
            handle.stopping = asyncio.ensure_future(self._stop(handle, policy, force))
        return await asyncio.shield(handle.stopping)

    async def _stop(self, handle: ProcessHandle, policy: StopPolicy, force: bool) -> tuple[int, ...]:
        survivors = await self._stopper.stop(handle, policy, force=force)
        return await self._settle(handle, survivors)

    async def sweep(self, handle: ProcessHandle, scope: str = KillScope.SET) -> tuple[int, ...]:
        """Kill what a dead leader left; the result is that of stop."""
        if handle.stopping is not None and not handle.stopping.done():
            return await asyncio.shield(handle.stopping)
        if handle.sweeping is None or handle.sweeping.done():
            handle.sweeping = asyncio.ensure_future(self._sweep(handle, scope))
        return await asyncio.shield(handle.sweeping)

    async def _sweep(self, handle: ProcessHandle, scope: str) -> tuple[int, ...]:
        return await self._settle(handle, await self._stopper.sweep(handle, scope))

    async def _settle(self, handle: ProcessHandle, survivors: tuple[int, ...]) -> tuple[int, ...]:
        await self.logs.settle(handle)
        CHILDREN.reap_unknown()
        if not survivors:
            self._handles.pop(handle.lineage.token, None)
            if handle.lineage.cgroup is not None:
                handle.lineage.cgroup.remove()
            await self.thread(self.records.remove, handle.record)
        return survivors

    async def _stop_command(self, handle: ProcessHandle, argv: tuple[str, ...], timeout_s: float) -> bool:
        environment = await self.thread(self.table.environment, handle.pid)
        env = _pairs(environment or b"")
        env.setdefault("PATH", os.defpath)
        env["MAINPID"] = str(handle.pid)
        began = time.monotonic()
        try:
            result = await self.command(Program(argv=argv, env=env), timeout_s)
        except HostError as error:
            handle.stop_command = StopCommandResult(False, error.sentence)
            return False
        except asyncio.CancelledError:  # the set is empty, or its time is over
            if not handle.exited.is_set():
                handle.stop_command = StopCommandResult(
                    False, f"it did not exit within {time.monotonic() - began:.1f} s"
                )
            raise
        handle.stop_command = stop_command_result(result, time.monotonic() - began)
        return result.ok

    async def command(self, program: Program, timeout_s: float) -> CommandResult:
        """Run a program with a time limit. Raises HostError if it cannot be started."""
        return await run_command(program, timeout_s, pool=self._pool, table=self.table, end_lineage=self._hunt)

    async def run(
        self, argv: Sequence[str], env: Mapping[str, str], cwd: str | None, timeout_s: float
    ) -> tuple[bool, str]:
        """Run a program; return success and the end of its output. Raises HostError."""
        result = await self.command(Program(tuple(argv), env, Execution(cwd=cwd)), timeout_s)
        if result.timed_out:
            return False, f"{argv[0]} was killed after {timeout_s:g} s"
        return result.ok, result.output

    async def probe_command(self, program: Program, timeout_s: float) -> CommandResult:
        """Run a probe's command with a mark, so that the next daemon kills leftovers."""
        return await self.command(replace(program, env={**program.env, PROBE_VARIABLE: self.records.place}), timeout_s)

    def _hunt(self, lineage: Lineage) -> asyncio.Task[tuple[int, ...]]:
        hunt = asyncio.get_running_loop().create_task(self._stopper.end_lineage(lineage))
        self._hunts.add(hunt)
        hunt.add_done_callback(self._hunts.discard)
        return hunt

    async def _scan(self, lineage: Lineage, scope: str) -> dict[int, int]:
        found = await self.thread(self._scanner.scan, lineage, scope)
        CHILDREN.reap_unknown()
        return found

    async def signal(self, handle: ProcessHandle, name: str) -> bool:
        """Signal the leader; return False if it is gone. Raises HostError (bad name)."""
        try:
            number = signal_number(name)
        except ValueError as error:
            raise HostError(str(error), recoverable=False) from None
        return await self.thread(self.table.send, handle.pid, handle.lineage.start, number)

    # -- adoption --------------------------------------------------------------------------------------------------

    def load_records(self, carried: Sequence[HandleRecord] = ()) -> tuple[list[HandleRecord], list[Path]]:
        """Return an earlier daemon's records, and where unreadable ones were moved.

        `carried` came over an execv and replaces the copies on disk. Other records there belong to processes that started too late for it.
        """
        found, moved = self.records.load(carried)
        known = {record.token for record in carried}
        records = [*carried, *(record for record in found if record.token not in known)]
        known |= {record.token for record in found}
        return [*records, *identity.unrecorded(self.table, self._boot_id, self.records.place, known)], moved

    def expect(self, records: Iterable[HandleRecord]) -> None:
        """Leave the exit statuses of these children to `adopt`. Call before `start`."""
        for record in records:
            entry = self.table.entry(record.pid) if record.pid is not None else None
            if entry is not None and entry.ppid == os.getpid() and entry.start == record.start_ticks:
                CHILDREN.claim(entry.pid)

    def leave_deaths(self) -> None:
        """Collect no more statuses of children: the program after an execv does."""
        self._leaving = True

    async def adopt(self, record: HandleRecord, on_exit: OnExit) -> ProcessHandle:
        """Adopt a live process. Raises HostError if its identity is not proven.

        A process that is no longer our child dies with an unknown exit code.
        """
        doubt = await self.thread(identity.doubt, record, self.table, self._boot_id)
        if doubt is not None or record.pid is None:
            raise HostError(f"{record.name}: {doubt}", recoverable=False)
        entry = self.table.entry(record.pid)
        leaf = cgroup.Cgroup(Path(record.cgroup)) if record.cgroup and Path(record.cgroup).is_dir() else None
        child = entry is not None and entry.ppid == os.getpid()
        if child:
            CHILDREN.claim(record.pid)
        age = max(0.0, time.time() - record.spawned_at)
        handle = ProcessHandle(
            record,
            Lineage(record.pid, record.start_ticks, record.token, leaf),
            on_exit,
            child=child,
            started=time.monotonic() - age,
        )
        for fd in (record.pipe_fd, record.ipc_fd):
            if fd is not None:
                os.set_inheritable(fd, False)
        self._attach(handle)
        pipe = record.pipe_fd
        if pipe is None and record.logs.capture == Capture.PIPE:
            pipe = await self.thread(reopen, self.records.pipe_path(record.token))
        self.logs.attach(handle, pipe)
        if record.ipc_fd is not None:
            end = socket.socket(fileno=record.ipc_fd)
            handle.channel = NodeChannel(asyncio.get_running_loop(), end)
            handle.channel.adopted = True
        return handle

    async def gone(self, record: HandleRecord) -> bool:
        """Return whether a recorded run has provably exited since this boot."""
        return await self.thread(identity.is_gone, record, self.table, self._boot_id)

    async def prepare_exec(self) -> list[HandleRecord]:
        """Keep pipes and channels over an execv; return the records to `adopt` after it.

        From here on no output is read and no death is reported: close the host and exec, at once. `encode_records` and
        `decode_records` carry the list over.
        """
        self.leave_deaths()
        pipes = await self.thread(self.logs.release_pipes)
        records = []
        for token, handle in self._handles.items():
            channel = handle.channel.detach() if handle.channel is not None and handle.channel.open else None
            if channel is not None:
                os.set_inheritable(channel, True)
            handle.channel = None
            records.append(replace(handle.record, pipe_fd=pipes.get(token), ipc_fd=channel))
        return records

    async def sweep_record(self, record: HandleRecord) -> tuple[int, ...]:
        """Kill a run without a leader: processes with its token or in its cgroup.

        Returns survivors. The record is removed when there are none.
        """
        survivors: tuple[int, ...] = ()
        if record.boot_id == self._boot_id:
            leaf = cgroup.Cgroup(Path(record.cgroup)) if record.cgroup else None
            pipe = await self.thread(reopen, self.records.pipe_path(record.token))
            read_out = self.logs.salvage(record, pipe) if pipe is not None else None
            survivors = await self._stopper.end_lineage(Lineage(-1, 0, record.token, leaf))
            if read_out is not None:
                await read_out()
            if leaf is not None and not survivors:
                leaf.remove()
        if not survivors:
            await self.thread(self.records.remove, record)
        return survivors

    # -- looking ---------------------------------------------------------------------------------------------------

    async def usage(self, handle: ProcessHandle) -> Usage:
        """Return the present usage of the whole set."""
        return (await self.usage_all([handle]))[0]

    async def usage_all(self, handles: Iterable[ProcessHandle]) -> list[Usage]:
        """Return the usage of many sets, in order, from one look at the table."""
        wanted = list(handles)
        return await self.thread(self._usage_all, wanted)

    def _usage_all(self, handles: list[ProcessHandle]) -> list[Usage]:
        results = []
        scans = self._scanner.scan_entries([handle.lineage for handle in handles])
        for handle, (found, snapshot) in zip(handles, scans, strict=True):
            if handle.guest is not None:
                found = {**found, **family(snapshot, handle.guest)}
            entries = [snapshot[pid] for pid in found]
            results.append(
                Usage(
                    rss_bytes=sum(entry.rss_bytes for entry in entries),
                    cpu_s=sum(entry.cpu_ticks for entry in entries) / TICKS_PER_S,
                    pids=tuple(sorted(found)),
                )
            )
        return results

    async def port_owner(self, port: int) -> PortOwner | None:
        """Return the owner of a port of this machine; None when no process listens."""
        return await self.thread(ports.owner, port)

    async def answers_on(self, handle: ProcessHandle, port: int) -> bool:
        """Return whether the listener on this port belongs to our process set."""
        return await self.thread(self._answers_on, handle, port)

    def log_scanner(self, handle: ProcessHandle, pattern: re.Pattern[bytes]) -> LogScanner:
        """Return a scanner for a line in the output of this run, from its start."""
        return self.logs.scanner(handle, pattern)

    def _answers_on(self, handle: ProcessHandle, port: int) -> bool:
        if ports.listener_among(port, [handle.pid]):
            return True
        return ports.listener_among(port, self._scanner.scan(handle.lineage))


def _pairs(environment: bytes) -> dict[str, str]:
    pairs = (part.partition(b"=") for part in environment.split(b"\0") if b"=" in part)
    return {os.fsdecode(key): os.fsdecode(value) for key, _, value in pairs if key}
