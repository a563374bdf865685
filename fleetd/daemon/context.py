"""The services that every part of a running daemon is given."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fleetd.control.event_codes import SHOWN, EventCode
from fleetd.core.data.commands import Command
from fleetd.core.data.events import Event
from fleetd.daemon.api.event_log import EventLog
from fleetd.daemon.async_tools import Tasks
from fleetd.daemon.reload.active import ActiveConfiguration

if TYPE_CHECKING:
    from aiohttp import ClientSession
    from structlog.typing import FilteringBoundLogger

    from fleetd.core.queries import FleetQueries


class Reporter:
    """Report to operators: to the daemon's log and the event stream."""

    def __init__(self, log: FilteringBoundLogger, events: EventLog) -> None:
        self.log = log
        self.events = events

    def warn(self, name: str, sentence: str) -> None:
        """Report what failed for a process without changing its state."""
        self.log.warning(str(EventCode.WARNING), name=name, reason=sentence)
        self.events.report("process", name, EventCode.WARNING, sentence)

    def adoption(self, name: str, sentence: str) -> None:
        """Report what became of a process that an earlier daemon left running."""
        self.log.info("adoption", name=name, reason=sentence)
        self.events.report("process", name, EventCode.ADOPTION, sentence)

    def model(self, name: str, code: EventCode, sentence: str) -> None:
        """Report what happened to a model in its store."""
        log = self.log.warning if SHOWN[code].warning else self.log.info
        log(str(code), model=name, reason=sentence)
        self.events.report("model", name, code, sentence)

    def damaged_file(self, path: str) -> None:
        """Report a state file that could not be read and was moved away."""
        self.log.warning("a damaged file was moved: its contents are lost", path=path)
        text = f"a damaged file was moved to {path}: its contents are lost"
        self.events.report("daemon", None, EventCode.STATE_FILE_DAMAGED, text)

    def task_fault(self, task: str, error: BaseException) -> None:
        self.log.error("a task failed", task=task, exc_info=error)

    def delivery_fault(self, what: str, error: Exception) -> None:
        self.log.error(what, exc_info=error)

    def command_fault(self, command: Command, error: Exception) -> None:
        self.log.error("a command could not be started", command=repr(command), exc_info=error)

    def fleet_fault(self, event: Event, error: Exception) -> None:
        self.log.error("the fleet could not handle an event", event_seen=repr(event), exc_info=error)
        self.events.report("daemon", None, EventCode.INTERNAL_ERROR, f"{type(error).__name__}: {error}")


class HttpClient:
    """The HTTP client for everything outside the data plane, created at its first use."""

    def __init__(self) -> None:
        self._session: ClientSession | None = None

    @property
    def session(self) -> ClientSession:
        if self._session is None:
            from aiohttp import ClientSession, ClientTimeout, TCPConnector

            connector = TCPConnector(limit=0, keepalive_timeout=10.0, enable_cleanup_closed=False)
            self._session = ClientSession(connector=connector, timeout=ClientTimeout(total=600.0), trust_env=False)
        return self._session

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()


@dataclass(frozen=True, slots=True)
class DaemonContext:
    """The shared services. `queries` reads the fleet; only events change it."""

    queries: FleetQueries
    dispatch: Callable[[Event], None]
    config: ActiveConfiguration
    tasks: Tasks  # each exits by itself
    reporter: Reporter
    http: HttpClient
