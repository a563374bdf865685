"""Run the real `fleetctl` as a program, with pipes or on a terminal, and servers that misbehave."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import select
import signal
import socket
import struct
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
FLEETCTL = [sys.executable, "-m", "fleetd.cli.fleetctl"]
PATIENCE_S = 30.0


@dataclass(frozen=True)
class Ran:
    code: int
    out: str
    err: str


def environment(**changes: str) -> dict[str, str]:
    base = {"PATH": os.environ["PATH"], "HOME": "/nonexistent", "LANG": "C.UTF-8", "PYTHONPATH": str(REPOSITORY)}
    return base | changes


def fleetctl(*arguments: str, stdin: str = "", **env: str) -> Ran:
    """Run with pipes. A traceback in the output fails the test."""
    done = subprocess.run(
        [*FLEETCTL, *arguments],
        input=stdin.encode(),
        capture_output=True,
        timeout=PATIENCE_S,
        env=environment(**env),
        check=False,
    )
    out, err = done.stdout.decode("utf-8", "surrogateescape"), done.stderr.decode("utf-8", "surrogateescape")
    assert "Traceback" not in out + err, err
    return Ran(done.returncode, out, err)


def on_terminal(
    *arguments: str, columns: int = 80, interrupt_at: str | None = None, typed: str = "", **env: str
) -> Ran:
    """Run on a pseudo-terminal of that width; `interrupt_at`: send SIGINT once this text was seen."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    started = subprocess.Popen(
        [*FLEETCTL, *arguments],
        stdin=slave,
        stdout=slave,
        stderr=subprocess.PIPE,
        env=environment(TERM="xterm", **env),
        start_new_session=True,
    )
    os.close(slave)
    seen = b""
    deadline = time.monotonic() + PATIENCE_S
    try:
        if typed:
            os.write(master, typed.encode())
        while time.monotonic() < deadline:
            ready, _, _ = select.select([master], [], [], 0.1)
            if ready:
                try:
                    chunk = os.read(master, 65536)
                except OSError:  # Linux reports a closed other side this way
                    break
                if not chunk:
                    break
                seen += chunk
            elif started.poll() is not None:
                break
            if interrupt_at is not None and interrupt_at.encode() in seen:
                started.send_signal(signal.SIGINT)
                interrupt_at = None
        code = started.wait(max(0.1, deadline - time.monotonic()))
        assert started.stderr is not None
        err = started.stderr.read().decode()
    finally:
        if started.poll() is None:
            started.kill()
            started.wait()
        assert started.stderr is not None
        started.stderr.close()
        os.close(master)
    out = seen.decode("utf-8", "replace").replace("\r\n", "\n")
    assert "Traceback" not in out + err, err
    return Ran(code, out, err)


@contextmanager
def fake_fleet(folder: Path) -> Iterator[Path]:
    """Run tests/fakes/fake_control_port.py as a program, and yield its socket."""
    path = folder / "run" / "fleetd.sock"
    started = subprocess.Popen(
        [sys.executable, "-m", "tests.fakes.fake_control_port", str(path)],
        stdout=subprocess.PIPE,
        cwd=REPOSITORY,
        env=environment(),
    )
    try:
        assert started.stdout is not None
        assert started.stdout.readline() == b"ready\n"
        yield path
    finally:
        started.terminate()
        started.wait(PATIENCE_S)
        assert started.stdout is not None
        started.stdout.close()


@contextmanager
def raw_server(path: Path, answer: Callable[[socket.socket], None]) -> Iterator[Path]:
    """Serve every connection with `answer`, one after the other, until the block ends."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen(8)
    stopping = threading.Event()

    def serve() -> None:
        while not stopping.is_set():
            connection, _ = listener.accept()
            with connection, contextlib.suppress(OSError):
                if not stopping.is_set():
                    answer(connection)

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield path
    finally:
        stopping.set()
        with socket.socket(socket.AF_UNIX) as last, contextlib.suppress(OSError):
            last.connect(str(path))
        thread.join(PATIENCE_S)
        listener.close()
