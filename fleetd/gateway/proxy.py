"""A request on its way through the gateway: parse, ask the fleet, forward, relay. One `Exchange` per request.

Invariants:
- Every admitted request ends once: `cancel` before a grant, `finish` after it. `_phase` selects which.
- Bytes are relayed as they arrive, one write per read. A client that reads slowly pauses the reading from its engine.
- A client that leaves ends everything at once: nothing is loaded for it, and its engine sees a closed socket.
- A request is not retried once a byte of an answer was received. Before that, another process may get it; if not even a
  connection was opened, also the same process once it is back.
- A stream that waits sends comments, never content; from then on its failures are error events. An answer that breaks ends
  visibly: an error event without a finish reason and without [DONE], or a body that is cut short.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Final

from fleetd.core.data.commands import Grant, Reject
from fleetd.errors import ApiError
from fleetd.gateway import body as bodies
from fleetd.gateway.body import BodyFields
from fleetd.gateway.context import GatewayContext
from fleetd.gateway.errors import from_reject, status_line
from fleetd.gateway.http1 import ServerConnection
from fleetd.gateway.pools import Pools
from fleetd.gateway.request import Request
from fleetd.gateway.target import ModelTarget, rejection_lines
from fleetd.gateway.upstream import Pool, UpstreamConnection

log = logging.getLogger("fleetd.gateway")

READING: Final = 0  # the body is being parsed
QUEUED: Final = 1  # the fleet has not answered yet
GRANTED: Final = 2  # sent to a process, or about to be
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

    # Defaults that most requests never change are class attributes: setting them for each request would cost more.
    relaying: bool = False  # the client has received the beginning of an answer
    upstream: UpstreamConnection | None = None
    _phase: int = READING
    _fields: BodyFields
    _target: ModelTarget
    _pool: Pool
    _labels: bytes = b""  # header lines with the target and the waits
    _avoid: tuple[str, ...] = ()
    _chunks: bool = False  # the answer goes out in chunks
    _comment_at: float = _NEVER
    _connecting: asyncio.Task[None] | None = None
    _early: bool = False  # 200 was sent before anything was granted
    _error_pieces: list[bytes] | None = None
    _event_stream: bool = False
    _failure: ApiError | None = None
    _last_read: float = _NEVER
    _piping: bool = False  # the engine's bytes go to the client
    _queued_at: float
    _request_id: int = 0
    _stale_once: bool = False
    _tries: int = 0
    _unreachable_since: float = _NEVER

    def __init__(self, context: GatewayContext, pools: Pools, conn: ServerConnection, request: Request) -> None:
        self._context = context
        self._pools = pools
        self.conn = conn
        self.request = request

    # -- from the body to the fleet ----------------------------------------------------------------------------------------------

    def begin(self) -> None:
        """Parse the body, a large one in a thread, and ask the fleet."""
        self.conn.observer = self
        body = self.request.body
        if len(body) >= bodies.LARGE_BYTES:
            future = self._context.loop.run_in_executor(self._context.threads, bodies.scan, body)
            future.add_done_callback(self._scanned)
            return
        try:
            fields = bodies.parse(body)
        except ApiError as error:
            self._refuse(error)
            return
        self._admit(fields)

    def _scanned(self, future: asyncio.Future[BodyFields]) -> None:
        if self._phase != READING or future.cancelled():
            return
        error = future.exception()
        if error is None:
            self._admit(future.result())
        elif isinstance(error, ApiError):
            self._refuse(error)
        else:
            log.error("request body could not be parsed", exc_info=error)
            self.conn.fail()

    def _admit(self, fields: BodyFields) -> None:
        self._fields = fields
        context = self._context
        taken = None if self._avoid else context.fleet.take(fields.model)
        if taken is not None:
            self._phase = GRANTED
            self._request_id, target = taken
            self._send_to(target, target.names_no_wait)
            return
        self._phase = QUEUED
        self._queued_at = context.loop.time()
        request_id = context.fleet.admit(fields.model, self._granted, self._rejected, self._avoid)
        if self._phase == QUEUED:  # no answer yet
            self._request_id = request_id
            if fields.stream and self.request.http11:
                self._comment_at = context.clock + context.options.loading_comment_s

    # -- from the fleet to the engine ---------------------------------------------------------------------------------------------

    def _rejected(self, reject: Reject) -> None:
        if self._phase != QUEUED:
            return
        self._phase = DONE
        if self._failure is None:
            model = self._context.fleet.names().get(self._fields.model)
            self._labels = rejection_lines(model, self._context.loop.time() - self._queued_at)
        self._refuse(self._failure or from_reject(reject))

    def _granted(self, grant: Grant) -> None:
        if self._phase != QUEUED:
            return
        self._phase = GRANTED
        self._request_id = grant.request_id
        self._comment_at = _NEVER
        self._stale_once = False
        try:
            target = self._context.fleet.target(grant.model, grant.process)
        except KeyError:
            self._fail_over(grant.process, f"{grant.process} no longer serves {grant.model}")
            return
        self._send_to(target, target.names_after(grant.queued_s, grant.load_s))

    def _send_to(self, target: ModelTarget, labels: bytes) -> None:
        self._target = target
        self._labels = labels
        pool = self._pool = self._pools.by_target.get(target) or self._pools.find(target)
        self._forward(pool.idle.pop() if pool.idle else None)  # the most recently used

    def _forward(self, connection: UpstreamConnection | None) -> None:
        """Send the request on an idle connection; None: on a new one."""
        request, pool, served_name = self.request, self._pool, self._target.served_name
        head, body = request.head, request.body
        if served_name != self._fields.model:
            body = bodies.rename_model(body, self._fields, served_name)
        size_line = b"Content-Length: %d\r\n\r\n" % len(body)
        if head.accept_encoding is not None and not self._fields.stream:
            # A stream must stay readable: an error event may have to follow it.
            size_line = b"Accept-Encoding: %b\r\n%b" % (head.accept_encoding, size_line)
        pieces = (pool.prefix, request.target, pool.head, head.forward, request.id_line, size_line, body)
        self._last_read = self._context.clock
        if connection is None:
            self._connecting = pool.connect(self, pieces)
        else:
            self.upstream = connection
            connection.send(self, pieces)

    # -- the engine's answer --------------------------------------------------------------------------------------------

    def connected(self, connection: UpstreamConnection) -> None:
        """Keep the connection that the request is sent on."""
        self._connecting = None
        self.upstream = connection

    def answer_read(self, connection: UpstreamConnection) -> None:
        """Relay what the connection has read."""
        self._last_read = self._context.clock
        if self._error_pieces is not None:
            self._collect_error(connection)
            return
        out: list[bytes] = []
        if not self._piping:
            if self.conn.half_close is not None:
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
        """Free the body: an answer has begun, so the request is not sent again."""
        request = self.request
        request.body = b""
        if request.buffered_bytes:
            self.conn.release_body(request)

    def _head(self, connection: UpstreamConnection) -> tuple[bytes, ...]:
        """Return the head of the answer, and choose how its end is marked."""
        request, head = self.request, connection.head
        framing = b""
        if not head.sized and connection.status not in (204, 304):
            if request.http11:
                self._chunks = True
                framing = b"Transfer-Encoding: chunked\r\n"
            else:
                request.keep_alive = False
        if self._context.draining:
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
        self._context.fleet.finish(self._request_id)
        conn.done(keep)

    def _collect_error(self, connection: UpstreamConnection) -> None:
        """Pass the engine's answer on as an error event: 200 was sent, but no stream came."""
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
        self._context.fleet.finish(self._request_id)
        self._end_stream(ApiError(502, "upstream_failed", f"The engine answered {status} instead of a stream: {text}"))

    # -- failures ------------------------------------------------------------------------------------------------------

    def upstream_lost(self, reason: str, received: bool, stale: bool) -> None:
        """Retry, fail over or break off after the connection broke."""
        self.upstream = None
        self._connecting = None
        if self._phase != GRANTED:
            return
        if stale and not self._stale_once:
            self._stale_once = True
            self._forward(None)
        elif received:
            self._break_off(self._cut_off(self._target.process, reason))
        else:
            self._fail_over(self._target.process, reason)

    def _cut_off(self, process: str, reason: str) -> ApiError:
        """Return the error of an answer that ended early: a stop on request says so."""
        why = self._context.fleet.stop_reason(process)
        if why is None:
            return _upstream_failed(process, reason)
        return ApiError(503, "draining", f"The answer was cut off: {process} was stopped ({why}).", retry_after_s=5.0)

    def unreachable(self, reason: str) -> None:
        """Report the failure and ask the fleet again, which names or awaits a process."""
        self._connecting = None
        if self._phase != GRANTED:
            return
        self._phase = DONE
        self._context.fleet.finish(self._request_id, failed=True, refused=reason)
        now = self._context.loop.time()
        self._unreachable_since = min(self._unreachable_since, now)
        if now - self._unreachable_since < self._context.options.unreachable_s:
            self._admit(self._fields)
        else:
            self._refuse(
                ApiError(503, "model_failed", f"{self._target.process} cannot be reached: {reason}.", retry_after_s=2.0)
            )

    def _fail_over(self, process: str, reason: str) -> None:
        """Ask for another process, if attempts are left: this one sent nothing."""
        self._failure = _upstream_failed(process, reason)
        self._phase = DONE
        self._tries += 1
        self._context.fleet.finish(self._request_id, failed=True)
        if self._tries < self._context.options.retry_attempts:
            self._avoid += (process,)
            self._admit(self._fields)
        else:
            self._refuse(self._failure)

    def _break_off(self, error: ApiError) -> None:
        """Give up on an answer that was partly received."""
        self._phase = DONE
        self._context.fleet.finish(self._request_id, failed=True)
        if not self._piping:
            self._refuse(error)
        elif self._chunks and self._event_stream:
            self._end_stream(error)
        else:
            self.conn.cut()

    def _refuse(self, error: ApiError) -> None:
        """Answer with an error; as an event if 200 was already sent."""
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
        """Cancel everything in progress for a client that is gone."""
        phase, self._phase = self._phase, DONE
        if phase == QUEUED:
            self._context.fleet.cancel(self._request_id)
        elif phase == GRANTED:
            self._drop_upstream()
            self._context.fleet.finish(self._request_id)

    def _drop_upstream(self) -> None:
        upstream, self.upstream = self.upstream, None
        connecting, self._connecting = self._connecting, None
        if upstream is not None:
            upstream.abort()
        elif connecting is not None:
            connecting.cancel()

    def client_paused(self) -> None:
        """Stop reading from the engine while the client reads slowly."""
        if self.upstream is not None and not self.upstream.transport.is_closing():
            self.upstream.transport.pause_reading()

    def client_resumed(self) -> None:
        """Read from the engine again: the client has caught up."""
        if self.upstream is not None and not self.upstream.transport.is_closing():
            self.upstream.transport.resume_reading()
            self._last_read = self._context.clock

    def tick(self, now: float) -> None:
        """Check timeouts; called a few times a second while the request is in progress."""
        if now >= self._comment_at:
            self._comment(now)
        elif self._phase == GRANTED:
            options = self._context.options
            limit_s = options.idle_timeout_s if self.relaying else options.first_byte_timeout_s
            if now - self._last_read >= limit_s and self.conn.stalled_since == _NEVER:
                self._drop_upstream()
                self._break_off(_upstream_failed(self._target.process, f"nothing arrived for {limit_s:g} s"))

    def _comment(self, now: float) -> None:
        """Send a comment to the client of a waiting stream."""
        self._comment_at = now + self._context.options.loading_comment_s
        out = chunk(COMMENT)
        if not self._early:
            self.conn.answer_begins()
            self._early = self._chunks = self.relaying = True
            self.request.keep_alive = False
            head = (EARLY_HEAD, self.request.id_line, b"Transfer-Encoding: chunked\r\n")
            out = b"".join((*head, b"Connection: close\r\n\r\n", out))
        self.conn.transport.write(out)


def _upstream_failed(process: str, reason: str) -> ApiError:
    return ApiError(502, "upstream_failed", f"{process} did not answer: {reason}.")
