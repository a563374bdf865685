"""The facts that the doctor judges: plain values, gathered elsewhere, so that a test can state any machine.

Sizes are bytes. None means that a fact could not be read, or does not exist on this system; no check fails for that alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from fleetd.setup.programs import Installed


@dataclass(frozen=True, slots=True)
class FolderFact:
    """A folder of the daemon. `existing` is the nearest folder that exists; the space is of its volume."""

    role: str  # state, run or logs
    path: str
    existing: str | None = None  # None: it did not answer
    exists: bool = False
    is_folder: bool = True
    is_link: bool = False
    writable: bool = True
    owner: int = 0
    mode: int = 0o700
    free_bytes: int | None = None
    total_bytes: int | None = None
    free_inodes: int | None = None
    total_inodes: int | None = None


@dataclass(frozen=True, slots=True)
class ConfigFact:
    """The fleet.yaml. `problems` are what `fleetd check` reports; `exposed`: others may write it, or its folder."""

    path: str | None = None
    problems: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    exposed: str | None = None
    listen: str = "127.0.0.1:8484"
    loopback: bool = True
    insecure: bool = False
    unread: str | None = None  # why it could not even be looked at


@dataclass(frozen=True, slots=True)
class DaemonFact:
    """The daemon. `state`: running, stopped, silent (it holds its lock and does not answer) or denied."""

    state: str = "stopped"
    socket: str = ""
    pid: int | None = None
    version: str | None = None
    problem: str | None = None
    config: str | None = None
    config_error: str | None = None
    store_problem: str | None = None


@dataclass(frozen=True, slots=True)
class ProgramFact:
    """The program of one or more processes. `problem`: why it cannot be run, None if it can."""

    name: str
    processes: tuple[str, ...]
    problem: str | None = None
    hint: str | None = None
    missing_for_service: bool = False  # found here, but not on the PATH that is written in the service's file


@dataclass(frozen=True, slots=True)
class PortFact:
    """A port of the fleet. `ours`: the daemon, or a process that a fleetd started, listens there."""

    port: int
    users: tuple[str, ...]
    free: bool = True
    owner: str | None = None
    owner_pid: int | None = None
    ours: bool = False


@dataclass(frozen=True, slots=True)
class PathFact:
    """A file or folder that a process requires. `missing`: why it is not there."""

    path: str
    processes: tuple[str, ...]
    missing: str | None = None


@dataclass(frozen=True, slots=True)
class LimitsFact:
    """Limits of this login; a service has those of its file. `wanted`: the processes of the fleet, `clients` its connections."""

    open_files_soft: int | None = None
    open_files_hard: int | None = None
    processes_soft: int | None = None
    processes_now: int | None = None
    cgroup_pids_max: int | None = None
    cgroup_pids_now: int | None = None
    system_files_max: int | None = None
    system_files_now: int | None = None
    wanted: int = 0


@dataclass(frozen=True, slots=True)
class LibraryFact:
    """The wheel of llama.cpp, imported by another process. `problem`: its last words, None if it works."""

    installed: bool = False
    needed: bool = False
    problem: str | None = None


@dataclass(frozen=True, slots=True)
class GpuFact:
    """GPUs as the bus, the driver and NVML see them. `denied`: device files that this user may not open."""

    nvidia_on_bus: int = 0
    amd_on_bus: int = 0
    driver: str | None = None
    nvml_problem: str | None = None
    nvml_cards: int = 0
    amd_cards: int = 0
    denied: tuple[str, ...] = ()
    missing_nodes: tuple[str, ...] = ()
    wanted: tuple[str, ...] = ()  # GPUs that fleet.yaml names


@dataclass(frozen=True, slots=True)
class MemoryFact:
    """Memory. `budgets` and `totals` are by device; overcommit as in /proc/sys/vm, None on other systems."""

    total_bytes: int | None = None
    available_bytes: int | None = None
    swap_bytes: int | None = None
    overcommit: int | None = None
    commit_limit_bytes: int | None = None
    committed_bytes: int | None = None
    cgroup_limit_bytes: int | None = None
    budgets: Mapping[str, int] = field(default_factory=dict)
    totals: Mapping[str, int] = field(default_factory=dict)
    used: Mapping[str, int] = field(default_factory=dict)
    wired_limit_bytes: int | None = None  # macOS: what the GPU may wire down


@dataclass(frozen=True, slots=True)
class OllamaFact:
    """Ollama's own service. `unit`: its name if it is active; `engine`: fleet.yaml has servers that fleetd starts."""

    unit: str | None = None
    user_unit: bool = False
    engine: bool = False
    external: bool = False


@dataclass(frozen=True, slots=True)
class ServiceFact:
    """The service of fleetd. `manager`: systemd, launchd or none; `kind`: system or user; None: not installed."""

    manager: str = "none"
    kind: str | None = None
    path: str | None = None
    active: bool | None = None
    enabled: bool | None = None
    state: str | None = None  # as the manager prints it
    linger: bool | None = None  # of a user unit
    user: str = ""
    config: str | None = None  # that the service's file names
    program: str | None = None  # the fleetd in it
    program_found: bool = True
    open_files: int | None = None


@dataclass(frozen=True, slots=True)
class ClockFact:
    """`now` in UNIX seconds; `newest_file_s`: of the daemon's own files; `synchronized` by NTP as the kernel says."""

    now_s: float = 0.0
    newest_file_s: float | None = None
    synchronized: bool | None = None


@dataclass(frozen=True, slots=True)
class LeftFact:
    """A process that a daemon started which no longer runs."""

    name: str
    pid: int
    command: str


@dataclass(frozen=True, slots=True)
class Facts:
    """Everything that the doctor knows. `silent`: looks that did not answer in time."""

    platform: str = "linux"
    uid: int = 0
    version: str = ""
    python: tuple[int, int] = (3, 11)
    config: ConfigFact = ConfigFact()
    daemon: DaemonFact = DaemonFact()
    folders: tuple[FolderFact, ...] = ()
    programs: tuple[ProgramFact, ...] = ()
    installed: tuple[Installed, ...] = ()
    engines: tuple[str, ...] = ()  # the engines that fleet.yaml uses
    ports: tuple[PortFact, ...] = ()
    paths: tuple[PathFact, ...] = ()
    limits: LimitsFact = LimitsFact()
    library: LibraryFact = LibraryFact()
    gpu: GpuFact = GpuFact()
    memory: MemoryFact = MemoryFact()
    ollama: OllamaFact = OllamaFact()
    service: ServiceFact = ServiceFact()
    clock: ClockFact = ClockFact()
    left: tuple[LeftFact, ...] = ()
    silent: tuple[str, ...] = ()
