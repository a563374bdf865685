"""Start the fake model server in a test, wait for it, read its counters, and stop it.

with fake("--api", "vllm", "--memory", "10000000") as server:
    requests.get(server.base_url + "/health"); server.stats()["requests"]
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from tests.support.waiting import until

SCRIPT = Path(__file__).with_name("fake_model_server.py")
DEADLINE_S = 20.0


def command(*flags: str) -> list[str]:
    """Return the command line of the fake: it can stand in for an engine's own program in fleet.yaml."""
    return [sys.executable, "-S", "-E", str(SCRIPT), *flags]


@dataclass
class Answer:
    status: int
    headers: Mapping[str, str]
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)


@dataclass
class FakeServer:
    """A running fake. `port` is where it listens or will listen."""

    process: subprocess.Popen[bytes]
    port: int
    output: IO[bytes]

    @property
    def base_url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def log(self) -> str:
        size = os.fstat(self.output.fileno()).st_size
        return os.pread(self.output.fileno(), size, 0).decode()

    def request(self, method: str, path: str, payload: Any = None, timeout_s: float = DEADLINE_S) -> Answer:
        """Do one request on its own connection. OSError or HTTPException when it breaks."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout_s)
        try:
            body = payload if payload is None or isinstance(payload, bytes) else json.dumps(payload)
            connection.request(method, path, body, {"Content-Type": "application/json"})
            response = connection.getresponse()
            return Answer(response.status, dict(response.getheaders()), response.read())
        finally:
            connection.close()

    def chat(self, model: str = "fake", **more: Any) -> Answer:
        payload = {"model": model, "messages": [{"role": "user", "content": "hello"}], **more}
        return self.request("POST", "/v1/chat/completions", payload)

    def stats(self) -> dict[str, Any]:
        answer: dict[str, Any] = self.request("GET", "/fake/stats").json()
        return answer

    def answers(self) -> bool:
        """Return whether it accepts connections."""
        try:
            return self.request("GET", "/fake/stats").status == 200
        except (OSError, http.client.HTTPException):
            return False

    def exit_code(self) -> int:
        """Wait for its end and return the exit code, negative for a signal."""
        return self.process.wait(DEADLINE_S)


@contextlib.contextmanager
def fake(*flags: str, env: Mapping[str, str] | None = None, wait: bool = True) -> Iterator[FakeServer]:
    """Start the fake on a free port; `wait` until it accepts connections. At the end it and its workers are killed."""
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(
            command(*flags), stdin=subprocess.DEVNULL, stdout=output, stderr=output, env={**os.environ, **(env or {})}
        )
        server = FakeServer(process, 0, output)
        workers: list[int] = []
        try:
            match = until(
                lambda: re.search(r"^fake: .* port (\d+)$", server.log(), re.MULTILINE), "the fake says its port"
            )
            server.port = int(match[1])
            if wait:
                until(lambda: process.poll() is not None or server.answers(), "the fake listens")
                if process.poll() is None and "--orphan-worker" in flags:
                    workers += until(lambda: server.stats()["workers"], "the worker runs")
            yield server
        finally:
            process.kill()
            process.wait()
            for pid in workers:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
