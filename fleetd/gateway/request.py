"""One request as it comes in: what its head says, and the header lines that may go on to an engine.

The rules of this file
- Everything is passed on but: what concerns this hop only, credentials (they are for us, never for an engine), what a
  browser says of its page, what other proxies claim, and what only we may say.
- Attributes have their defaults on the class: most requests set few of them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from fleetd.errors import ApiError

if TYPE_CHECKING:
    from fleetd.gateway.routes import Route

# What is done with a header. Plain integers: this is looked at for every header of every request.
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
REQUEST_ID: Final = 10
CONTENT_ENCODING: Final = 11

_SPECIAL = {
    "host": HOST,
    "content-length": CONTENT_LENGTH,
    "content-type": CONTENT_TYPE,
    "accept-encoding": ACCEPT_ENCODING,
    "connection": CONNECTION,
    "transfer-encoding": TRANSFER_ENCODING,
    "expect": EXPECT,
    "origin": ORIGIN,
    "x-request-id": REQUEST_ID,
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
KINDS: dict[bytes, int] = {}
for _name, _kind in (*_SPECIAL.items(), *((name, DROP) for name in _DROPPED)):
    for _form in (_name, _name.title()):
        KINDS[_form.encode()] = _kind


class Request:
    """A request of a client. `forward` holds header lines as pieces to join: name, ": ", value, CRLF."""

    method: bytes = b"GET"
    http11: bool = True
    keep_alive: bool = False
    version_refused: bool = False
    header_count: int = 0
    head_bytes: int = 0
    host: bytes | None = None
    length: int = -1
    chunked: bool = False
    content_type: bytes | None = None
    content_encoding: bytes | None = None
    accept_encoding: bytes | None = None
    connection: bytes | None = None
    expect: bool = False
    origin: bytes | None = None
    client_request_id: bytes | None = None

    request_id: bytes = b""
    route: Route | None = None
    error: ApiError | None = None
    close_unread: bool = False  # input after this request is not to be understood
    body: bytes | bytearray = b""
    buffered_bytes: int = 0  # what the gateway's account of large bodies holds for it

    def __init__(self, target: bytes) -> None:
        self.target = target
        self.forward: list[bytes] = []

    def header(self, name: bytes, value: bytes) -> None:
        """Take one header line."""
        self.header_count += 1
        self.head_bytes += len(name) + len(value) + 4
        kind = KINDS.get(name)
        if kind is None:
            kind = KINDS.get(name.lower(), PASS)
        if kind == PASS:
            self.forward += (name, b": ", value, b"\r\n")
        elif kind == HOST:
            self.host = value if self.host is None else b""
        elif kind == CONTENT_LENGTH:
            self.length = int(value)
        elif kind == CONTENT_TYPE:
            self.content_type = value
            self.forward += (name, b": ", value, b"\r\n")
        elif kind != DROP:
            self._rarer_header(kind, value)

    def _rarer_header(self, kind: int, value: bytes) -> None:
        if kind == ACCEPT_ENCODING:
            self.accept_encoding = value
        elif kind == CONNECTION:
            self.connection = value if self.connection is None else self.connection + b"," + value
        elif kind == REQUEST_ID:
            self.client_request_id = value
        elif kind == TRANSFER_ENCODING:
            self.chunked = True
            if value.lower() != b"chunked":
                self.content_encoding = value
        elif kind == EXPECT:
            self.expect = True
        elif kind == ORIGIN:
            self.origin = value
        elif kind == CONTENT_ENCODING and value.lower() != b"identity":
            self.content_encoding = value

    def drop_named_by_connection(self) -> None:
        """Drop the headers that `Connection` declares to be for this hop only."""
        named = {part.strip() for part in (self.connection or b"").lower().split(b",")} - {b"close", b"keep-alive"}
        if not named:
            return
        lines = self.forward
        kept: list[bytes] = []
        for at in range(0, len(lines), 4):
            if lines[at].lower() not in named:
                kept += lines[at : at + 4]
        self.forward = kept
