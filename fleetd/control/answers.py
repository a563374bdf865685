"""JSON answers of the control API, and the answer to every exception.

Invariants:
- A caller never gets a traceback or an HTML page: an error is {schema, error: {code, message, hint}}.
- An unexpected exception is logged with its traceback and answered as `internal`, without its text.
- A client that disconnects is not an error.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import orjson
from aiohttp import web

from fleetd.control import wire
from fleetd.errors import ApiError, CapacityError, ConfigError, EngineError, FleetError, HostError, InvalidTransition

log = logging.getLogger("fleetd.control")

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def encode(body: Mapping[str, Any]) -> bytes:
    """Return JSON in UTF-8: NaN as null, lone surrogates of log lines escaped."""
    try:
        return orjson.dumps(body, default=str, option=orjson.OPT_NON_STR_KEYS)
    except TypeError:
        return json.dumps(body, default=str, separators=(",", ":")).encode("ascii")


def answer(body: Mapping[str, Any], status: int = 200) -> web.Response:
    """Return a JSON response with the schema name."""
    return web.Response(body=encode(wire.document(body)), status=status, content_type="application/json")


def describe_error(error: FleetError) -> tuple[int, dict[str, Any]]:
    """Return the HTTP status and the error document of a FleetError."""
    message, hint = str(error), error.hint
    match error:
        case ConfigError():
            problems = [
                {
                    "file": problem.file,
                    "line": problem.line,
                    "column": problem.column,
                    "path": problem.path,
                    "message": problem.message,
                    "text": str(problem),
                }
                for problem in error.problems
            ]
            return 422, wire.error_document("invalid_config", message, hint, problems=problems)
        case ApiError():
            return error.status, wire.error_document(error.code, message, hint)
        case CapacityError():
            return 409, wire.error_document("does_not_fit", message, hint)
        case EngineError():
            return 502, wire.error_document("engine_failed", message, hint)
        case HostError():
            return 500, wire.error_document("host_refused", message, hint)
        case InvalidTransition():
            log.error("invalid transition", exc_info=error)
            return 500, wire.error_document("internal", f"A bug in fleetd: {message}", "See the daemon's log.")
        case _:
            return 500, wire.error_document("failed", message, hint)


def failure(error: FleetError) -> web.Response:
    """Return the response of a FleetError."""
    status, body = describe_error(error)
    response = answer(body, status)
    if isinstance(error, ApiError) and error.retry_after_s is not None:
        response.headers["Retry-After"] = str(min(120, max(1, round(error.retry_after_s))))
    return response


def _http_error(error: web.HTTPException, request: web.Request) -> web.Response:
    reason = {
        404: ("unknown_route", f"There is no route {request.path}."),
        405: ("wrong_method", f"{request.path} does not take {request.method}."),
        413: ("body_too_large", "The body of the request is too large."),
    }.get(error.status, ("invalid_request", error.reason))
    response = answer(wire.error_document(*reason), error.status)
    if "Allow" in error.headers:
        response.headers["Allow"] = error.headers["Allow"]
    return response


@web.middleware
async def errors_as_json(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Turn every exception of a handler into a JSON answer.

    A stream that has begun handles its own errors.
    """
    try:
        return await handler(request)
    except web.HTTPException as error:
        return _http_error(error, request)
    except FleetError as error:
        return failure(error)
    except ConnectionError:
        raise  # the client disconnected: aiohttp closes the connection quietly
    except Exception:
        log.exception("%s %s failed", request.method, request.path)
        return answer(
            wire.error_document("internal", "A bug in fleetd: the request failed.", "See the daemon's log."), 500
        )


class QuietHTTP(logging.Filter):
    """Reduces the traceback that aiohttp logs for every malformed request to one line."""

    def filter(self, record: logging.LogRecord) -> bool:
        if record.exc_info and record.exc_info[0] is not None and record.exc_info[0].__module__.startswith("aiohttp"):
            record.msg, record.args = "malformed request: %s", (record.exc_info[0].__name__,)
            record.exc_info, record.exc_text = None, None
        return True
