"""Match a regular expression on the output of a run, or return its new lines.

Invariants:
- Only new bytes are read, in a thread, at most 8 MiB per step; a line longer than 64 KiB is matched on its first 64 KiB.
- A match is kept: rotation cannot undo it.
"""

from __future__ import annotations

import asyncio
import os
import re
from collections import deque
from collections.abc import Callable
from concurrent.futures import Executor

from fleetd.host.logs.tail import parse_line

_STEP = 8 * 1024 * 1024
_BLOCK = 256 * 1024
_LONGEST_LINE = 64 * 1024
_KEPT_LINES = 2000
_NEVER = re.compile(rb"(?!)")


class LogScanner:
    """Search for the first matching line from an offset of a live log file.

    `start_of` says where the live lines begin now: what rotation has freed meanwhile is passed over.
    """

    def __init__(
        self, pool: Executor, path: str, offset: int, pattern: re.Pattern[bytes], start_of: Callable[[], int]
    ) -> None:
        self._pool, self._path, self._offset, self._pattern, self._start_of = pool, path, offset, pattern, start_of
        self._rest = b""
        self._inode: int | None = None
        self._found: str | None = None

    async def advance(self) -> str | None:
        """Read new lines. Return the first matching line, None if there is none yet."""
        if self._found is None:
            self._found = await asyncio.get_running_loop().run_in_executor(self._pool, self._step)
        return self._found

    def close(self) -> None:
        """Release the scanner; no file is open between steps."""

    def _step(self) -> str | None:
        try:
            fd = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return None
        try:
            status = os.fstat(fd)
            if self._inode not in (None, status.st_ino):  # the pump began a new file
                self._offset, self._rest = 0, b""
            self._inode = status.st_ino
            self._offset = max(self._offset, self._start_of())
            end = min(status.st_size, self._offset + _STEP)
            while self._offset < end:
                data = os.pread(fd, min(_BLOCK, end - self._offset), self._offset)
                if not data:
                    return None
                self._offset += len(data)
                match = self._match(data)
                if match is not None:
                    return match
        except OSError:
            return None
        finally:
            os.close(fd)
        return None

    def _match(self, data: bytes) -> str | None:
        lines = (self._rest + data).split(b"\n")
        self._rest = lines.pop()[:_LONGEST_LINE]
        for raw in lines:
            line = parse_line(raw[:_LONGEST_LINE])
            if self._pattern.search(line.text.encode("utf-8", "replace")):
                return line.text
        return None


class LineReader(LogScanner):
    """Return every line once; overwritten terminal output (a progress bar) counts."""

    def __init__(self, pool: Executor, path: str, offset: int, start_of: Callable[[], int]) -> None:
        super().__init__(pool, path, offset, _NEVER, start_of)
        self._lines: deque[str] = deque(maxlen=_KEPT_LINES)

    async def new_lines(self) -> list[str]:
        """Read new lines; of a flood only the last ones."""
        await self.advance()
        found = list(self._lines)
        self._lines.clear()
        return found

    def _match(self, data: bytes) -> str | None:
        lines = (self._rest + data.replace(b"\r", b"\n")).split(b"\n")
        self._rest = lines.pop()[:_LONGEST_LINE]
        self._lines.extend(parse_line(raw[:_LONGEST_LINE]).text for raw in lines if raw)
        return None
