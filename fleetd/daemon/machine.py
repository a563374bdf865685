"""The machine behind a protocol: what the executor asks of the host, so that another host can stand in its place.

The rules of this file
- `Machine` holds questions and orders in the executor's words; nothing of it is decided here.
- Handles are opaque: who made one takes it back.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from fleetd.core.contract import ProbeSpec
from fleetd.daemon.launches import LaunchPlan
from fleetd.engines.base import ProbeOutcome
from fleetd.host.types import HandleRecord, RawExit, SpawnRequest, StopPolicy, Usage


class Handle(Protocol):
    """A live process of ours."""

    @property
    def pid(self) -> int: ...

    @property
    def uptime_s(self) -> float: ...


class Machine(Protocol):
    """The host, as the executor sees it. Everything that the machine refuses is a HostError."""

    async def spawn(self, request: SpawnRequest, on_exit: Callable[[RawExit], None]) -> Handle:
        """Start a process; `on_exit` fires once, when its leader dies."""
        ...

    async def stop(self, handle: Any, policy: StopPolicy, force: bool) -> tuple[int, ...]:
        """Empty the process set; return what would not die."""
        ...

    async def sweep(self, handle: Any, scope: str) -> tuple[int, ...]:
        """Empty what a dead leader left behind; return what would not die."""
        ...

    async def adopt(self, record: HandleRecord, on_exit: Callable[[RawExit], None]) -> Handle:
        """Take over a process of an earlier daemon, proven to be ours."""
        ...

    async def run(
        self, argv: Sequence[str], env: Mapping[str, str], cwd: str | None, timeout_s: float
    ) -> tuple[bool, str]:
        """Run a short program; return whether it succeeded, and the end of what it said."""
        ...

    async def last_words(self, handle: Any, lines: int) -> tuple[str, ...]:
        """Return the last lines that this run wrote into its log."""
        ...

    async def probe(self, spec: ProbeSpec, plan: LaunchPlan, handle: Any) -> ProbeOutcome:
        """Ask once, by http, tcp, exec or log_line."""
        ...

    async def answers_on(self, handle: Any, port: int) -> bool:
        """Return whether the listener on a port belongs to the process set."""
        ...

    async def usage_all(self, handles: Sequence[Any]) -> list[Usage]:
        """Return the usage of several sets, from one look."""
        ...

    async def signal(self, handle: Any, name: str) -> bool:
        """Send a signal to the leader; False when it is gone."""
        ...
