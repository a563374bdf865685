"""The server half: one `ServerConnection` per client, from bytes to `Request` and back. llhttp parses.

Invariants:
- llhttp stays strict: two lengths, a length next to chunks, bare LF, folded lines and bad chunks are errors, and an error
  ends the connection after everything before it was answered. Input that was not understood is never forwarded.
- Limits hold from the first byte: head size and count, target, body (declared and as it arrives), deadlines, pipelining.
- An error in a request is known at the end of its headers, and answered before its body is read if that is long.
- Answers leave in the order of the requests. One request of a connection is in progress at a time.
- A client that closes is noticed while its request waits: reading never pauses. A client that only finished sending looks the
  same and still gets its answer if that has not begun: half_close.py distinguishes them. Once an answer has begun, and
  for HTTP/1.0 and TLS, end of input means that the client is gone.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from typing import Final, Protocol, cast

import httptools

from fleetd.errors import ApiError
from fleetd.gateway.context import GatewayContext
from fleetd.gateway.errors import error_headers, invalid_request, openai_shape, status_line
from fleetd.gateway.half_close import HalfCloseProbe
from fleetd.gateway.request import Request

log = logging.getLogger("fleetd.gateway")

NEVER = float("inf")
SMALL_BODY_BYTES = 64 * 1024  # a rejected request may still send this much on a connection that stays open
# Lengths of the names of headers that differ from request to request; the other lines are looked up as a whole.
_VARYING_NAME_SIZES: Final = frozenset({len(b"content-length"), len(b"x-request-id")})

CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"

# Phases of a connection; ACTIVE alone has no deadline of its own.
IDLE: Final = 0
HEAD: Final = 1
BODY: Final = 2
ACTIVE: Final = 3
CLOSING: Final = 4
LINGER: Final = 5


class ClientObserver(Protocol):
    """Works on the request in progress, and is notified about its client."""

    relaying: bool

    def client_left(self) -> None: ...
    def client_paused(self) -> None: ...
    def client_resumed(self) -> None: ...
    def tick(self, now: float) -> None: ...


class ConnectionOwner(Protocol):
    """The listener that a connection belongs to."""

    def register(self, connection: ServerConnection) -> bool:
        """Count a new connection; False if it is over a limit."""
        ...

    def forget(self, connection: ServerConnection) -> None:
        """Forget a connection that was lost."""
        ...

    def handle(self, connection: ServerConnection, request: Request) -> None:
        """Handle a request that passed all checks."""
        ...


class ServerConnection(asyncio.Protocol):
    """A client's connection."""

    __slots__ = (
        "_context",
        "_current",
        "_ignore_input",
        "_in_head",
        "_lines",
        "_owner",
        "_parser",
        "_queue",
        "_raw_bytes",
        "_raw_left",
        "_reading_paused",
        "_starting",
        "active",
        "client",
        "deadline",
        "eof",
        "half_close",
        "observer",
        "phase",
        "stalled_bytes",
        "stalled_since",
        "transport",
    )

    def __init__(self, context: GatewayContext, owner: ConnectionOwner) -> None:
        self._context = context
        self._owner = owner
        self.transport: asyncio.Transport = cast(asyncio.Transport, None)
        self.client = ""
        self.active: Request | None = None
        self.observer: ClientObserver | None = None
        self.phase = IDLE
        self.deadline = NEVER
        self.stalled_since = NEVER
        self.stalled_bytes = 0
        self.eof = False
        self._parser = httptools.HttpRequestParser(self)
        self._queue: deque[Request] = deque()
        self._starting = False
        self._reading_paused = False
        self._ignore_input = False
        self._in_head = True
        self._lines: list[bytes] = []  # of the head being read: name, value, name, value …
        self._current: Request | None = None  # the one being read
        self._raw_bytes = 0
        self._raw_left = 0
        self.half_close: HalfCloseProbe | None = None  # only after the client sent its end of input

    # -- the connection -------------------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        peer = transport.get_extra_info("peername")
        self.client = str(peer[0]) if isinstance(peer, tuple) and peer else "local"
        if self._owner.register(self):
            self.phase = IDLE
            self.deadline = self._context.clock + self._context.options.head_timeout_s
        else:
            self._ignore_input = True
            self._refuse_now(ApiError(503, "too_many_connections", "Too many connections are open.", retry_after_s=1))

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002  the reason does not matter
        self._owner.forget(self)
        self.answer_begins()
        self.deadline = NEVER
        self.stalled_since = NEVER
        observer, self.observer = self.observer, None
        if observer is not None:
            observer.client_left()
        for request in (*self._queue, self.active, self._current):
            if request is not None:
                self.release_body(request)
        self.active = self._current = None
        self._queue.clear()
        self._ignore_input = True
        self._parser = cast(httptools.HttpRequestParser, None)  # the parser holds us: break the cycle

    def eof_received(self) -> bool:
        self.eof = True
        if self.active is None or self.phase >= CLOSING:
            return False
        observer = self.observer
        if observer is None or observer.relaying or not self.active.http11 or not self.transport.can_write_eof():
            self._client_left()
            return False
        self._watch()
        return True

    def _watch(self) -> None:
        self.half_close = HalfCloseProbe(self._context.loop, self.transport, self._client_left)

    def answer_begins(self) -> None:
        """Stop probing a half-closed client: writing now shows whether it is connected."""
        probe, self.half_close = self.half_close, None
        if probe is not None:
            probe.stop()

    def _client_left(self) -> None:
        observer, self.observer = self.observer, None
        if observer is not None:
            observer.client_left()
        self.transport.abort()

    def pause_writing(self) -> None:
        self.stalled_since = self._context.clock
        self.stalled_bytes = self.transport.get_write_buffer_size()
        if self.observer is not None:
            self.observer.client_paused()

    def resume_writing(self) -> None:
        self.stalled_since = NEVER
        if self.observer is not None:
            self.observer.client_resumed()
        elif self._queue:
            self._start_next()

    # -- bytes in -------------------------------------------------------------------------------------------------------

    def data_received(self, data: bytes) -> None:
        if self._ignore_input:
            return
        self._raw_bytes += len(data)
        try:
            if self._raw_left:
                data = self._take_raw(data)
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            self._after_upgrade(data[upgrade.args[0] :])
        except httptools.HttpParserError as error:
            if not self._ignore_input:
                self._give_up(invalid_request(f"This is not valid HTTP/1.1: {error}."))
        if self._current is not None:
            self._check_partial(self._current)
        if self.active is None and self._queue:
            self._start_next()

    def _take_raw(self, data: bytes) -> bytes:
        """Take the body of an upgrade request, which llhttp skips; return the rest."""
        body, rest = data[: self._raw_left], data[self._raw_left :]
        self._raw_left -= len(body)
        self.on_body(body)
        if not self._raw_left:
            self._complete()
        return rest

    def _after_upgrade(self, rest: bytes) -> None:
        """Answer without the upgrade, as HTTP allows (JDK clients ask for one)."""
        if self._ignore_input or self._current is None:
            return
        self._raw_left = max(0, self._current.length)
        if not self._raw_left:
            self._complete()
        if rest:
            self.data_received(rest)

    def _check_partial(self, request: Request) -> None:
        """Check the size of a partly read request, and set the deadline for the rest."""
        options = self._context.options
        if self._in_head:
            if self._raw_bytes > options.max_head_bytes:
                if len(request.target) > options.max_target_bytes:
                    self._give_up(invalid_request("The request line is too long.", 414, "uri_too_long"))
                else:
                    self._give_up(invalid_request("The headers are too large.", 431, "headers_too_large"))
            elif self.active is None and self.phase != HEAD:
                self.phase = HEAD
                self.deadline = self._context.clock + options.head_timeout_s
        # Chunk extensions and trailers do not count as body, and llhttp accepts any number of them.
        elif request.head.chunked and self._raw_bytes > options.max_head_bytes + 8 * (len(request.body) + 1024):
            self._give_up(invalid_request("The chunked body is mostly framing."))
        elif self.active is None:
            self.phase = BODY
            self.deadline = self._context.clock + options.body_idle_timeout_s

    # -- callbacks of llhttp ------------------------------------------------------------------------------------------------

    def on_url(self, url: bytes) -> None:
        if self._current is None:
            self._current = Request(url)
            self._in_head = True
        else:
            self._current.target += url

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self._in_head:
            return  # a trailer
        if len(name) in _VARYING_NAME_SIZES and self._current is not None:
            lower = name.lower()
            if lower == b"content-length":
                self._current.length = int(value)
                return
            if lower == b"x-request-id":
                self._current.client_id = value
                return
        self._lines += (name, value)

    def on_headers_complete(self) -> None:
        request = self._current
        if self._ignore_input or request is None:
            return
        self._in_head = False
        parser, context = self._parser, self._context
        head = request.head = context.heads.get(self._lines)
        self._lines = []
        method = request.method = parser.get_method()
        keep_alive = request.keep_alive = parser.should_keep_alive()
        if head.connection is not None or not keep_alive:
            version = parser.get_http_version()
            request.http11 = version == "1.1"
            request.keep_alive = keep_alive and request.http11
            request.version_refused = version not in ("1.1", "1.0")
        request.id_line = context.id_line(request.client_id)
        error = request.error = context.checks.check(request)
        if error is not None:
            final = head.expect or method == b"CONNECT" or request.version_refused
            if final or head.chunked or request.length > SMALL_BODY_BYTES:
                self._give_up(error)
        elif head.chunked and parser.should_upgrade():
            self._give_up(invalid_request("An upgrade with a chunked body is not supported."))
        elif head.expect and request.http11:
            if self.active is None and not self._queue:
                self.transport.write(CONTINUE)
            else:
                request.expect = True

    def on_body(self, data: bytes) -> None:
        request = self._current
        if self._ignore_input or request is None or request.error is not None:
            return
        body = request.body
        if not body:
            request.body = data
            size = len(data)
        else:
            if isinstance(body, bytes):
                body = request.body = bytearray(body)
            body += data
            size = len(body)
        if size <= SMALL_BODY_BYTES:
            return
        context = self._context
        if size > context.options.max_body_bytes:
            self._give_up(context.checks.body_too_large())
            return
        context.buffered_bytes += size - request.buffered_bytes
        request.buffered_bytes = size
        if context.buffered_bytes > context.options.max_buffered_bytes:
            self._give_up(ApiError(503, "overloaded", "Too many large requests are being read.", retry_after_s=2))

    def on_message_complete(self) -> None:
        if not self._parser.should_upgrade():
            self._complete()

    def _complete(self) -> None:
        request = self._current
        if request is None:
            return
        self._current = None
        self._raw_bytes = 0
        self._queue.append(request)
        if len(self._queue) > self._context.options.max_pipelined and not self._reading_paused:
            self._reading_paused = True
            self.transport.pause_reading()

    # -- one request after another --------------------------------------------------------------------------------------

    def _start_next(self) -> None:
        if self._starting:
            return
        self._starting = True
        # A client that sends requests without reading answers gets no further ones.
        while self.active is None and self._queue and self.phase < CLOSING and self.stalled_since == NEVER:
            request = self._queue.popleft()
            self.active = request
            self.phase = ACTIVE
            self.deadline = NEVER
            error = request.error
            try:
                if error is not None:
                    self.respond_error(error)
                elif request.route is not None:
                    self._owner.handle(self, request)
                    if self.eof and self.observer is not None and not self.observer.relaying:
                        self._watch()
            except Exception:
                log.exception("request failed inside the gateway")
                self.fail()
        self._starting = False

    def fail(self) -> None:
        """Answer 500 after an internal error; if part was sent, cut the connection."""
        observer, self.observer = self.observer, None
        relaying = observer.relaying if observer is not None else False
        if observer is not None:
            observer.client_left()
        if self.active is None or relaying:
            self.transport.abort()
        else:
            self.respond_error(
                ApiError(500, "internal_error", "The gateway failed on this request.", should_retry=False)
            )

    def respond(self, status: int, body: bytes, extra: bytes = b"", content_type: bytes = b"application/json") -> None:
        """Answer the request in progress with the gateway's own body."""
        request = self.active
        if request is None:
            return
        self.answer_begins()
        keep = request.keep_alive and not self._context.draining
        pieces = [status_line(status)]
        if body or status != 204:
            pieces.append(b"Content-Type: %b\r\nContent-Length: %d\r\n" % (content_type, len(body)))
        pieces += (request.id_line, extra)
        pieces.append(b"\r\n" if keep else b"Connection: close\r\n\r\n")
        if request.method != b"HEAD":
            pieces.append(body)
        self.transport.write(b"".join(pieces))
        self.done(keep)

    def respond_error(self, error: ApiError, extra: bytes = b"") -> None:
        """Answer the request in progress with an error in the shape of its route."""
        request = self.active
        shape = openai_shape if request is None or request.route is None else request.route.shape
        if request is not None and request.close_unread:
            request.keep_alive = False
        self.respond(error.status, shape(error), error_headers(error) + extra)

    def done(self, keep: bool) -> None:
        """End the request in progress after its complete answer, and start the next."""
        request, self.active = self.active, None
        self.observer = None
        if request is not None and request.buffered_bytes:
            self.release_body(request)
        if not keep or self._context.draining:
            self._finish_writing(linger=request is not None and request.close_unread)
            return
        if self._queue:
            self._start_next()
            return
        if self._reading_paused:
            self._reading_paused = False
            self.transport.resume_reading()
        if self.eof:
            self._finish_writing(linger=False)
        elif self._current is not None:
            self._wait_for_rest(self._current)
        else:
            self.phase = IDLE
            self.deadline = self._context.clock + self._context.options.keepalive_timeout_s

    def _wait_for_rest(self, request: Request) -> None:
        """Start the clock of a pipelined request that is partly read."""
        self.phase = IDLE
        if request.expect and not self._in_head:
            self.transport.write(CONTINUE)
            request.expect = False
        self._check_partial(request)

    def release_body(self, request: Request) -> None:
        """Subtract a body that is no longer in memory."""
        self._context.buffered_bytes -= request.buffered_bytes
        request.buffered_bytes = 0

    # -- closing --------------------------------------------------------------------------------------------------------

    def _give_up(self, error: ApiError) -> None:
        """Ignore further input: answer earlier requests, then this error, then close."""
        self._ignore_input = True
        request = self._current or Request(b"")
        self._current = None
        request.error = error
        request.close_unread = True
        request.id_line = self._context.id_line(request.client_id)
        request.body = b""
        self.release_body(request)
        self._queue.append(request)

    def _refuse_now(self, error: ApiError) -> None:
        self.active = Request(b"")
        self.active.id_line = self._context.id_line(b"")
        self.active.close_unread = True
        self.respond_error(error)

    def _finish_writing(self, linger: bool) -> None:
        options = self._context.options
        self._ignore_input = True
        self._queue.clear()
        if linger and not self.eof and self.transport.can_write_eof():
            # Closing with unread input would reset the connection, and the client might lose the answer.
            self.phase = LINGER
            self.deadline = self._context.clock + options.linger_s
            self.transport.write_eof()
            if self._reading_paused:
                self.transport.resume_reading()
            return
        self.phase = CLOSING
        self.deadline = self._context.clock + options.write_timeout_s
        self.transport.close()

    def cut(self) -> None:
        """Break off the answer in progress, so that the client sees it is incomplete."""
        self.observer = None
        request, self.active = self.active, None
        if request is not None:
            self.release_body(request)
        self._finish_writing(linger=False)

    def close_when_idle(self) -> None:
        """Close the draining connection now unless a request is in progress."""
        if self.active is None and not self._queue:
            self.transport.close()

    def tick(self, now: float) -> None:
        """Check deadlines; called a few times a second."""
        if self.deadline <= now:
            self._expire()
        elif self.stalled_since != NEVER:
            self._check_stalled(now)
        observer = self.observer
        if observer is not None:
            observer.tick(now)

    def _expire(self) -> None:
        if self.phase in (HEAD, BODY) and not self._ignore_input:
            part = "headers" if self.phase == HEAD else "body"
            self._give_up(ApiError(408, "request_timeout", f"The request's {part} did not arrive in time."))
            self._start_next()
        elif self.phase == IDLE:
            self.transport.close()
        else:
            self.transport.abort()

    def _check_stalled(self, now: float) -> None:
        left_bytes = self.transport.get_write_buffer_size()
        if left_bytes < self.stalled_bytes:
            self.stalled_since = now
        elif now - self.stalled_since >= self._context.options.write_timeout_s:
            self._client_left()
        self.stalled_bytes = left_bytes
