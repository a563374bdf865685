"""Follow a growing log by (inode, offset), across rotations.

Invariants:
- The file stays open: a file that the pump renames is read to its end before the new file.
- Lines that rotation frees before they were read are reported as a gap, in one line.
- One step reads at most 1 MiB, and the next waits until its lines were taken: a slow reader costs nothing.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import Executor
from pathlib import Path

from fleetd.host.logs.files import LogFiles
from fleetd.host.logs.tail import LogEntry, parse_line

_STEP = 1024 * 1024
_LONGEST_LINE = 64 * 1024
_SHORTEST_S, _LONGEST_S = 0.02, 0.25
_TRIES = 10


class LogFollower:
    """Reads the lines that are appended after its creation."""

    def __init__(self, files: LogFiles, start_of: Callable[[], int]) -> None:
        self._files, self._start_of = files, start_of
        self._fd = -1
        self._inode = 0
        self._offset = 0
        self._rest = b""
        self._skipped = 0
        if self._open():
            self._offset = self._line_start(os.fstat(self._fd).st_size)

    def _open(self, path: Path | None = None) -> bool:
        try:
            self._fd = os.open(path or self._files.live, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return False
        self._inode = os.fstat(self._fd).st_ino
        self._offset, self._rest = 0, b""
        return True

    def _line_start(self, end: int) -> int:
        """Return the start of an unfinished last line, which is shown when complete."""
        back = max(0, end - _LONGEST_LINE)
        data = os.pread(self._fd, end - back, back)
        found = data.rfind(b"\n")
        return back + found + 1 if found >= 0 else end

    @property
    def offset(self) -> int:
        """Where the next step begins."""
        return self._offset

    def step(self) -> list[LogEntry]:
        """Return the lines that came since the last step. Blocks for the disk only."""
        if self._fd < 0 and not self._open():
            return []
        try:
            lines = self._read()
            if not lines and self.replaced():
                lines = self._read()  # written between the last look and the rename
                if not lines and self._next_file():
                    lines = self._read()
            return lines
        except OSError:
            return []

    def _next_file(self) -> bool:
        """Go on with the next file: the live one, or an archive after rotations."""
        for _ in range(_TRIES):
            following, inode = self._following()
            fd = os.open(following, os.O_RDONLY | os.O_CLOEXEC)
            if os.fstat(fd).st_ino == inode:
                os.close(self._fd)
                self._fd, self._inode, self._offset, self._rest = fd, inode, 0, b""
                return True
            os.close(fd)  # one more rotation has moved the names on since we looked
        return False

    def _following(self) -> tuple[Path, int]:
        """Return path and inode of the next file. Raises OSError during a rename."""
        live = self._files.live
        following = (live, live.stat().st_ino)
        for path in self._files.archives():
            inode = path.stat().st_ino
            if inode == self._inode:
                return following if following[0].suffix != ".gz" else (live, live.stat().st_ino)
            following = (path, inode)
        return live, live.stat().st_ino

    def replaced(self) -> bool:
        """Return whether the live file is no longer the one that is read here."""
        try:
            return os.stat(self._files.live).st_ino != self._inode  # noqa: PTH116 (the hot path)
        except FileNotFoundError:
            return False

    def _read(self) -> list[LogEntry]:
        size = os.fstat(self._fd).st_size
        found: list[LogEntry] = []
        if size < self._offset:  # emptied: the fallback of rotation where no holes can be made
            self._offset, self._rest = 0, b""
        start = self._start_of() if size > self._offset else 0
        if start > self._offset:
            found.append(LogEntry(f"--- {start - self._offset} bytes were rotated away before they could be shown ---"))
            self._offset, self._rest = start, b""
        data = os.pread(self._fd, min(_STEP, size - self._offset), self._offset) if size > self._offset else b""
        self._offset += len(data)
        lines = (self._rest + data).split(b"\n")
        self._rest = lines.pop()
        if len(self._rest) > _LONGEST_LINE:
            self._skipped += len(self._rest) - _LONGEST_LINE
            self._rest = self._rest[:_LONGEST_LINE]
        for raw in lines:
            line = parse_line(raw)
            if self._skipped:
                line = LogEntry(f"{line.text} (and {self._skipped} bytes more)", line.at)
                self._skipped = 0
            found.append(line)
        return found

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


async def follow(pool: Executor, follower: LogFollower) -> AsyncGenerator[list[LogEntry], None]:
    """Yield lists of new lines until the generator is closed."""
    loop, pause = asyncio.get_running_loop(), _SHORTEST_S
    try:
        while True:
            lines = await loop.run_in_executor(pool, follower.step)
            if lines:
                pause = _SHORTEST_S
                yield lines
            else:
                await asyncio.sleep(pause)
                pause = min(pause * 1.5, _LONGEST_S)
    finally:
        follower.close()
