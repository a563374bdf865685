"""Short functions for fleets, programs and actions of the system tests.

Invariants:
- A fleet is a Python mapping, written as JSON, which is YAML: no test fails because of indentation.
- Programs are small isolated Python or shell scripts that print what they observe; tests wait for their output.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from bench.chaos_checks import log_content
from tests.support.daemon import ROOT, Answer, Fleetd
from tests.support.waiting import alive, until

SLEEPER = ["sleep", "1000"]
QUICK = {"backoff": {"initial": "20ms", "max": "50ms", "jitter": 0}, "crash_loop": {"count": 1000}}


def fleet(services: Mapping[str, Mapping[str, Any]] | None = None, **keys: Any) -> str:
    """Return the text of a fleet.yaml, without what the rig writes above it."""
    keys = {"services": services or {}, **keys}
    return "".join(f"{key}: {json.dumps(value, ensure_ascii=False)}\n" for key, value in keys.items())


def python(code: str, *args: str) -> list[str]:
    """Return a command that runs Python code, unbuffered."""
    return [sys.executable, "-I", "-S", "-u", "-c", code, *args]


def sh(code: str) -> list[str]:
    return ["sh", "-c", code]


def order(daemon: Fleetd, verb: str, name: str, **body: Any) -> Answer:
    """POST one verb for one process."""
    return daemon.control("POST", f"/v1/processes/{verb}", {"names": [name], **body})


def ctl(
    daemon: Fleetd, *words: str, env: Mapping[str, str] | None = None, stdin: str | None = None
) -> subprocess.CompletedProcess[str]:
    """Run fleetctl to its end."""
    return subprocess.run(
        [sys.executable, "-m", "fleetd.cli.fleetctl", "--socket", str(daemon.socket), *words],
        cwd=ROOT, capture_output=True, text=True, timeout=60, check=False, input=stdin,
        env={**os.environ, **(env or {})},
    )  # fmt: skip


def crash(daemon: Fleetd) -> None:
    """kill -9 the daemon."""
    daemon.signal(signal.SIGKILL)
    daemon.wait()


def ready(daemon: Fleetd, name: str) -> int:
    """Return the pid of a process once it is READY."""
    return int(daemon.until_state(name, "READY")["pid"])


def until_gone(*pids: int) -> None:
    until(lambda: not any(map(alive, pids)), f"{pids} are gone")


def until_logged(daemon: Fleetd, name: str, text: str, times: int = 1) -> str:
    """Return the log of a process once it holds `text`."""
    until(lambda: daemon.log_of(name).count(text) >= times, f"{name} logs {text!r} {times} times")
    return daemon.log_of(name)


def numbers(texts: Sequence[str]) -> list[int]:
    """Return the lines that are numbers."""
    return [int(text) for text in texts if text.strip().isdigit()]


def piped_lines(folder: Path, name: str) -> list[str]:
    """Return the lines of a log captured by pipe, archives first."""
    return [json.loads(line)["line"] for line in all_lines(folder, name)]


def all_lines(folder: Path, name: str) -> list[str]:
    """Return all lines of a log, archives first, freed heads left out. Reads again if a file is rotated meanwhile."""
    logs, end = folder / "logs", time.monotonic() + 20.0
    while time.monotonic() < end:
        with suppress(FileNotFoundError):
            (logs / f"{name}.log").stat()
            return log_content(logs, name).decode("utf-8", "replace").splitlines()
    raise AssertionError(f"the log of {name} never rests")
