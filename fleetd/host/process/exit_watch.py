"""Report exits to the event loop as they happen, and collect each status exactly once.

Invariants:
- Linux: a pidfd becomes readable when the whole thread group is dead, even if another process holds its stdout. macOS: kqueue.
- No other code waits for children: no SIGCHLD handler, no asyncio child watcher, no Popen polling.
- As subreaper the daemon inherits orphans; their statuses are collected here too, never one of a spawn still under way.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import select
import signal as signals
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from fleetd.host.process.table import system_table

_PR_SET_CHILD_SUBREAPER = 36


@dataclass(frozen=True, slots=True)
class ExitStatus:
    """The exit status of a child: `code` or `signal`; neither if it is unknown."""

    code: int | None = None
    signal: str | None = None
    core_dumped: bool = False


def decode_status(status: int) -> ExitStatus:
    """Turn a wait status into a code or a signal's name."""
    if os.WIFSIGNALED(status):
        return ExitStatus(signal=signal_name(os.WTERMSIG(status)), core_dumped=os.WCOREDUMP(status))
    return ExitStatus(code=os.WEXITSTATUS(status))


def signal_name(number: int) -> str:
    """Return SIGTERM for 15; realtime signals without a name are SIG34 and so on."""
    try:
        return signals.Signals(number).name
    except ValueError:
        return f"SIG{number}"


def signal_number(name: str | int) -> int:
    """Return 15 for SIGTERM, TERM, "15" or 15. Raises ValueError with the name."""
    text = str(name).strip().upper()
    if text.isdigit() and int(text) in signals.valid_signals():
        return int(text)
    try:
        return signals.Signals[text if text.startswith("SIG") else f"SIG{text}"].value
    except KeyError:
        raise ValueError(f"{name!r} is not a signal of this system") from None


def become_subreaper() -> bool:
    """Adopt our children's orphans instead of init; False if unsupported."""
    if sys.platform != "linux":
        return False
    libc = ctypes.CDLL(None, use_errno=True)
    return bool(libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) == 0)


class Children:
    """The owners of child statuses, one per program: waiting is per process."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._known: set[int] = set()
        self._spawning = 0

    @contextmanager
    def spawning(self) -> Iterator[None]:
        """While inside, no unknown child is reaped: it may be the one being spawned."""
        with self._lock:
            self._spawning += 1
        try:
            yield
        finally:
            with self._lock:
                self._spawning -= 1

    def claim(self, pid: int) -> None:
        """Reserve this child's status for `collect(pid)`."""
        with self._lock:
            self._known.add(pid)

    def collect(self, pid: int) -> ExitStatus | None:
        """Collect a child's status: None while it lives, empty if it is not ours."""
        try:
            found, status = os.waitpid(pid, os.WNOHANG)
        except ChildProcessError:
            found, status = pid, -1
        if found == 0:
            return None
        with self._lock:
            self._known.discard(pid)
        return ExitStatus() if status == -1 else decode_status(status)

    def disown(self, pid: int) -> None:
        """Release a child: it is reaped like an orphan."""
        with self._lock:
            self._known.discard(pid)

    def reap_unknown(self) -> list[int]:
        """Collect the statuses of dead orphans, except children in our own session."""
        reaped: list[int] = []
        if not hasattr(os, "waitid"):
            return reaped
        while True:
            with self._lock:
                if self._spawning:
                    return reaped
                try:
                    info = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
                except ChildProcessError:
                    return reaped
                if info is None:
                    return reaped
                if not self._is_orphan(info.si_pid):
                    break
                self._take(info.si_pid, reaped)
        # The kernel reports only this child until its owner collects it: search for others.
        for pid in _dead_children():
            with self._lock:
                self._take_orphan(pid, reaped)
        return reaped

    def _is_orphan(self, pid: int) -> bool:
        return pid not in self._known and _session_of(pid) != os.getsid(0)

    def _take_orphan(self, pid: int, reaped: list[int]) -> None:
        if self._spawning == 0 and self._is_orphan(pid):
            self._take(pid, reaped)

    def _take(self, pid: int, reaped: list[int]) -> None:
        try:
            os.waitpid(pid, os.WNOHANG)
        except ChildProcessError:
            return
        reaped.append(pid)


def _dead_children() -> list[int]:
    own = os.getpid()
    return [entry.pid for entry in system_table().snapshot().values() if entry.ppid == own and entry.dead]


def _session_of(pid: int) -> int:
    try:
        return os.getsid(pid)
    except OSError:
        return -1


CHILDREN = Children()


class ExitWatch:
    """Call back once, on the loop, when a process has exited; child or not."""

    def __init__(self, loop: asyncio.AbstractEventLoop, pid: int, callback: Callable[[], None]) -> None:
        """Watch a process. Raises ProcessLookupError if it does not exist."""
        self._loop, self._callback = loop, callback
        self._queue: Any = None
        if hasattr(os, "pidfd_open"):
            self._fd = os.pidfd_open(pid)
        else:
            self._queue = _kqueue_for(pid)
            self._fd = self._queue.fileno()
        loop.add_reader(self._fd, self._fire)

    def _fire(self) -> None:
        self.close()
        self._callback()

    def close(self) -> None:
        if self._fd < 0:
            return
        self._loop.remove_reader(self._fd)
        if self._queue is not None:
            self._queue.close()
        else:
            os.close(self._fd)
        self._fd = -1


def _kqueue_for(pid: int) -> Any:
    """Return a kqueue that becomes readable when pid exits (macOS and the BSDs)."""
    api: Any = select
    queue = api.kqueue()
    event = api.kevent(pid, filter=api.KQ_FILTER_PROC, flags=api.KQ_EV_ADD | api.KQ_EV_ONESHOT, fflags=api.KQ_NOTE_EXIT)
    try:
        queue.control([event], 0, 0)
    except OSError:
        queue.close()
        raise ProcessLookupError(pid) from None
    return queue
