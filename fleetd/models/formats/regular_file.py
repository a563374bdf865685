"""Open a file of a model without ever waiting on it, and report errors in the terms of its format.

Invariants:
- A folder, a FIFO, a socket or a device is rejected at once.
- Files are read, not mapped: an unplugged drive gives an error, while a mapping would kill the daemon with SIGBUS.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fleetd.errors import EngineError

_KINDS = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a FIFO", stat.S_IFSOCK: "a socket"}


@contextmanager
def opened(path: Path, error_type: type[EngineError]) -> Iterator[tuple[int, os.stat_result]]:
    """Yield descriptor and status of a file. Raises `error_type` for every OSError."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise error_type(f"{path}: {error.strerror}", recoverable=True) from None
    except ValueError as error:
        raise error_type(f"{str(path)!r} is not a path: {error}") from None
    try:
        status = os.fstat(handle)
        if not stat.S_ISREG(status.st_mode):
            kind = _KINDS.get(stat.S_IFMT(status.st_mode), "a device")
            raise error_type(f"{path} is {kind}, not a regular file")
        yield handle, status
    except OSError as error:
        raise error_type(f"{path}: {error.strerror}", recoverable=True) from None
    finally:
        os.close(handle)
