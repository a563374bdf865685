"""What every test gets: a check that it leaves nothing behind, and a closing line that names the engines that were absent.

The rules of this file
- A test that leaks a file descriptor, a child process or a running thread fails, whatever it asserted.
- A real engine that is not installed is a skip with its name; the summary repeats the names, so that none is overlooked.
"""

from __future__ import annotations

import asyncio
import gc
import importlib.util
import os
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import psutil
import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
_LEAK_GRACE_S = 3.0

ENGINES = {
    "llamacpp": lambda: importlib.util.find_spec("xllamacpp") is not None or shutil.which("llama-server") is not None,
    "ollama": lambda: shutil.which("ollama") is not None,
    "vllm": lambda: shutil.which("vllm") is not None,
    "lmstudio": lambda: shutil.which("lms") is not None,
}


# An example's time says more of what else the machine does than of the code.
hypothesis.settings.register_profile("fleetd", deadline=None)
hypothesis.settings.load_profile("fleetd")

# A run in a script's background ignores Ctrl-C, and every program started from it would too: some tests send it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def absent_engines() -> list[str]:
    """Return the engines of the contract that this machine has no program for."""
    return [name for name, present in ENGINES.items() if not present()]


def _open_fds() -> dict[int, str]:
    """Return the open descriptors that a test could own, with what they point to."""
    folder = Path("/proc/self/fd") if Path("/proc/self/fd").is_dir() else Path("/dev/fd")
    found: dict[int, str] = {}
    for entry in folder.iterdir():
        try:
            target = str(entry.readlink()) if folder.parts[1] == "proc" else entry.name
        except OSError:
            continue
        # Descriptors that a library keeps for the life of the process: the loop's epoll, random sources, pytest's own.
        if any(
            part in target for part in ("/dev/urandom", "/dev/null", "/dev/pts", "/dev/tty", "/dev/nvidia", "/proc/")
        ):
            continue
        found[int(entry.name)] = target
    return found


def _children() -> dict[int, str]:
    found = {}
    for child in psutil.Process().children(recursive=True):
        try:
            words = " ".join(child.cmdline()) or child.name()
            own = child.ppid() == os.getpid()
        except psutil.Error:
            continue
        if own or "fleetd.daemon.reload.worker" not in words:
            found[child.pid] = words  # a daemon's reading process stays for the next reading, and ends by itself
    return found


def _threads() -> set[str]:
    return {
        thread.name
        for thread in threading.enumerate()
        if thread.is_alive()
        and not thread.daemon
        and not thread.name.startswith(("asyncio_", "MainThread", "ThreadPool"))
    }


def _left_over(fds: dict[int, str], children: dict[int, str], threads: set[str]) -> list[str]:
    left = [f"file descriptor {fd} -> {target}" for fd, target in _open_fds().items() if fds.get(fd) != target]
    left += [f"child process {pid}: {line}" for pid, line in _children().items() if pid not in children]
    left += [f"thread {name}" for name in _threads() - threads]
    return left


@pytest.fixture(autouse=True)
def no_leaks(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fail a test that leaves a descriptor, a child or a thread. `@pytest.mark.leaks` is no way out: there is none."""
    fds, children, threads = _open_fds(), _children(), _threads()
    yield
    deadline = time.monotonic() + _LEAK_GRACE_S
    left = _left_over(fds, children, threads)
    while left and time.monotonic() < deadline:
        gc.collect()
        time.sleep(0.02)
        left = _left_over(fds, children, threads)
    if left:
        pytest.fail(f"{request.node.nodeid} left behind:\n  " + "\n  ".join(left))


@pytest.fixture(autouse=True)
def no_running_loop() -> Iterator[None]:
    """A test must not leave an event loop set for its thread: the next one would inherit its tasks."""
    yield
    try:
        loop = asyncio.get_running_loop()
    except RuntimeError:
        return
    left = [task for task in asyncio.all_tasks(loop) if not task.done()]
    assert not left, f"tasks still running: {left}"


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    missing = absent_engines()
    terminalreporter.write_line(f"engines absent on this machine: {', '.join(missing) if missing else 'none'}")
