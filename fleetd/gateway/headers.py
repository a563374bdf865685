"""Header lines of requests and answers: which are forwarded, which are dropped, and what the gateway reads of them.

Invariants:
- Dropped from requests: hop-by-hop headers, credentials (they are for the gateway, not for an engine), what a browser reports
  about its page, what other proxies claim, and names that only the gateway may set.
- Dropped from answers: hop-by-hop headers, the engine's banner, permissions for web pages, and names that only the gateway may set.
- The lines of a head are parsed once and cached: clients and engines repeat themselves.
"""

from __future__ import annotations

from typing import Final

# How a header is handled. CONTENT_LENGTH is only looked up for answers: http1 reads the length of a request itself.
PASS: Final = 0
DROP: Final = 1
HOST: Final = 2
CONTENT_LENGTH: Final = 3
CONTENT_TYPE: Final = 4
ACCEPT_ENCODING: Final = 5
CONNECTION: Final = 6
TRANSFER_ENCODING: Final = 7
EXPECT: Final = 8
ORIGIN: Final = 9
CONTENT_ENCODING: Final = 10

# `connection` and `transfer-encoding` are hop-by-hop too, but are read before they are dropped.
_HOP_BY_HOP = (
    "keep-alive", "proxy-connection", "proxy-authorization", "proxy-authenticate", "te", "trailer", "upgrade", "http2-settings",
)  # fmt: skip
_DROPPED_FROM_REQUESTS = (
    "authorization", "x-api-key", "api-key", "x-goog-api-key", "cookie", "referer",
    "forwarded", "via", "x-forwarded-for", "x-forwarded-host", "x-forwarded-proto", "x-forwarded-port", "x-forwarded-server", "x-real-ip",
    "sec-fetch-site", "sec-fetch-mode", "sec-fetch-dest", "sec-fetch-user",
    "access-control-request-method", "access-control-request-headers",
)  # fmt: skip
_DROPPED_FROM_ANSWERS = (
    "server", "alt-svc", "x-powered-by", "x-request-id",
    "access-control-allow-origin", "access-control-allow-credentials", "access-control-allow-headers",
    "access-control-allow-methods", "access-control-expose-headers", "access-control-max-age",
    "x-fleet-model", "x-fleet-instance", "x-fleet-queue-ms", "x-fleet-load-ms", "x-fleet-error-source",
)  # fmt: skip


def _kinds(dropped: tuple[str, ...], **read: int) -> dict[bytes, int]:
    """Return how each header is handled; a name that is not in the table is passed on."""
    kinds = {name.encode(): DROP for name in (*_HOP_BY_HOP, *dropped)}
    return kinds | {name.replace("_", "-").encode(): kind for name, kind in read.items()}


_REQUEST_KINDS = _kinds(
    _DROPPED_FROM_REQUESTS,
    host=HOST,
    content_type=CONTENT_TYPE,
    accept_encoding=ACCEPT_ENCODING,
    connection=CONNECTION,
    transfer_encoding=TRANSFER_ENCODING,
    expect=EXPECT,
    origin=ORIGIN,
    content_encoding=CONTENT_ENCODING,
)
_ANSWER_KINDS = _kinds(
    _DROPPED_FROM_ANSWERS,
    content_length=CONTENT_LENGTH,
    transfer_encoding=TRANSFER_ENCODING,
    content_type=CONTENT_TYPE,
    connection=CONNECTION,
)
_UNBUFFERED: Final = (b"X-Accel-Buffering", b"no")
_CACHED_HEADS: Final = 256
_CACHED_HEAD_BYTES: Final = 4096  # a larger head is not cached


class Head:
    """The header lines of a request, shared by equal requests; without length and id."""

    def __init__(self, lines: tuple[bytes, ...]) -> None:
        """Parse `lines`: name, value, name, value …"""
        self.header_count = len(lines) // 2
        self.head_bytes = sum(map(len, lines)) + 2 * len(lines)
        self.host: bytes | None = None
        self.chunked = False
        self.unknown_coding = False  # a Transfer-Encoding other than chunked
        self.content_type: bytes | None = None
        self.content_encoding: bytes | None = None
        self.accept_encoding: bytes | None = None
        self.connection: bytes | None = None
        self.expect = self.unknown_expect = False
        self.origin: bytes | None = None
        self.allowed = False  # these lines passed all checks on a POST of JSON
        passed: list[tuple[bytes, bytes]] = []
        for at in range(0, len(lines), 2):
            self._read(lines[at], lines[at + 1], passed)
        self.forward = _join(passed, _named_by(self.connection))

    def _read(self, name: bytes, value: bytes, passed: list[tuple[bytes, bytes]]) -> None:
        kind = _REQUEST_KINDS.get(name.lower(), PASS)
        if kind in (PASS, CONTENT_TYPE):
            passed.append((name, value))
        if kind == HOST:
            self.host = value if self.host is None else b""
        elif kind == CONTENT_TYPE:
            self.content_type = value if self.content_type in (None, value) else b""
        elif kind == ACCEPT_ENCODING:
            self.accept_encoding = value
        elif kind == CONNECTION:
            self.connection = value if self.connection is None else self.connection + b"," + value
        elif kind == TRANSFER_ENCODING:
            self.chunked = True
            self.unknown_coding = self.unknown_coding or value.strip().lower() != b"chunked"
        elif kind == EXPECT:
            self.expect = True
            self.unknown_expect = value.strip().lower() != b"100-continue"
        elif kind == ORIGIN:
            self.origin = value
        elif kind == CONTENT_ENCODING and value.lower() != b"identity":
            self.content_encoding = value


class Heads:
    """A bounded cache of request heads by their lines."""

    def __init__(self) -> None:
        self._known: dict[tuple[bytes, ...], Head] = {}

    def get(self, lines: list[bytes]) -> Head:
        """Return the head with these lines, parsed if it is new."""
        key = tuple(lines)
        head = self._known.get(key)
        if head is None:
            head = Head(key)
            if head.head_bytes <= _CACHED_HEAD_BYTES:
                if len(self._known) >= _CACHED_HEADS:
                    self._known.clear()
                self._known[key] = head
        return head


class AnswerHead:
    """The header lines of an engine's answer. Shared by answers with equal lines."""

    __slots__ = ("chunked", "event_stream", "lines", "sized")

    def __init__(self, lines: tuple[bytes, ...]) -> None:
        """Parse `lines`: name, value, name, value …"""
        self.sized = False  # the answer has a Content-Length
        self.chunked = False
        self.event_stream = False
        connection: bytes | None = None
        passed: list[tuple[bytes, bytes]] = []
        for at in range(0, len(lines), 2):
            name, value = lines[at], lines[at + 1]
            kind = _ANSWER_KINDS.get(name.lower(), PASS)
            if kind in (PASS, CONTENT_LENGTH, CONTENT_TYPE):
                passed.append((name, value))
            if kind == CONTENT_LENGTH:
                self.sized = True
            elif kind == CONTENT_TYPE:
                self.event_stream = value[:17].lower() == b"text/event-stream"
            elif kind == TRANSFER_ENCODING:
                self.chunked = True
            elif kind == CONNECTION:
                connection = value if connection is None else connection + b"," + value
        if self.event_stream and not self.sized:  # exactly once, whether or not the engine sends it too
            passed = [*(line for line in passed if line[0].lower() != _UNBUFFERED[0].lower()), _UNBUFFERED]
        self.lines = _join(passed, _named_by(connection))


def _named_by(connection: bytes | None) -> frozenset[bytes]:
    """Return the headers that a Connection header declares to be for this hop only."""
    if connection is None:
        return frozenset()
    return frozenset(part.strip() for part in connection.lower().split(b","))


def _join(lines: list[tuple[bytes, bytes]], dropped: frozenset[bytes]) -> bytes:
    return b"".join(b"%b: %b\r\n" % line for line in lines if line[0].lower() not in dropped)
