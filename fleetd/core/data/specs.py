"""Configuration, engines and machine as the core sees them: frozen values.

Durations are seconds (`_s`), sizes are bytes (`_bytes`), times are monotonic seconds. A *process* has a PID (or is an external
server that fleetd only probes). A *model* is a name that requests use. A model is *placed* on a process.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum


class ProcessKind(StrEnum):
    SERVICE = "service"
    INSTANCE = "instance"


class RestartMode(StrEnum):
    ALWAYS = "always"
    ON_FAILURE = "on-failure"
    NEVER = "never"


@dataclass(frozen=True, slots=True)
class Backoff:
    """Delay after k deaths: min(max, initial * factor**(k-1)) +- jitter."""

    initial_s: float = 0.5
    factor: float = 2.0
    max_s: float = 60.0
    jitter: float = 0.25


@dataclass(frozen=True, slots=True)
class CrashLoop:
    """`count` deaths in `window_s`: give up ("fail"), or try per `every_s` ("slow").

    A death after a run of `min_uptime_s` or longer does not count, if that is above 0.
    """

    count: int = 5
    window_s: float = 60.0
    then: str = "fail"
    every_s: float = 600.0
    min_uptime_s: float = 0.0


@dataclass(frozen=True, slots=True)
class RestartPolicy:
    mode: RestartMode = RestartMode.ALWAYS
    success_codes: tuple[int, ...] = (0,)
    backoff: Backoff = Backoff()
    stable_after_s: float = 10.0
    crash_loop: CrashLoop = CrashLoop()


class SleepState(StrEnum):
    """The observed state of an engine that can sleep."""

    ASLEEP = "asleep"
    AWAKE = "awake"
    FAILED = "failed"  # the content of its memory is unknown


class ProbeKind(StrEnum):
    STARTUP = "startup"
    READINESS = "readiness"
    LIVENESS = "liveness"


@dataclass(frozen=True, slots=True)
class ProbeSpec:
    """One probe of exactly one kind; the daemon runs it, the core judges it.

    `failures` in a row turn the verdict bad, `successes` in a row turn it good again. `deadline_s` is for startup only:
    the longest time from spawn to the first success (None: no limit).
    """

    http: str | None = None
    tcp: bool = False
    exec: tuple[str, ...] = ()
    log_line: str | None = None
    completion: bool = False
    message: str | None = None
    period_s: float = 2.0
    timeout_s: float = 2.0
    failures: int = 3
    successes: int = 1
    deadline_s: float | None = None


@dataclass(frozen=True, slots=True)
class Probes:
    startup: ProbeSpec | None = None
    readiness: ProbeSpec | None = None
    liveness: ProbeSpec | None = None


class DependencyCondition(StrEnum):
    STARTED = "started"
    READY = "ready"
    COMPLETED = "completed"


@dataclass(frozen=True, slots=True)
class Dependency:
    """A dependency on a process by its expanded name; all must hold before a start."""

    name: str
    condition: DependencyCondition = DependencyCondition.READY


@dataclass(frozen=True, slots=True)
class Capabilities:
    """Abilities of an engine that decisions depend on."""

    owns_process: bool = True  # fleetd starts and stops it (False: external server)
    many_models: bool = False  # one server holds several models; False: the process is the model
    can_sleep: bool = False  # it can free most of its memory without exiting, and wakes faster than it starts
    exit_zero_is_failure: bool = False
    exclusive_start: bool = False  # nothing else may start, stop or wake on its device until it is ready


class FootprintSource(StrEnum):
    DECLARED = "declared"
    LEARNED = "learned"
    ESTIMATED = "estimated"


@dataclass(frozen=True, slots=True)
class Footprint:
    """Bytes per device name. Empty means: costs nothing that we account for."""

    bytes: Mapping[str, int] = field(default_factory=dict)
    source: FootprintSource = FootprintSource.ESTIMATED

    @property
    def total_bytes(self) -> int:
        return sum(self.bytes.values())

    def raised(self, measured: Mapping[str, int]) -> Footprint:
        """Return the footprint with larger measured sizes entered."""
        more = {device: size for device, size in measured.items() if size > self.bytes.get(device, 0)}
        return Footprint({**self.bytes, **more}, FootprintSource.LEARNED) if more else self


class ExitKind(StrEnum):
    """The cause of an exit as its engine classifies it; the restart policy reads it."""

    EXPECTED = "expected"
    CRASH = "crash"
    OOM = "oom"
    PORT_IN_USE = "port_in_use"
    BAD_CONFIG = "bad_config"  # a retry cannot help: straight to FAILED
    UNKNOWN = "unknown"  # it died while the daemon was down, or was the child of an earlier daemon


@dataclass(frozen=True, slots=True)
class ExitReport:
    """One exit. `code` is None if a signal ended it or the code is unknown."""

    code: int | None
    signal: str | None = None
    oom: bool = False
    kind: ExitKind = ExitKind.CRASH
    reason: str = ""  # only what the other fields do not say
    log_tail: tuple[str, ...] = ()


def describe_exit(report: ExitReport) -> str:
    """Return one exit as a sentence: how it ended, and the reason where one is known."""
    if report.oom:
        how = "killed by the kernel: out of memory"
    elif report.signal:
        how = f"killed by {report.signal}"
    elif report.code is not None:
        how = f"exited with code {report.code}"
    elif report.reason and report.kind is not ExitKind.UNKNOWN:
        return report.reason  # it never ran, or fleetd stopped it itself
    else:
        how = "died with an unknown exit code"
    return f"{how}: {report.reason}" if report.reason and report.signal not in report.reason.split() else how


def brief_exit(report: ExitReport) -> str:
    """Return one exit as a few words for use in parentheses: `exit code 3: why`, `SIGKILL`, `out of memory`."""
    if report.oom:
        how = "out of memory"
    elif report.signal:
        how = report.signal
    elif report.code is not None:
        how = f"exit code {report.code}"
    else:
        return report.reason or "unknown exit code"
    return f"{how}: {report.reason}" if report.reason and report.signal not in report.reason.split() else how


@dataclass(frozen=True, slots=True)
class ProcessSpec:
    """One process of the fleet, replicas already expanded.

    `launch_hash` covers all that only a restart can change (argv, env, cwd, user, port, device); two specs with an equal
    hash differ in hot fields only.
    """

    name: str
    base: str  # the key in fleet.yaml; differs from name for replicas
    kind: ProcessKind
    engine: str | None = None
    port: int | None = None
    enabled: bool = True
    on_demand: bool = False  # started only when a model on it is wanted
    own_model: str | None = None  # the model that this process *is* (an engine without many_models)
    capabilities: Capabilities = Capabilities()
    depends_on: tuple[Dependency, ...] = ()
    restart: RestartPolicy = RestartPolicy()
    probes: Probes = Probes()
    memory_limit_bytes: int | None = None
    max_age_s: float | None = None
    drain_timeout_s: float = 30.0  # longest wait for requests in flight before an ordered stop
    lane: str | None = None  # processes of one lane start one after another
    launch_hash: str = ""


@dataclass(frozen=True, slots=True)
class Route:
    to: str
    weight: int = 1
    shadow: bool = False


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """One name that a request may use."""

    name: str
    holders: tuple[str, ...] = ()  # processes that can hold it, in order of preference; own process: just that one
    served_as: str = ""
    aliases: tuple[str, ...] = ()
    footprint: Footprint = Footprint()
    footprint_hash: str = ""  # the key of its learned footprint
    preload: bool = False
    pin: bool = False
    priority: int = 0
    ttl_s: float = 600.0  # 0: never unloaded for being idle
    min_resident_s: float = 30.0
    concurrency: int = 4  # slots per holder
    queue_max: int = 64
    queue_timeout_s: float = 120.0  # longest wait in the queue, including a load
    load_timeout_s: float = 300.0
    asleep: Mapping[str, int] | None = None  # bytes per device that it holds while it sleeps; None: it cannot
    sleep_timeout_s: float = 60.0
    fallback: tuple[str, ...] = ()
    routes: tuple[Route, ...] = ()  # not empty: this name only points to others


def asleep_hash(footprint_hash: str) -> str:
    """Return the key of the learned footprint that a model has while it sleeps."""
    return f"{footprint_hash}:asleep"


@dataclass(frozen=True, slots=True)
class DeviceSpec:
    """A pool of bytes: host, gpuN or unified."""

    name: str
    kind: str
    total_bytes: int
    budget_bytes: int


@dataclass(frozen=True, slots=True)
class QueueLimits:
    """The gateway's queue: its maximum, and the fairness bound (`max_wait_s`)."""

    max: int = 512
    max_wait_s: float = 30.0


@dataclass(frozen=True, slots=True)
class FleetSpec:
    """The desired fleet, replaced as one value on every change."""

    processes: Mapping[str, ProcessSpec] = field(default_factory=dict)
    models: Mapping[str, ModelSpec] = field(default_factory=dict)
    devices: Mapping[str, DeviceSpec] = field(default_factory=dict)
    queue: QueueLimits = QueueLimits()


@dataclass(frozen=True, slots=True)
class Remembered:
    """The persisted state of a process, from before a restart of the daemon."""

    stopped: bool = False  # an operator's durable stop
    restarts: int = 0
    deaths: int = 0  # since the last stable run
    died_s: tuple[float, ...] = ()  # the last deaths that its crash loop counts, in monotonic seconds of this boot
    slow: bool = False  # in a crash loop that goes on slowly
    failed: str | None = None  # the reason, if it was FAILED
    generation: int = 0
    exited: str | None = None  # the reason, if it had exited as expected; not kept over a requested shutdown
    code: int | None = None  # the code of that exit
    again: bool = False  # its next start counts as a restart
    last_exit: ExitReport | None = None  # without its log
    last_exit_s: float | None = None  # in monotonic seconds of this boot
    spec_hash: str = ""  # of the spec that failed or exited: an edited one is tried again
