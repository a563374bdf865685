"""A service for chaos to disturb: `chaos_child.py FOLDER NAME writer|tree`, run by `python -I -S`.

Invariants:
- Every line has a number within its run. After write() has returned for a line, its number goes to FOLDER/progress:
  the log must contain each line up to there, complete and once, whichever process is killed next.
- A run holds a lock while it lives. If another run of the same name holds it, the run reports that in FOLDER/overlaps.
"""

# ruff: noqa: ARG001 - both programs are called with the same words
from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import time

PERIOD_S = 0.02
BURST = 4


def write_all(data: bytes) -> None:
    """Write to stdout to the last byte; a full disk is waited for."""
    while data:
        try:
            data = data[os.write(1, data) :]
        except OSError:
            time.sleep(0.05)


def alone(folder: str, name: str) -> int:
    """Take the lock of the name; note an overlap when another run has it."""
    fd = os.open(f"{folder}/locks/{name}", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        with open(f"{folder}/overlaps", "a") as file:  # noqa: PTH123
            file.write(f"{name}: {os.getpid()} began at {time.time():.3f} while another run lived\n")
    return fd


def writer(folder: str, name: str) -> None:
    run = f"{time.time_ns():x}-{os.getpid()}"
    progress = os.open(f"{folder}/progress/{name}.{run}", os.O_RDWR | os.O_CREAT, 0o600)
    number = 0
    while True:
        for _ in range(BURST):
            number += 1
            write_all(b"%s %s %08d %s\n" % (name.encode(), run.encode(), number, b"z" * (number % 97)))
            os.pwrite(progress, b"%08d" % number, 0)
        time.sleep(PERIOD_S)


def tree(folder: str, name: str) -> None:
    """A leader whose workers do not leave by themselves: one of its group, one of its own session, one left by its parent."""
    stubborn = "import signal,time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(86400)"
    program = [sys.executable, "-I", "-S", "-c", stubborn]
    subprocess.Popen(program)
    subprocess.Popen(program, start_new_session=True)
    if os.fork() == 0:
        subprocess.Popen(program, start_new_session=True)
        os._exit(0)
    os.wait()
    signal.pause()


if __name__ == "__main__":
    held = alone(sys.argv[1], sys.argv[2])
    globals()[sys.argv[3]](*sys.argv[1:3])
