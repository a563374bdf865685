"""The client half: one `Pool` of kept-alive connections per process, one request at a time on each connection.

The rules of this file
- A connection goes back to its pool only after a whole answer on an orderly connection; anything odd closes it.
- An idle connection is closed before the server does it (vLLM's closes after 5 s). One that was closed at the same moment
  is told apart from a failing server: it was used before, and nothing was received; its user may try a new one once.
- Cancelling closes the socket at once: that is the only signal that every engine understands.
- Nothing here knows of models, grants or clients: it reports to an `Answered`.
"""

from __future__ import annotations

import asyncio
import ssl
from time import monotonic
from typing import TYPE_CHECKING, Final, Protocol, cast

import httptools

from fleetd.gateway.port import Upstream

if TYPE_CHECKING:
    from fleetd.gateway.listener import Gateway

# What is done with a response header.
PASS: Final = 0
DROP: Final = 1
CONTENT_LENGTH: Final = 2
TRANSFER_ENCODING: Final = 3
CONTENT_TYPE: Final = 4
CONNECTION: Final = 5

# Hop-by-hop; the engine's banner; permissions to web pages that only we may give; what only we say.
_DROPPED = [
    "keep-alive",
    "proxy-connection",
    "proxy-authenticate",
    "te",
    "trailer",
    "upgrade",
    "server",
    "alt-svc",
    "x-powered-by",
    "x-request-id",
    "access-control-allow-origin",
    "access-control-allow-credentials",
    "access-control-allow-headers",
    "access-control-allow-methods",
    "access-control-expose-headers",
    "access-control-max-age",
    "x-fleet-model",
    "x-fleet-instance",
    "x-fleet-queue-ms",
    "x-fleet-load-ms",
    "x-fleet-error-source",
]
_SPECIAL = {
    "content-length": CONTENT_LENGTH,
    "transfer-encoding": TRANSFER_ENCODING,
    "content-type": CONTENT_TYPE,
    "connection": CONNECTION,
}
KINDS: dict[bytes, int] = {name.encode(): DROP for name in _DROPPED}
KINDS.update((name.encode(), kind) for name, kind in _SPECIAL.items())

UNBUFFERED: Final = (b"X-Accel-Buffering", b"no")
MAX_HEAD_BYTES: Final = 64 * 1024
_REMEMBERED: Final = 32  # heads of answers
JOIN_BYTES: Final = 64 * 1024

Pieces = tuple[bytes | bytearray, ...]  # of a request: lines of its head, and its body last


class AnswerHead:
    """What the header lines of an answer say. Built once for equal lines, then shared: engines repeat themselves."""

    __slots__ = ("chunked", "event_stream", "lines", "sized")

    def __init__(self, raw: tuple[bytes, ...]) -> None:
        """`raw` is name, value, name, value …"""
        self.sized = False  # the answer has a Content-Length
        self.chunked = False
        self.event_stream = False
        named: set[bytes] = set()
        passed: list[tuple[bytes, bytes]] = []
        for at in range(0, len(raw), 2):
            name, value = raw[at], raw[at + 1]
            kind = KINDS.get(name.lower(), PASS)
            if kind in (PASS, CONTENT_LENGTH, CONTENT_TYPE):
                passed.append((name, value))
            if kind == CONTENT_LENGTH:
                self.sized = True
            elif kind == CONTENT_TYPE:
                self.event_stream = value[:17].lower() == b"text/event-stream"
            elif kind == TRANSFER_ENCODING:
                self.chunked = True
            elif kind == CONNECTION:
                named.update(part.strip() for part in value.lower().split(b","))
        if self.event_stream and not self.sized:  # said once, whether the engine says it too or not
            passed = [*(line for line in passed if line[0].lower() != UNBUFFERED[0].lower()), UNBUFFERED]
        self.lines = b"".join(b"%b: %b\r\n" % line for line in passed if line[0].lower() not in named)


class Answered(Protocol):
    """Who waits for the answer."""

    def connected(self, connection: UpstreamConnection) -> None:
        """A new connection is there; the request goes out on it now."""
        ...

    def answer_read(self, connection: UpstreamConnection) -> None:
        """Something arrived: `status` (0: head incomplete), `head`, `pieces` and `complete` of the connection say what."""
        ...

    def upstream_lost(self, reason: str, received: bool, stale: bool) -> None:
        """The connection broke. `stale`: it came from the pool and broke before a byte."""
        ...

    def unreachable(self, reason: str) -> None:
        """No connection could be made: nothing was sent."""
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
        "status",
        "transport",
        "user",
    )

    def __init__(self, pool: Pool) -> None:
        self.pool = pool
        self.transport: asyncio.Transport = cast(asyncio.Transport, None)
        self.user: Answered | None = None
        self.idle_since = 0.0
        self.status = 0
        self.head: AnswerHead = _NO_HEAD
        self.pieces: list[bytes] = []  # of the body, since the last report; its user clears it
        self.complete = False
        self.keep_alive = False
        self._raw: list[bytes] = []
        self._received_bytes = 0
        self._reused = False
        self.on_body = self.pieces.append  # llhttp's callback, without a function of ours between
        self._parser = httptools.HttpResponseParser(self)

    def send(self, user: Answered, pieces: Pieces) -> None:
        """Send one request, whose answer `user` gets."""
        self.user = user
        if len(pieces[-1]) < JOIN_BYTES:
            self.transport.write(b"".join(pieces))
        else:
            self.transport.writelines((b"".join(pieces[:-1]), pieces[-1]))

    def release(self) -> None:
        """The answer is complete and was taken: back to the pool, or away."""
        self.user = None
        if self.keep_alive:
            self._reused = True
            self.status = self._received_bytes = 0
            self.complete = False
            self.pool.give_back(self)
        else:
            self.transport.close()

    def abort(self) -> None:
        """Close at once; nobody hears of it."""
        self.user = None
        self.transport.abort()

    # -- asyncio.Protocol -----------------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self.pool.open_connections += 1

    def data_received(self, data: bytes) -> None:
        user = self.user
        if user is None:
            self.transport.abort()  # an answer that nobody asked for
            return
        if not self.status:
            self._received_bytes += len(data)
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            self._broken("it switched protocols unasked")
            return
        except httptools.HttpParserError as error:
            if not self.complete:
                if self.status:
                    user.answer_read(self)  # what came before the nonsense
                self._broken(f"its answer is not valid HTTP/1.1: {error}")
                return
            self.keep_alive = False  # more bytes than the answer has
        if self.status:
            if self.status == 200:
                self.pool.heard_s = monotonic()
            user.answer_read(self)
        elif self._received_bytes > MAX_HEAD_BYTES:
            self._broken("the headers of its answer do not end")

    def eof_received(self) -> bool:
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        self.pool.lost(self)
        user, self.user = self.user, None
        self._parser = cast(httptools.HttpResponseParser, None)  # the parser holds us: break the cycle
        if user is None:
            return
        if exc is None and self.status and not self.head.sized and not self.head.chunked:
            self.complete = True  # the end of the connection is the end of the answer
            self.user = user
            user.answer_read(self)
            return
        received = self._received_bytes > 0
        reason = "the connection was closed" if exc is None else f"the connection broke ({exc})"
        user.upstream_lost(reason, received, self._reused and not received)

    def pause_writing(self) -> None:
        """Nothing to pause: a request's body is in memory as a whole."""

    def resume_writing(self) -> None:
        """See pause_writing."""

    def _broken(self, reason: str) -> None:
        user, self.user = self.user, None
        self.transport.abort()
        if user is not None:
            user.upstream_lost(reason, True, False)

    # -- what llhttp saw ------------------------------------------------------------------------------------------------

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

    def __init__(self, gateway: Gateway, process: str, upstream: Upstream) -> None:
        self.gateway = gateway
        self.process = process
        self.upstream = upstream
        self.open_connections = 0
        self.heard_s = 0.0  # when a good answer, or a piece of one, last came: monotonic
        self.idle: list[UpstreamConnection] = []  # the one used last is at the end
        self._connecting: set[asyncio.Task[None]] = set()
        self._heads: dict[tuple[bytes, ...], AnswerHead] = {}
        host = f"[{upstream.host}]" if ":" in upstream.host else upstream.host
        lines = [f" HTTP/1.1\r\nHost: {host}:{upstream.port}\r\n"]
        lines += [f"{name}: {value}\r\n" for name, value in upstream.headers]
        self.head = "".join(lines).encode("latin-1", "replace")
        self.prefix = b"POST " + upstream.base_path.encode("ascii", "replace")

    def answer_head(self, raw: list[bytes]) -> AnswerHead:
        """Return what these header lines say; a Date makes them new once a second."""
        key = tuple(raw)
        head = self._heads.get(key)
        if head is None:
            if len(self._heads) >= _REMEMBERED:
                self._heads.clear()
            head = self._heads[key] = AnswerHead(key)
        return head

    def take(self) -> UpstreamConnection | None:
        """Return an idle connection, the one used last; None: a new one is needed."""
        return self.idle.pop() if self.idle else None

    def give_back(self, connection: UpstreamConnection) -> None:
        """Keep a connection for the next request."""
        gateway = self.gateway
        idle = self.idle
        if len(idle) >= gateway.options.max_idle_per_upstream or gateway.closed:
            connection.transport.close()
            return
        connection.idle_since = gateway.clock
        idle.append(connection)

    def lost(self, connection: UpstreamConnection) -> None:
        """A connection is gone."""
        self.open_connections -= 1
        if connection.user is None and connection in self.idle:
            self.idle.remove(connection)
        if not self.open_connections:
            self.gateway.pool_emptied(self)

    def connect(self, user: Answered, pieces: Pieces) -> asyncio.Task[None]:
        """Open a connection and send one request on it. Cancel the returned task to give it up."""
        task = self.gateway.loop.create_task(self._connect(user, pieces))
        self._connecting.add(task)
        task.add_done_callback(self._connecting.discard)
        return task

    async def _connect(self, user: Answered, pieces: Pieces) -> None:
        upstream, gateway = self.upstream, self.gateway
        context = ssl.create_default_context() if upstream.tls else None
        connection = UpstreamConnection(self)
        try:
            async with asyncio.timeout(gateway.options.connect_timeout_s):
                await gateway.loop.create_connection(lambda: connection, upstream.host, upstream.port, ssl=context)
        except TimeoutError:
            user.unreachable("no connection in time")
            return
        except OSError as error:
            user.unreachable(f"no connection ({error.strerror or error})")
            return
        except asyncio.CancelledError:
            if cast(object, connection.transport) is not None:
                connection.abort()  # it was made in the moment when it was given up
            raise
        if connection.transport.is_closing():
            user.upstream_lost("the connection was closed", False, False)
            return
        user.connected(connection)
        connection.send(user, pieces)

    def close_idle(self, older_than: float = float("inf")) -> None:
        """Close connections that are idle since before `older_than` (loop time); all without it."""
        keep: list[UpstreamConnection] = []
        for connection in self.idle:
            if connection.idle_since < older_than:
                connection.transport.close()
            else:
                keep.append(connection)
        self.idle = keep

    def close(self) -> None:
        """Close what is idle and give up what is being opened."""
        self.close_idle()
        for task in tuple(self._connecting):
            task.cancel()
