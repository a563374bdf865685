"""Fixtures of every test: leak checks, and a summary line with the engines that are not installed.

Invariants:
- A test that leaks a file descriptor, a child process or a running thread fails.
- A test of an engine that is not installed is skipped with its name; the summary lists these engines.
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

from tests.support.waiting import descendants
from tests.support.warm_start import is_config_worker

REPOSITORY = Path(__file__).resolve().parent.parent
_LEAK_GRACE_S = 3.0

ENGINES = {
    "llamacpp": lambda: importlib.util.find_spec("xllamacpp") is not None or shutil.which("llama-server") is not None,
    "ollama": lambda: shutil.which("ollama") is not None,
    "vllm": lambda: shutil.which("vllm") is not None,
    "lmstudio": lambda: shutil.which("lms") is not None,
}


# No deadline per example: on a loaded machine the time of one example says nothing about the code.
hypothesis.settings.register_profile("fleetd", deadline=None)
hypothesis.settings.load_profile("fleetd")

# A shell starts background jobs with SIGINT ignored, and child processes inherit that. Some tests send SIGINT.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def missing_engines() -> list[str]:
    """Return the engines whose program is not installed on this machine."""
    return [name for name, present in ENGINES.items() if not present()]


# A library keeps these open for the life of the process: random sources, terminals, pytest's own files.
_LONG_LIVED = ("/dev/urandom", "/dev/null", "/dev/pts", "/dev/tty", "/dev/nvidia", "/proc/")


def _open_fds() -> dict[int, str]:
    """Return the open descriptors that a test could own, with their targets."""
    if not Path("/proc/self/fd").is_dir():
        return {int(name): name for name in os.listdir("/dev/fd")}  # noqa: PTH208 - runs twice per test
    found: dict[int, str] = {}
    for name in os.listdir("/proc/self/fd"):  # noqa: PTH208
        try:
            target = os.readlink(f"/proc/self/fd/{name}")  # noqa: PTH115
        except OSError:
            continue  # the descriptor of the listing itself
        if not target.startswith(_LONG_LIVED):
            found[int(name)] = target
    return found


def _command_of_leaked(pid: int) -> str | None:
    """Return the command of a child that counts as leaked, None if it does not.

    The config worker of a daemon stays alive for the next load and exits by itself.
    """
    try:
        child = psutil.Process(pid)
        command = " ".join(child.cmdline()) or child.name()
        is_worker = child.ppid() != os.getpid() and is_config_worker(child)
    except psutil.Error:
        return None
    return None if is_worker else command


def _threads() -> set[str]:
    return {
        thread.name
        for thread in threading.enumerate()
        if thread.is_alive()
        and not thread.daemon
        and not thread.name.startswith(("asyncio_", "MainThread", "ThreadPool"))
    }


def _left_over(fds: dict[int, str], children: set[int], threads: set[str]) -> list[str]:
    left = [f"file descriptor {fd} -> {target}" for fd, target in _open_fds().items() if fds.get(fd) != target]
    new = {pid: _command_of_leaked(pid) for pid in descendants(os.getpid()) - children}
    left += [f"child process {pid}: {command}" for pid, command in new.items() if command is not None]
    left += [f"thread {name}" for name in _threads() - threads]
    return left


@pytest.fixture(autouse=True)
def no_leaks(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fail a test that leaves a descriptor, a child process or a thread."""
    fds, children, threads = _open_fds(), descendants(os.getpid()), _threads()
    yield
    deadline = time.monotonic() + _LEAK_GRACE_S
    while left := _left_over(fds, children, threads):
        if time.monotonic() > deadline:
            pytest.fail(f"{request.node.nodeid} left behind:\n  " + "\n  ".join(left))
        gc.collect()
        time.sleep(0.02)


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
    missing = missing_engines()
    terminalreporter.write_line(f"engines not installed: {', '.join(missing) if missing else 'none'}")
