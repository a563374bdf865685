"""The documents of the control API: their fields, the schema name, and the format of times.

Invariants:
- Standard library only: the client imports this module and must start in a few milliseconds.
- Keys are stable: a key may be added, never renamed or given another meaning. Readers ignore unknown keys.
- Times are UTC in RFC 3339 with milliseconds and `Z`; durations are float seconds (`_s`); memory is integer bytes (`_bytes`).
- Every JSON document has `"schema": "fleetctl/v1"` as its first key; so do the items of a stream.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any, NotRequired, TypedDict

SCHEMA = "fleetctl/v1"

PROCESS_VERBS = ("start", "stop", "restart", "drain", "undrain", "signal")
MODEL_VERBS = ("load", "unload", "pin", "unpin")
VERBS = PROCESS_VERBS + MODEL_VERBS


class ResultCode(StrEnum):
    """The result of an action for one name. `ACCEPTED`: the caller asked not to wait."""

    OK = "ok"
    ACCEPTED = "accepted"
    FAILED = "failed"
    TIMEOUT = "timeout"


class ActionResult(TypedDict):
    """The result of an action for one name: `reason` for people, `state` as it is now."""

    name: str
    result: str  # an ResultCode
    state: str | None
    reason: str | None
    hint: NotRequired[str | None]  # what to do next
    warning: NotRequired[str]  # it succeeded, with this restriction


class LastExit(TypedDict):
    code: int | None
    signal: str | None
    oom: bool
    at: str
    reason: str


class ProcessStatus(TypedDict):
    name: str
    kind: str  # service | instance
    engine: str | None
    state: str
    desired: str  # up | down
    reason: str
    pid: int | None
    generation: int
    port: int | None
    restarts: int
    uptime_s: float | None
    cpu_percent: float | None
    rss_bytes: int | None
    next_start_s: float | None
    last_exit: LastExit | None
    base: NotRequired[str]  # the key in fleet.yaml, if it differs from the name (replicas)
    device_bytes: NotRequired[dict[str, int]]
    in_flight: NotRequired[int]
    draining: NotRequired[bool]
    hint: NotRequired[str | None]  # what to do next
    problem: NotRequired[bool]  # it needs attention
    state_age_s: NotRequired[float]  # since it entered the state


class ModelStatus(TypedDict):
    name: str
    state: str
    engine: str | None
    instances: list[str]
    device_bytes: dict[str, int]
    footprint: str | None  # declared | learned | estimated
    pinned: bool
    priority: int
    in_flight: int
    queued: int
    loads: int
    evictions: int
    last_used: str | None
    ttl_left_s: float | None
    load_s: float | None
    sleeps: NotRequired[int]
    wakes: NotRequired[int]
    wake_s: NotRequired[float | None]  # the last wake
    ttl_s: NotRequired[float]
    context_length: NotRequired[int | None]
    reason: NotRequired[str]
    hint: NotRequired[str | None]  # what to do next
    problem: NotRequired[bool]  # it needs attention
    loading: NotRequired[dict[str, Any]]  # while it loads: {elapsed_s, limit_s, detail, rss_bytes, needs_bytes}
    aliases: NotRequired[list[str]]
    routes: NotRequired[list[dict[str, Any]]]
    # {state, detail, done_bytes, total_bytes}; state is unchanged | made | making | failed | blocked | missing | foreign
    store: NotRequired[dict[str, Any]]


class DeviceStatus(TypedDict):
    name: str
    kind: str  # host | gpu | unified
    total_bytes: int
    budget_bytes: int
    reserved_bytes: int
    used_bytes: int | None
    utilization: float | None  # 0…1
    temperature_c: float | None


class DaemonStatus(TypedDict):
    pid: int
    version: str
    uptime_s: float
    config: str
    config_hash: str
    rss_bytes: int
    config_error: NotRequired[str | None]  # fleet.yaml on disk cannot be used: its first problem
    restart_needed: NotRequired[list[str]]  # its keys that take effect when the daemon restarts
    store_problem: NotRequired[str | None]  # why the daemon's state could not be saved
    gateway: NotRequired[str | None]  # host:port of the data plane
    stopping: NotRequired[bool]
    disk_problems: NotRequired[list[str]]  # log or state folders without room
    config_warnings: NotRequired[list[str]]  # of the running configuration


class HostStatus(TypedDict):
    """The machine, for the host line of `status`."""

    hostname: str
    cpus: int
    cpu_percent: float | None
    load1: float | None
    memory_total_bytes: int
    memory_used_bytes: int


class FleetStatus(TypedDict):
    """The document of `GET /v1/status`; the server adds `schema`."""

    name: str
    ready: bool
    daemon: DaemonStatus
    devices: list[DeviceStatus]
    processes: list[ProcessStatus]
    models: list[ModelStatus]
    host: NotRequired[HostStatus]


class FleetEvent(TypedDict):
    """One event; `seq` grows by one, also across daemon restarts, and is the SSE id."""

    seq: int
    at: str
    kind: str  # process | model | config | daemon
    name: str | None
    event: str  # a stable code, see docs/reference/events.md
    reason: str  # a sentence
    state: NotRequired[str | None]  # the state after it
    before: NotRequired[str | None]  # the state before it
    data: NotRequired[dict[str, Any]]


OWN_STREAM = "fleetd"  # LogLine.stream of a message about the log itself


class LogLine(TypedDict):
    """One line of a process' log; `at` is null if the child writes its file itself."""

    name: str
    at: str | None
    line: str
    stream: str | None  # out | err | null if both share a file | fleetd for a message about the log itself


class ProcessDetail(TypedDict):
    """The document of `status NAME`; `events` and `log` are the last ten."""

    process: ProcessStatus
    models: list[ModelStatus]  # the models that it serves or can serve
    events: list[FleetEvent]
    log: list[LogLine]
    command: NotRequired[list[str]]  # secrets redacted
    cwd: NotRequired[str | None]
    log_path: NotRequired[str | None]
    source: NotRequired[str | None]  # file:line in fleet.yaml
    depends_on: NotRequired[dict[str, str]]  # name → condition
    requires: NotRequired[dict[str, bool]]  # path → whether it exists
    tree: NotRequired[list[dict[str, Any]]]  # [{pid, ppid, command, rss_bytes}] of the whole process set
    probes: NotRequired[dict[str, Any]]  # startup | readiness | liveness → {ok, at, detail}


class ModelDetail(TypedDict):
    model: ModelStatus
    events: list[FleetEvent]
    log: NotRequired[list[LogLine]]
    source: NotRequired[str | None]
    served_as: NotRequired[str]


class KeyChange(TypedDict):
    """One changed key; `before` and `after` are redacted, null if the key is missing."""

    path: str
    before: Any
    after: Any
    effect: str  # hot | reload (a served model is created and loaded again) | scale | restart | daemon


class PlannedChange(TypedDict):
    kind: str  # service | instance | model | device | gateway | …
    name: str
    change: str  # add | change | remove
    effect: str  # start | stop | restart | scale | hot | daemon (needs a restart of the daemon)
    keys: list[KeyChange]
    starts: NotRequired[list[str]]  # processes that a change adds, as another number of replicas does
    stops: NotRequired[list[str]]


class Plan(TypedDict):
    """The changes from the running fleet to a file; `unchanged` counts processes."""

    file: str | None
    config_hash: str
    changes: list[PlannedChange]
    unchanged: int
    warnings: NotRequired[list[str]]  # of the file


class Applied(TypedDict):
    plan: Plan
    results: list[ActionResult]


def rfc3339(unix_s: float) -> str:
    """Return UNIX seconds as `2026-11-22T10:00:00.000Z`."""
    return datetime.fromtimestamp(unix_s, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def parse_rfc3339(text: str) -> float:
    """Return UNIX seconds of an RFC 3339 time. Raises ValueError."""
    moment = datetime.fromisoformat(text)
    if moment.tzinfo is None:
        raise ValueError(f"{text!r} has no time zone")
    return moment.timestamp()


def document(body: Mapping[str, Any]) -> dict[str, Any]:
    """Return `body` with the schema name as its first key."""
    return {"schema": SCHEMA, **{key: value for key, value in body.items() if key != "schema"}}


def error_document(code: str, message: str, hint: str | None = None, **extra: Any) -> dict[str, Any]:
    """Return the document of an error."""
    return document({"error": {"code": code, "message": message, "hint": hint, **extra}})
