"""Allocate TCP ports for tests and measurements."""

from __future__ import annotations

import fcntl
import os
import socket
import tempfile
from contextlib import suppress
from pathlib import Path


def free_port() -> int:
    """Return a free port outside the ranges that fleetd assigns and that outgoing connections use.

    A counter in a locked file gives each port to one process of the user only, also before it is bound.
    """
    for _ in range(100):
        port = 10_000 + _next_number() % 10_000
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            with suppress(OSError):
                probe.bind(("127.0.0.1", port))
                return port
    raise AssertionError("no free port")


def _next_number() -> int:
    with (Path(tempfile.gettempdir()) / f"fleetd-ports-{os.getuid()}").open("a+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        number = int(file.read() or "0") + 1
        file.seek(0)
        file.truncate()
        file.write(str(number))
    return number
