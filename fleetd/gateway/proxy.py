"""A request on its way through: read what it asks for, ask the fleet, forward, relay. One `Exchange` per request.

The rules of this file
- Every admitted request ends once: `cancel` before a grant, `finish` after it. `_phase` says which is due.
- Bytes are relayed as they arrive, one write per read. A client that reads slowly stops the reading from its engine.
- A client that leaves ends everything at once: nothing is loaded for it, and its engine sees a closed socket.
- Nothing is tried again once a byte of an answer was received. Before that, another holder may have it; where not even a
  connection was made, the same one too, once it is back.
- A stream that waits says so with comments, never with content; from then on its failures are error events. An answer that
  breaks ends visibly: an error event without a finish reason and without [DONE], or a body that is cut short.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Final

from fleetd.core.data.commands import Grant, Reject
from fleetd.errors import ApiError
from fleetd.gateway import body as bodies
from fleetd.gateway.body import Asked
from fleetd.gateway.errors import from_reject, status_line
from fleetd.gateway.http1 import ServerConnection
from fleetd.gateway.request import Request
from fleetd.gateway.target import Place, labels_of_refusal
from fleetd.gateway.upstream import UpstreamConnection

if TYPE_CHECKING:
    from fleetd.gateway.listener import Gateway

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

    # Defaults that most requests never change stand on the class: setting them for each would cost more than using them.
    relaying: bool = False  # the client has seen the beginning of an answer
    upstream: UpstreamConnection | None = None
    _phase: int = READING
    _asked: Asked
    _place: Place
    _labels: bytes = b""  # header lines that say where the request went, and after which wait
    _avoid: tuple[str, ...] = ()
    _chunks: bool = False  # the answer goes out in chunks
    _comment_at: float = _NEVER
    _connecting: asyncio.Task[None] | None = None
    _early: bool = False  # 200 was sent before anything was granted
    _error_pieces: list[bytes] | None = None
    _event_stream: bool = False
    _failure: ApiError | None = None
    _last_read: float = _NEVER
    _piping: bool = False  # what the engine sends goes to the client
    _process: str = "the engine"
    _queued_at: float
    _request_id: int = 0
    _stale_once: bool = False
    _tries: int = 0
    _unreachable_since: float = _NEVER

    def __init__(self, gateway: Gateway, conn: ServerConnection, request: Request) -> None:
        self.gateway = gateway
        self.conn = conn
        self.request = request

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
        gateway = self.gateway
        taken = None if self._avoid else gateway.port.take(asked.model)
        if taken is not None:
            self._phase = GRANTED
            self._request_id, seat = taken
            self._process = seat.process
            place = self._place = gateway.places.get(seat) or gateway.place(seat)
            self._labels = place.labels_at_once
            self._forward(place.pool.idle.pop() if place.pool.idle else None)
            return
        self._phase = QUEUED
        self._queued_at = gateway.loop.time()
        request_id = gateway.port.admit(asked.model, self._granted, self._rejected, self._avoid)
        if self._phase == QUEUED:  # no answer yet
            self._request_id = request_id
            if asked.stream and self.request.http11:
                self._comment_at = gateway.clock + gateway.options.loading_comment_s

    # -- the fleet's answer ---------------------------------------------------------------------------------------------

    def _rejected(self, reject: Reject) -> None:
        if self._phase != QUEUED:
            return
        self._phase = DONE
        if self._failure is None:
            model = self.gateway.port.names().get(self._asked.model)
            self._labels = labels_of_refusal(model, self.gateway.loop.time() - self._queued_at)
        self._refuse(self._failure or from_reject(reject))

    def _granted(self, grant: Grant) -> None:
        if self._phase != QUEUED:
            return
        self._phase = GRANTED
        self._process = grant.process
        self._request_id = grant.request_id
        self._comment_at = _NEVER
        self._stale_once = False
        try:
            self._place = self.gateway.place_for(grant.model, grant.process)
        except KeyError:
            self._fail_over(f"{grant.process} no longer serves {grant.model}")
            return
        self._labels = self._place.labels_after(grant.queued_s, grant.load_s)
        self._forward(self._place.pool.take())

    def _forward(self, connection: UpstreamConnection | None) -> None:
        """Send the request on an idle connection; None: on a new one."""
        request, place = self.request, self._place
        pool, head, body = place.pool, request.head, request.body
        if place.served_name != self._asked.model:
            body = bodies.rename(body, self._asked, place.served_name)
        size_line = b"Content-Length: %d\r\n\r\n" % len(body)
        if head.accept_encoding is not None and not self._asked.stream:
            # A stream must stay readable: an error event may have to follow it.
            size_line = b"Accept-Encoding: %b\r\n%b" % (head.accept_encoding, size_line)
        pieces = (pool.prefix, request.target, pool.head, head.forward, request.id_line, size_line, body)
        self._last_read = self.gateway.clock
        if connection is None:
            self._connecting = pool.connect(self, pieces)
        else:
            self.upstream = connection
            connection.send(self, pieces)

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
            if self.conn.departure is not None:
                self.conn.answer_begins()
            self._forget_body()
            if not self._early:
                out += self._head(connection)
            elif connection.status != 200 or not connection.head.event_stream:
                self._error_pieces = []
                self._collect_error(connection)
                return
            self._event_stream = connection.head.event_stream
            self._piping = self.relaying = True
        pieces = connection.pieces
        if pieces:
            if self._chunks:
                out.append(b"%x\r\n" % sum(map(len, pieces)))
                out += pieces
                out.append(b"\r\n")
            else:
                out += pieces
            pieces.clear()
        if connection.complete:
            if self._chunks:
                out.append(LAST_CHUNK)
            self.conn.transport.write(b"".join(out))
            self._complete(connection)
        elif out:
            self.conn.transport.write(b"".join(out))

    def _forget_body(self) -> None:
        """An answer began: the request will not be sent again."""
        request = self.request
        request.body = b""
        if request.buffered_bytes:
            self.conn.give_back(request)

    def _head(self, connection: UpstreamConnection) -> tuple[bytes, ...]:
        """Return the head of the answer, and decide how its end will be known."""
        request, head = self.request, connection.head
        framing = b""
        if not head.sized and connection.status not in (204, 304):
            if request.http11:
                self._chunks = True
                framing = b"Transfer-Encoding: chunked\r\n"
            else:
                request.keep_alive = False
        if self.gateway.draining:
            request.keep_alive = False
        end = framing + (b"\r\n" if request.keep_alive else b"Connection: close\r\n\r\n")
        return (status_line(connection.status), head.lines, request.id_line, self._labels, end)

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
        connection.pieces.clear()
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
            self._forward(None)
        elif received:
            self._break_off(self._upstream_failed(reason))
        else:
            self._fail_over(reason)

    def unreachable(self, reason: str) -> None:
        """See upstream.Answered. The fleet learns of it and names another holder, or waits until there is one."""
        self._connecting = None
        if self._phase != GRANTED:
            return
        self._phase = DONE
        self.gateway.port.finish(self._request_id, failed=True, refused=reason)
        now = self.gateway.loop.time()
        self._unreachable_since = min(self._unreachable_since, now)
        if now - self._unreachable_since < self.gateway.options.unreachable_s:
            self._admit(self._asked)
        else:
            self._refuse(
                ApiError(503, "model_failed", f"{self._process} cannot be reached: {reason}.", retry_after_s=2.0)
            )

    def _upstream_failed(self, reason: str) -> ApiError:
        return ApiError(502, "upstream_failed", f"{self._process} did not answer: {reason}.")

    def _fail_over(self, reason: str) -> None:
        """Nothing was received: another holder may have the request, as often as the options say."""
        self._failure = self._upstream_failed(reason)
        self._phase = DONE
        self._tries += 1
        self.gateway.port.finish(self._request_id, failed=True)
        if self._tries < self.gateway.options.retry_attempts:
            self._avoid += (self._process,)
            self._admit(self._asked)
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
            self.conn.respond_error(error, self._labels)

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
            head = (EARLY_HEAD, self.request.id_line, b"Transfer-Encoding: chunked\r\n")
            out = b"".join((*head, b"Connection: close\r\n\r\n", out))
        self.conn.transport.write(out)
