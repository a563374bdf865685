"""Read bodies, query parameters and options of requests strictly.

Invariants:
- Input is closed: an unknown key or query parameter is an error that names it.
"""

from __future__ import annotations

import asyncio
import re
import signal
import time
from collections.abc import Mapping, Sequence
from typing import Any

import orjson
from aiohttp import web

from fleetd.errors import ApiError

BEFORE_HEADER = "X-Fleetctl-Before"  # monotonic seconds of this machine
BODY_TIMEOUT_S = 10.0
TIMEOUT_S = 300.0
TIMEOUT_MAX_S = 86_400.0
NAMES_MAX = 10_000

Kinds = Mapping[str, type | tuple[type, ...]]


def invalid(message: str) -> ApiError:
    """Return the error for invalid input."""
    return ApiError(400, "invalid_request", message)


async def read_body(request: web.Request, allowed: Kinds) -> dict[str, Any]:
    """Return the JSON object of a request ({} if empty). Raises ApiError 400, 408.

    A request that its client gave up before it could be read is not carried out: the daemon hung meanwhile.
    """
    before = request.headers.get(BEFORE_HEADER, "")
    try:
        late = bool(before) and time.monotonic() > float(before)
    except ValueError:
        raise invalid(f"{BEFORE_HEADER} must be a number.") from None
    if late:
        raise ApiError(408, "expired", "The client gave up before the daemon read the request; nothing was done.")
    try:
        async with asyncio.timeout(BODY_TIMEOUT_S):
            raw = await request.read()
    except TimeoutError:
        raise ApiError(408, "body_timeout", f"The body did not arrive within {BODY_TIMEOUT_S:g} s.") from None
    if not raw.strip():
        return {}
    try:
        body = orjson.loads(raw)
    except ValueError as error:
        raise invalid(f"The body is not JSON: {error}.") from None
    if not isinstance(body, dict):
        raise invalid("The body must be a JSON object.")
    for key, value in body.items():
        if key not in allowed:
            raise invalid(f"Unknown key {key[:60]!r}; known: {', '.join(allowed)}.")
        kinds = allowed[key]
        if not isinstance(value, kinds) or (isinstance(value, bool) and kinds is not bool):
            raise invalid(f"The value of {key!r} has the wrong type.")
    return body


def read_query(request: web.Request, allowed: Sequence[str] = ()) -> dict[str, str]:
    """Return the query parameters. Raises ApiError 400."""
    for key in request.query:
        if key not in allowed:
            raise invalid(f"Unknown parameter {key[:60]!r}; known: {', '.join(allowed) or 'none'}.")
    return dict(request.query)


def names_of(body: Mapping[str, Any]) -> list[str]:
    """Return `names` of a body; empty if missing. Raises ApiError 400."""
    names = body.get("names", [])
    if not all(isinstance(name, str) for name in names) or len(names) > NAMES_MAX:
        raise invalid("names must be a list of names.")
    return list(names)


def path_of(body: Mapping[str, Any]) -> str | None:
    """Return the absolute `path` of a body; None if missing. Raises ApiError 400."""
    path = body.get("path")
    if path is not None and (not path.startswith("/") or "\0" in path):
        raise invalid("path must be absolute.")
    return path


def timeout_of(body: Mapping[str, Any]) -> float:
    """Return `timeout_s` of a body, in seconds. Raises ApiError 400."""
    value = float(body.get("timeout_s", TIMEOUT_S))
    if not 0 <= value <= TIMEOUT_MAX_S:
        raise invalid(f"timeout_s must be between 0 and {TIMEOUT_MAX_S:g}.")
    return value


def parse_number(text: str | None, name: str, lowest: float, highest: float) -> float | None:
    """Return the number of a query parameter; None if missing. Raises ApiError 400."""
    if text is None:
        return None
    try:
        value = float(text)
    except ValueError:
        raise invalid(f"{name} must be a number.") from None
    if not lowest <= value <= highest:
        raise invalid(f"{name} must be between {lowest:g} and {highest:g}.")
    return value


def parse_flag(text: str | None, name: str, default: bool) -> bool:
    """Return a boolean query parameter. Raises ApiError 400."""
    if text is None:
        return default
    if text.lower() in ("1", "true", "yes", ""):
        return True
    if text.lower() in ("0", "false", "no"):
        return False
    raise invalid(f"{name} must be 1 or 0.")


def check_pattern(text: str | None) -> str | None:
    """Return the regular expression of `grep`, checked. Raises ApiError 400."""
    if text is None:
        return None
    if len(text) > 1000:
        raise invalid("grep is too long.")
    try:
        re.compile(text)
    except (re.error, RecursionError, OverflowError) as error:
        raise invalid(f"grep is not a regular expression: {error}.") from None
    return text


def signal_name(text: str) -> str:
    """Return `hup`, `SIGHUP` or `1` as SIGHUP. Raises ApiError 400."""
    word = text.strip().upper()
    try:
        if word.isascii() and word.isdigit():
            return signal.Signals(int(word)).name
        return signal.Signals[word if word.startswith("SIG") else f"SIG{word}"].name
    except (KeyError, ValueError):
        raise invalid(f"There is no signal {text[:40]!r}.") from None
