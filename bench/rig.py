"""Shared by the measurements: a scratch folder, a running `fleetd`, and timed requests.

Invariants:
- All files are in a temporary folder with its own state, socket and ports, which is deleted at the end.
- A measurement is repeated and interleaved with the one that it is compared to. Results are median, minimum and maximum.
"""

from __future__ import annotations

import http.client
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

from tests.support.daemon import ROOT, Fleetd

DEADLINE_S = 30.0


def answers(port: int, path: str = "/health") -> bool:
    """Return whether GET `path` says 200 now."""
    try:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=2)
        try:
            connection.request("GET", path)
            return connection.getresponse().status == 200
        finally:
            connection.close()
    except (OSError, http.client.HTTPException):
        return False


def chat(
    port: int, model: str, tokens: int = 1, stream: bool = True, path: str = "/v1/chat/completions"
) -> tuple[float, dict[str, str]]:
    """Ask one chat question; return the seconds to the first byte of the answer's body, and the headers. Raises RuntimeError."""
    body = json.dumps(
        {"model": model, "messages": [{"role": "user", "content": "hi"}], "max_tokens": tokens, "stream": stream}
    )
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=DEADLINE_S)
    began = time.monotonic()
    try:
        connection.request("POST", path, body, {"Content-Type": "application/json"})
        response = connection.getresponse()
        first = response.read(1)
        took_s = time.monotonic() - began
        rest = first + response.read()
        if response.status != 200:
            raise RuntimeError(f"{response.status}: {rest[:300]!r}")
        return took_s, {key.lower(): value for key, value in response.getheaders()}
    finally:
        connection.close()


@contextmanager
def scratch(name: str) -> Iterator[Path]:
    """Yield a temporary folder."""
    folder = Path(tempfile.mkdtemp(prefix=f"fleetd-{name}-"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


class RunningFleet(Fleetd):
    """A daemon that runs within a `with` block, and `fleetctl` for it."""

    def __init__(self, folder: Path, text: str, port: int) -> None:
        super().__init__(folder, text, port=port)

    def __enter__(self) -> Self:
        return self.start()

    def ctl(self, *words: str, check: bool = True) -> str:
        """Run fleetctl; return its standard output. Raises RuntimeError if it fails and `check` is set."""
        command = [sys.executable, "-m", "fleetd.cli.fleetctl", "--socket", str(self.socket), *words]
        done = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE_S * 2, cwd=ROOT, check=False)
        if check and done.returncode:
            raise RuntimeError(f"fleetctl {' '.join(words)}: exit {done.returncode}: {done.stderr}{done.stdout}")
        return done.stdout

    def named(self, kind: str, name: str) -> dict[str, Any]:
        """Return one entry of the status; kind is `processes` or `models`."""
        found: dict[str, Any] = next(entry for entry in self.status()[kind] if entry["name"] == name)
        return found


def summary(values: Sequence[float], unit: str = "ms", scale: float = 1000.0) -> str:
    """Return `median (min ... max)` of seconds, in milliseconds by default."""
    scaled = [value * scale for value in values]
    return f"{statistics.median(scaled):8.1f} {unit}  ({min(scaled):.1f} ... {max(scaled):.1f}, n={len(scaled)})"
