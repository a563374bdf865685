"""Captured output that outlives its collector: a named pipe whose reading end the child also holds.

Invariants:
- The child's output is opened for reading and writing, so the pipe keeps a reader when the daemon dies: the child gets no
  SIGPIPE, its output waits in the pipe, and the next daemon opens the same pipe by its path.
- While no daemon runs, a child that has filled the pipe waits for the next one.
- When the last writer is gone the reader sees the end, as with any pipe.
"""

from __future__ import annotations

import os
from pathlib import Path


def open_pair(path: Path) -> tuple[int, int]:
    """Return our end and the child's end of a named or plain pipe. Raises OSError."""
    reader = -1
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        os.mkfifo(path, 0o600)
        reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        return reader, os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError:  # a full disk, or a file system without named pipes
        if reader >= 0:
            os.close(reader)
        path.unlink(missing_ok=True)
        return os.pipe()


def reopen(path: Path) -> int | None:
    """Return a reading end of an earlier daemon's pipe; None when it is gone."""
    try:
        if not path.is_fifo():
            return None
        return os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return None
