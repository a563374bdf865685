"""The routes of /v1/library and /v1/volumes: read a request strictly, ask the port, answer.

The rules of this file
- As in `routes.py`: input is closed, and nothing about the fleet is decided here.
"""

from __future__ import annotations

from aiohttp import web

from fleetd.control import sse
from fleetd.control.answers import answer
from fleetd.control.library_port import LibraryPort
from fleetd.control.routes import read_body, read_query
from fleetd.errors import ApiError

LIBRARY: web.AppKey[LibraryPort] = web.AppKey("library", LibraryPort)


async def get_library(request: web.Request) -> web.Response:
    read_query(request, ())
    return answer(await request.app[LIBRARY].diff())


async def get_model(request: web.Request) -> web.Response:
    read_query(request, ())
    return answer(await request.app[LIBRARY].show(request.match_info["name"]))


async def post_sync(request: web.Request) -> web.Response:
    body = await read_body(request, {"names": list})
    names = body.get("names", [])
    if not all(isinstance(name, str) for name in names) or len(names) > 10_000:
        raise ApiError(400, "invalid_request", "names must be a list of names.")
    return answer({"sync": request.app[LIBRARY].sync(names)}, 202)


async def get_sync(request: web.Request) -> web.StreamResponse:
    """SSE: what a sync did so far, then what it does."""
    number = int(request.match_info["number"])
    return await sse.stream(request, request.app[LIBRARY].progress(number), "step")


async def post_prune(request: web.Request) -> web.Response:
    body = await read_body(request, {"dry_run": bool})
    return answer(await request.app[LIBRARY].prune(body.get("dry_run", False)))


async def get_volumes(request: web.Request) -> web.Response:
    read_query(request, ())
    return answer(request.app[LIBRARY].volumes())


async def post_accept(request: web.Request) -> web.Response:
    body = await read_body(request, {"path": str})
    path = body.get("path", "")
    if not path.startswith("/"):
        raise ApiError(400, "invalid_request", "path must be absolute.")
    return answer(request.app[LIBRARY].accept_volume(path))


def table() -> list[web.RouteDef]:
    """Return the routes."""
    return [
        web.get("/v1/library", get_library),
        web.post("/v1/library/sync", post_sync),
        web.post("/v1/library/prune", post_prune),
        web.get(r"/v1/syncs/{number:\d{1,9}}", get_sync),
        web.get("/v1/library/{name:.+}", get_model),
        web.get("/v1/volumes", get_volumes),
        web.post("/v1/volumes/accept", post_accept),
    ]
