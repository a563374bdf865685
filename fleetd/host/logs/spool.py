"""The spool: bytes read from a pipe and not yet in its log, kept where they outlive a killed daemon.

Invariants:
- Bytes are read directly into a mapped file, so the kernel has them before the daemon can be killed.
- The header records the unwritten range, and for a write in progress the log's size before and after. The next daemon can tell
  whether that write happened, and writes every line once.
- The length of a read is known only after it, so it goes onto zeros: other bytes were read. (Trailing NULs are lost.)
- Blocks are allocated at the start: a full disk rejects the file, never a page of it. Without the file a pipe is still read,
  and a kill between a read and its write loses that read. A power cut does too.
"""

from __future__ import annotations

import mmap
import os
import struct
from pathlib import Path

READ = 256 * 1024
_ROOM = 2 * READ
# start, end, whether a read is under way, start after the write, inode, size before, size after (0: no write), lost lines
_HEAD = struct.Struct("<8Q")
_SIZE = _HEAD.size + _ROOM


class Spool:
    """The mapped file of one pipe. Raises OSError when it cannot be created."""

    def __init__(self, path: Path) -> None:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            if os.fstat(fd).st_size != _SIZE and os.pwrite(fd, bytes(_SIZE), 0) != _SIZE:
                raise OSError("no room")
            self._map = mmap.mmap(fd, _SIZE)
        except (OSError, ValueError) as error:
            path.unlink(missing_ok=True)
            raise OSError(str(error)) from error
        finally:
            os.close(fd)
        self._view = memoryview(self._map)
        self._start = self._end = self.lost = 0
        self._used = _ROOM  # the bytes after the end are zeros from here on

    def recover(self, fd: int) -> bytes:
        """Return bytes that an earlier daemon read but did not log; cut a torn write."""
        start, end, reading, after, inode, before, goal, lost = _HEAD.unpack_from(self._map)
        if not (start <= after <= end <= _ROOM and before <= goal):
            start = end = reading = after = goal = lost = 0
        if reading:
            end += len(self._map[_HEAD.size + end : _HEAD.size + min(end + READ, _ROOM)].rstrip(b"\0"))
        status = os.fstat(fd)
        if goal and inode == status.st_ino:
            if status.st_size >= goal:
                start, lost = after, 0
            elif status.st_size > before:
                os.ftruncate(fd, before)
        self._start, self._end, self._used, self.lost = start, end, _ROOM, lost
        self._note()
        return bytes(self._view[_HEAD.size + start : _HEAD.size + end])

    def read(self, fd: int) -> bytes:
        """Read once from a pipe. Raises OSError as a read does."""
        if self._start == self._end:
            self._start = self._end = 0
        elif self._end + READ > _ROOM:
            rest = self._map[_HEAD.size + self._start : _HEAD.size + self._end]
            self._map[_HEAD.size : _HEAD.size + len(rest)] = rest
            self._start, self._end = 0, len(rest)
            self._note()
        at = _HEAD.size + self._end
        if self._used > self._end:
            self._map[at : _HEAD.size + self._used] = bytes(self._used - self._end)
        self._used = self._end
        self._note(reading=1)
        count = os.readv(fd, [self._view[at : at + READ]])
        self._end = self._used = self._end + count
        self._note()
        return bytes(self._view[at : at + count])

    def writing(self, inode: int, before: int, goal: int, rest: int) -> None:
        """Record the start of a write between two log sizes, without `rest` bytes."""
        after = max(self._start, self._end - rest)
        _HEAD.pack_into(self._map, 0, self._start, self._end, 0, after, inode, before, goal, self.lost)

    def written(self, rest: int, lost: int) -> None:
        """Record that all but the last `rest` bytes are logged, or lost as `lost` lines."""
        self.lost = lost
        kept = rest if rest <= min(self._end - self._start, _ROOM - READ) else 0
        self._start = self._end - kept
        self._note()

    def close(self) -> None:
        self._view.release()
        self._map.close()

    def _note(self, reading: int = 0) -> None:
        _HEAD.pack_into(self._map, 0, self._start, self._end, reading, self._start, 0, 0, 0, self.lost)


def open_spool(path: Path | None) -> Spool | None:
    """Return the file at `path`; None if it cannot be created."""
    try:
        return Spool(path) if path is not None else None
    except OSError:
        return None
