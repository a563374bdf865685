"""The control API: an aiohttp application, served on the Unix socket.

Invariants:
- The peer's credentials are the key: the same user or root.
- aiohttp's defaults are replaced: cancellation of handlers, limits and timeouts are set here.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket as sockets
from collections.abc import Awaitable, Callable, Collection, Sequence
from pathlib import Path

from aiohttp import web
from aiohttp.typedefs import Middleware

from fleetd.control import routes, socket, sse
from fleetd.control.answers import Handler, QuietHTTP, answer, errors_as_json
from fleetd.control.port import ControlPort, LibraryPort
from fleetd.control.wire import error_document

BODY_MAX_BYTES = 4 * 1024 * 1024  # a fleet.yaml sent as text
KEEPALIVE_S = 20.0  # also the longest time for a request's head to arrive
SHUTDOWN_S = 2.0

Metrics = Callable[[], Awaitable[bytes]]


def create_app(
    port: ControlPort,
    *,
    metrics: Metrics | None = None,
    middlewares: Sequence[Middleware] = (),
    library: LibraryPort | None = None,
) -> web.Application:
    """Return the application with every route of /v1.

    `metrics` renders the Prometheus text of GET /v1/metrics and /metrics; without it these routes do not exist. `middlewares`
    run inside the one that turns errors into JSON. Without `library` the routes of stores and volumes do not exist.
    """
    app = web.Application(middlewares=[errors_as_json, *middlewares], client_max_size=BODY_MAX_BYTES)
    app[routes.PORT] = port
    app[sse.STREAMS] = set()
    app.on_shutdown.append(sse.cut_all)
    app.add_routes(routes.fleet_routes())
    if library is not None:
        app[routes.LIBRARY] = library
        app.add_routes(routes.library_routes())
    if metrics is not None:
        _add_metrics(app, metrics)
    app.on_response_prepare.append(_hide_software)
    return app


def _add_metrics(app: web.Application, metrics: Metrics) -> None:
    async def get_metrics(_request: web.Request) -> web.Response:
        return web.Response(body=await metrics(), headers={"Content-Type": "text/plain; version=0.0.4; charset=utf-8"})

    app.router.add_get("/v1/metrics", get_metrics)
    app.router.add_get("/metrics", get_metrics)


async def _hide_software(_request: web.Request, response: web.StreamResponse) -> None:
    response.headers.popall("Server", None)
    response.headers["Server"] = "fleetd"


def _check_peer(allowed_uids: Collection[int]) -> Middleware:
    @web.middleware
    async def check(request: web.Request, handler: Handler) -> web.StreamResponse:
        connection = None if request.transport is None else request.transport.get_extra_info("socket")
        caller = socket.peer(connection) if connection is not None else None
        if caller is None or caller.uid not in allowed_uids:
            return answer(
                error_document("forbidden", "Only the user who runs fleetd, and root, may use this socket."), 403
            )
        request[routes.CALLER] = caller
        return await handler(request)

    return check


class ControlServer:
    """Serves a port on a Unix socket.

    Call `start` once and `close` once, while holding the host's lock.
    """

    def __init__(
        self,
        port: ControlPort,
        path: Path,
        *,
        metrics: Metrics | None = None,
        allowed_uids: Collection[int] | None = None,
        library: LibraryPort | None = None,
    ) -> None:
        self.path = path
        uids = frozenset((0, os.geteuid()) if allowed_uids is None else allowed_uids)
        app = create_app(port, metrics=metrics, middlewares=[_check_peer(uids)], library=library)
        logger = logging.getLogger("fleetd.control.http")
        if not any(isinstance(found, QuietHTTP) for found in logger.filters):
            logger.addFilter(QuietHTTP())
        self._runner = web.AppRunner(
            app,
            access_log=None,
            logger=logger,
            handler_cancellation=True,
            keepalive_timeout=KEEPALIVE_S,
            shutdown_timeout=SHUTDOWN_S,
        )
        self._server: asyncio.AbstractServer | None = None
        self._listener: sockets.socket | None = None
        self._identity = (0, 0)

    async def start(self) -> None:
        """Bind and serve. Raises HostError."""
        self._listener = socket.bind(self.path)
        found = self.path.lstat()
        self._identity = (found.st_dev, found.st_ino)
        await self._runner.setup()
        serve = self._runner.server
        assert serve is not None
        self._server = await asyncio.get_running_loop().create_unix_server(serve, sock=self._listener)

    async def close(self) -> None:
        """Stop listening, wait SHUTDOWN_S for requests, cut the rest, remove the socket."""
        socket.release(self.path, self._identity)
        if self._server is not None:
            self._server.close()
        await self._runner.cleanup()
