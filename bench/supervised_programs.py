"""The programs that the comparisons supervise: `supervised_programs.py PROGRAM FOLDER MARKER`.

Invariants:
- They import the standard library only and run with `python -I -S`: a start takes 15 ms.
- Each run appends one line to FOLDER/runs, so that starts are counted without a supervisor's help.
"""

# ruff: noqa: ARG001 - every program is called with the same two words
from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

LINES_AT_EXIT, RUNS_AT_EXIT = 2000, 100
LINES_UNDER_ROTATION = 200_000
LATE_S, SHORT_S = 20.0, 0.3


def began(folder: str) -> int:
    """Count this run; return its number, from 1."""
    path = os.path.join(folder, "runs")  # noqa: PTH118 - pathlib would double the time of a start
    with open(path, "a+") as file:  # noqa: PTH123
        file.write(f"{time.time()}\n")
        file.seek(0)
        return sum(1 for _ in file)


def late(folder: str, marker: str) -> None:
    """Live long once; from then on die at once."""
    if began(folder) == 1:
        time.sleep(LATE_S)
    sys.exit(1)


def short(folder: str, marker: str) -> None:
    """Live for 0.3 s, always."""
    began(folder)
    time.sleep(SHORT_S)
    sys.exit(1)


def still(folder: str, marker: str) -> None:
    """Live for ever."""
    began(folder)
    time.sleep(86_400)


def worker(folder: str, marker: str) -> None:
    """Ignore every polite request to end."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    time.sleep(86_400)


def tree(folder: str, marker: str) -> None:
    """Start three workers: one of the same group, one of its own session, one that its parent has left."""
    began(folder)
    program = [sys.executable, "-I", "-S", __file__, "worker", folder, marker]
    subprocess.Popen(program)
    subprocess.Popen(program, start_new_session=True)
    if os.fork() == 0:
        subprocess.Popen(program, start_new_session=True)
        os._exit(0)
    os.wait()
    time.sleep(86_400)


def tail(folder: str, marker: str) -> None:
    """Write and exit in the same instant, a hundred times."""
    run = began(folder)
    if run > RUNS_AT_EXIT:
        time.sleep(86_400)
    sys.stdout.write("".join(f"{run:04d} {line:05d} {'x' * 48}\n" for line in range(LINES_AT_EXIT)))
    sys.stdout.flush()
    os._exit(0)


def flood(folder: str, marker: str) -> None:
    """Write many numbered lines at the speed of the reader, as C's stdio does: in blocks of 4 KiB, wherever a line ends. Then stay."""
    if began(folder) == 1:
        text = b"".join(b"%08d %s\n" % (line, b"y" * 50) for line in range(LINES_UNDER_ROTATION))
        for start in range(0, len(text), 4096):
            block = text[start : start + 4096]
            while block:
                block = block[os.write(1, block) :]
    with open(os.path.join(folder, "written"), "w"):  # noqa: PTH118, PTH123
        pass
    time.sleep(86_400)


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:4])
