"""Measure the time from the death of a process to the spawn of the next one: fleetd, supervisord, PM2.

    python -m bench.restart [--rounds 20]

Each supervisor runs a small child (`/bin/sleep`) without backoff. The child is killed with SIGKILL, and /proc is polled
every 0.2 ms for the next child of that command. Programs that are not on PATH are skipped with a message.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from bench.rig import DEADLINE_S, RunningFleet, scratch, summary
from tests.support.ports import free_port
from tests.support.waiting import until


def sleepers(marker: str, others: set[str]) -> set[int]:
    """Return the pids whose command line is `sleep MARKER`. `others` are known to be something else, and not read."""
    found: set[int] = set()
    wanted = f"sleep\0{marker}\0".encode()
    for name in set(os.listdir("/proc")) - others:  # noqa: PTH208 (names alone: a look must cost next to nothing)
        if name.isdigit():
            with suppress(OSError):
                if Path(f"/proc/{name}/cmdline").read_bytes().endswith(wanted):
                    found.add(int(name))
    return found


def deaths(marker: str, rounds: int, pause_s: float) -> list[float]:
    """Kill the child `rounds` times; return seconds from each kill to its successor."""
    took: list[float] = []
    until(lambda: bool(sleepers(marker, set())), "the first child")
    for _ in range(rounds):
        end = time.monotonic() + pause_s  # let the supervisor call this run a stable one
        until(lambda end=end: time.monotonic() >= end, "the pause")  # type: ignore[misc]
        (pid,) = sleepers(marker, set())
        others = set(os.listdir("/proc"))  # noqa: PTH208
        os.kill(pid, signal.SIGKILL)
        began = time.monotonic()
        until(lambda known=others: bool(sleepers(marker, known)), "the next child", period_s=0.0002)  # type: ignore[misc]
        took.append(time.monotonic() - began)
    return took


@contextmanager
def fleetd(folder: Path, marker: str) -> Iterator[None]:
    restart = "{policy: always, backoff: {initial: 0ms, max: 0ms, jitter: 0}, crash_loop: {count: 1000, window: 1m}}"
    text = f"services:\n  sleeper: {{command: [/bin/sleep, '{marker}'], restart: {restart}}}\n"
    with RunningFleet(folder, text, free_port()):
        yield


@contextmanager
def supervisord(folder: Path, marker: str) -> Iterator[None]:
    (folder / "supervisord.conf").write_text(
        f"[supervisord]\nnodaemon=true\nlogfile={folder}/s.log\npidfile={folder}/s.pid\nuser=root\n"
        f"[program:sleeper]\ncommand=/bin/sleep {marker}\nautorestart=true\nstartsecs=0\n"
    )
    child = subprocess.Popen(
        ["supervisord", "-c", str(folder / "supervisord.conf")], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        yield
    finally:
        child.send_signal(signal.SIGTERM)
        child.wait(timeout=DEADLINE_S)


@contextmanager
def pm2(folder: Path, marker: str) -> Iterator[None]:
    environment = {**os.environ, "PM2_HOME": str(folder / "pm2")}
    command = [
        "pm2",
        "start",
        "/bin/sleep",
        "--name",
        "sleeper",
        "--interpreter",
        "none",
        "--max-restarts",
        "100000",
        "--",
        marker,
    ]
    subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        yield
    finally:
        subprocess.run(
            ["pm2", "kill"], env=environment, check=False, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    asked = parser.parse_args()
    rivals: list[tuple[str, Callable[[Path, str], object]]] = [
        ("fleetd", fleetd),
        ("supervisord", supervisord),
        ("pm2", pm2),
    ]
    for index, (name, keep) in enumerate(rivals):
        if name != "fleetd" and shutil.which(name) is None:
            print(f"{name}: not on PATH, left out")
            continue
        marker = str(86_400 + os.getpid() % 1000 * 10 + index)
        with scratch("restart") as folder, keep(folder, marker):  # type: ignore[attr-defined]
            print(f"{name:12} {summary(deaths(marker, asked.rounds, 1.2 if name == 'supervisord' else 0.3))}")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
