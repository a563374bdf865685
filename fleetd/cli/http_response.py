"""One HTTP request over a connected socket, its response parsed by llhttp; `http.client` would double the start-up time of `fleetctl`.

Invariants:
- Each read of the socket is bounded by its timeout, a body by `limit` bytes.
- A body that is shorter than its declared length, or without its last chunk, is never returned as complete.
"""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Iterator, Mapping

import httptools

_READ_BYTES = 1 << 18
_HEAD_MAX_BYTES = 64 * 1024


class ResponseError(Exception):
    """The connection closed early, or the response is too large."""


class InvalidResponse(ResponseError):
    """The peer does not speak HTTP."""


def send(
    connection: socket.socket, method: str, target: str, headers: Mapping[str, str], body: bytes | None = None
) -> None:
    """Send a request. Raises OSError, TimeoutError."""
    lines = [f"{method} {target} HTTP/1.1", *(f"{name}: {value}" for name, value in headers.items())]
    if body is not None:
        lines.append(f"Content-Length: {len(body)}")
    with contextlib.suppress(BrokenPipeError):  # rejected before the body was read: the response has the reason
        connection.sendall("\r\n".join([*lines, "", ""]).encode("ascii") + (body or b""))


class Response:
    """The response to one request. `head` returns when the header block is complete."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._parser = httptools.HttpResponseParser(self)
        self._chunks: list[bytes] = []
        self._read_bytes = 0
        self._has_head = self._complete = False
        self.status = 0
        self.content_type = ""

    @classmethod
    def read(cls, connection: socket.socket) -> Response:
        """Return the response to the request that was sent. Raises ResponseError, OSError, TimeoutError."""
        response = cls(connection)
        while not response._has_head:
            response._receive()
            if response._read_bytes > _HEAD_MAX_BYTES and not response._has_head:
                raise InvalidResponse("the header block is too large")
        return response

    # -- called by the parser -------------------------------------------------------------------------------------------

    def on_header(self, name: bytes, value: bytes) -> None:
        if name.lower() == b"content-type":
            self.content_type = value.decode("latin-1").split(";")[0].strip()

    def on_headers_complete(self) -> None:
        self.status = self._parser.get_status_code()
        self._has_head = self.status >= 200  # an interim response precedes the response

    def on_body(self, body: bytes) -> None:
        self._chunks.append(body)

    def on_message_complete(self) -> None:
        self._complete = self._has_head

    # -- the body -------------------------------------------------------------------------------------------------------

    def body(self, limit: int, deadline: float, silence_s: float) -> bytes:
        """Return the whole body.

        Raises TimeoutError if it is not complete by the monotonic time `deadline`, or if nothing arrives for `silence_s`.
        """
        while not self._complete:
            left = deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError
            self._connection.settimeout(min(left, silence_s))
            self._receive()
            if self._read_bytes > limit + _HEAD_MAX_BYTES:
                break
        body = b"".join(self._chunks)
        if len(body) > limit:
            raise ResponseError("the response is too large")
        return body

    def lines(self, limit: int) -> Iterator[bytes]:
        """Yield the lines of the body, without their ends, as they arrive. Raises ResponseError at an early close."""
        rest = b""
        while True:
            *lines, rest = (rest + b"".join(self._chunks)).split(b"\n")
            self._chunks.clear()
            yield from (line.rstrip(b"\r") for line in lines)
            if len(rest) > limit:
                raise ResponseError("a line is too long")
            if self._complete:
                return
            self._receive()

    def _receive(self) -> None:
        data = self._connection.recv(_READ_BYTES)
        if not data:
            raise ResponseError("closed before the end of the response" if self._read_bytes else "closed")
        self._read_bytes += len(data)
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            if not self._complete:  # otherwise: bytes after the response
                raise InvalidResponse(str(error)) from None
