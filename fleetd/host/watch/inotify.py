"""Changes in folders, reported by the kernel (Linux): no polling.

Invariants:
- Folders alone, not what is below them; a change of one is reported as the path of its entry.
- An overflow of the kernel's queue is reported as a change of every folder.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import struct
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

AVAILABLE = sys.platform == "linux"

_NONBLOCK_CLOEXEC = os.O_NONBLOCK | os.O_CLOEXEC
_MODIFY, _ATTRIB, _CLOSE_WRITE, _MOVED, _CREATE, _DELETE = 0x2, 0x4, 0x8, 0xC0, 0x100, 0x200
_DELETE_SELF, _MOVE_SELF, _ONLYDIR = 0x400, 0x800, 0x01000000
_EVERYTHING = _MODIFY | _ATTRIB | _CLOSE_WRITE | _MOVED | _CREATE | _DELETE | _DELETE_SELF | _MOVE_SELF | _ONLYDIR
_OVERFLOW = 0x4000
_HEAD = struct.Struct("iIII")
_READ_BYTES = 64 * 1024


class FolderWatch:
    """Calls `changed(paths)` on the loop for new, removed and changed entries."""

    def __init__(
        self, loop: asyncio.AbstractEventLoop, folders: Iterable[Path], changed: Callable[[set[Path]], None]
    ) -> None:
        """Watch the folders. Raises OSError: no watches left, or none is watchable."""
        self._loop, self._changed = loop, changed
        self._folders: dict[int, Path] = {}
        libc = ctypes.CDLL(None, use_errno=True)
        self._fd = libc.inotify_init1(_NONBLOCK_CLOEXEC)
        if self._fd < 0:
            raise _error()
        problem: OSError | None = None
        for folder in folders:
            number = libc.inotify_add_watch(self._fd, os.fsencode(folder), ctypes.c_uint32(_EVERYTHING))
            if number < 0:
                problem = _error()
            else:
                self._folders[number] = folder
        if problem is not None and not self._folders:
            os.close(self._fd)
            raise problem
        loop.add_reader(self._fd, self._read)

    def _read(self) -> None:
        try:
            data = os.read(self._fd, _READ_BYTES)
        except OSError:
            return
        found: set[Path] = set()
        at = 0
        while at < len(data):
            number, mask, _, length = _HEAD.unpack_from(data, at)
            name = data[at + _HEAD.size : at + _HEAD.size + length].rstrip(b"\0")
            at += _HEAD.size + length
            if mask & _OVERFLOW:
                found |= set(self._folders.values())
            elif number in self._folders:
                found.add(self._folders[number] / os.fsdecode(name))
        if found:
            self._changed(found)

    def close(self) -> None:
        """Let go; `changed` is not called any more."""
        if self._fd >= 0:
            self._loop.remove_reader(self._fd)
            os.close(self._fd)
            self._fd = -1


def _error() -> OSError:
    number = ctypes.get_errno()
    return OSError(number, os.strerror(number))
