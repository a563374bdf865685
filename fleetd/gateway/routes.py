"""Which path does what, and in which dialect its errors are said.

The rules of this file
- A path is compared as it came: nothing is decoded or cleaned up on the way, so nothing slips past by another spelling.
- An unknown path is 404, a known one with another method 405 with Allow; both are JSON. OPTIONS names the methods and allows
  no other origin anything. HEAD is GET without its body.
- /health and /ready are answered from what is known: they wake no model and reset no clock.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

import orjson

from fleetd.errors import ApiError
from fleetd.gateway.errors import ErrorShape, openai_shape, quoted
from fleetd.gateway.http1 import ServerConnection
from fleetd.gateway.port import ModelEntry
from fleetd.gateway.proxy import Exchange
from fleetd.gateway.request import Request

if TYPE_CHECKING:
    from fleetd.gateway.listener import Gateway

Handle = Callable[[ServerConnection, Request], None]
MODELS_PREFIX = b"/v1/models/"


@dataclass(frozen=True, slots=True)
class Route:
    """What one path does. `shape` writes the errors of its dialect."""

    method: bytes
    handle: Handle
    shape: ErrorShape = openai_shape
    json: bool = False  # takes a JSON body

    @property
    def allow(self) -> bytes:
        """The methods that the path knows, for an Allow header."""
        return b"POST, OPTIONS" if self.method == b"POST" else b"GET, HEAD, OPTIONS"


class Routes:
    """All paths of the data plane."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway
        proxied = Route(b"POST", self._proxy, json=True)
        self._options = Route(b"OPTIONS", self._answer_options)
        self._one_model = Route(b"GET", self._answer_one_model)
        self.by_path: dict[bytes, Route] = {
            b"/v1/chat/completions": proxied,
            b"/v1/completions": proxied,
            b"/v1/embeddings": proxied,
            b"/v1/models": Route(b"GET", self._answer_models),
            b"/health": Route(b"GET", self._answer_health),
            b"/ready": Route(b"GET", self._answer_ready),
        }

    def find(self, request: Request) -> ApiError | None:
        """Set the route of a request, or say why there is none."""
        target = request.target
        route = self.by_path.get(target) or self._find_rarer(target)
        if route is None:
            if target == b"*":
                request.route = self._options
                return None
            return ApiError(404, "not_found", f"There is no route {quoted(target.decode('latin-1'))}.")
        method = request.method
        if method == route.method or (method == b"HEAD" and route.method == b"GET"):
            request.route = route
            return None
        request.route = Route(route.method, self._options.handle, route.shape)
        if method == b"OPTIONS":
            return None
        allowed = route.allow.decode()
        return ApiError(405, "method_not_allowed", f"This route takes {allowed}.", hint=allowed)

    def _find_rarer(self, target: bytes) -> Route | None:
        path = target.partition(b"?")[0]
        route = self.by_path.get(path)
        if route is None and path.startswith(MODELS_PREFIX) and len(path) > len(MODELS_PREFIX):
            return self._one_model
        return route

    # -- handlers -------------------------------------------------------------------------------------------------------

    def _proxy(self, conn: ServerConnection, request: Request) -> None:
        gateway = self._gateway
        if gateway.draining:
            conn.respond_error(ApiError(503, "draining", "The gateway is shutting down.", retry_after_s=5))
            return
        Exchange(gateway, conn, request).begin()

    def _answer_options(self, conn: ServerConnection, request: Request) -> None:
        route = request.route
        allow = route.allow if route is not None and route is not self._options else b"GET, HEAD, POST, OPTIONS"
        conn.respond(204, b"", b"Allow: %b\r\n" % allow)

    def _answer_health(self, conn: ServerConnection, _request: Request) -> None:
        conn.respond(200, b'{"status":"ok"}')

    def _answer_ready(self, conn: ServerConnection, _request: Request) -> None:
        ready, reasons = self._gateway.port.ready()
        if self._gateway.draining:
            ready, reasons = False, ("The gateway is shutting down.",)
        body = orjson.dumps({"ready": ready, "reasons": list(reasons)})
        if ready:
            conn.respond(200, body)
        else:
            conn.respond(503, body, b"Retry-After: 5\r\n")

    def _answer_models(self, conn: ServerConnection, _request: Request) -> None:
        entries = [model_object(entry) for entry in self._gateway.port.models()]
        conn.respond(200, orjson.dumps({"object": "list", "data": entries}))

    def _answer_one_model(self, conn: ServerConnection, request: Request) -> None:
        name = unquote(request.target.partition(b"?")[0][len(MODELS_PREFIX) :].decode("latin-1"), errors="replace")
        for entry in self._gateway.port.models():
            if entry.id == name:
                conn.respond(200, orjson.dumps(model_object(entry)))
                return
        conn.respond_error(ApiError(404, "model_not_found", f"There is no model {quoted(name)}."))


def model_object(entry: ModelEntry) -> dict[str, Any]:
    """Return one model as OpenAI's API shows it, with what the fleet knows beside it."""
    return {
        "id": entry.id,
        "object": "model",
        "created": entry.created,
        "owned_by": "fleetd",
        "fleet": {
            "state": entry.state,
            "engine": entry.engine,
            "instance": entry.instance,
            "memory_bytes": entry.memory_bytes,
        },
    }
