"""Putting a vLLM server to sleep and waking it, step by step, with its traps.

The rules of this file
- Traffic is gated before `sleep` and let in after `wake`: a sleeping engine accepts requests and lets them wait for ever, and
  its /health stays well. Nothing else on the device may start, stop, sleep or wake meanwhile.
- A second /sleep answers well and does nothing: there is no way from level 1 to level 2 but through being awake.
- A plain /wake_up after level 2 answers well and the model then speaks garbage: weights first, read again, then the KV cache.
- After any error the engine's memory is in a state that nobody knows. Every EngineError here says: kill it, start it cold.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from fleetd.engines.base import Endpoint
from fleetd.engines.http import Reply, call, until
from fleetd.errors import EngineError

if TYPE_CHECKING:
    from aiohttp import ClientSession

KILL = "kill the process and start it cold: what its memory holds is not known"
CANARY_TOKENS = 8
POLL_S = 0.02


async def is_sleeping(http: ClientSession, endpoint: Endpoint, timeout_s: float = 5.0) -> bool | None:
    """Return whether it sleeps, None where the server has no sleep routes. Raises EngineError without an answer."""
    reply = await call(http, endpoint, "GET", "/is_sleeping", timeout_s=timeout_s)
    if reply.status in (404, 405):
        return None
    asleep = reply.expect("asking whether it sleeps").mapping().get("is_sleeping")
    if not isinstance(asleep, bool):
        raise EngineError(f"{reply.url} did not say whether it sleeps: {reply.text[:200]!r}")
    return asleep


async def sleep(http: ClientSession, endpoint: Endpoint, level: int, timeout_s: float) -> None:
    """Put an idle server to sleep; return when it says that it sleeps. Raises EngineError: then kill it."""
    try:
        asleep = await is_sleeping(http, endpoint, min(5.0, timeout_s))
        if asleep is None:
            raise EngineError(f"{endpoint.base_url} cannot sleep: its sleep routes are not there", recoverable=False)
        if asleep:
            raise EngineError(f"{endpoint.base_url} sleeps already; a second /sleep would do nothing")
        await _step(http, endpoint, f"/sleep?level={level}&mode=wait", timeout_s)
        await _until_sleeping(http, endpoint, True, timeout_s)
    except EngineError as error:
        error.hint = error.hint or KILL
        raise


async def wake(
    http: ClientSession,
    endpoint: Endpoint,
    level: int,
    timeout_s: float,
    *,
    served_as: str,
    expected: str | None = None,
) -> None:
    """Wake a server that sleeps at `level`, and hear it speak before anybody else does. Raises EngineError: then kill it.

    `expected` is what `canary` said before the sleep, where it is known.
    """
    end = asyncio.get_running_loop().time() + timeout_s

    def left() -> float:
        return max(0.1, end - asyncio.get_running_loop().time())

    try:
        if level >= 2:
            await _step(http, endpoint, "/wake_up?tags=weights", left())
            await _step(http, endpoint, "/collective_rpc", left(), {"method": "reload_weights"})
            await _step(http, endpoint, "/wake_up?tags=kv_cache", left())
            await _step(http, endpoint, "/reset_prefix_cache", left())
        else:
            await _step(http, endpoint, "/wake_up", left())
        await _until_sleeping(http, endpoint, False, left())
        said = await canary(http, endpoint, served_as, left())
        if is_garbage(said) and said != expected:
            raise EngineError(f"{endpoint.base_url} woke and speaks garbage: {said!r}")
    except EngineError as error:
        error.hint = error.hint or KILL
        raise


async def canary(http: ClientSession, endpoint: Endpoint, served_as: str, timeout_s: float) -> str:
    """Return a few tokens at temperature 0: what a healthy model says to the same prompt again and again.

    Of a model that only pools it is the head of a vector.
    """
    payload = {"model": served_as, "prompt": "One two three", "max_tokens": CANARY_TOKENS, "temperature": 0}
    reply = await call(http, endpoint, "POST", "/v1/completions", payload, timeout_s=timeout_s)
    if reply.status in (400, 404, 405, 501):
        pooled = {"model": served_as, "input": "One two three"}
        second = await call(http, endpoint, "POST", "/v1/embeddings", pooled, timeout_s=timeout_s)
        vector = second.listing("data")[0].get("embedding") if second.ok and second.listing("data") else None
        if isinstance(vector, list) and vector and all(isinstance(number, int | float) for number in vector):
            return " ".join(f"{number:g}" for number in vector[:CANARY_TOKENS])
    choices = reply.expect(f"one completion of {served_as}").listing("choices")
    text = choices[0].get("text") if choices else None
    if not isinstance(text, str):
        raise EngineError(f"{reply.url} answered without a text: {reply.text[:200]!r}")
    return text


def is_garbage(text: str) -> bool:
    """True for one sign over and over, which is how weights that were never read again speak."""
    signs = text.replace(" ", "").replace("\n", "")
    return len(signs) >= 4 and len(set(signs)) == 1


async def _until_sleeping(http: ClientSession, endpoint: Endpoint, wanted: bool, timeout_s: float) -> None:
    async def reached() -> bool:
        return await is_sleeping(http, endpoint, min(5.0, timeout_s)) is wanted

    what = f"{endpoint.base_url} does not say that it {'sleeps' if wanted else 'is awake'}"
    await until(reached, timeout_s=timeout_s, period_s=POLL_S, what=what)


async def _step(
    http: ClientSession, endpoint: Endpoint, path: str, timeout_s: float, payload: dict[str, Any] | None = None
) -> Reply:
    reply = await call(http, endpoint, "POST", path, payload, timeout_s=timeout_s)
    return reply.expect(path)
