"""What the control plane asks of the daemon, as a protocol: the server is written and tested without one.

The rules of this file
- Everything runs on the daemon's event loop. The plain methods read memory only and return within a millisecond.
- Names arrive resolved: globs, `all`, and the base names of replicas are expanded by the server, against `names()`.
- Mistakes are raised as FleetError: ConfigError (all problems), ApiError (status and code), CapacityError, EngineError,
  HostError. A failure that concerns one name of several is an ActionResult, not an exception.
- A caller that hangs up cancels the await. Cancelling stops the *waiting*; the fleet goes on doing what was asked.
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
    """What can be named. `processes`: name → its key in fleet.yaml (differs for replicas); `models`: name → aliases.

    `routes`: those of the models that only lead to others → these.
    """

    processes: Mapping[str, str] = field(default_factory=dict)
    models: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    routes: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ActOptions:
    """How an action is carried out. `wait` False: answer `accepted` as soon as the fleet knows of it.

    `timeout_s` bounds the waiting: what is not there by then is `timeout`, and goes on. `signal` is a name with its
    SIG.
    """

    wait: bool = True
    timeout_s: float = 300.0
    force: bool = False
    signal: str | None = None


@dataclass(frozen=True, slots=True)
class Caller:
    """Who is at the other end of the socket. `pid` is None where the system does not say."""

    uid: int | None = None
    pid: int | None = None


@dataclass(frozen=True, slots=True)
class ApplyOptions:
    """`dry_run` plans only. `wait`: until every changed process is where it should be, or `timeout_s` is over.

    `expect_hash`, when given, is the `config_hash` of the plan a person agreed to: another one now is an
    ApiError(409, "plan_changed").
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
        """Return one model (an alias will do) with its last ten events. Raises ApiError 404."""

    def devices(self) -> Sequence[DeviceStatus]:
        """Return the devices of `status()`."""

    def names(self) -> Names:
        """Return what can be named now."""

    async def act(self, verb: str, names: Sequence[str], options: ActOptions) -> Sequence[ActionResult]:
        """Do one of wire.VERBS to each name, in the order that dependencies ask; return one ActionResult per name.

        start, restart: ok when READY (or EXITED as expected); failed on FAILED or BLOCKED, with the reason.
        stop: ok when STOPPED. drain: ok when nothing is in flight. load: ok when LOADED. unload: ok when ABSENT.
        undrain, pin, unpin, signal: at once.
        """

    def events(self, since_s: float | None, after: int | None, follow: bool) -> AsyncIterator[FleetEvent]:
        """Yield events, oldest first: those of the last `since_s` seconds (None: the last hundred or so), or those
        after
        sequence number `after`; with `follow` go on for ever. Closing the iterator frees what it holds.
        """

    def logs(
        self, names: Sequence[str], lines: int, since_s: float | None, grep: str | None, follow: bool
    ) -> AsyncIterator[LogLine]:
        """Yield the last `lines` lines of each process (those that match the regular expression `grep`), then
        follow."""

    def story(self, name: str) -> Sequence[FleetEvent]:
        """Return the journal's events and commands about a process or model, oldest first. Raises ApiError 404."""

    def explain(self, model: str) -> Mapping[str, Any]:
        """Return why a model is where it is: {model, state, reason, footprint: {source, bytes}, devices: [{name,
        budget_bytes,
        reserved_bytes, free_bytes}], holders: [{name, state, reason}], victims: [{name, reason}], text: [sentences]}.
        Raises ApiError 404.
        """

    async def dump(self) -> Mapping[str, Any]:
        """Return everything needed to understand and replay this fleet: status, configuration, journal. Secrets
        redacted."""

    def config(self) -> Mapping[str, Any]:
        """Return {file, config_hash, config}: the configuration that runs, normalised, secrets redacted."""

    async def plan(self, path: str | None, text: str | None) -> Plan:
        """Return the way from what runs to a file: `path` (absolute), or `text` read as if it stood in the daemon's
        own file,
        or, both None, the daemon's own file. Raises ConfigError.
        """

    async def apply(self, path: str | None, options: ApplyOptions) -> Applied:
        """Check the file, then change only what differs. Raises ConfigError (nothing was touched), ApiError 409
        `locked` while
        another apply runs. A `path` other than the daemon's own becomes its configuration file from now on.
        """

    async def reload(self) -> Applied:
        """Apply the daemon's own file; do not wait. Raises ConfigError."""

    async def reexec(self) -> None:
        """Replace the daemon's program by a new one in the same PID; children stay. Returns before it happens."""

    async def shutdown(self, force: bool) -> None:
        """Begin to shut down, and return."""
