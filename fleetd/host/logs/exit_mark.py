"""The line that fleetd appends to a log when a generation exits."""

from __future__ import annotations

import os
import re
from pathlib import Path

from fleetd.host.types import RawExit

_MARK = re.compile(r"--- exited .* generation=\d+ ---$")


def exit_mark(ended: RawExit) -> str:
    """Return the line that closes a generation's output."""
    how = f"code={ended.code}" if ended.code is not None else f"signal={ended.signal or 'unknown'}"
    oom = " oom=true" if ended.oom else ""
    return f"--- exited {how}{oom} uptime={ended.uptime_s:.3f}s generation={ended.generation} ---"


def append_mark(path: Path, mark: str) -> None:
    """Append a mark to a child's log on a line of its own; a full disk loses it."""
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


def is_exit_mark(text: str) -> bool:
    """Return whether a line is the mark of any generation."""
    return _MARK.match(text) is not None
