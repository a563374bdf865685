"""The paths of the data plane: which method each takes, what it does, and the dialect of its errors.

Invariants:
- A path is compared as received: nothing is decoded or normalised, so no other spelling reaches a route.
- An unknown path is 404, a known one with another method 405 with Allow. OPTIONS lists the methods and allows no other origin
  anything. HEAD is GET without its body.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

from fleetd.errors import ApiError
from fleetd.gateway.errors import ErrorShape, openai_shape, quoted

Action = Literal["greeting", "proxy", "list_models", "show_model", "health", "ready", "options"]
MODELS_PREFIX: Final = b"/v1/models/"


@dataclass(frozen=True, slots=True)
class HttpRoute:
    """One path of the data plane. `shape` writes errors in its dialect."""

    method: bytes
    action: Action
    shape: ErrorShape = openai_shape

    @property
    def allow(self) -> bytes:
        """The methods that the path takes, for an Allow header."""
        match self.method:
            case b"POST":
                return b"POST, OPTIONS"
            case b"GET":
                return b"GET, HEAD, OPTIONS"
            case _:
                return b"GET, HEAD, POST, OPTIONS"


_PROXIED = HttpRoute(b"POST", "proxy")
_ANY = HttpRoute(b"OPTIONS", "options")
_ONE_MODEL = HttpRoute(b"GET", "show_model")
ROUTES: Final[dict[bytes, HttpRoute]] = {
    b"/v1/chat/completions": _PROXIED,
    b"/v1/completions": _PROXIED,
    b"/v1/embeddings": _PROXIED,
    b"/v1/models": HttpRoute(b"GET", "list_models"),
    b"/": HttpRoute(b"GET", "greeting"),
    b"/health": HttpRoute(b"GET", "health"),
    b"/ready": HttpRoute(b"GET", "ready"),
}


# paths of llama-swap → what to use
_ELSEWHERE: Final[dict[bytes, str]] = {
    b"/ui": "fleetd has no web page; use: fleetctl status --watch",
    b"/running": "use: fleetctl ps, or GET /v1/models",
    b"/unload": "use: fleetctl unload MODEL",
    b"/logs": "use: fleetctl logs -f",
    b"/upstream": "send requests to /v1/…: the model's name selects the engine",
}


def find(method: bytes, target: bytes) -> tuple[HttpRoute | None, ApiError | None]:
    """Return the route (None: unknown path) and the error of a request."""
    route = ROUTES.get(target) or _find_by_path(target)
    if route is None:
        if target == b"*":
            return _ANY, None
        path = target.partition(b"?")[0]
        hint = next(
            (line for start, line in _ELSEWHERE.items() if path == start or path.startswith(start + b"/")), None
        )
        return None, ApiError(404, "not_found", f"There is no route {quoted(target.decode('latin-1'))}.", hint=hint)
    if method == route.method or (method == b"HEAD" and route.method == b"GET"):
        return route, None
    listing = HttpRoute(route.method, "options", route.shape)
    if method == b"OPTIONS":
        return listing, None
    allowed = route.allow.decode()
    return listing, ApiError(405, "method_not_allowed", f"This route takes {allowed}.", hint=allowed)


def _find_by_path(target: bytes) -> HttpRoute | None:
    path = target.partition(b"?")[0]
    if path.startswith(MODELS_PREFIX) and len(path) > len(MODELS_PREFIX):
        return _ONE_MODEL
    return ROUTES.get(path)
