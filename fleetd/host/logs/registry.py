"""All logs of a daemon: opened for children, marked at an exit, read, followed and rotated.

Invariants:
- Disk access runs in a thread. A log that cannot be written or read never stops a process.
- The mark of a death is written before `settle` returns, so before the next generation writes.
"""

from __future__ import annotations

import asyncio
import os
import re
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from fleetd.host.filenames import unescape
from fleetd.host.logs.exit_mark import append_mark, exit_mark, is_exit_mark
from fleetd.host.logs.files import LogFiles
from fleetd.host.logs.follow import LogFollower, follow
from fleetd.host.logs.match import LineReader, LogScanner
from fleetd.host.logs.pump import Pump, Stream
from fleetd.host.logs.punch_hole import can_punch
from fleetd.host.logs.rotate import Rotation, bound_total, compress_archives, current_state, due, recover, rotate
from fleetd.host.logs.tail import LogEntry, Wanted, read_tail
from fleetd.host.logs.time_index import TimeIndex
from fleetd.host.process.handle import ProcessHandle
from fleetd.host.types import Capture, HandleRecord, LogPolicy

T = TypeVar("T")

_LATE_LINES = 50  # that processes may write after the exit of their leader
_ROTATIONS_IN_A_ROW = 20
_LONGEST_FILE = 1 << 40  # 1 TiB of offsets, freed ones included: well below what file systems allow


def inode_written(pid: int, path: str) -> int | None:
    """Return the inode of a running process' log, also of a deleted one (Linux)."""
    try:
        for fd in (1, 2):
            own = Path(f"/proc/{pid}/fd/{fd}")
            if own.is_symlink() and str(own.readlink()) == f"{os.path.realpath(path)} (deleted)":
                return own.stat().st_ino
        return Path(path).stat().st_ino
    except OSError:
        return None


class LogRegistry:
    """The logs of one daemon, by process name.

    `total_bytes` bounds all of them together: the oldest archives are deleted. `spool_path(token)` is the file for bytes of a
    piped run that are read and not written yet.
    """

    def __init__(
        self,
        folder: Path,
        pool: Executor,
        *,
        total_bytes: int | None = None,
        spool_path: Callable[[str], Path | None] = lambda _token: None,
        report_lost: Callable[[str, str], None] = lambda _name, _sentence: None,
    ) -> None:
        """Call `report_lost(name, sentence)` when a running process' log is deleted."""
        self._report_lost = report_lost
        self._spool_path = spool_path
        self.folder, self._pool, self.total_bytes = folder, pool, total_bytes
        self._archiver = ThreadPoolExecutor(1, thread_name_prefix="fleetd-archive")
        self._policies: dict[str, LogPolicy] = {}
        self._starts: dict[str, int] = {}
        self._times: dict[str, TimeIndex] = {}
        self._rotating: set[str] = set()
        self._streams: dict[str, Stream] = {}  # by the token of the run
        self._pump: Pump | None = None
        self._can_punch = True
        self._written: dict[str, int] = {}  # inode of the file that a run writes into by itself
        self._lost: dict[str, str] = {}
        self.problems: dict[str, str] = {}
        self.grew = True  # between the last two looks

    def files(self, name: str) -> LogFiles:
        return LogFiles(self.folder, name)

    # -- life ------------------------------------------------------------------------------------------------------

    def recover(self) -> None:
        """Finish rotations that an earlier daemon left incomplete. Blocks."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            self.problems["*"] = f"the log folder {self.folder} cannot be created: {error.strerror}"
            return
        self._can_punch = can_punch(self.folder)
        if not self._can_punch:
            self.problems["*"] = (
                f"the file system of {self.folder} cannot free the head of a file: rotation of a log that is written to "
                "without a pause waits, and may lose a line; `capture: pipe` has no such limit"
            )
        for path in self.folder.glob("*.log.json"):
            recover(self.files(unescape(path.name.removesuffix(".log.json"))), can_punch=self._can_punch)

    async def close(self) -> None:
        """Release everything: drain the pipes, and finish running rotations."""
        if self._pump is not None:
            await asyncio.get_running_loop().run_in_executor(None, self._pump.close)
            self._pump = None
        self._archiver.shutdown(wait=True, cancel_futures=True)

    # -- output of runs --------------------------------------------------------------------------------------------

    def open_for_child(self, name: str, policy: LogPolicy) -> int:
        """Open the live file for appending. Raises HostError. Blocks."""
        self._policies[name] = policy
        fd = self.files(name).open_for_append()
        try:
            if (
                os.fstat(fd).st_size > _LONGEST_FILE
            ):  # offsets are exhausted: no process writes now, so start a new file
                rotate(self.files(name), replace(policy, max_size_bytes=_LONGEST_FILE), force=True)
                self.files(name).live.unlink(missing_ok=True)
                os.close(fd)
                fd = self.files(name).open_for_append()
        except OSError:
            pass
        if policy.capture == Capture.FILE:
            self._written[name] = os.fstat(fd).st_ino
        return fd

    def set_policy(self, name: str, policy: LogPolicy) -> None:
        """Change the limits of a log; its capture stays until the next start."""
        self._policies[name] = policy
        for stream in self._streams.values():
            if stream.files.name == name:
                stream.policy = policy

    def attach(self, handle: ProcessHandle, pipe: int | None) -> None:
        """Start with the output of one run."""
        self._policies.setdefault(handle.name, handle.record.logs)
        if handle.record.logs.capture == Capture.FILE and handle.name not in self._written:
            inode = inode_written(handle.pid, handle.record.log_path)
            if inode is not None:
                self._written[handle.name] = inode
        self._times.setdefault(handle.name, TimeIndex()).sample(time.time(), handle.record.log_start)
        if pipe is not None:
            if self._pump is None:
                self._pump = Pump(self._pump_rotated)
            stream = Stream(
                pipe, self.files(handle.name), self._policies[handle.name], self._spool_path(handle.lineage.token)
            )
            self._streams[handle.lineage.token] = stream
            self._watch(handle, self._pump.add(stream))

    def salvage(self, record: HandleRecord, pipe: int) -> Callable[[], Awaitable[None]]:
        """Read the output of an unadopted run; call the result after its exit."""
        if self._pump is None:
            self._pump = Pump(self._pump_rotated)
        pump = self._pump
        stream = Stream(
            pipe, self.files(record.name), self._policies.get(record.name, record.logs), self._spool_path(record.token)
        )
        pump.add(stream)

        async def finished() -> None:
            await asyncio.wrap_future(pump.finish(stream))

        return finished

    def ended(self, handle: ProcessHandle) -> None:
        """Close the output of a dead leader with a mark, after all its lines."""
        if handle.exit is None:
            return
        text, stream = exit_mark(handle.exit), self._streams.get(handle.lineage.token)
        if stream is not None and self._pump is not None:
            self._watch(handle, self._pump.mark(stream, text))
        elif handle.record.logs.capture == Capture.FILE:
            path = Path(handle.record.log_path)
            work = asyncio.get_running_loop().run_in_executor(self._pool, append_mark, path, text)
            handle.background.add(work)
            work.add_done_callback(handle.background.discard)

    def _watch(self, handle: ProcessHandle, done: Future[None]) -> None:
        work = asyncio.wrap_future(done)
        handle.background.add(work)
        work.add_done_callback(handle.background.discard)

    async def written(self, handle: ProcessHandle) -> None:
        """Return once all lines of the leader and its exit mark are in the file."""
        if handle.background:
            await asyncio.gather(*handle.background, return_exceptions=True)

    async def settle(self, handle: ProcessHandle) -> None:
        """Close the output of an empty set."""
        self._written.pop(handle.name, None)
        self._lost.pop(handle.name, None)
        stream = self._streams.pop(handle.lineage.token, None)
        if stream is not None and self._pump is not None:
            self._watch(handle, self._pump.finish(stream))
        await self.written(handle)

    def release_pipes(self) -> dict[str, int]:
        """Stop reading and keep every pipe over an execv; return descriptors by token."""
        if self._pump is None:
            return {}
        pipes = {}
        for token, stream in list(self._streams.items()):
            self._pump.release(stream).result(timeout=5.0)
            os.set_inheritable(stream.fd, True)
            pipes[token] = stream.fd
        self._streams.clear()
        return pipes

    # -- reading ---------------------------------------------------------------------------------------------------

    async def tail(
        self, name: str, lines: int = 50, *, since: float | None = None, grep: re.Pattern[str] | None = None
    ) -> list[LogEntry]:
        """Return the last lines, oldest first. `since` is wall clock."""
        begin = self._times[name].offset_at(since) if since is not None and name in self._times else None
        if self._is_piped(name):
            begin = None  # its lines carry their times
        return await self._read(name, Wanted(lines, begin, None, since, grep))

    async def run_tail(self, handle: ProcessHandle, lines: int = 30) -> list[LogEntry]:
        """Return the last lines of this run alone, up to its exit mark.

        What survives its leader may write after the mark; such lines count only if nothing precedes the mark.
        """
        await self.written(handle)
        begin = None if self._is_piped(handle.name) else handle.record.log_start
        since = handle.record.spawned_at - 0.01 if begin is None else None
        found = await self._read(handle.name, Wanted(lines + 1 + _LATE_LINES, begin, None, since))
        if handle.exit is not None:
            own = exit_mark(handle.exit)
            mark = next((number for number, line in reversed([*enumerate(found)]) if line.text == own), len(found))
            found = found[:mark] or found[mark + 1 :]
        earlier = [number for number, line in enumerate(found) if is_exit_mark(line.text)]
        return found[earlier[-1] + 1 if earlier else 0 :][-lines:]

    async def _read(self, name: str, wanted: Wanted) -> list[LogEntry]:
        return await asyncio.get_running_loop().run_in_executor(self._pool, read_tail, self.files(name), wanted)

    async def follow(
        self, name: str, lines: int = 10, *, since: float | None = None
    ) -> tuple[list[LogEntry], AsyncGenerator[list[LogEntry], None]]:
        """Return the last lines and a generator of later ones, each line once."""
        begin = self._times[name].offset_at(since) if since is not None and name in self._times else None
        for _ in range(_ROTATIONS_IN_A_ROW):
            before, follower = await self._tail_and_follower(
                name, lines, None if self._is_piped(name) else begin, since
            )
            if not lines or not await self._in_thread(follower.replaced):
                break
            follower.close()  # a rotation came between: its offset is not one of the file that the tail was read from
        else:
            before, follower = await self._tail_and_follower(name, 0, None, None)
        return before, follow(self._pool, follower)

    async def _tail_and_follower(
        self, name: str, lines: int, begin: int | None, since: float | None
    ) -> tuple[list[LogEntry], LogFollower]:
        follower = await self._in_thread(lambda: LogFollower(self.files(name), lambda: self.start_of(name)))
        try:
            before = await self._read(name, Wanted(lines, begin, follower.offset, since)) if lines else []
        except BaseException:
            follower.close()
            raise
        return before, follower

    async def _in_thread(self, call: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._pool, call)

    def scanner(self, handle: ProcessHandle, pattern: re.Pattern[bytes]) -> LogScanner:
        """Return a scanner for a line in the output of this run, from its start."""
        record, name = handle.record, handle.name
        return LogScanner(self._pool, record.log_path, record.log_start, pattern, lambda: self.start_of(name))

    def reader(self, handle: ProcessHandle) -> LineReader:
        """Return a reader of the lines of this run, from its start."""
        record, name = handle.record, handle.name
        return LineReader(self._pool, record.log_path, record.log_start, lambda: self.start_of(name))

    def start_of(self, name: str) -> int:
        """Return where the live lines of a log begin."""
        if name not in self._starts:
            self._starts[name] = self.files(name).read_state().start
        return self._starts[name]

    def _is_piped(self, name: str) -> bool:
        policy = self._policies.get(name)
        return policy is not None and policy.capture == Capture.PIPE

    # -- rotation --------------------------------------------------------------------------------------------------

    def look(self) -> list[str]:
        """Note the lengths of live files; return the names that are due. Blocks."""
        found, grew = [], False
        for name, policy in list(self._policies.items()):
            self._notice(name)
            if policy.capture == Capture.PIPE:
                continue
            files = self.files(name)
            try:
                size = files.live.stat().st_size
                grew |= self._times.setdefault(name, TimeIndex()).sample(time.time(), size)
                near = size - self.start_of(name) >= policy.max_size_bytes or policy.max_age_s is not None
                if near and due(size, current_state(files), policy):
                    found.append(name)
            except OSError:
                continue
        self.grew = grew
        return found

    async def housekeep(self) -> None:
        """Start to rotate what is due and to hold the total bound; do not wait for it."""
        loop = asyncio.get_running_loop()
        known = set(self._lost)
        found = await loop.run_in_executor(self._pool, self.look)
        for name in set(self._lost) - known:
            self._report_lost(name, self._lost[name])
        for name in found:
            if name not in self._rotating:
                self._rotating.add(name)
                loop.run_in_executor(self._archiver, self._rotate, name, False)
        if self.total_bytes is not None and "*total" not in self._rotating:
            self._rotating.add("*total")
            loop.run_in_executor(self._archiver, self._bound)

    async def lost(self, name: str) -> str | None:
        """Return why the output of a process is in no log; None if it is in one."""
        return await self._in_thread(lambda: self._lost_now(name))

    def _lost_now(self, name: str) -> str | None:
        live, inode = self.files(name).live, self._written.get(name)
        if inode is None:
            return None
        try:
            if live.stat().st_ino == inode:
                return None
            what = "was replaced by another file"
        except FileNotFoundError:
            what = "was deleted while it runs"
        except OSError:
            return None
        return f"its log {live} {what}: its output is lost until it is restarted (fleetctl restart {name})"

    def _notice(self, name: str) -> None:
        why = self._lost_now(name)
        if why is None:
            self._lost.pop(name, None)
        else:
            self._lost[name] = why

    async def rotate(self, name: str) -> Rotation:
        """Archive the present lines, due or not."""
        return await asyncio.get_running_loop().run_in_executor(self._archiver, self._rotate, name, True)

    def _rotate(self, name: str, force: bool) -> Rotation:
        files, policy = self.files(name), self._policies.get(name, LogPolicy())
        try:
            done = rotate(files, policy, force=force, can_punch=self._can_punch)
            self._starts.pop(name, None)
            problem = done.problem
            if done.archived and policy.compress:
                problem = problem or compress_archives(files)
            if problem is None:
                self.problems.pop(name, None)
            else:
                self.problems[name] = problem
            return done
        finally:
            self._rotating.discard(name)

    def _pump_rotated(self, files: LogFiles, policy: LogPolicy) -> None:
        if policy.compress:
            try:
                self._archiver.submit(compress_archives, files)
            except RuntimeError:  # closing: the next daemon compresses it with the next rotation
                return

    def _bound(self) -> None:
        try:
            if self.total_bytes is not None and self.folder.is_dir():
                bound_total(self.folder, self.total_bytes)
        except OSError:
            pass
        finally:
            self._rotating.discard("*total")
