"""One request of a client: what the server half has read of it so far."""

from __future__ import annotations

from fleetd.errors import ApiError
from fleetd.gateway.headers import Head
from fleetd.gateway.routes import HttpRoute


class Request:
    """A request of a client.

    Defaults are class attributes: setting them for each request would cost more.
    """

    method: bytes = b"GET"
    http11: bool = True
    keep_alive: bool = False
    version_refused: bool = False
    length: int = -1  # -1: no Content-Length
    expect: bool = False  # the client waits for `100 Continue` before it sends the body

    head: Head = Head(())
    client_id: bytes = b""  # the request id that the client sent
    id_line: bytes = b""  # the header line with the request id of the answer
    route: HttpRoute | None = None
    error: ApiError | None = None
    close_unread: bool = False  # input after this request is ignored, and the connection closes
    body: bytes | bytearray = b""
    buffered_bytes: int = 0  # its share of GatewayContext.buffered_bytes

    def __init__(self, target: bytes) -> None:
        self.target = target
