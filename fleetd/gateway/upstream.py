"""The client half: one `Pool` of kept-alive connections per process, one request at a time on each connection.

Invariants:
- A connection returns to its pool only after a whole answer on an orderly connection; anything else closes it.
- An idle connection is closed before the server closes it (vLLM does after 5 s). A connection that the server closed at that
  moment is distinguished from a failing server: it was used before, and nothing was received; its request may try a new one once.
- Cancelling closes the socket at once: that is the only signal that every engine understands.
- Nothing here knows of models, grants or clients: it reports to an `AnswerReceiver`.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Callable
from time import monotonic
from typing import Final, Protocol, cast

import httptools

from fleetd.gateway.context import GatewayContext
from fleetd.gateway.headers import AnswerHead
from fleetd.gateway.target import Upstream

MAX_HEAD_BYTES: Final = 64 * 1024
JOIN_BYTES: Final = 64 * 1024  # a request with a body below this is sent in one write
_CACHED_HEADS: Final = 32

Pieces = tuple[bytes | bytearray, ...]  # of a request: lines of its head, and its body last


class AnswerReceiver(Protocol):
    """Receives the answer to one request."""

    def connected(self, connection: UpstreamConnection) -> None:
        """A new connection is open; the request is sent on it now."""
        ...

    def answer_read(self, connection: UpstreamConnection) -> None:
        """Data arrived: see the attributes of the connection (`status` 0: no head yet)."""
        ...

    def upstream_lost(self, reason: str, received: bool, stale: bool) -> None:
        """The connection broke; `stale`: a pooled one broke before a byte arrived."""
        ...

    def unreachable(self, reason: str) -> None:
        """No connection could be opened; nothing was sent."""
        ...


_NO_HEAD: Final = AnswerHead(())


class UpstreamConnection(asyncio.Protocol):
    """One connection to an engine."""

    __slots__ = (
        "_parser",
        "_raw",
        "_received_bytes",
        "_reused",
        "complete",
        "head",
        "idle_since",
        "keep_alive",
        "on_body",
        "pieces",
        "pool",
        "receiver",
        "status",
        "transport",
    )

    def __init__(self, pool: Pool) -> None:
        self.pool = pool
        self.transport: asyncio.Transport = cast(asyncio.Transport, None)
        self.receiver: AnswerReceiver | None = None
        self.idle_since = 0.0
        self.status = 0
        self.head: AnswerHead = _NO_HEAD
        self.pieces: list[bytes] = []  # of the body, since the last report; the receiver clears it
        self.complete = False
        self.keep_alive = False
        self._raw: list[bytes] = []
        self._received_bytes = 0
        self._reused = False
        self.on_body = self.pieces.append  # llhttp's callback, without a Python function between
        self._parser = httptools.HttpResponseParser(self)

    def send(self, receiver: AnswerReceiver, pieces: Pieces) -> None:
        """Send one request; its answer goes to `receiver`."""
        self.receiver = receiver
        if len(pieces[-1]) < JOIN_BYTES:
            self.transport.write(b"".join(pieces))
        else:
            self.transport.writelines((b"".join(pieces[:-1]), pieces[-1]))

    def release(self) -> None:
        """Return the connection to its pool after a complete answer, or close it."""
        self.receiver = None
        if self.keep_alive:
            self._reused = True
            self.status = self._received_bytes = 0
            self.complete = False
            self.pool.give_back(self)
        else:
            self.transport.close()

    def abort(self) -> None:
        """Close at once, without a report."""
        self.receiver = None
        self.transport.abort()

    # -- asyncio.Protocol -----------------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self.pool.open_connections += 1

    def data_received(self, data: bytes) -> None:
        receiver = self.receiver
        if receiver is None:
            self.transport.abort()  # an answer without a request
            return
        if not self.status:
            self._received_bytes += len(data)
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            self._broken("it switched protocols without being asked")
            return
        except httptools.HttpParserError as error:
            if not self.complete:
                if self.status:
                    receiver.answer_read(self)  # what came before the invalid part
                self._broken(f"its answer is not valid HTTP/1.1: {error}")
                return
            self.keep_alive = False  # more bytes than the answer has
        if self.status:
            if self.status == 200:
                self.pool.last_answer_s = monotonic()
            receiver.answer_read(self)
        elif self._received_bytes > MAX_HEAD_BYTES:
            self._broken("the headers of its answer are too large")

    def eof_received(self) -> bool:
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        self.pool.lost(self)
        receiver, self.receiver = self.receiver, None
        self._parser = cast(httptools.HttpResponseParser, None)  # the parser holds us: break the cycle
        if receiver is None:
            return
        if exc is None and self.status and not self.head.sized and not self.head.chunked:
            self.complete = True  # the end of the connection is the end of the answer
            self.receiver = receiver
            receiver.answer_read(self)
            return
        received = self._received_bytes > 0
        reason = "the connection was closed" if exc is None else f"the connection broke ({exc})"
        receiver.upstream_lost(reason, received, self._reused and not received)

    def pause_writing(self) -> None:
        """Do nothing: a request's body is completely in memory."""

    def resume_writing(self) -> None:
        """Do nothing; see pause_writing."""

    def _broken(self, reason: str) -> None:
        receiver, self.receiver = self.receiver, None
        self.transport.abort()
        if receiver is not None:
            receiver.upstream_lost(reason, True, False)

    # -- callbacks of llhttp ------------------------------------------------------------------------------------------------

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self.status:  # else a trailer
            self._raw += (name, value)

    def on_headers_complete(self) -> None:
        if self.complete:
            raise httptools.HttpParserError("a second answer")
        parser = self._parser
        status = parser.get_status_code()
        if status >= 200:
            self.status = status
            self.head = self.pool.answer_head(self._raw)
            self.keep_alive = parser.should_keep_alive()
        self._raw = []

    def on_message_complete(self) -> None:
        if self.status:
            self.complete = True


class Pool:
    """The connections to one process."""

    def __init__(
        self, context: GatewayContext, process: str, upstream: Upstream, on_empty: Callable[[Pool], None]
    ) -> None:
        """`on_empty` is called with the pool whenever its last connection is gone."""
        self._context = context
        self._on_empty = on_empty
        self.process = process
        self.upstream = upstream
        self.open_connections = 0
        self.last_answer_s = 0.0  # when a piece of a successful answer last arrived: monotonic
        self.idle: list[UpstreamConnection] = []  # the most recently used is last
        self._connecting: set[asyncio.Task[None]] = set()
        self._heads: dict[tuple[bytes, ...], AnswerHead] = {}
        host = f"[{upstream.host}]" if ":" in upstream.host else upstream.host
        lines = [f" HTTP/1.1\r\nHost: {host}:{upstream.port}\r\n"]
        lines += [f"{name}: {value}\r\n" for name, value in upstream.headers]
        self.head = "".join(lines).encode("latin-1", "replace")
        self.prefix = b"POST " + upstream.base_path.encode("ascii", "replace")

    def answer_head(self, raw: list[bytes]) -> AnswerHead:
        """Return the head with these lines, cached until the engine's Date changes."""
        key = tuple(raw)
        head = self._heads.get(key)
        if head is None:
            if len(self._heads) >= _CACHED_HEADS:
                self._heads.clear()
            head = self._heads[key] = AnswerHead(key)
        return head

    def give_back(self, connection: UpstreamConnection) -> None:
        """Keep a connection for the next request."""
        context = self._context
        idle = self.idle
        if len(idle) >= context.options.max_idle_per_upstream or context.closed:
            connection.transport.close()
            return
        connection.idle_since = context.clock
        idle.append(connection)

    def lost(self, connection: UpstreamConnection) -> None:
        """Forget a connection that was lost."""
        self.open_connections -= 1
        if connection.receiver is None and connection in self.idle:
            self.idle.remove(connection)
        if not self.open_connections:
            self._on_empty(self)

    def connect(self, receiver: AnswerReceiver, pieces: Pieces) -> asyncio.Task[None]:
        """Open a connection and send a request on it; cancel the returned task to stop."""
        task = self._context.loop.create_task(self._connect(receiver, pieces))
        self._connecting.add(task)
        task.add_done_callback(self._connecting.discard)
        return task

    async def _connect(self, receiver: AnswerReceiver, pieces: Pieces) -> None:
        upstream, context = self.upstream, self._context
        tls = ssl.create_default_context() if upstream.tls else None
        connection = UpstreamConnection(self)
        try:
            async with asyncio.timeout(context.options.connect_timeout_s):
                await context.loop.create_connection(lambda: connection, upstream.host, upstream.port, ssl=tls)
        except TimeoutError:
            receiver.unreachable("no connection in time")
            return
        except OSError as error:
            receiver.unreachable(f"no connection ({error.strerror or error})")
            return
        except asyncio.CancelledError:
            if cast(object, connection.transport) is not None:
                connection.abort()  # opened in the moment of the cancellation
            raise
        if connection.transport.is_closing():
            receiver.upstream_lost("the connection was closed", False, False)
            return
        receiver.connected(connection)
        connection.send(receiver, pieces)

    def close_idle(self, older_than: float = float("inf")) -> None:
        """Close connections idle since before `older_than` (loop time); by default all."""
        keep: list[UpstreamConnection] = []
        for connection in self.idle:
            if connection.idle_since < older_than:
                connection.transport.close()
            else:
                keep.append(connection)
        self.idle = keep

    def close(self) -> None:
        """Close idle connections and stop opening others."""
        self.close_idle()
        for task in tuple(self._connecting):
            task.cancel()
