"""The values that the host takes and gives. Frozen data, no behaviour.

Invariants:
- Durations are seconds, memory is bytes; wall-clock times are UNIX seconds, the rest is monotonic.
- An *identity* is (pid, start time): a bare pid is never signalled, since the kernel gives pids out again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

# Variables by which systemd speaks to the daemon alone. With the first group a child would report to systemd in the daemon's
# name or take its sockets: no child gets them, even from fleet.yaml. The rest only describes the daemon's own unit.
NEVER_PASSED = frozenset(
    {"NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID", "LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"}
)
NEVER_INHERITED = NEVER_PASSED | {
    "JOURNAL_STREAM", "INVOCATION_ID", "MANAGERPID", "SYSTEMD_EXEC_PID", "CREDENTIALS_DIRECTORY", "MEMORY_PRESSURE_WATCH",
    "MEMORY_PRESSURE_WRITE",
}  # fmt: skip


class KillScope(StrEnum):
    """Which processes must be gone for a stop, and are killed at its deadline."""

    SET = "set"  # everything that descends from it, sessions and double forks included
    GROUP = "group"  # its process group
    LEADER = "leader"  # only itself: for programs that leave daemons behind on purpose


class Capture(StrEnum):
    FILE = "file"  # the child writes into its file itself
    PIPE = "pipe"  # the daemon reads a pipe and writes JSON lines with times


@dataclass(frozen=True, slots=True)
class LogPolicy:
    """Limits of one log: `keep` archives and a live file; `max_age_s` rotates by age."""

    max_size_bytes: int = 50 * 1024 * 1024
    keep: int = 5
    compress: bool = True
    capture: str = Capture.FILE
    max_age_s: float | None = None


@dataclass(frozen=True, slots=True)
class StopPolicy:
    """How a process is asked to end, and what happens when it does not.

    `command` runs instead of the signal (with MAINPID in its environment); `message` goes over the Node IPC channel, when
    there is one, instead of the signal.
    """

    signal: str = "SIGTERM"
    timeout_s: float = 10.0
    kill: str = KillScope.SET
    command: tuple[str, ...] = ()
    message: str | None = None


@dataclass(frozen=True, slots=True)
class StopCommandResult:
    """The result of a stop command: `text` is its last output line, or how it failed."""

    ok: bool
    text: str
    took_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Execution:
    """The operating-system settings of a process."""

    cwd: str | None = None
    user: str | None = None
    umask: int | None = None
    nice: int | None = None
    cpu: tuple[int, ...] = ()
    nofile: int | None = None
    logs: LogPolicy = LogPolicy()


@dataclass(frozen=True, slots=True)
class Program:
    """A command line, its environment and settings; `pass_fds` keep their numbers."""

    argv: tuple[str, ...]
    env: Mapping[str, str] = field(default_factory=dict)
    execution: Execution = Execution()
    pass_fds: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class SpawnRequest:
    """One process to start.

    Variables that belong to the daemon alone are removed from its environment. `port` is checked to be free on `host` first.
    `ipc` opens a Node IPC channel. `extra` is kept in the handle's record and comes back on adoption.
    """

    name: str
    generation: int
    program: Program
    host: str = "127.0.0.1"
    port: int | None = None
    ipc: bool = False
    extra: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class RawExit:
    """A death as the kernel reports it; `code` and `signal` None: unknown."""

    name: str
    generation: int
    pid: int
    code: int | None
    signal: str | None = None
    core_dumped: bool = False
    oom: bool = False
    uptime_s: float = 0.0
    at: float = 0.0


@dataclass(frozen=True, slots=True)
class Usage:
    """The usage of a process set. `cpu_s` grows while its members (`pids`) live."""

    rss_bytes: int = 0
    cpu_s: float = 0.0
    pids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class PortOwner:
    """The listener on a port. `pid` None: not visible, as for another user's process."""

    port: int
    pid: int | None
    command: str = ""

    def __str__(self) -> str:
        if self.pid is None:
            return "a process that cannot be seen from here"
        return f"pid {self.pid} ({self.command})"


@dataclass(frozen=True, slots=True)
class HandleRecord:
    """The record of a live process on disk: proof for its adoption.

    `pid` None: the daemon was about to spawn it; only `token` can find it.
    """

    name: str
    generation: int
    token: str
    boot_id: str
    pid: int | None = None
    start_ticks: int = 0
    exe: str = ""
    argv: tuple[str, ...] = ()
    host: str = "127.0.0.1"
    port: int | None = None
    cgroup: str | None = None
    log_path: str = ""
    log_start: int = 0
    logs: LogPolicy = LogPolicy()
    spawned_at: float = 0.0
    pipe_fd: int | None = None
    ipc_fd: int | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class HostPaths:
    """The folders of a daemon; `handles` holds one record per live process."""

    state: Path
    run: Path
    logs: Path

    @property
    def handles(self) -> Path:
        return self.state / "handles"
