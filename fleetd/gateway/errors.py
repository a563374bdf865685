"""Error answers: a status, a stable code, one sentence, and whether and when to retry.

Invariants:
- The body is in the dialect of the route (`ErrorShape`); status, code and headers are the same for all dialects.
- 429 and 503 carry Retry-After (1 to 120 seconds: clients ignore longer ones). Errors that must not be retried say so.
- Text from a client is cut before it is repeated, and never appears in a header.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from http import HTTPStatus

import orjson

from fleetd.core.data.commands import Reject
from fleetd.errors import ApiError

ErrorShape = Callable[[ApiError], bytes]

STATUS_LINES: dict[int, bytes] = {s.value: f"HTTP/1.1 {s.value} {s.phrase}\r\n".encode() for s in HTTPStatus}

REJECT_STATUS = {
    "model_not_found": 404,
    "model_too_large": 422,
    "queue_full": 429,
    "rate_limited": 429,
    "queue_timeout": 504,
    "model_failed": 503,
    "model_blocked": 503,
    "draining": 503,
}
_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
_DEFAULT_RETRY_AFTER_S = 5.0
# A 502 was retried as often as allowed; the others are errors of the client.
_FINAL = frozenset({400, 401, 403, 404, 405, 411, 413, 414, 415, 417, 422, 431, 501, 502, 505})


def status_line(status: int) -> bytes:
    """Return the first line of a response, for any status from 100 to 999."""
    return STATUS_LINES.get(status) or b"HTTP/1.1 %d Status\r\n" % status


def error_type(status: int) -> str:
    """Return OpenAI's `type` for a status."""
    return _TYPES.get(status) or ("server_error" if status >= 500 else "invalid_request_error")


def openai_shape(error: ApiError) -> bytes:
    """Return the body in OpenAI's format: always an object under `error`."""
    body = {"message": str(error), "type": error_type(error.status), "param": None, "code": error.code}
    if error.hint and error.status != 405:  # there it is the Allow header
        body["hint"] = error.hint
    return orjson.dumps({"error": body})


def error_headers(error: ApiError) -> bytes:
    """Return the header lines that let a client decide whether and when to retry."""
    lines = b"X-Fleet-Error-Source: gateway\r\n"
    if error.status in (429, 503):
        wait_s = _DEFAULT_RETRY_AFTER_S if error.retry_after_s is None else error.retry_after_s
        lines += b"Retry-After: %d\r\n" % min(120, max(1, math.ceil(wait_s)))
    if error.status == 405 and error.hint:
        lines += b"Allow: %b\r\n" % error.hint.encode()
    final = error.status in _FINAL if error.should_retry is None else not error.should_retry
    if final:
        lines += b"x-should-retry: false\r\n"
    return lines


def from_reject(reject: Reject) -> ApiError:
    """Return the error for a request that the core rejected."""
    status = REJECT_STATUS.get(reject.code, 503)
    return ApiError(
        status,
        reject.code,
        reject.reason,
        retry_after_s=reject.retry_after_s,
        should_retry=False if reject.final else None,
        hint=reject.hint,
    )


def invalid_request(message: str, status: int = 400, code: str = "invalid_request") -> ApiError:
    """Return the error for an invalid request."""
    return ApiError(status, code, message)


def quoted(text: str) -> str:
    """Return `text` in quotes, cut to 80 characters, control characters escaped."""
    cut = text if len(text) <= 80 else text[:80] + "…"
    return repr(cut)
