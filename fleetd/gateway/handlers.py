"""What each route does: forward to an engine, or answer from what the gateway knows.

Invariants:
- /health and /ready wake no model and reset no idle time.
"""

from __future__ import annotations

from typing import Any
from urllib.parse import unquote

import orjson

from fleetd.errors import ApiError
from fleetd.gateway.context import GatewayContext
from fleetd.gateway.errors import quoted
from fleetd.gateway.http1 import ServerConnection
from fleetd.gateway.pools import Pools
from fleetd.gateway.port import ModelEntry
from fleetd.gateway.proxy import Exchange
from fleetd.gateway.request import Request
from fleetd.gateway.routes import MODELS_PREFIX

_GREETING = b"""\
fleetd is running

  GET  /v1/models             the models
  POST /v1/chat/completions   OpenAI's API (also /v1/completions, /v1/embeddings)
  GET  /ready                 whether the fleet is as fleet.yaml asks
"""


class Handlers:
    """The handler of every action in the route table."""

    def __init__(self, context: GatewayContext, pools: Pools) -> None:
        self._context = context
        self._pools = pools
        self._by_action = {
            "greeting": self._greeting,
            "proxy": self._proxy,
            "list_models": self._list_models,
            "show_model": self._show_model,
            "health": self._health,
            "ready": self._ready,
            "options": self._options,
        }

    def handle(self, conn: ServerConnection, request: Request) -> None:
        """Handle a request that passed all checks."""
        route = request.route
        assert route is not None
        self._by_action[route.action](conn, request)

    def _proxy(self, conn: ServerConnection, request: Request) -> None:
        context = self._context
        if context.draining:
            conn.respond_error(ApiError(503, "draining", "The gateway is shutting down.", retry_after_s=5))
            return
        Exchange(context, self._pools, conn, request).begin()

    def _options(self, conn: ServerConnection, request: Request) -> None:
        assert request.route is not None
        conn.respond(204, b"", b"Allow: %b\r\n" % request.route.allow)

    def _greeting(self, conn: ServerConnection, _request: Request) -> None:
        conn.respond(200, _GREETING, content_type=b"text/plain; charset=utf-8")

    def _health(self, conn: ServerConnection, _request: Request) -> None:
        conn.respond(200, b'{"status":"ok"}')

    def _ready(self, conn: ServerConnection, _request: Request) -> None:
        ready, reasons = self._context.fleet.ready()
        if self._context.draining:
            ready, reasons = False, ("The gateway is shutting down.",)
        body = orjson.dumps({"ready": ready, "reasons": list(reasons)})
        if ready:
            conn.respond(200, body)
        else:
            conn.respond(503, body, b"Retry-After: 5\r\n")

    def _list_models(self, conn: ServerConnection, _request: Request) -> None:
        entries = [model_object(entry) for entry in self._context.fleet.models()]
        conn.respond(200, orjson.dumps({"object": "list", "data": entries}))

    def _show_model(self, conn: ServerConnection, request: Request) -> None:
        name = unquote(request.target.partition(b"?")[0][len(MODELS_PREFIX) :].decode("latin-1"), errors="replace")
        for entry in self._context.fleet.models():
            if entry.id == name:
                conn.respond(200, orjson.dumps(model_object(entry)))
                return
        conn.respond_error(ApiError(404, "model_not_found", f"There is no model {quoted(name)}."))


def model_object(entry: ModelEntry) -> dict[str, Any]:
    """Return a model as OpenAI's API does, with the fleet's own fields under `fleet`."""
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
