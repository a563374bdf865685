"""Put a vLLM server to sleep and wake it.

Invariants:
- Requests are blocked before `sleep` and allowed after `wake`: a sleeping engine accepts requests and never answers them, while
  its /health succeeds. Nothing else on the device may start, stop, sleep or wake meanwhile.
- A second /sleep succeeds and does nothing: the way from level 1 to level 2 leads through being awake.
- A plain /wake_up after level 2 succeeds and the model then generates garbage: load the weights again, then the KV cache.
- After any error the content of the engine's memory is unknown. The hint of every EngineError here is to kill and restart it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from fleetd.engines.base import Endpoint, LaunchContext, SleepRecord
from fleetd.engines.http import Deadline, Reply, call, until
from fleetd.engines.listed_models import listed_names
from fleetd.engines.options import Options, narrow
from fleetd.engines.vllm import memory
from fleetd.engines.vllm.options import VllmOptions
from fleetd.errors import EngineError

if TYPE_CHECKING:
    from aiohttp import ClientSession

KILL = "kill the process and restart it: the content of its memory is unknown"
CANARY_TOKENS = 8
POLL_S = 0.02
LIST_TIMEOUT_S = 5.0


async def is_sleeping(http: ClientSession, endpoint: Endpoint, timeout_s: float = 5.0) -> bool | None:
    """Return whether it sleeps; None: no sleep routes. Raises EngineError."""
    reply = await call(http, endpoint, "GET", "/is_sleeping", timeout_s=timeout_s)
    if reply.status in (404, 405):
        return None
    asleep = reply.expect("asking whether it sleeps").mapping().get("is_sleeping")
    if not isinstance(asleep, bool):
        raise EngineError(f"{reply.url} did not report whether it sleeps: {reply.text[:200]!r}")
    return asleep


async def sleep(http: ClientSession, endpoint: Endpoint, level: int, timeout_s: float) -> None:
    """Put an idle server to sleep and verify it. Raises EngineError: then kill it."""
    try:
        asleep = await is_sleeping(http, endpoint, min(5.0, timeout_s))
        if asleep is None:
            raise EngineError(f"{endpoint.base_url} cannot sleep: it has no sleep routes", recoverable=False)
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
    """Wake a server from `level`, verify by a completion. Raises EngineError: kill it.

    `expected` is the result of `canary` from before the sleep, if known.
    """
    left = Deadline(timeout_s).left
    try:
        if level >= 2:
            await _step(http, endpoint, "/wake_up?tags=weights", left())
            await _step(http, endpoint, "/collective_rpc", left(), {"method": "reload_weights"})
            await _step(http, endpoint, "/wake_up?tags=kv_cache", left())
            await _step(http, endpoint, "/reset_prefix_cache", left())
        else:
            await _step(http, endpoint, "/wake_up", left())
        await _until_sleeping(http, endpoint, False, left())
        text = await canary(http, endpoint, served_as, left())
        if is_garbage(text) and text != expected:
            raise EngineError(f"{endpoint.base_url} generates garbage after its wake: {text!r}")
    except EngineError as error:
        error.hint = error.hint or KILL
        raise


async def canary(http: ClientSession, endpoint: Endpoint, served_as: str, timeout_s: float) -> str:
    """Return a few tokens at temperature 0, which a healthy model repeats.

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
    """Return whether the text repeats one character, as without loaded weights."""
    signs = text.replace(" ", "").replace("\n", "")
    return len(signs) >= 4 and len(set(signs)) == 1


async def _until_sleeping(http: ClientSession, endpoint: Endpoint, wanted: bool, timeout_s: float) -> None:
    async def reached() -> bool:
        return await is_sleeping(http, endpoint, min(5.0, timeout_s)) is wanted

    what = f"{endpoint.base_url} does not report that it {'sleeps' if wanted else 'is awake'}"
    await until(reached, timeout_s=timeout_s, period_s=POLL_S, what=what)


async def _step(
    http: ClientSession, endpoint: Endpoint, path: str, timeout_s: float, payload: dict[str, Any] | None = None
) -> Reply:
    reply = await call(http, endpoint, "POST", path, payload, timeout_s=timeout_s)
    return reply.expect(path)


async def first_served_name(http: ClientSession, endpoint: Endpoint) -> str:
    """Return the first listed name, which names the model; empty: none is listed."""
    return next(iter(await listed_names(http, endpoint, LIST_TIMEOUT_S)), "")


class VllmSleeper:
    """Puts vLLM processes with `enable_sleep_mode` to sleep."""

    def can_sleep(self, options: Options) -> bool:
        return narrow(options, VllmOptions).enable_sleep_mode

    def asleep_bytes(self, context: LaunchContext, awake: Mapping[str, int]) -> Mapping[str, int] | None:
        return memory.asleep_bytes(context, awake)

    async def sleep(
        self, http: ClientSession, endpoint: Endpoint, options: Options, before: SleepRecord | None, timeout_s: float
    ) -> SleepRecord:
        level = narrow(options, VllmOptions).sleep_level
        text = before.canary if before is not None else None
        if text is None:
            text = await canary(http, endpoint, await first_served_name(http, endpoint), timeout_s)
        await sleep(http, endpoint, level, timeout_s)
        return SleepRecord(level, text)

    async def wake(self, http: ClientSession, endpoint: Endpoint, before: SleepRecord, timeout_s: float) -> None:
        served_as = await first_served_name(http, endpoint)
        await wake(http, endpoint, before.level, timeout_s, served_as=served_as, expected=before.canary)

    async def is_asleep(self, http: ClientSession, endpoint: Endpoint, timeout_s: float) -> bool:
        return bool(await is_sleeping(http, endpoint, timeout_s))
