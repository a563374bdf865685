"""A real `fleetd run` for tests: HTTP, the control socket, signals and the process table.

Invariants:
- Every wait polls a condition with a deadline; no test sleeps for a fixed time and hopes.
- Leaving the `with` block kills the daemon and all processes that it started, found by a variable in their environment.
"""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psutil

from tests.support.ports import free_port
from tests.support.waiting import descendants, until
from tests.support.warm_start import WarmProcess, is_config_worker, server_for

ROOT = Path(__file__).resolve().parent.parent.parent
FAKE = ROOT / "tests" / "fakes" / "fake_model_server.py"
DEADLINE_S = 30.0


@dataclass(frozen=True, slots=True)
class Answer:
    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def code(self) -> str:
        """The stable code of an error, whatever dialect it has."""
        error = self.json["error"]
        return str(error["code"] if isinstance(error, dict) else error)


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: Path) -> None:
        super().__init__("fleetd", timeout=DEADLINE_S)
        self._path = str(path)

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


@dataclass(slots=True)
class Fleetd:
    """One daemon in a folder. `fleet` is fleet.yaml without version, paths and gateway."""

    folder: Path
    fleet: str
    env: Mapping[str, str] = field(default_factory=dict)
    port: int = field(default_factory=free_port)
    process: subprocess.Popen[bytes] | WarmProcess | None = None
    run: Path = field(init=False)

    def __post_init__(self) -> None:
        self.run = Path(tempfile.mkdtemp(prefix="fd-"))  # a socket's path has to be short
        self.write(self.fleet)

    # -- files ----------------------------------------------------------------------------------------------------------

    @property
    def config(self) -> Path:
        return self.folder / "fleet.yaml"

    @property
    def socket(self) -> Path:
        return self.run / "fleetd.sock"

    def write(self, fleet: str) -> None:
        """Write fleet.yaml, as an editor does: whole, by rename."""
        head = f"version: 1\nname: test\npaths: {{state: ./state, run: {self.run}, logs: ./logs}}\n"
        head += f"gateway: {{listen: 127.0.0.1:{self.port}}}\n"
        part = self.folder / ".fleet.yaml.part"
        part.write_text(head + textwrap.dedent(fleet), "utf-8")
        part.replace(self.config)

    def log(self) -> str:
        path = self.folder / "fleetd.log"
        return path.read_text("utf-8", "replace") if path.exists() else ""

    def log_of(self, name: str) -> str:
        path = self.folder / "logs" / f"{name}.log"
        return path.read_text("utf-8", "replace") if path.exists() else ""

    # -- life -----------------------------------------------------------------------------------------------------------

    def start(self, *, wait: bool = True, cold: bool = False) -> Self:
        """Start the daemon; `cold`: in an interpreter of its own, for tests of what it imports."""
        env = {**os.environ, "PYTHONPATH": str(ROOT), **self.env}
        words = ["run", "--config", str(self.config)]
        server = None if cold else server_for(self.env)
        with (self.folder / "fleetd.log").open("ab") as log:
            if server is not None:
                self.process = server.start(words, env, self.folder, log.fileno())
            else:
                command = [sys.executable, "-m", "fleetd", *words]
                self.process = subprocess.Popen(command, stdout=log, stderr=log, env=env, cwd=self.folder)
        if wait:
            until(self.is_up, f"the daemon is up; it says:\n{self.log()}")
            until(lambda: not self._has_config_worker(), "the config worker of the start has exited")
        return self

    def _has_config_worker(self) -> bool:
        """Return whether the process that loaded fleet.yaml is alive; tests of children must not see it."""
        for pid in descendants(self.pid):
            with suppress(psutil.Error):
                if is_config_worker(psutil.Process(pid)):
                    return True
        return False

    def is_up(self) -> bool:
        assert self.process is not None
        if self.process.poll() is not None:
            raise AssertionError(f"the daemon ended with {self.process.returncode}:\n{self.log()}")
        try:
            return self.get("/health").status == 200 and self.socket.exists()
        except OSError:
            return False

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    def signal(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)

    def wait(self) -> int:
        assert self.process is not None
        return self.process.wait(DEADLINE_S)

    def stop(self) -> int:
        self.signal(signal.SIGTERM)
        return self.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(20)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        for child in self.children():
            try:
                child.kill()
                child.wait(5)
            except psutil.Error:
                continue
        for left in self.run.iterdir():
            left.unlink()
        self.run.rmdir()

    def children(self) -> list[psutil.Process]:
        """Return everything alive that this daemon started: it works, or logs, in our folder, or carries its name."""
        found = []
        for process in psutil.process_iter():
            try:
                if process.pid not in (os.getpid(), self.process.pid if self.process else 0) and self._is_ours(process):
                    found.append(process)
            except psutil.Error:
                continue
        return found

    def _is_ours(self, process: psutil.Process) -> bool:
        if process.status() == psutil.STATUS_ZOMBIE:
            return False
        return process.environ().get("BLACK_BOX_FOLDER") == str(self.folder)

    # -- asking ---------------------------------------------------------------------------------------------------------

    def get(self, path: str) -> Answer:
        return self.ask("GET", path)

    def ask(self, method: str, path: str, body: Any = None, timeout_s: float = DEADLINE_S) -> Answer:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout_s)
        try:
            data = json.dumps(body) if body is not None else None
            connection.request(method, path, data, {"Content-Type": "application/json"} if data else {})
            response = connection.getresponse()
            return Answer(response.status, dict(response.headers.items()), response.read())
        finally:
            connection.close()

    def chat(self, model: str, **more: Any) -> Answer:
        body = {"model": model, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 4, **more}
        return self.ask("POST", "/v1/chat/completions", body)

    def control(self, method: str, path: str, body: Any = None) -> Answer:
        connection = _UnixConnection(self.socket)
        try:
            data = json.dumps(body) if body is not None else None
            connection.request(method, path, data, {"Content-Type": "application/json"} if data else {})
            response = connection.getresponse()
            return Answer(response.status, dict(response.headers.items()), response.read())
        finally:
            connection.close()

    def status(self) -> dict[str, Any]:
        found: dict[str, Any] = self.control("GET", "/v1/status").json
        return found

    def process_row(self, name: str) -> dict[str, Any]:
        return next(row for row in self.status()["processes"] if row["name"] == name)

    def model_row(self, name: str) -> dict[str, Any]:
        return next(row for row in self.status()["models"] if row["name"] == name)

    def until_state(self, name: str, *states: str) -> dict[str, Any]:
        found: dict[str, Any] = {}

        def there() -> bool:
            found.update(next((row for row in self.status()["processes"] if row["name"] == name), {}))
            return found.get("state") in states

        try:
            until(there, "")
        except AssertionError:
            raise AssertionError(
                f"{name} is {found.get('state')}, not {' or '.join(states)}: {found.get('reason')}\n{self.log()[-3000:]}"
            ) from None
        return found


def fake(*flags: str, api: str = "openai") -> str:
    """Return a command of the fake model server, as a YAML list."""
    return json.dumps([sys.executable, "-I", str(FAKE), "--api", api, "--port", "{port}", *flags])


def fleetd(folder: Path, fleet: str) -> Fleetd:
    """Return a daemon, not started yet, whose children can be found by their environment."""
    return Fleetd(folder, fleet, {"BLACK_BOX_FOLDER": str(folder)})
