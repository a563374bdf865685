"""HTTP calls of an engine to its server, limited in time and size.

Invariants:
- A call raises EngineError when there is no answer, or a refusal (401, 403); an answer of any other status is returned.
- The shape of an answer is checked where it is read; the error names the URL, the answer and what was expected. An optional
  value may be null; any other type is an error.
- A refusal is an error of `options.api_key`, for every request.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from fleetd.engines.base import Endpoint
from fleetd.errors import EngineError, in_words

if TYPE_CHECKING:
    from aiohttp import ClientSession

ANSWER_LIMIT_BYTES = 8 * 1024 * 1024
EXCERPT_CHARS = 300
T = TypeVar("T")
_LONGEST_PERIOD_S = 0.5
_MOST = 2**62  # the largest valid count of bytes or tokens


@dataclass(frozen=True, slots=True)
class Reply:
    """An answer: `data` is the parsed JSON, None where the body is not JSON."""

    url: str
    status: int
    data: Any
    text: str

    @property
    def ok(self) -> bool:
        return 200 <= self.status < 300

    @property
    def message(self) -> str:
        """The server's error message, else the start of its body, else its status."""
        error = self.data.get("error") if isinstance(self.data, Mapping) else None
        if isinstance(error, Mapping):
            error = error.get("message") or error.get("type")
        if not isinstance(error, str) or not error:
            error = self.text.strip()[:EXCERPT_CHARS]
        return error or f"HTTP status {self.status}"

    def expect(self, what: str) -> Reply:
        """Return itself if the status is 2xx. Raises EngineError: `what` failed, and why."""
        if not self.ok:
            raise EngineError(f"{what} failed: HTTP {self.status} from {self.url}: {self.message}")
        return self

    def mapping(self) -> Mapping[str, Any]:
        """Return the body as a JSON object. Raises EngineError for any other body."""
        if not isinstance(self.data, Mapping):
            raise EngineError(f"{self.url} did not answer with a JSON object: {self.text.strip()[:EXCERPT_CHARS]!r}")
        return self.data

    def listing(self, key: str) -> Sequence[Mapping[str, Any]]:
        """Return the JSON objects under `key`; null is empty. Raises EngineError."""
        value = self.mapping().get(key, ...)
        shown = self.text.strip()[:EXCERPT_CHARS]
        if value is None:
            return ()
        if not isinstance(value, list) or not all(isinstance(item, Mapping) for item in value):
            raise EngineError(f"{self.url} did not answer with a list of objects under {key!r}: {shown!r}")
        return value

    def word(self, entry: Mapping[str, Any], *keys: str) -> str:
        """Return the non-empty text under the first set key. Raises EngineError."""
        value = next((entry[key] for key in keys if entry.get(key) is not None), None)
        if not isinstance(value, str) or not value:
            raise EngineError(
                f"{self.url} did not answer with a text under {keys[0]!r}: {str(dict(entry))[:EXCERPT_CHARS]}"
            )
        return value

    def count(self, entry: Mapping[str, Any], key: str) -> int:
        """Return the whole number under `key`, 0 if missing or null. Raises EngineError."""
        value = entry.get(key)
        if value is None:
            return 0
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= _MOST:
            shown = str(dict(entry))[:EXCERPT_CHARS]
            raise EngineError(f"{self.url} did not answer with a whole number from 0 under {key!r}: {shown}")
        return value


async def call(
    http: ClientSession,
    endpoint: Endpoint,
    method: str,
    path: str,
    payload: Mapping[str, Any] | None = None,
    *,
    timeout_s: float,
) -> Reply:
    """Send a request and read the whole answer, at most ANSWER_LIMIT_BYTES. Raises EngineError without an answer in `timeout_s`."""
    import aiohttp  # here, since validating options needs no HTTP client

    url = endpoint.base_url + path
    headers = {"Authorization": f"Bearer {endpoint.api_key}"} if endpoint.api_key else {}
    timeout = aiohttp.ClientTimeout(total=max(0.001, timeout_s))
    try:
        async with http.request(
            method, url, json=payload, headers=headers, timeout=timeout, allow_redirects=False
        ) as response:
            body = await _bounded(response.content.iter_any(), url)
            status = response.status
    except TimeoutError as error:
        raise EngineError(f"{method} {url} did not answer within {timeout_s:g} s") from error
    except (aiohttp.ClientError, OSError, ValueError) as error:
        raise EngineError(f"{method} {url} failed: {in_words(error)}") from error
    text = body.decode("utf-8", "replace")
    reply = Reply(url=url, status=status, data=_parsed(text), text=text)
    if status in (401, 403):
        raise EngineError(
            f"{method} {url} was refused: HTTP {status}: {reply.message}", key="options.api_key", recoverable=False
        )
    return reply


def _parsed(text: str) -> Any:
    """Return the JSON; None if invalid, or with lone surrogates, which cannot print."""
    try:
        data = json.loads(text)
        if "\\u" in text:
            json.dumps(data, ensure_ascii=False).encode()
    except (ValueError, RecursionError):
        return None
    return data


async def _bounded(chunks: Any, url: str) -> bytes:
    body = bytearray()
    async for chunk in chunks:
        body += chunk
        if len(body) > ANSWER_LIMIT_BYTES:
            raise EngineError(f"{url} answered with more than {ANSWER_LIMIT_BYTES} bytes")
    return bytes(body)


class Deadline:
    """The end of a time limit that several calls share."""

    def __init__(self, timeout_s: float) -> None:
        self._loop = asyncio.get_running_loop()
        self._end = self._loop.time() + timeout_s

    def left(self, at_least: float = 0.1) -> float:
        """Return the seconds left, but not less than `at_least`."""
        return max(at_least, self._end - self._loop.time())


async def until(
    condition: Callable[[], Awaitable[T | None]],
    *,
    timeout_s: float,
    period_s: float,
    what: str,
) -> T:
    """Poll `condition` until its result is true, and return that; intervals grow from `period_s` to 0.5 s.

    Raises EngineError after `timeout_s`: `what` describes the state that did not change.
    """
    deadline = Deadline(timeout_s)
    while not (found := await condition()):
        left = deadline.left(0.0)
        if not left:
            raise EngineError(f"{what} after {timeout_s:g} s")
        await asyncio.sleep(min(period_s, left))
        period_s = min(_LONGEST_PERIOD_S, period_s * 1.1)
    return found
