"""What the control plane asks of the daemon, as protocols: the server is written and tested without a daemon.

Invariants:
- Everything runs on the daemon's event loop. The plain methods read memory only and return within a millisecond.
- Names arrive resolved: globs, `all`, and the base names of replicas are expanded by the server, against `names()`.
- Errors are raised as FleetError: ConfigError (all problems), ApiError (status and code), CapacityError, EngineError,
  HostError. A failure of one name among several is an ActionResult, not an exception.
- A caller that disconnects cancels the await. That stops the waiting; the fleet goes on with what was asked.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from fleetd.control.wire import (
    ActionResult,
    Applied,
    DeviceStatus,
    FleetEvent,
    FleetStatus,
    LogLine,
    ModelDetail,
    Plan,
    ProcessDetail,
)


@dataclass(frozen=True, slots=True)
class Names:
    """The names that requests may use.

    `processes`: name → its key in fleet.yaml (differs for replicas); `models`: name → aliases; `routes`: the models that only
    route to others → these.
    """

    processes: Mapping[str, str] = field(default_factory=dict)
    models: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    routes: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ActOptions:
    """Options of an action.

    `wait` False: answer `accepted` as soon as the fleet knows of it.

    `timeout_s` bounds the waiting: what is not done by then is `timeout`, and goes on. `signal` is a name such as SIGHUP.

    `rolling`: a restart takes the replicas in turn. `broad`: names that only `all` or a glob selected; a restart passes over
    those that do not run.
    """

    wait: bool = True
    timeout_s: float = 300.0
    force: bool = False
    signal: str | None = None
    rolling: bool = False
    broad: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Caller:
    """The process that connected to the socket; None: unknown to the system."""

    uid: int | None = None
    pid: int | None = None


@dataclass(frozen=True, slots=True)
class ApplyOptions:
    """Options of an apply.

    `dry_run` only plans. `wait`: until every changed process has settled, at most `timeout_s`.

    `expect_hash` is the `config_hash` of the plan that was confirmed: a different one now is ApiError(409, "plan_changed").
    """

    dry_run: bool = False
    wait: bool = True
    timeout_s: float = 300.0
    expect_hash: str | None = None
    caller: Caller = Caller()


class ControlPort(Protocol):
    """The daemon, as the control plane sees it."""

    async def status(self) -> FleetStatus:
        """Return the whole fleet, without `schema`."""

    def process(self, name: str) -> ProcessDetail:
        """Return one process with its last ten events and log lines. Raises ApiError 404."""

    def model(self, name: str) -> ModelDetail:
        """Return a model, by name or alias, with its last ten events. Raises ApiError 404."""

    def devices(self) -> Sequence[DeviceStatus]:
        """Return the devices of `status()`."""

    def names(self) -> Names:
        """Return the names that requests may use now."""

    async def act(self, verb: str, names: Sequence[str], options: ActOptions) -> Sequence[ActionResult]:
        """Carry out a verb on each name, in the order of dependencies; one result each.

        start, restart: ok when READY (or EXITED as expected); failed on FAILED or BLOCKED, with the reason.
        stop: ok when STOPPED. drain: ok when nothing is in flight. load: ok when LOADED. unload: ok when ABSENT.
        undrain, pin, unpin, signal: ok at once.
        """

    def events(self, since_s: float | None, after: int | None, follow: bool) -> AsyncIterator[FleetEvent]:
        """Yield events, oldest first; with `follow` for ever.

        Closing the iterator frees its resources.

        Starts with the events of the last `since_s` seconds (None: the last hundred or so), or those after sequence number
        `after`.
        """

    def logs(
        self, names: Sequence[str], lines: int, since_s: float | None, grep: str | None, follow: bool
    ) -> AsyncIterator[LogLine]:
        """Yield the last `lines` lines of each process that match `grep`, then follow."""

    def story(self, name: str) -> Sequence[FleetEvent]:
        """Return all events about a process or model, oldest first. Raises ApiError 404."""

    def explain(self, model: str) -> Mapping[str, Any]:
        """Return why a model is where it is. Raises ApiError 404.

        {model, state, reason, footprint: {source, bytes}, devices: [{name, budget_bytes, reserved_bytes, free_bytes}],
        holders: [{name, state, reason}], victims: [{name, reason}], text: [sentences]}
        """

    async def dump(self) -> Mapping[str, Any]:
        """Return status, configuration and journal, enough to replay the fleet."""

    def config(self) -> Mapping[str, Any]:
        """Return {file, config_hash, config}, normalised, secrets redacted."""

    async def plan(self, path: str | None, text: str | None) -> Plan:
        """Return the changes from the running fleet to a file. Raises ConfigError.

        The file is `path` (absolute), or `text` read in place of the daemon's own file, or (both None) that file itself.
        """

    async def apply(self, path: str | None, options: ApplyOptions) -> Applied:
        """Check a file, then change only what differs; `path` replaces the daemon's file.

        Raises ConfigError (nothing was changed), ApiError 409 `locked` while another apply runs.
        """

    async def reload(self) -> Applied:
        """Apply the daemon's own file without waiting. Raises ConfigError."""

    async def reexec(self) -> None:
        """Replace the daemon's program in the same PID; return before it happens."""

    async def shutdown(self, force: bool) -> None:
        """Begin to shut down, and return."""


class LibraryPort(Protocol):
    """The model stores and volumes of the fleet, as the control plane sees them."""

    async def diff(self) -> Mapping[str, Any]:
        """Return how the stores differ from fleet.yaml.

        {stores: [{store, instances, error, steps: [{name, served_as, change, reason, failure?}]}], differences}. `change` is
        none | create | update | delete | foreign | missing | blocked; `error` says why a store was not compared.
        """

    async def show(self, name: str) -> Mapping[str, Any]:
        """Return one model of a store. Raises ApiError 404, 409.

        {model, served_as, store, instances, loaded: [{process, state}], state, modelfile, modelfile_error, from, quantize,
        size_bytes, made, present, digest, link_to, stored_bytes}
        """

    def sync(self, names: Sequence[str]) -> int:
        """Start a sync of `names` (empty: all); return its number. Raises ApiError 404."""

    def progress(self, number: int) -> AsyncIterator[Mapping[str, Any]]:
        """Yield the steps of a sync. Raises ApiError 404.

        {what: making | made | failed | done, name, store, detail, done_bytes, total_bytes}; the last is `done`, with the counts
        unchanged, made and failed.
        """

    async def prune(self, dry_run: bool) -> Mapping[str, Any]:
        """Delete what fleetd created and fleet.yaml no longer names.

        {results: [{store, name, result, reason}]}, or {doomed} for a dry run.
        """

    def volumes(self) -> Mapping[str, Any]:
        """Return {volumes: [{path, identity, problem, needed_by}]}."""

    def accept_volume(self, path: str) -> Mapping[str, Any]:
        """Accept the volume that is mounted at `path` from now on. Raises ApiError 404."""
