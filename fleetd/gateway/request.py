"""One request as it comes in: what its head says, and the header lines that may go on to an engine.

The rules of this file
- Everything is passed on but: what concerns this hop only, credentials (they are for us, never for an engine), what a
  browser says of its page, what other proxies claim, and what only we may say.
- The lines of a head are read once and remembered: clients repeat themselves.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from fleetd.errors import ApiError

if TYPE_CHECKING:
    from fleetd.gateway.routes import Route

# What is done with a header.
PASS: Final = 0
DROP: Final = 1
HOST: Final = 2
CONTENT_TYPE: Final = 4
ACCEPT_ENCODING: Final = 5
CONNECTION: Final = 6
TRANSFER_ENCODING: Final = 7
EXPECT: Final = 8
ORIGIN: Final = 9
CONTENT_ENCODING: Final = 10

_SPECIAL = {
    "host": HOST,
    "content-type": CONTENT_TYPE,
    "accept-encoding": ACCEPT_ENCODING,
    "connection": CONNECTION,
    "transfer-encoding": TRANSFER_ENCODING,
    "expect": EXPECT,
    "origin": ORIGIN,
    "content-encoding": CONTENT_ENCODING,
}
_DROPPED = [
    "keep-alive",
    "proxy-connection",
    "proxy-authorization",
    "proxy-authenticate",
    "te",
    "trailer",
    "upgrade",
    "http2-settings",
    "authorization",
    "x-api-key",
    "api-key",
    "x-goog-api-key",
    "cookie",
    "referer",
    "forwarded",
    "via",
    "x-forwarded-for",
    "x-forwarded-host",
    "x-forwarded-proto",
    "x-forwarded-port",
    "x-forwarded-server",
    "x-real-ip",
    "sec-fetch-site",
    "sec-fetch-mode",
    "sec-fetch-dest",
    "sec-fetch-user",
    "access-control-request-method",
    "access-control-request-headers",
]
KINDS: dict[bytes, int] = {name.encode(): DROP for name in _DROPPED}
KINDS.update((name.encode(), kind) for name, kind in _SPECIAL.items())
APART_SIZES: Final = frozenset({len(b"content-length"), len(b"x-request-id")})

_REMEMBERED: Final = 256  # heads, of at most
_REMEMBERED_BYTES: Final = 4096


class Head:
    """What the header lines of a request say, length and request id aside. Built once for equal lines, then shared."""

    def __init__(self, lines: tuple[bytes, ...]) -> None:
        """`lines` is name, value, name, value …"""
        self.header_count = len(lines) // 2
        self.head_bytes = sum(map(len, lines)) + 2 * len(lines)
        self.host: bytes | None = None
        self.chunked = False
        self.content_type: bytes | None = None
        self.content_encoding: bytes | None = None
        self.accept_encoding: bytes | None = None
        self.connection: bytes | None = None
        self.expect = self.unknown_expect = False
        self.origin: bytes | None = None
        self.allowed = False  # the policy has nothing against these lines on a POST of JSON
        passed: list[tuple[bytes, bytes]] = []
        for at in range(0, len(lines), 2):
            self._take(lines[at], lines[at + 1], passed)
        named = self._named_by_connection()
        self.forward = b"".join(b"%b: %b\r\n" % line for line in passed if line[0].lower() not in named)

    def _take(self, name: bytes, value: bytes, passed: list[tuple[bytes, bytes]]) -> None:
        kind = KINDS.get(name.lower(), PASS)
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
            if value.lower() != b"chunked":
                self.content_encoding = value
        elif kind == EXPECT:
            self.expect = True
            self.unknown_expect = value.strip().lower() != b"100-continue"
        elif kind == ORIGIN:
            self.origin = value
        elif kind == CONTENT_ENCODING and value.lower() != b"identity":
            self.content_encoding = value

    def _named_by_connection(self) -> frozenset[bytes]:
        """Return the headers that `Connection` declares to be for this hop only."""
        if self.connection is None:
            return frozenset()
        return frozenset(part.strip() for part in self.connection.lower().split(b","))


class Request:
    """A request of a client."""

    method: bytes = b"GET"
    http11: bool = True
    keep_alive: bool = False
    version_refused: bool = False
    length: int = -1
    expect: bool = False  # the client still waits for a word before it sends the body

    head: Head = Head(())
    own_id: bytes = b""  # the request id that the client sent
    id_line: bytes = b""  # the header line with the request id that counts
    route: Route | None = None
    error: ApiError | None = None
    close_unread: bool = False  # input after this request is not to be understood
    body: bytes | bytearray = b""
    buffered_bytes: int = 0  # what the gateway's account of large bodies holds for it

    def __init__(self, target: bytes) -> None:
        self.target = target


class Heads:
    """Heads by their lines. A client sends the same lines with every request, so most heads are looked up, not read."""

    def __init__(self) -> None:
        self._known: dict[tuple[bytes, ...], Head] = {}

    def get(self, lines: list[bytes]) -> Head:
        """Return what these lines say."""
        key = tuple(lines)
        head = self._known.get(key)
        if head is None:
            head = Head(key)
            if head.head_bytes <= _REMEMBERED_BYTES:
                if len(self._known) >= _REMEMBERED:
                    self._known.clear()
                self._known[key] = head
        return head
