"""The gateway as one object: its listeners, its connections and its clock.

Invariants:
- One timer serves all deadlines: it visits the connections a few times a second. No request starts a timer of its own.
- A connection over the limit replaces the one that is idle longest; it is refused only if none is idle.
- Closing has two steps: `drain` answers requests in progress and starts no new ones, `close` cuts the rest.
"""

from __future__ import annotations

import asyncio
import contextlib
import resource
import socket
import ssl
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from fleetd.errors import HostError
from fleetd.gateway.context import GatewayContext
from fleetd.gateway.handlers import Handlers
from fleetd.gateway.http1 import IDLE, ServerConnection
from fleetd.gateway.options import GatewayOptions
from fleetd.gateway.pools import Pools
from fleetd.gateway.port import FleetPort

_UPSTREAM_CLOSE_S = 1.0  # closing takes one turn of the loop; TLS a little longer
_SPARE_FILES = 256  # for the rest of the daemon


@dataclass(frozen=True, slots=True)
class GatewayStats:
    """Counters since the start, and numbers of open connections and requests."""

    connections: int
    active: int
    upstream_connections: int
    buffered_bytes: int
    requests: int
    refused_connections: int


class Gateway:
    """The data plane of one daemon. Construct it on the running loop."""

    def __init__(self, fleet: FleetPort, options: GatewayOptions | None = None) -> None:
        self._options = options or GatewayOptions()
        self._context = GatewayContext(fleet, self._options)
        self._changed = asyncio.Event()  # set when the last connection of a client or of a pool is gone
        self._pools = Pools(self._context, self._changed.set)
        self.handle = Handlers(self._context, self._pools).handle
        self._servers: list[asyncio.Server] = []
        self._timer: asyncio.TimerHandle | None = None
        self._connections: set[ServerConnection] = set()
        self._by_client: dict[str, int] = {}
        self._refused = 0
        self._max_connections = min(self._options.max_connections, _files_for_connections())

    # -- start and stop -------------------------------------------------------------------------------------------------

    async def start(
        self, sockets: Sequence[socket.socket] = (), tls: ssl.SSLContext | None = None
    ) -> list[tuple[str, int]]:
        """Listen on the configured address, or on sockets that already listen.

        Returns the addresses.

        Raises HostError if the address cannot be used.
        """
        options, loop = self._options, self._context.loop
        settings: dict[str, Any] = {"ssl": tls, "backlog": options.backlog}
        try:
            if sockets:
                for sock in sockets:
                    self._servers.append(await loop.create_server(self._accept, sock=sock, **settings))
            else:
                self._servers.append(
                    await loop.create_server(self._accept, options.host or None, options.port, **settings)
                )
        except OSError as error:
            where = f"{options.host}:{options.port}"
            raise HostError(f"The gateway cannot listen on {where}: {error.strerror or error}.") from error
        self._tick()
        return [address for server in self._servers for address in _addresses(server)]

    def drain(self) -> None:
        """Stop accepting; idle connections are closed, requests in progress go on."""
        self._context.draining = True
        for server in self._servers:
            server.close()
        for connection in tuple(self._connections):
            connection.close_when_idle()

    async def close(self, grace_s: float = 0.0) -> None:
        """Drain for at most `grace_s` seconds, then cut the remaining connections."""
        self.drain()
        if self._connections and grace_s > 0:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(grace_s):
                    await self._wait_until(lambda: not self._connections)
        self._context.closed = True
        for connection in tuple(self._connections):
            connection.transport.abort()
        await self._wait_until(lambda: not self._connections)
        if self._timer is not None:
            self._timer.cancel()
        self._pools.close()
        for server in self._servers:
            await server.wait_closed()
        self._context.threads.shutdown(wait=False, cancel_futures=True)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_UPSTREAM_CLOSE_S):
                await self._wait_until(lambda: not self._pools.open_connections)

    async def _wait_until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            self._changed.clear()
            await self._changed.wait()

    def stats(self) -> GatewayStats:
        """Return counters for metrics."""
        return GatewayStats(
            connections=len(self._connections),
            active=sum(1 for connection in self._connections if connection.active is not None),
            upstream_connections=self._pools.open_connections,
            buffered_bytes=self._context.buffered_bytes,
            requests=self._context.requests,
            refused_connections=self._refused,
        )

    def last_answer_s(self, process: str) -> float:
        """Return when a process last sent a piece of a 200 answer, monotonic; 0: never."""
        return self._pools.last_answer_s(process)

    # -- connections ----------------------------------------------------------------------------------------------------

    def _accept(self) -> ServerConnection:
        return ServerConnection(self._context, self)

    def register(self, connection: ServerConnection) -> bool:
        """Count a new connection; False if it is over a limit."""
        client = connection.client
        accepted = True
        if len(self._connections) >= self._max_connections:
            accepted = self._close_idlest(None)
        elif self._by_client.get(client, 0) >= self._options.max_connections_per_client:
            accepted = self._close_idlest(client)
        self._connections.add(connection)
        self._by_client[client] = self._by_client.get(client, 0) + 1
        self._refused += not accepted
        return accepted

    def forget(self, connection: ServerConnection) -> None:
        """Forget a connection that was lost."""
        if connection not in self._connections:
            return
        self._connections.discard(connection)
        left = self._by_client.get(connection.client, 0) - 1
        if left > 0:
            self._by_client[connection.client] = left
        else:
            self._by_client.pop(connection.client, None)
        if not self._connections:
            self._changed.set()

    def _close_idlest(self, client: str | None) -> bool:
        """Close the connections idle longest, of a client or all; False if none is idle.

        Several at once, so that a flood does not search for each connection.
        """
        idle = [c for c in self._connections if c.phase == IDLE and client in (None, c.client)]
        if not idle:
            return False
        idle.sort(key=lambda c: c.deadline)
        for connection in idle[: max(1, len(idle) // 32)]:
            connection.transport.abort()
        return True

    def _tick(self) -> None:
        now = self._context.clock = self._context.loop.time()
        self._timer = self._context.loop.call_later(self._options.tick_s, self._tick)
        for connection in tuple(self._connections):
            connection.tick(now)
        self._pools.close_idle()


def _addresses(server: asyncio.Server) -> list[tuple[str, int]]:
    found = []
    for sock in server.sockets:
        name = sock.getsockname()
        found.append((str(name[0]), int(name[1])))
    return found


def _files_for_connections() -> int:
    """Return how many clients the open-file limit allows, at two files each."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return 1_000_000
    return max(16, (soft - _SPARE_FILES) // 2)
