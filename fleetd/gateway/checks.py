"""Checks at the end of a request's headers, before a byte of its body is read.

Invariants:
- A host name is allowed if it is localhost, the listen address, this machine's own name, or in `allowed_hosts`.
- A numeric address cannot be rebound: loopback ones are always allowed, all of them if the gateway listens on every address.
- A web page of another origin cannot use the fleet by DNS rebinding or by an HTML form: its Origin must be the request's own
  Host, and JSON must be declared as JSON, which no form can do.
- What was allowed once is cached (bounded), on the head itself, so that the usual request costs one look-up.
"""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Iterable

import httptools

from fleetd.errors import ApiError
from fleetd.gateway import routes
from fleetd.gateway.errors import invalid_request
from fleetd.gateway.headers import Head
from fleetd.gateway.options import GatewayOptions
from fleetd.gateway.request import Request

_CACHED = 1024


def split_host(value: bytes) -> str | None:
    """Return the host of a Host header, in lower case, without port; None if invalid."""
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
    """Decides which Host and Origin headers are allowed, and caches allowed hosts."""

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
        """Return whether a request may address the gateway by this Host."""
        if host in self._known:
            return True
        if not self._decide(host):
            return False
        if len(self._known) < _CACHED:
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
        """Return whether a page of `origin` was served by this gateway."""
        scheme, separator, rest = origin.lower().partition(b"://")
        return bool(separator) and scheme in (b"http", b"https") and rest == host.lower()


class RequestChecks:
    """Everything that the head of a request must satisfy."""

    def __init__(self, options: GatewayOptions) -> None:
        self.options = options
        self.hosts = HostPolicy(options.host, options.allowed_hosts)
        self._json_types: set[bytes] = {b"application/json"}

    def body_too_large(self) -> ApiError:
        """Return the error for a body over the limit."""
        return invalid_request(
            f"The body is larger than the limit of {self.options.max_body_bytes} bytes.", 413, "body_too_large"
        )

    def check(self, request: Request) -> ApiError | None:
        """Return the error in a head, or None. Sets the route of its request."""
        head = request.head
        if head.allowed and request.method == b"POST" and not request.version_refused:
            route = routes.ROUTES.get(request.target)
            if route is not None and route.method == b"POST" and request.length <= self.options.max_body_bytes:
                request.route = route
                return None
        error = (
            self._check_form(request)
            or self._check_origin(request)
            or self._find_route(request)
            or (self._check_body(head) if request.method == b"POST" else None)
        )
        if error is None and request.method == b"POST" and request.target[:1] == b"/" and head.host is not None:
            head.allowed = True
        return error

    @staticmethod
    def _find_route(request: Request) -> ApiError | None:
        request.route, error = routes.find(request.method, request.target)
        return error

    def _check_form(self, request: Request) -> ApiError | None:
        options = self.options
        target = request.target
        if len(target) > options.max_target_bytes:
            return invalid_request("The request line is too long.", 414, "uri_too_long")
        if request.head.header_count > options.max_headers or request.head.head_bytes > options.max_head_bytes:
            return invalid_request("There are too many headers, or they are too large.", 431, "headers_too_large")
        if request.version_refused:
            return invalid_request("Unsupported HTTP version: use HTTP/1.1 or HTTP/1.0.", 505, "http_version")
        if request.head.unknown_coding:
            return invalid_request(
                "Unknown Transfer-Encoding: only chunked is known.", 501, "unknown_transfer_encoding"
            )
        if request.head.unknown_expect:
            return invalid_request("Unsupported Expect header: only 100-continue is known.", 417, "expectation_failed")
        if request.length > options.max_body_bytes:
            return self.body_too_large()
        host = request.head.host
        if host is None and not request.http11:
            return None
        if not host:
            return invalid_request("A request must have exactly one Host header.")
        if target[:1] != b"/":
            return self._check_absolute(request)
        return None if self.hosts.allows(host) else self._foreign_host()

    def _check_absolute(self, request: Request) -> ApiError | None:
        """Check `GET http://host/path`: both hosts must be allowed."""
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
            "This Host is not a name of the gateway (add it to gateway.allowed_hosts to allow it).",
        )

    def _check_origin(self, request: Request) -> ApiError | None:
        origin = request.head.origin
        if origin is None or request.method in (b"GET", b"HEAD"):
            return None  # harmless: no answer allows another origin to read it
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
            return invalid_request(
                "Content-Type must be application/json (curl: -H 'Content-Type: application/json').",
                415,
                "unsupported_media_type",
            )
        if len(self._json_types) < _CACHED:
            self._json_types.add(content_type)
        return None
