"""The schema of one process: services, engine servers, and their common keys.

Invariants:
- Field names are the keys of the file; durations are seconds, sizes bytes, `None` means "not set".
- `ProcessKeys` are the keys that `defaults.process` may contain; `Service` and `Instance` add their own.
- An engine's `options` stay a raw mapping: the engine types them.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Annotated, Any, Literal
from zoneinfo import ZoneInfo

from cronsim import CronSim, CronSimError
from pydantic import Field, field_validator, model_validator

from fleetd.config.schema.base import Argv, Block, Bool, Bytes, PathText, Port, Seconds, SecondsOrZero, Word, Words
from fleetd.config.schema.types import (
    Arguments,
    Choice,
    DeviceName,
    DurationType,
    Environment,
    FieldType,
    HttpUrl,
    Misplaced,
    PatternType,
    Real,
    SignalName,
    Size,
    Strings,
    Text,
    Umask,
    Whole,
)
from fleetd.units import shown


class BackoffKeys(Block):
    """Delay: initial * factor ** (deaths - 1), at most max, +- jitter."""

    initial: Annotated[float, DurationType("1ms", "1d", zero=True)] = 0.5
    factor: Annotated[float, Real(1, 100)] = 2.0
    max: Annotated[float, DurationType("1ms", "7d", zero=True)] = 60.0
    jitter: Annotated[float, Real(0, 1)] = 0.25


class CrashLoopKeys(Block):
    """`count` deaths inside `window` give up, or go on slowly."""

    count: Annotated[int, Whole(1, 100_000)] = 5
    window: Annotated[float, DurationType("100ms", "30d")] = 60.0
    then: Annotated[Literal["fail", "slow"], Choice("fail", "slow")] = "fail"
    every: Annotated[float, DurationType("100ms", "7d")] = 600.0


class RestartKeys(Block):
    policy: Annotated[Literal["always", "on-failure", "never"], Choice("always", "on-failure", "never")] = "always"
    success_codes: tuple[Annotated[int, Whole(0, 255)], ...] = (0,)
    backoff: BackoffKeys = BackoffKeys()
    stable_after: SecondsOrZero = 10.0
    crash_loop: CrashLoopKeys = CrashLoopKeys()

    @model_validator(mode="before")
    @classmethod
    def _policy_alone(cls, data: Any) -> Any:
        if isinstance(data, str):
            raise ValueError(f"must be a mapping of keys (write restart: {{policy: {data[:40]}}})")
        return data


class StopKeys(Block):
    """How a process set is stopped.

    `command`, `message` or `signal`; after `timeout`, a kill of the set, group or leader.
    """

    signal: Annotated[str, SignalName()] = "SIGTERM"
    timeout: Annotated[float, DurationType("1ms", "1d", zero=True)] = 10.0
    kill: Annotated[Literal["set", "group", "leader"], Choice("set", "group", "leader")] = "set"
    command: Argv | None = None
    message: Annotated[str, Text(1024, what="a message such as shutdown")] | None = None

    @model_validator(mode="after")
    def _one_way(self) -> StopKeys:
        if self.command is not None and self.message is not None:
            raise ValueError("has command and message: a stop has one of them")
        return self


class ProbeKeys(Block):
    """One probe, of exactly one kind. None: the default of that kind."""

    http: Annotated[str, Text(2048, pattern=r"/[^\s#]*", what="a path such as /health")] | None = None
    tcp: Bool = False
    exec: Argv | None = None
    log_line: Annotated[str, PatternType()] | None = None
    completion: Bool = False
    message: Annotated[str, Text(1024, what="a message such as ready")] | None = None
    period: Annotated[float, DurationType("10ms", "1d")] | None = None
    timeout: Annotated[float, DurationType("10ms", "1h")] | None = None
    failures: Annotated[int, Whole(1, 1000)] | None = None
    successes: Annotated[int, Whole(1, 1000)] | None = None
    deadline: Annotated[float, DurationType("10ms", "7d")] | None = None

    @property
    def ways(self) -> tuple[str, ...]:
        """Return the ways that are set: exactly one in a loaded configuration."""
        ways = (
            ("http", self.http),
            ("tcp", self.tcp),
            ("exec", self.exec),
            ("log_line", self.log_line),
            ("message", self.message),
        )
        return (*(name for name, value in ways if value), *(("completion",) if self.completion else ()))

    @model_validator(mode="after")
    def _exactly_one_way(self) -> ProbeKeys:
        ways = self.ways
        if not ways:
            raise ValueError("has no kind: set one of http, tcp, exec, log_line, completion or message")
        if len(ways) > 1:
            raise ValueError(f"has {' and '.join(ways)}: a probe has exactly one of them")
        return self


class ProbesKeys(Block):
    startup: ProbeKeys | None = None
    readiness: ProbeKeys | None = None
    liveness: ProbeKeys | None = None

    @field_validator("readiness", "liveness")
    @classmethod
    def _deadline_is_for_startup(cls, probe: ProbeKeys | None) -> ProbeKeys | None:
        if probe is not None and probe.deadline is not None:
            raise ValueError("deadline belongs to the startup probe only")
        if probe is not None and probe.message is not None:
            raise ValueError("message belongs to the startup probe only: a program sends it once, when it is ready")
        return probe


class LogsKeys(Block):
    max_size: Annotated[int, Size("4KiB", "1TiB")] = 50 * 2**20
    keep: Annotated[int, Whole(0, 1000)] = 5
    compress: Bool = True
    capture: Annotated[Literal["file", "pipe"], Choice("file", "pipe")] = "file"


class LimitsKeys(Block):
    """Limits; `memory` exceeded in two samples restarts, `cpu` lists the cores."""

    memory: Annotated[int, Size("1MiB")] | None = None
    nofile: Annotated[int, Whole(16, 10_000_000)] | None = None
    nice: Annotated[int, Whole(-20, 19)] | None = None
    cpu: tuple[Annotated[int, Whole(0, 4095)], ...] | None = None

    @field_validator("cpu")
    @classmethod
    def _cores_once(cls, cores: tuple[int, ...] | None) -> tuple[int, ...] | None:
        if cores is not None and (not cores or len(set(cores)) < len(cores)):
            raise ValueError("must list each core once, and at least one")
        return cores


class Timezone(FieldType):
    """A name of the IANA database."""

    def parse(self, value: object) -> str:
        if isinstance(value, str) and 0 < len(value) <= 64:
            try:
                ZoneInfo(value)
            except (KeyError, ValueError, OSError):
                pass
            else:
                return value
        raise ValueError(f"must be a time zone such as UTC or Europe/Berlin, not {shown(value)}")

    def json_schema(self) -> dict[str, Any]:
        return {"type": "string", "examples": ["UTC", "Europe/Berlin"]}


class Cron(FieldType):
    """Five fields of cron: minute, hour, day of month, month, day of week."""

    def parse(self, value: object) -> str:
        if not isinstance(value, str) or len(value) > 200:
            raise ValueError(f'must be five fields of cron, such as "0 4 * * *", not {shown(value)}')
        fields = value.split()
        if len(fields) != 5:
            raise ValueError(f'must be five fields of cron, such as "0 4 * * *": {shown(value)} has {len(fields)}')
        try:
            next(CronSim(value, datetime(2024, 1, 1, tzinfo=UTC)))
        except CronSimError as error:
            raise ValueError(f"{shown(value)} is not a cron schedule: {str(error).lower()}") from None
        except StopIteration:
            raise ValueError(f"{shown(value)} never occurs") from None
        return value

    def json_schema(self) -> dict[str, Any]:
        return {"type": "string", "examples": ["0 4 * * *"]}


class ScheduleKeys(Block):
    restart: Annotated[str, Cron()]
    timezone: Annotated[str, Timezone()] = "UTC"


class WatchKeys(Block):
    """Paths relative to `cwd`; a change restarts after `debounce` without another."""

    paths: Annotated[tuple[str, ...], Strings(at_least=1, what="a path")]
    ignore: Words = ()
    debounce: Annotated[float, DurationType("10ms", "1h")] = 0.5


class HooksKeys(Block):
    pre_start: Argv | None = None
    post_stop: Argv | None = None


class ProcessKeys(Block):
    """The keys of every process, and of `defaults.process`."""

    cwd: PathText | None = None
    env: Annotated[dict[str, str], Environment()] = Field(default_factory=dict)
    env_file: Annotated[tuple[str, ...], Strings(what="a path")] = ()
    requires: Annotated[tuple[str, ...], Strings(what="a path")] = ()
    restart: RestartKeys = RestartKeys()
    stop: StopKeys = StopKeys()
    probes: ProbesKeys = ProbesKeys()
    logs: LogsKeys = LogsKeys()
    limits: LimitsKeys = LimitsKeys()
    schedule: ScheduleKeys | None = None
    watch: WatchKeys | None = None
    max_age: Seconds | None = None
    hooks: HooksKeys = HooksKeys()
    user: Annotated[str, Text(255, what="the name of a user")] | None = None
    umask: Annotated[int, Umask()] | None = None
    enabled: Bool = True


class DependsOn(FieldType):
    """`{ollama: ready}`, a list of names, or one name; the default is ready."""

    conditions = ("started", "ready", "completed")

    def parse(self, value: object) -> dict[str, str]:
        if isinstance(value, str):
            value = [value]
        if isinstance(value, list | tuple):
            if not all(isinstance(name, str) and name for name in value):
                raise ValueError("must be names of processes")
            return dict.fromkeys(value, "ready")
        if not isinstance(value, dict):
            raise ValueError(f"must be a mapping such as {{ollama: ready}} or a list of names, not {shown(value)}")
        for name, condition in value.items():
            if condition not in self.conditions:
                raise Misplaced(f"must be started or ready or completed, not {shown(condition)}", str(name))
        return dict(value)

    def json_schema(self) -> dict[str, Any]:
        mapping = {"type": "object", "additionalProperties": {"enum": list(self.conditions)}}
        return {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}, mapping]}


class PlacedKeys(ProcessKeys):
    """The common keys of a service, an engine server and a model with an engine."""

    args: Annotated[tuple[str, ...], Arguments()] = ()
    replicas: Annotated[int, Whole(1, 256)] = 1
    port: Port | None = None
    depends_on: Annotated[dict[str, str], DependsOn()] = Field(default_factory=dict)


class Service(PlacedKeys):
    """A plain process."""

    command: Argv


class GpuName(Text):
    """all, the number of a GPU, or its UUID."""

    def __init__(self) -> None:
        super().__init__(128, pattern=r"all|[0-9]{1,3}|[A-Za-z0-9-]+", what="all, a number or a UUID of a GPU")

    def parse(self, value: object) -> str:
        return super().parse(str(value) if isinstance(value, int) and not isinstance(value, bool) else value)

    def json_schema(self) -> dict[str, Any]:
        return {"type": ["string", "integer"]}


class DockerKeys(Block):
    image: Annotated[str, Text(512, pattern=r"[^\s]+", what="the name of an image")]
    gpus: Annotated[tuple[str, ...], Strings(GpuName())] = ()
    mounts: Annotated[
        tuple[str, ...], Strings(Text(pattern=r"[^:]+:[^:]+(:(ro|rw))?", what="a mount such as /a:/b:ro"))
    ] = ()
    pull: Annotated[Literal["missing", "always", "never"], Choice("missing", "always", "never")] = "missing"
    args: Annotated[tuple[str, ...], Arguments()] = ()
    network: Annotated[Literal["host", "bridge"], Choice("host", "bridge")] = "host"
    program: PathText = "docker"


class RuntimeKeys(Block):
    docker: DockerKeys


class EngineKeys(PlacedKeys):
    """The keys of an engine's process: instances, and models with an engine."""

    engine: Annotated[str, Text(64, pattern=r"[a-z][a-z0-9_-]*", what="the name of an engine")]
    command: Argv | None = None
    device: Annotated[str, DeviceName()] | None = None
    options: dict[str, Any] = Field(default_factory=dict)
    start: Annotated[Literal["always", "on-demand"], Choice("always", "on-demand")] = "always"
    runtime: RuntimeKeys | None = None
    external: Annotated[str, HttpUrl()] | None = None

    @model_validator(mode="after")
    def _external_is_not_started(self) -> EngineKeys:
        if self.external is not None:
            ours = (
                "command",
                "args",
                "port",
                "replicas",
                "runtime",
                "cwd",
                "user",
                "umask",
                "watch",
                "schedule",
                "max_age",
            )
            unusable = [key for key in ours if key in self.model_fields_set]
            if unusable:
                raise ValueError(
                    f"{', '.join(unusable)} cannot be used with external: fleetd does not start an external server"
                )
        return self


class Instance(EngineKeys):
    """An engine server that may hold many models."""


__all__ = ["Bytes", "EngineKeys", "Instance", "PlacedKeys", "ProcessKeys", "Service", "Word"]


def process_names(key: str, replicas: int) -> tuple[str, ...]:
    """Return an entry's process names: the key, or key-1 … key-N for replicas."""
    if replicas <= 1:
        return (key,)
    return tuple(f"{key}-{replica}" for replica in range(1, replicas + 1))
