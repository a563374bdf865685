"""Start `fleetd` and its config worker from a process that has already imported them.

Most of the CPU time of a test with a daemon is spent on imports. A server process imports fleetd once for a test run;
each daemon is a fork of it with its own arguments, environment, folder and standard streams; its config worker is a fork of the daemon.

Invariants:
- The fork runs `fleetd.cli.fleetd.main` as `python -m fleetd` does. A re-execution starts a new interpreter, its config worker too.
- Only plain starts are warm: variables that the interpreter or the dynamic linker read at start need a cold one.
- A config worker is found by its command line or, if it is a fork, by its process name.
"""

from __future__ import annotations

import ctypes
import json
import os
import selectors
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from importlib import import_module
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[2]
PRELOADED = (
    "fleetd.cli.fleetd",
    "fleetd.control.server",
    "fleetd.daemon.app",
    "fleetd.daemon.reload.worker",
    "fleetd.host.watch.watcher",
    "uvloop",
)
READ_AT_START = ("PYTHON", "LD_", "MALLOC", "GLIBC", "LANG", "LC_", "TZ")
WORKER = "fleetd.daemon.reload.worker"
_WORKER_NAME = "config-worker"  # at most 15 bytes
_PR_SET_NAME = 15
_LAST_FD = 4096


def is_config_worker(process: psutil.Process) -> bool:
    """Return whether a process is the config worker of a daemon. Raises psutil.Error."""
    return process.name() == _WORKER_NAME or WORKER in " ".join(process.cmdline())


class WarmProcess:
    """A forked daemon, with the part of the interface of `subprocess.Popen` that tests use."""

    def __init__(self, pid: int, status: socket.socket) -> None:
        self.pid = pid
        self.returncode: int | None = None
        self._status = status

    def poll(self) -> int | None:
        """Return the exit code, negative for a signal; None while it runs."""
        with suppress(subprocess.TimeoutExpired):
            return self.wait(0)
        return None

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the exit. Raises subprocess.TimeoutExpired."""
        if self.returncode is None:
            self._status.settimeout(None if timeout is None else max(timeout, 1e-6))
            try:
                answer = self._status.recv(64)
            except (TimeoutError, BlockingIOError):
                raise subprocess.TimeoutExpired(["fleetd"], timeout or 0) from None
            self._status.close()
            self.returncode = int(answer)  # empty if the server was killed: an error
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Send a signal unless the process is known to have exited."""
        if self.poll() is None:
            with suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


class WarmServer:
    """The client of a running server process."""

    def __init__(self, control: socket.socket) -> None:
        self._control = control

    def start(self, words: Sequence[str], env: Mapping[str, str], folder: Path, output: int) -> WarmProcess:
        """Start `fleetd WORDS…`; `output` receives stdout and stderr."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        request = {"words": list(words), "env": dict(env), "folder": str(folder)}
        with theirs:
            socket.send_fds(self._control, [json.dumps(request).encode()], [theirs.fileno(), output])
        return WarmProcess(int(ours.recv(64)), ours)


_server: WarmServer | None = None


def server_for(env: Mapping[str, str]) -> WarmServer | None:
    """Return the running server if a start with these changes of the environment may be warm."""
    return None if any(name.startswith(READ_AT_START) for name in env) else _server


@contextmanager
def warm_server() -> Iterator[None]:
    """Run the server; starts within the block are warm. Systems without SOCK_SEQPACKET start everything cold."""
    global _server
    if not hasattr(socket, "SOCK_SEQPACKET") or sys.platform != "linux":
        yield
        return
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    command = [sys.executable, "-m", __name__, str(theirs.fileno())]
    process = subprocess.Popen(
        command, cwd=ROOT, pass_fds=[theirs.fileno()], env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    theirs.close()
    _server = WarmServer(ours)
    try:
        yield
    finally:
        _server = None
        ours.close()
        process.wait(30)


def _serve(control: socket.socket) -> bool:
    """Fork a daemon per request. Returns True in each fork, False when the client closed its end."""
    wake_read, wake_write = os.pipe()
    os.set_blocking(wake_read, False)
    os.set_blocking(wake_write, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(wake_write)
    running: dict[int, socket.socket] = {}
    with selectors.DefaultSelector() as selector:
        selector.register(control, selectors.EVENT_READ)
        selector.register(wake_read, selectors.EVENT_READ)
        while True:
            ready = {key.fileobj for key, _ in selector.select()}
            if wake_read in ready:
                os.read(wake_read, 4096)
            _report_exits(running)
            if control not in ready:
                continue
            message, fds, _, _ = socket.recv_fds(control, 1 << 20, 2)
            if not message:
                return False
            status = socket.socket(fileno=fds[0])
            pid = os.fork()
            if pid == 0:
                signal.set_wakeup_fd(-1)
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                os.dup2(fds[1], 1)
                os.dup2(fds[1], 2)
                for fd in (fds[1], wake_read, wake_write):
                    os.close(fd)
                for open_socket in (control, status, *running.values()):
                    open_socket.close()
                _become(json.loads(message))
                return True
            os.close(fds[1])
            running[pid] = status
            status.send(str(pid).encode())


def _report_exits(running: dict[int, socket.socket]) -> None:
    for pid in list(running):
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            with running.pop(pid) as client, suppress(OSError):  # the test may have closed its end
                client.send(str(os.waitstatus_to_exitcode(status)).encode())


def _become(request: dict[str, object]) -> None:
    """Take the arguments, environment and folder of a request."""
    words = [str(word) for word in request["words"]]  # type: ignore[attr-defined]
    os.chdir(str(request["folder"]))
    os.environ.clear()
    os.environ.update(request["env"])  # type: ignore[call-overload]
    sys.path[0] = str(request["folder"])
    sys.argv = [str(ROOT / "fleetd" / "__main__.py"), *words]
    sys.orig_argv = [sys.executable, "-m", "fleetd", *words]
    time.tzset()


def _fork_worker(module: str, stdin: int, stdout: int) -> int:
    """Do what `fleetd.host.process.worker.spawn` does, with a fork of this daemon."""
    pid = os.fork()
    if pid:
        return pid
    try:
        os.setpgid(0, 0)
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        signal.set_wakeup_fd(-1)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGCHLD, signal.SIGUSR1):
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
        os.dup2(stdin, 0)
        os.dup2(stdout, 1)
        os.closerange(3, _LAST_FD)
        ctypes.CDLL(None).prctl(_PR_SET_NAME, _WORKER_NAME.encode(), 0, 0, 0)
        import_module(module).main()
    finally:
        os._exit(1)


def _serve_forks() -> None:
    for module in PRELOADED:
        __import__(module)
    if _serve(socket.socket(fileno=int(sys.argv[1]))):
        from fleetd.cli.fleetd import main
        from fleetd.host.process import worker

        worker.spawn = _fork_worker
        main()


if __name__ == "__main__":
    _serve_forks()
