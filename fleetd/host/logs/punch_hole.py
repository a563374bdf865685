"""Frees the head of a file that a process is still writing to.

Invariants:
- The file keeps its length and its offsets; the freed part reads as NUL bytes and costs no disk.
- Linux: fallocate with PUNCH_HOLE. macOS: fcntl F_PUNCHHOLE, whole blocks only. Elsewhere: OSError EOPNOTSUPP.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import struct
import sys
import tempfile
from pathlib import Path

_KEEP_SIZE, _PUNCH_HOLE = 0x01, 0x02
_F_PUNCHHOLE = 99


def punch(fd: int, start: int, end: int) -> None:
    """Free the bytes [start, end). Raises OSError; EOPNOTSUPP if impossible."""
    if end <= start:
        return
    system: str = sys.platform
    if system == "linux":
        libc = ctypes.CDLL(None, use_errno=True)
        call = libc.fallocate64 if hasattr(libc, "fallocate64") else libc.fallocate
        offset, length = ctypes.c_int64(start), ctypes.c_int64(end - start)
        if call(ctypes.c_int(fd), ctypes.c_int(_PUNCH_HOLE | _KEEP_SIZE), offset, length) != 0:
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code))
        return
    if system == "darwin":
        block = os.fstatvfs(fd).f_frsize or 4096
        first, last = -(-start // block) * block, end // block * block
        if last > first:
            fcntl.fcntl(fd, _F_PUNCHHOLE, struct.pack("=IIqq", 0, 0, first, last - first))
        return
    raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))


def can_punch(folder: Path) -> bool:
    """Try it on an unlinked file."""
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"x" * 16384)
            file.flush()
            punch(file.fileno(), 0, 8192)
    except OSError:
        return False
    return True
