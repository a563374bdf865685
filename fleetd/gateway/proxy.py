"""A request on its way through: read what it asks for, ask the fleet, forward, relay. One `Exchange` per request.

The rules of this file
- Every admitted request ends once: `cancel` before a grant, `finish` after it. `_phase` says which is due.
- Bytes are relayed as they arrive, one write per read. A client that reads slowly stops the reading from its engine.
- A client that leaves ends everything at once: nothing is loaded for it, and its engine sees a closed socket.
- Nothing is tried again once a byte of an answer was received. Before that, another holder may have it.
- A stream that waits says so with comments, never with content; from then on its failures are error events. An answer that
  breaks ends visibly: an error event without a finish reason and without [DONE], or a body that is cut short.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Final

from fleetd.core.commands import Grant, Reject
from fleetd.errors import ApiError
from fleetd.gateway import body as bodies
from fleetd.gateway.body import Asked
from fleetd.gateway.errors import from_reject, status_line
from fleetd.gateway.http1 import ServerConnection
from fleetd.gateway.request import Request
from fleetd.gateway.upstream import Pool, UpstreamConnection

if TYPE_CHECKING:
    from fleetd.gateway.server import Gateway

log = logging.getLogger("fleetd.gateway")

READING: Final = 0  # the body is being looked at
QUEUED: Final = 1  # the fleet was asked
GRANTED: Final = 2  # a holder is named, and is being asked or answers
DONE: Final = 3

LAST_CHUNK: Final = b"0\r\n\r\n"
COMMENT: Final = b": loading\n\n"
EARLY_HEAD: Final = (
    b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nCache-Control: no-cache\r\nX-Accel-Buffering: no\r\n"
)
MAX_ERROR_BYTES: Final = 64 * 1024
_NEVER: Final = float("inf")


def chunk(data: bytes) -> bytes:
    """Return `data` as one HTTP/1.1 chunk."""
    return b"%x\r\n%b\r\n" % (len(data), data)


class Exchange:
    """One request of a client, from its body to the last byte of its answer."""

    __slots__ = (
        "_asked",
        "_avoid",
        "_chunks",
        "_comment_at",
        "_connecting",
        "_early",
        "_error_pieces",
        "_event_stream",
        "_failure",
        "_grant",
        "_last_read",
        "_phase",
        "_piping",
        "_pool",
        "_request_id",
        "_stale_once",
        "_tries",
        "conn",
        "gateway",
        "relaying",
        "request",
        "upstream",
    )

    def __init__(self, gateway: Gateway, conn: ServerConnection, request: Request) -> None:
        self.gateway = gateway
        self.conn = conn
        self.request = request
        self.relaying = False  # the client has seen the beginning of an answer
        self.upstream: UpstreamConnection | None = None
        self._phase = READING
        self._asked: Asked | None = None
        self._avoid: tuple[str, ...] = ()
        self._chunks = False  # the answer goes out in chunks
        self._comment_at = _NEVER
        self._connecting: asyncio.Task[None] | None = None
        self._early = False  # 200 was sent before anything was granted
        self._error_pieces: list[bytes] | None = None
        self._event_stream = False
        self._failure: ApiError | None = None
        self._grant: Grant | None = None
        self._last_read = _NEVER
        self._piping = False  # what the engine sends goes to the client
        self._pool: Pool | None = None
        self._request_id = 0
        self._stale_once = False
        self._tries = 0

    # -- what is asked for ----------------------------------------------------------------------------------------------

    def begin(self) -> None:
        """Read the body and go on; a large one in a thread."""
        self.conn.handler = self
        body = self.request.body
        if len(body) >= bodies.LARGE_BYTES:
            future = self.gateway.loop.run_in_executor(self.gateway.threads, bodies.scan, body)
            future.add_done_callback(self._scanned)
            return
        try:
            asked = bodies.read(body)
        except ApiError as error:
            self._refuse(error)
            return
        self._admit(asked)

    def _scanned(self, future: asyncio.Future[Asked]) -> None:
        if self._phase != READING or future.cancelled():
            return
        error = future.exception()
        if error is None:
            self._admit(future.result())
        elif isinstance(error, ApiError):
            self._refuse(error)
        else:
            log.error("a body could not be read", exc_info=error)
            self.conn.fail()

    def _admit(self, asked: Asked) -> None:
        self._asked = asked
        self._phase = QUEUED
        request_id = self.gateway.port.admit(asked.model, self._granted, self._rejected, self._avoid)
        if self._phase == QUEUED:  # no answer yet
            self._request_id = request_id
            if asked.stream and self.request.http11:
                self._comment_at = self.gateway.clock + self.gateway.options.loading_comment_s

    # -- the fleet's answer ---------------------------------------------------------------------------------------------

    def _rejected(self, reject: Reject) -> None:
        if self._phase != QUEUED:
            return
        self._phase = DONE
        self._refuse(self._failure or from_reject(reject))

    def _granted(self, grant: Grant) -> None:
        if self._phase != QUEUED:
            return
        self._phase = GRANTED
        self._grant = grant
        self._request_id = grant.request_id
        self._comment_at = _NEVER
        self._stale_once = False
        try:
            self._pool = self.gateway.pool(grant.process)
        except KeyError:
            self._fail_over(f"{grant.process} is gone")
            return
        self._forward(fresh=False)

    def _forward(self, fresh: bool) -> None:
        pool, grant, request, asked = self._pool, self._grant, self.request, self._asked
        assert pool is not None
        assert grant is not None
        assert asked is not None
        body = request.body
        try:
            served_name = self.gateway.port.served_name(grant.model, grant.process)
        except KeyError:
            self._fail_over(f"{grant.process} no longer holds {grant.model}")
            return
        if served_name != asked.model:
            body = bodies.rename(body, asked, served_name)
        head = [pool.prefix, request.target, pool.head, request.head.forward]
        if request.head.accept_encoding is not None and not asked.stream:
            # A stream must stay readable: an error event may have to follow it.
            head += (b"Accept-Encoding: ", request.head.accept_encoding, b"\r\n")
        head += (b"X-Request-Id: ", request.request_id, b"\r\nContent-Length: %d\r\n\r\n" % len(body))
        self._last_read = self.gateway.clock
        connection = None if fresh else pool.take()
        if connection is None:
            self._connecting = pool.connect(self, head, body)
        else:
            self.upstream = connection
            connection.send(self, head, body)

    # -- the engine's answer --------------------------------------------------------------------------------------------

    def connected(self, connection: UpstreamConnection) -> None:
        """See upstream.Answered."""
        self._connecting = None
        self.upstream = connection

    def answer_read(self, connection: UpstreamConnection) -> None:
        """See upstream.Answered."""
        self._last_read = self.gateway.clock
        if self._error_pieces is not None:
            self._collect_error(connection)
            return
        out: list[bytes] = []
        if not self._piping:
            self._forget_body()
            if self.conn.departure is not None:
                self.conn.answer_begins()
            if self._early:
                if connection.status != 200 or not connection.head.event_stream:
                    self._error_pieces = []
                    self._collect_error(connection)
                    return
            else:
                self._head(connection, out)
            self._event_stream = connection.head.event_stream
            self._piping = self.relaying = True
        if connection.body_bytes:
            if self._chunks:
                out.append(b"%x\r\n" % connection.body_bytes)
                out += connection.pieces
                out.append(b"\r\n")
            else:
                out += connection.pieces
            connection.pieces = []
            connection.body_bytes = 0
        if connection.complete:
            if self._chunks:
                out.append(LAST_CHUNK)
            self.conn.transport.write(b"".join(out))
            self._complete(connection)
        elif out:
            self.conn.transport.write(b"".join(out))

    def _forget_body(self) -> None:
        """An answer began: the request will not be sent again."""
        self.request.body = b""
        if self.request.buffered_bytes:
            self.conn.give_back(self.request)

    def _head(self, connection: UpstreamConnection, out: list[bytes]) -> None:
        """Write the head of the answer, and decide how its end will be known."""
        request = self.request
        head = connection.head
        out += (
            status_line(connection.status),
            head.lines,
            b"X-Request-Id: ",
            request.request_id,
            b"\r\n",
            self._labels(),
        )
        if not head.sized and connection.status not in (204, 304):
            if request.http11:
                self._chunks = True
                out.append(b"Transfer-Encoding: chunked\r\n")
            else:
                request.keep_alive = False
            if head.event_stream:
                out.append(b"X-Accel-Buffering: no\r\n")
        if self.gateway.draining:
            request.keep_alive = False
        out.append(b"\r\n" if request.keep_alive else b"Connection: close\r\n\r\n")

    def _labels(self) -> bytes:
        grant = self._grant
        assert grant is not None
        labels = self.gateway.labels(grant.model, grant.process)
        if not grant.queued_s and not grant.load_s:
            return labels + b"X-Fleet-Queue-Ms: 0\r\nX-Fleet-Load-Ms: 0\r\n"
        times = (int(grant.queued_s * 1000), int(grant.load_s * 1000))
        return labels + b"X-Fleet-Queue-Ms: %d\r\nX-Fleet-Load-Ms: %d\r\n" % times

    def _complete(self, connection: UpstreamConnection) -> None:
        self._phase = DONE
        self.upstream = None
        keep = self.request.keep_alive
        conn = self.conn
        if conn.stalled_since != _NEVER and not connection.transport.is_closing():
            connection.transport.resume_reading()
        connection.release()
        self.gateway.port.finish(self._request_id)
        conn.done(keep)

    def _collect_error(self, connection: UpstreamConnection) -> None:
        """200 went out already, and the engine says something else: pass its words on as an error event."""
        pieces = self._error_pieces
        assert pieces is not None
        if sum(map(len, pieces)) < MAX_ERROR_BYTES:
            pieces += connection.pieces
        connection.pieces = []
        connection.body_bytes = 0
        if not connection.complete:
            return
        self._phase = DONE
        self.upstream = None
        text = b"".join(pieces)[:MAX_ERROR_BYTES].decode("utf-8", "replace")
        status = connection.status
        connection.release()
        self.gateway.port.finish(self._request_id)
        self._end_stream(ApiError(502, "upstream_failed", f"The engine answered {status} instead of a stream: {text}"))

    # -- what goes wrong ------------------------------------------------------------------------------------------------

    def upstream_lost(self, reason: str, received: bool, stale: bool) -> None:
        """See upstream.Answered."""
        self.upstream = None
        self._connecting = None
        if self._phase != GRANTED:
            return
        if stale and not self._stale_once:
            self._stale_once = True
            self._forward(fresh=True)
        elif received:
            self._break_off(self._upstream_failed(reason))
        else:
            self._fail_over(reason)

    def _upstream_failed(self, reason: str) -> ApiError:
        process = self._grant.process if self._grant is not None else "the engine"
        return ApiError(502, "upstream_failed", f"{process} did not answer: {reason}.")

    def _fail_over(self, reason: str) -> None:
        """Nothing was received: another holder may have the request, as often as the options say."""
        grant, asked = self._grant, self._asked
        assert grant is not None
        assert asked is not None
        self._failure = self._upstream_failed(reason)
        self._phase = DONE
        self._tries += 1
        self.gateway.port.finish(self._request_id, failed=True)
        if self._tries < self.gateway.options.retry_attempts:
            self._avoid += (grant.process,)
            self._admit(asked)
        else:
            self._refuse(self._failure)

    def _break_off(self, error: ApiError) -> None:
        """The answer cannot be completed, and something of it was received."""
        self._phase = DONE
        self.gateway.port.finish(self._request_id, failed=True)
        if not self._piping:
            self._refuse(error)
        elif self._chunks and self._event_stream:
            self._end_stream(error)
        else:
            self.conn.cut()

    def _refuse(self, error: ApiError) -> None:
        """Answer with an error; as an event where 200 is out already."""
        self._phase = DONE
        if self._early:
            self._end_stream(error)
        else:
            self.conn.respond_error(error)

    def _end_stream(self, error: ApiError) -> None:
        route = self.request.route
        assert route is not None
        event = b"\n\ndata: " + route.shape(error) + b"\n\n"
        self.conn.transport.write(chunk(event) + LAST_CHUNK)
        self.conn.cut()

    # -- the client -----------------------------------------------------------------------------------------------------

    def client_left(self) -> None:
        """The client is gone: give up whatever is under way."""
        phase, self._phase = self._phase, DONE
        if phase == QUEUED:
            self.gateway.port.cancel(self._request_id)
        elif phase == GRANTED:
            self._drop_upstream()
            self.gateway.port.finish(self._request_id)

    def _drop_upstream(self) -> None:
        upstream, self.upstream = self.upstream, None
        connecting, self._connecting = self._connecting, None
        if upstream is not None:
            upstream.abort()
        elif connecting is not None:
            connecting.cancel()

    def client_paused(self) -> None:
        """The client reads slowly: stop reading for it."""
        if self.upstream is not None and not self.upstream.transport.is_closing():
            self.upstream.transport.pause_reading()

    def client_resumed(self) -> None:
        """The client has caught up."""
        if self.upstream is not None and not self.upstream.transport.is_closing():
            self.upstream.transport.resume_reading()
            self._last_read = self.gateway.clock

    def tick(self, now: float) -> None:
        """Called a few times a second while the request is in progress."""
        if now >= self._comment_at:
            self._comment(now)
        elif self._phase == GRANTED:
            options = self.gateway.options
            limit_s = options.idle_timeout_s if self.relaying else options.first_byte_timeout_s
            if now - self._last_read >= limit_s and self.conn.stalled_since == _NEVER:
                self._drop_upstream()
                self._break_off(self._upstream_failed(f"nothing came for {limit_s:g} s"))

    def _comment(self, now: float) -> None:
        """Tell the client of a stream that it waits for good reason."""
        self._comment_at = now + self.gateway.options.loading_comment_s
        out = chunk(COMMENT)
        if not self._early:
            self.conn.answer_begins()
            self._early = self._chunks = self.relaying = True
            self.request.keep_alive = False
            head = (EARLY_HEAD, b"X-Request-Id: ", self.request.request_id, b"\r\nTransfer-Encoding: chunked\r\n")
            out = b"".join((*head, b"Connection: close\r\n\r\n", out))
        self.conn.transport.write(out)
