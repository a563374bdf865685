"""What is refused at the end of a request's headers, before a byte of its body is read.

The rules of this file
- A name is allowed when it is localhost, the listen address, this machine's own name, or in `allowed_hosts`.
- An address that is written as numbers cannot be rebound: loopback ones are allowed everywhere, all of them where the
  gateway listens on every address.
- Without this, any web page could talk to the fleet by DNS rebinding. And a page of another origin may send nothing that
  costs something: its Origin must be our own Host, and JSON must be called JSON, which no HTML form can do.
- What passed once is remembered (bounded), on the head itself, so that the usual request costs one look-up.
"""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Iterable
from typing import TYPE_CHECKING

import httptools

from fleetd.errors import ApiError
from fleetd.gateway.errors import invalid_request
from fleetd.gateway.options import GatewayOptions

if TYPE_CHECKING:
    from fleetd.gateway.request import Head, Request
    from fleetd.gateway.routes import Routes

_REMEMBERED = 1024


def split_host(value: bytes) -> str | None:
    """Return the lower-case host of a Host header without its port and brackets; None when it is not one."""
    try:
        text = value.decode("ascii").strip().lower()
    except UnicodeDecodeError:
        return None
    if text.startswith("["):
        host, closed, rest = text[1:].partition("]")
        if not closed or (rest and not (rest[0] == ":" and rest[1:].isdigit())):
            return None
        return host or None
    host, colon, port = text.partition(":")
    if colon and not port.isdigit():
        return None
    host = host.removesuffix(".")
    if not host or any(c in host for c in "/@\\?# "):
        return None
    return host


class HostPolicy:
    """Decides about Host and Origin, and remembers what it allowed."""

    def __init__(self, listen_host: str, allowed_hosts: Iterable[str] = ()) -> None:
        listen = listen_host.lower()
        own = socket.gethostname().lower()
        self._names = {"localhost", listen, own, f"{own}.local", own.partition(".")[0]} - {""}
        self._suffixes: tuple[str, ...] = (".localhost",)
        self._any_name = False
        for name in allowed_hosts:
            self._add(name.lower())
        self._any_address = listen in ("", "0.0.0.0", "::", "*")
        self._known: set[bytes] = set()

    def _add(self, name: str) -> None:
        if name == "*":
            self._any_name = True
        elif name.startswith("*."):
            self._suffixes += (name[1:],)
        else:
            self._names.add(split_host(name.encode("idna" if not name.isascii() else "ascii")) or name)

    def allows(self, host: bytes) -> bool:
        """Say whether a request may name us like this."""
        if host in self._known:
            return True
        if not self._decide(host):
            return False
        if len(self._known) < _REMEMBERED:
            self._known.add(host)
        return True

    def _decide(self, value: bytes) -> bool:
        host = split_host(value)
        if host is None:
            return False
        if host in self._names or self._any_name or host.endswith(self._suffixes):
            return True
        try:
            address = ipaddress.ip_address(host)
        except ValueError:
            return False
        return self._any_address or address.is_loopback

    @staticmethod
    def same_origin(origin: bytes, host: bytes) -> bool:
        """Say whether a page of `origin` was served by us."""
        scheme, separator, rest = origin.lower().partition(b"://")
        return bool(separator) and scheme in (b"http", b"https") and rest == host.lower()


class RequestPolicy:
    """All that a request's head must satisfy."""

    def __init__(self, options: GatewayOptions, routes: Routes) -> None:
        self.options = options
        self.routes = routes
        self.hosts = HostPolicy(options.host, options.allowed_hosts)
        self._json_types: set[bytes] = {b"application/json"}

    def body_too_large(self) -> ApiError:
        """Return the answer to a body over the limit."""
        return invalid_request(
            f"The body is over the limit of {self.options.max_body_bytes} bytes.", 413, "body_too_large"
        )

    def check(self, request: Request) -> ApiError | None:
        """Return what is wrong with a head, or None. Sets the route of its request."""
        head = request.head
        if head.allowed and request.method == b"POST" and not request.version_refused:
            route = self.routes.by_path.get(request.target)
            if route is not None and route.method == b"POST" and request.length <= self.options.max_body_bytes:
                request.route = route
                return None
        error = (
            self._check_form(request)
            or self._check_origin(request)
            or self.routes.find(request)
            or (self._check_body(head) if request.method == b"POST" else None)
        )
        if error is None and request.method == b"POST" and request.target[:1] == b"/" and head.host is not None:
            head.allowed = True
        return error

    def _check_form(self, request: Request) -> ApiError | None:
        options = self.options
        target = request.target
        if len(target) > options.max_target_bytes:
            return invalid_request("The request line is too long.", 414, "uri_too_long")
        if request.head.header_count > options.max_headers or request.head.head_bytes > options.max_head_bytes:
            return invalid_request("The headers are too many or too large.", 431, "headers_too_large")
        if request.version_refused:
            return invalid_request("Only HTTP/1.1 and HTTP/1.0 are spoken here.", 505, "http_version")
        if request.head.unknown_expect:
            return invalid_request("Only 100-continue may be expected here.", 417, "expectation_failed")
        if request.length > options.max_body_bytes:
            return self.body_too_large()
        host = request.head.host
        if host is None and not request.http11:
            return None
        if not host:
            return invalid_request("A request carries exactly one Host header.")
        if target[:1] != b"/":
            return self._check_absolute(request)
        return None if self.hosts.allows(host) else self._foreign_host()

    def _check_absolute(self, request: Request) -> ApiError | None:
        """`GET http://host/path`: the host in the target counts, and both must be ours."""
        if request.target == b"*" and request.method == b"OPTIONS":
            return None
        try:
            url = httptools.parse_url(request.target)
        except httptools.HttpParserInvalidURLError:
            return invalid_request("The request target is not a URL.")
        if url.schema not in (b"http", b"https") or not url.host or url.userinfo:
            return invalid_request("The request target must be a path.")
        name = b"[%b]" % url.host if b":" in url.host else url.host
        if not self.hosts.allows(name) or not self.hosts.allows(request.head.host or b""):
            return self._foreign_host()
        request.target = (url.path or b"/") + (b"?" + url.query if url.query else b"")
        return None

    def _foreign_host(self) -> ApiError:
        return ApiError(
            403,
            "host_not_allowed",
            "This Host is not one of the gateway's names; add it to gateway.allowed_hosts if it should be.",
        )

    def _check_origin(self, request: Request) -> ApiError | None:
        origin = request.head.origin
        if origin is None or request.method in (b"GET", b"HEAD"):
            return None  # nothing to steal: no answer ever allows another origin to read it
        if request.head.host and self.hosts.same_origin(origin, request.head.host):
            return None
        return ApiError(403, "origin_not_allowed", "Web pages of another origin may not use this gateway.")

    def _check_body(self, head: Head) -> ApiError | None:
        if head.content_encoding is not None:
            return invalid_request("Compressed requests are not accepted.", 415, "unsupported_media_type")
        content_type = head.content_type
        if content_type in self._json_types:
            return None
        if content_type is None or content_type.partition(b";")[0].strip().lower() != b"application/json":
            return invalid_request("Content-Type must be application/json.", 415, "unsupported_media_type")
        if len(self._json_types) < _REMEMBERED:
            self._json_types.add(content_type)
        return None
