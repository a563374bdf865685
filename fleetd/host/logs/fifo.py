"""Captured output that outlives its collector: a named pipe whose reading end the child holds as well.

Invariants:
- The child's output is opened for reading and writing, so a daemon that dies takes no reader away: the child gets no
  SIGPIPE, what it writes waits in the pipe, and the next daemon opens the same pipe by its path.
- Nobody reads while no daemon runs: a child that has filled the pipe waits there until one does.
- When the last writer is gone the reader sees the end, as with any pipe.
"""

from __future__ import annotations

import os
from pathlib import Path


def open_pair(path: Path) -> tuple[int, int]:
    """Return our reading end and the child's end. Where no named pipe can be made, an ordinary one; raises OSError."""
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
    """Return a reading end of a pipe that an earlier daemon made; None when it is gone."""
    try:
        if not path.is_fifo():
            return None
        return os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return None
