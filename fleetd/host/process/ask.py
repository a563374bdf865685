"""Run a short program for its answer: `ollama --version`, `nvidia-smi`, `systemctl show`.

Invariants:
- Bounded: the program and its whole session are killed at the limit, and at most a few kilobytes are read.
- The answer goes through a file, so a child that keeps the descriptor open holds nothing up.
"""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

ANSWER_MAX_BYTES = 64 * 1024


@dataclass(frozen=True, slots=True)
class Answered:
    """The exit code and the output, stderr included; `code` is None if it could not run or did not finish."""

    code: int | None
    text: str


def ask(argv: Sequence[str], limit_s: float, env: Mapping[str, str] | None = None) -> Answered:
    """Run a program and return its answer. Blocks for at most about `limit_s`; never raises for what it does."""
    with tempfile.TemporaryFile() as out:
        try:
            process = subprocess.Popen(
                list(argv), stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True, env=env
            )
        except (OSError, ValueError) as error:
            return Answered(None, getattr(error, "strerror", None) or str(error))
        try:
            code: int | None = process.wait(limit_s)
        except subprocess.TimeoutExpired:
            code = None
        _kill_session(process)
        out.seek(0)
        return Answered(code, out.read(ANSWER_MAX_BYTES).decode("utf-8", "replace"))


def _kill_session(process: subprocess.Popen[bytes]) -> None:
    """Kill the program if it still runs, with what it started in its group."""
    if process.poll() is None:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except OSError:
            process.kill()
        try:
            process.wait(2.0)
        except subprocess.TimeoutExpired:
            return  # in the kernel, as in a read of a dead network share: it is left behind
