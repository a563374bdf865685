"""The gateway as one object: its listeners, its connections, its pools, its clock.

The rules of this file
- One timer serves all deadlines: it goes over the connections a few times a second. No request starts a timer of its own.
- `clock` is the loop's time as of the last tick: good enough for every timeout, and free to read.
- A connection over the limit takes the place of the one that is idle longest; only where none is idle it is refused.
- Closing is two steps: `drain` answers what is in progress and starts nothing new, `close` ends what is left.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import resource
import socket
import ssl
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from fleetd.errors import HostError
from fleetd.gateway.checks import RequestPolicy
from fleetd.gateway.http1 import IDLE, ServerConnection
from fleetd.gateway.options import GatewayOptions
from fleetd.gateway.port import FleetPort, Seat, Upstream
from fleetd.gateway.request import Heads
from fleetd.gateway.routes import Routes
from fleetd.gateway.target import Place
from fleetd.gateway.upstream import Pool

_SANE_ID = re.compile(rb"[A-Za-z0-9._-]{1,128}")
_PLACES_REMEMBERED = 4096
_UPSTREAM_CLOSE_S = 1.0  # closing takes one turn of the loop; TLS a little longer
_SPARE_FILES = 256  # what the rest of the daemon may need


@dataclass(frozen=True, slots=True)
class GatewayStats:
    """Counters since the start, and what is open now."""

    connections: int
    active: int
    upstream_connections: int
    buffered_bytes: int
    requests: int
    refused_connections: int


class Gateway:
    """The data plane of one daemon."""

    def __init__(self, port: FleetPort, options: GatewayOptions | None = None) -> None:
        self.port = port
        self.options = options or GatewayOptions()
        self.heads = Heads()
        self.routes = Routes(self)
        self.policy = RequestPolicy(self.options, self.routes)
        self.loop: asyncio.AbstractEventLoop
        self.clock = 0.0
        self.draining = False
        self.closed = False
        self.buffered_bytes = 0
        self.threads = ThreadPoolExecutor(2, thread_name_prefix="gateway-body")
        self._servers: list[asyncio.Server] = []
        self._timer: asyncio.TimerHandle | None = None
        self._connections: set[ServerConnection] = set()
        self._by_client: dict[str, int] = {}
        self._pools: dict[str, Pool] = {}
        self._all_pools: set[Pool] = set()  # also those of an earlier address, until their connections are gone
        self.places: dict[Seat, Place] = {}
        self._id_format = b"X-Request-Id: %b-%%x\r\n" % os.urandom(6).hex().encode()
        self._id_count = 0
        self._refused = 0
        self._most_connections = self.options.max_connections
        self._empty: asyncio.Event

    # -- start and stop -------------------------------------------------------------------------------------------------

    async def start(
        self, sockets: Sequence[socket.socket] = (), tls: ssl.SSLContext | None = None
    ) -> list[tuple[str, int]]:
        """Listen on the options' address, or on sockets that listen already. Returns the addresses.

        Raises HostError when the address cannot be used.
        """
        self.loop = asyncio.get_running_loop()
        self.clock = self.loop.time()
        self._empty = asyncio.Event()
        self._most_connections = min(self.options.max_connections, _files_for_connections())
        settings: dict[str, Any] = {"ssl": tls, "backlog": self.options.backlog}
        try:
            if sockets:
                for sock in sockets:
                    self._servers.append(await self.loop.create_server(self._accept, sock=sock, **settings))
            else:
                host = self.options.host or None
                server = await self.loop.create_server(self._accept, host, self.options.port, **settings)
                self._servers.append(server)
        except OSError as error:
            where = f"{self.options.host}:{self.options.port}"
            raise HostError(f"The gateway cannot listen on {where}: {error.strerror or error}.") from error
        self._tick()
        return [address for server in self._servers for address in _addresses(server)]

    def drain(self) -> None:
        """Accept nothing new; idle connections are closed, requests in progress go on."""
        self.draining = True
        for server in self._servers:
            server.close()
        for connection in tuple(self._connections):
            connection.close_when_idle()

    async def close(self, grace_s: float = 0.0) -> None:
        """Drain for at most `grace_s` seconds, then cut what is left."""
        self.drain()
        if self._connections and grace_s > 0:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(grace_s):
                    await self._wait_empty()
        self.closed = True
        for connection in tuple(self._connections):
            connection.transport.abort()
        await self._wait_empty()
        if self._timer is not None:
            self._timer.cancel()
        for pool in self._all_pools:
            pool.close()
        for server in self._servers:
            await server.wait_closed()
        self.threads.shutdown(wait=False, cancel_futures=True)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_UPSTREAM_CLOSE_S):
                while any(pool.open_connections for pool in self._all_pools):
                    self._empty.clear()
                    await self._empty.wait()

    async def _wait_empty(self) -> None:
        while self._connections:
            self._empty.clear()
            await self._empty.wait()

    def stats(self) -> GatewayStats:
        """Return counters for metrics."""
        return GatewayStats(
            connections=len(self._connections),
            active=sum(1 for connection in self._connections if connection.active is not None),
            upstream_connections=sum(pool.open_connections for pool in self._all_pools),
            buffered_bytes=self.buffered_bytes,
            requests=self._id_count,
            refused_connections=self._refused,
        )

    # -- connections ----------------------------------------------------------------------------------------------------

    def _accept(self) -> ServerConnection:
        return ServerConnection(self)

    def register(self, connection: ServerConnection) -> bool:
        """Count a new connection; False when it is one too many."""
        client = connection.client
        mine = self._by_client.get(client, 0)
        accepted = True
        if len(self._connections) >= self._most_connections:
            accepted = self._make_room(None)
        elif mine >= self.options.max_connections_per_client:
            accepted = self._make_room(client)
        self._connections.add(connection)
        self._by_client[client] = self._by_client.get(client, 0) + 1
        self._refused += not accepted
        return accepted

    def forget(self, connection: ServerConnection) -> None:
        """A connection is gone."""
        if connection not in self._connections:
            return
        self._connections.discard(connection)
        left = self._by_client.get(connection.client, 0) - 1
        if left > 0:
            self._by_client[connection.client] = left
        else:
            self._by_client.pop(connection.client, None)
        if not self._connections:
            self._empty.set()

    def _make_room(self, client: str | None) -> bool:
        """Close the connections that are idle longest, a few at once so that a flood does not search each time."""
        idle = [c for c in self._connections if c.phase == IDLE and client in (None, c.client)]
        if not idle:
            return False
        idle.sort(key=lambda c: c.deadline)
        for connection in idle[: max(1, len(idle) // 32)]:
            connection.transport.abort()
        return True

    def _tick(self) -> None:
        now = self.clock = self.loop.time()
        self._timer = self.loop.call_later(self.options.tick_s, self._tick)
        for connection in tuple(self._connections):
            connection.tick(now)
        oldest = now - self.options.upstream_keepalive_s + self.options.tick_s
        for pool in tuple(self._all_pools):
            pool.close_idle(oldest)

    # -- what requests need ---------------------------------------------------------------------------------------------

    def id_line(self, from_client: bytes) -> bytes:
        """Return the header line with the client's own request id where it is a sane one, else with a new one."""
        count = self._id_count = self._id_count + 1
        if from_client and _SANE_ID.fullmatch(from_client):
            return b"X-Request-Id: %b\r\n" % from_client
        return self._id_format % count

    def heard_s(self, process: str) -> float:
        """Return when a good answer of this process, or a piece of one, last came, monotonic; 0: never."""
        pool = self._pools.get(process)
        return pool.heard_s if pool is not None else 0.0

    def _pool(self, process: str, upstream: Upstream) -> Pool:
        """Return the connections to a process at this address."""
        pool = self._pools.get(process)
        if pool is not None and pool.upstream is upstream:
            return pool
        if pool is not None and pool.upstream == upstream:
            pool.upstream = upstream
            return pool
        if pool is not None:
            pool.close_idle()
        pool = self._pools[process] = Pool(self, process, upstream)
        self._all_pools.add(pool)
        return pool

    def pool_emptied(self, pool: Pool) -> None:
        """The last connection of a pool is gone."""
        if self._pools.get(pool.process) is not pool:
            self._all_pools.discard(pool)
        self._empty.set()

    def place(self, seat: Seat) -> Place:
        """Return what the requests for a seat have in common."""
        if len(self.places) >= _PLACES_REMEMBERED:
            self.places.clear()
        place = self.places[seat] = Place(seat, self._pool(seat.process, seat.upstream))
        return place

    def place_for(self, model: str, process: str) -> Place:
        """Return the same for a model on a process. Raises KeyError when one of them is gone."""
        port = self.port
        upstream = port.upstream(process)
        return Place(Seat(model, process, upstream, port.served_name(model, process)), self._pool(process, upstream))


def _addresses(server: asyncio.Server) -> list[tuple[str, int]]:
    found = []
    for sock in server.sockets:
        name = sock.getsockname()
        found.append((str(name[0]), int(name[1])))
    return found


def _files_for_connections() -> int:
    """Return how many clients the open-file limit leaves room for: each may need a second file for its engine."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return 1_000_000
    return max(16, (soft - _SPARE_FILES) // 2)
