"""Every process of the machine in one pass, and signals that cannot hit the wrong one.

Invariants:
- One pass reads only `stat` files (about 10 microseconds each); environments are read for candidates alone.
- A process is named by (pid, start time). A signal goes through a pidfd whose identity was checked after it was opened.
- Where there is no /proc (macOS), psutil gives the same table; start times are then hundredths of a second.
- A zombie is dead, unless other threads of it still run.
"""

from __future__ import annotations

import os
import signal as signals
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple, Protocol

import psutil

LINUX = sys.platform == "linux"
TICKS_PER_S = os.sysconf("SC_CLK_TCK") if hasattr(os, "sysconf") else 100
PAGE_BYTES = os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 4096


class TableEntry(NamedTuple):
    """A line of the table: `start` in clock ticks since boot, `cpu_ticks` in total."""

    pid: int
    ppid: int
    pgid: int
    sid: int
    start: int
    dead: bool
    rss_bytes: int = 0
    cpu_ticks: int = 0


Snapshot = Mapping[int, TableEntry]


class ProcessTable(Protocol):
    """The machine's processes; a test puts a fake one in its place."""

    def snapshot(self) -> Snapshot: ...

    def entry(self, pid: int) -> TableEntry | None: ...

    def environment(self, pid: int) -> bytes | None: ...

    def send(self, pid: int, start: int, signal: int) -> bool: ...


def parse_stat(data: bytes) -> TableEntry | None:
    """Parse /proc/PID/stat from its last bracket: the command may contain brackets."""
    close = data.rfind(b")")
    if close < 0:
        return None
    fields = data[close + 2 :].split()
    if len(fields) < 22:
        return None
    state, threads = fields[0], int(fields[17])
    return TableEntry(
        pid=int(data[: data.index(b" ")]),
        ppid=int(fields[1]),
        pgid=int(fields[2]),
        sid=int(fields[3]),
        start=int(fields[19]),
        dead=state in (b"Z", b"X", b"x") and threads <= 1,
        rss_bytes=int(fields[21]) * PAGE_BYTES,
        cpu_ticks=int(fields[11]) + int(fields[12]),
    )


def _read(path: str, limit: int = 4096) -> bytes | None:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        return os.read(fd, limit)
    except OSError:
        return None
    finally:
        os.close(fd)


class LinuxTable:
    """/proc."""

    def snapshot(self) -> dict[int, TableEntry]:
        table: dict[int, TableEntry] = {}
        for name in os.listdir("/proc"):  # noqa: PTH208 (names alone; this is the hot path)
            if not name.isdigit():
                continue
            data = _read(f"/proc/{name}/stat")
            entry = parse_stat(data) if data else None
            if entry is not None:
                table[entry.pid] = entry
        return table

    def entry(self, pid: int) -> TableEntry | None:
        data = _read(f"/proc/{pid}/stat")
        return parse_stat(data) if data else None

    def environment(self, pid: int) -> bytes | None:
        """Return at most 256 KiB of environment; None if it may not be read."""
        try:
            with Path(f"/proc/{pid}/environ").open("rb") as file:
                return file.read(256 * 1024)
        except OSError:
            return None

    def send(self, pid: int, start: int, signal: int) -> bool:
        """Signal exactly this process; False if it is gone or its pid was reused."""
        try:
            fd = os.pidfd_open(pid)
        except (ProcessLookupError, OSError):
            return False
        try:
            entry = self.entry(pid)
            if entry is None or entry.start != start:
                return False
            signals.pidfd_send_signal(fd, signal)
        except (ProcessLookupError, PermissionError):
            return False
        finally:
            os.close(fd)
        return True


class PsutilTable:
    """The same through psutil, for systems without /proc."""

    def snapshot(self) -> dict[int, TableEntry]:
        table: dict[int, TableEntry] = {}
        for process in psutil.process_iter():
            entry = self._entry(process)
            if entry is not None:
                table[entry.pid] = entry
        return table

    def entry(self, pid: int) -> TableEntry | None:
        try:
            return self._entry(psutil.Process(pid))
        except psutil.Error:
            return None

    def _entry(self, process: psutil.Process) -> TableEntry | None:
        try:
            with process.oneshot():
                dead = process.status() == psutil.STATUS_ZOMBIE
                start, ppid = int(process.create_time() * 100), process.ppid()
                rss, cpu = 0, 0
                try:
                    rss = process.memory_info().rss
                    times = process.cpu_times()
                    cpu = int((times.user + times.system) * TICKS_PER_S)
                except psutil.Error:
                    pass
                group, session = os.getpgid(process.pid), os.getsid(process.pid)
        except (psutil.Error, OSError):
            return None
        return TableEntry(process.pid, ppid, group, session, start, dead, rss, cpu)

    def environment(self, pid: int) -> bytes | None:
        try:
            pairs = psutil.Process(pid).environ()
        except (psutil.Error, OSError):
            return None
        return b"\0".join(f"{key}={value}".encode(errors="surrogateescape") for key, value in pairs.items()) + b"\0"

    def send(self, pid: int, start: int, signal: int) -> bool:
        entry = self.entry(pid)
        if entry is None or entry.start != start:
            return False
        try:
            os.kill(pid, signal)
        except OSError:
            return False
        return True


def system_table() -> ProcessTable:
    """Return this machine's table."""
    if LINUX and Path("/proc/self/stat").exists():
        return LinuxTable()
    return PsutilTable()


def boot_id() -> str:
    """Return an id of this boot: pids and start times are valid within it only."""
    data = _read("/proc/sys/kernel/random/boot_id")
    if data:
        return data.decode().strip()
    return f"boot-{int(psutil.boot_time())}"


def command_of(pid: int) -> str:
    """Return a command line of at most 120 characters; empty if it is not visible."""
    try:
        words = psutil.Process(pid).cmdline() or [psutil.Process(pid).name()]
    except (psutil.Error, OSError):
        return ""
    text = " ".join(words)
    return text if len(text) <= 120 else text[:117] + "..."


def executable_of(pid: int) -> str:
    """Return the path of a process' program, empty when it may not be seen."""
    try:
        return psutil.Process(pid).exe()
    except (psutil.Error, OSError):
        return ""


def is_paused(pid: int) -> bool:
    """Return whether a signal such as SIGSTOP has stopped a process; False if it is gone."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_STOPPED
    except psutil.Error:
        return False
