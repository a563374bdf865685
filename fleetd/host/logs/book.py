"""All logs of a daemon: opened for children, marked at their end, read, followed and rotated.

The rules of this file
- What touches the disk runs in a thread. A log that cannot be written or read never stops a process.
- The mark of a death is written before `settle` returns, so before the next generation writes.
"""

from __future__ import annotations

import asyncio
import os
import re
import time
from collections.abc import Callable
from concurrent.futures import Executor
from pathlib import Path
from typing import Any

from fleetd.host.handle import ProcessHandle
from fleetd.host.logs.files import LogFiles
from fleetd.host.logs.scan import LogScanner
from fleetd.host.logs.tail import Line, read_tail
from fleetd.host.types import Capture, LogPolicy, RawExit


def exit_mark(ended: RawExit) -> str:
    """Return the line that closes a generation's output."""
    how = f"code={ended.code}" if ended.code is not None else f"signal={ended.signal or 'unknown'}"
    oom = " oom=true" if ended.oom else ""
    return f"--- exited {how}{oom} uptime={ended.uptime_s:.3f}s generation={ended.generation} ---"


def append_mark(path: Path, mark: str) -> None:
    """Append a line of ours to a child's file, after closing its last line. A disk that refuses loses the mark only."""
    try:
        fd = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CLOEXEC)
    except OSError:
        return
    try:
        size = os.fstat(fd).st_size
        cut = size > 0 and os.pread(fd, 1, size - 1) not in (b"\n", b"\0")
        os.write(fd, (b"\n" if cut else b"") + mark.encode() + b"\n")
    except OSError:
        pass
    finally:
        os.close(fd)


class LogBook:
    """The logs of one daemon, by process name."""

    def __init__(self, folder: Path, pool: Executor) -> None:
        self.folder, self._pool = folder, pool
        self._policies: dict[str, LogPolicy] = {}

    def files(self, name: str) -> LogFiles:
        return LogFiles(self.folder, name)

    def open_for_child(self, name: str, policy: LogPolicy) -> int:
        """Open the live file for appending. Raises HostError."""
        self._policies[name] = policy
        return self.files(name).open_for_append()

    def recover(self) -> None:
        """Finish what an earlier daemon left half done."""

    def attach(self, handle: ProcessHandle, pipe: int | None) -> None:
        """Begin with the output of one run."""

    def ended(self, handle: ProcessHandle) -> None:
        """The leader is dead: close its output with a mark."""
        if handle.exit is not None and handle.record.logs.capture == Capture.FILE:
            self._later(handle, append_mark, Path(handle.record.log_path), exit_mark(handle.exit))

    def _later(self, handle: ProcessHandle, call: Callable[..., object], *args: Any) -> None:
        work = asyncio.get_running_loop().run_in_executor(self._pool, call, *args)
        handle.background.add(work)
        work.add_done_callback(handle.background.discard)

    async def settle(self, handle: ProcessHandle) -> None:
        """Return when all output and the mark of this run are in the file."""
        if handle.background:
            await asyncio.gather(*handle.background, return_exceptions=True)

    async def tail(self, name: str, lines: int = 50) -> list[Line]:
        """Return the last lines, oldest first."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, read_tail, self.files(name), lines)

    def scanner(self, handle: ProcessHandle, pattern: re.Pattern[bytes]) -> LogScanner:
        """Return what looks for a line in the output of this run, from its beginning on."""
        record, files = handle.record, self.files(handle.name)
        return LogScanner(self._pool, record.log_path, record.log_start, pattern, lambda: files.read_state().start)

    async def close(self) -> None:
        """Let go of everything."""


def now() -> float:
    return time.time()
