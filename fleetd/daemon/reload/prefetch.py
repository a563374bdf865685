"""Start reading fleet.yaml in a worker process before the daemon's own modules are imported.

Invariants:
- Keep imports minimal: this module runs before everything else is loaded.
"""

from __future__ import annotations

import os
import pickle
import time
from pathlib import Path

from fleetd.host import early_lock
from fleetd.host.lock import DaemonLock
from fleetd.host.process.worker import WorkerProcess

LIMIT_S = 120.0  # for one reading: headers of thousands of model files on a slow disk with a cold cache


def hold_lock(path: Path) -> DaemonLock | None:
    """Lock the run folder from now on, if it can be guessed: fleetctl waits for the daemon that holds it."""
    return early_lock.take(path, os.environ)


def begin_reading(path: Path) -> WorkerProcess:
    """Start a worker on a file; it answers the folders first. Raises HostError."""
    companion = WorkerProcess("fleetd.daemon.reload.worker")
    try:
        ask_to_read(companion, path)
    except BaseException:
        companion.kill()
        companion.close()
        raise
    return companion


def ask_to_read(companion: WorkerProcess, path: Path) -> None:
    """Send a file to an idle worker. Raises HostError."""
    companion.send(pickle.dumps((str(path), dict(os.environ))), time.monotonic() + LIMIT_S)
