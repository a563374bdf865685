"""What begins before the daemon's own modules are loaded: the reading of fleet.yaml, on another core.

The rules of this file
- It imports next to nothing; that is what it is for.
"""

from __future__ import annotations

import os
import pickle
import time
from pathlib import Path

from fleetd.host.process.worker import WorkerProcess

LIMIT_S = 120.0  # for one reading: thousands of model files' headers from a cold, slow disk


def begin_reading(path: Path) -> WorkerProcess:
    """Have a file read; its places come as the first message. Raises HostError."""
    companion = WorkerProcess("fleetd.daemon.reload.worker")
    try:
        ask_to_read(companion, path)
    except BaseException:
        companion.kill()
        companion.close()
        raise
    return companion


def ask_to_read(companion: WorkerProcess, path: Path) -> None:
    """Have a file read by a companion that has nothing else to do. Raises HostError."""
    companion.send(pickle.dumps((str(path), dict(os.environ))), time.monotonic() + LIMIT_S)
