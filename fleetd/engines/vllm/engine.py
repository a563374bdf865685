"""The engine `vllm`: one process per model.

Invariants:
- Every exit that was not requested is a failure, code 0 included. After a kill of the first process its workers still hold
  the device.
- Nothing else starts, stops, sleeps or wakes on a device while a vLLM there is between launch and ready: it measures the free
  memory of the whole device.
- It listens on loopback only: its sleep routes require no key, and the gateway never proxies them.
- Variables that are part of the key of its compile cache are the same for every instance.
- Keys are passed in the environment, since a command line is public.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from fleetd.core.data.specs import Capabilities, Footprint, Probes, ProbeSpec
from fleetd.engines.base import (
    Api,
    Endpoint,
    Engine,
    ExitVerdict,
    Launch,
    LaunchContext,
    OptionProblem,
    ProbeOutcome,
    ServedModel,
)
from fleetd.engines.http import call
from fleetd.engines.options import Options, narrow
from fleetd.engines.vllm import command, memory
from fleetd.engines.vllm.log import learned_kv_bytes, phase, verdict
from fleetd.engines.vllm.options import VllmOptions
from fleetd.engines.vllm.sleep import VllmSleeper, first_served_name, is_sleeping
from fleetd.engines.vllm.validate import problems
from fleetd.errors import EngineError

if TYPE_CHECKING:
    from aiohttp import ClientSession


class VllmStartupLog:
    """Reports the phases of a start, and the KV cache that vLLM found room for."""

    def phase(self, line: str) -> str | None:
        return phase(line)

    def learned(self, context: LaunchContext, lines: Sequence[str]) -> Mapping[str, int]:
        """Return the size of the KV cache, unless fleet.yaml configures it."""
        found = None if narrow(context.options, VllmOptions).sets_kv_cache else learned_kv_bytes(lines)
        return {command.LEARNED_KV: found} if found else {}


class Vllm:
    """The engine `vllm`."""

    name = "vllm"
    capabilities = Capabilities(exclusive_start=True, exit_zero_is_failure=True)
    options = VllmOptions
    server = None
    sleep = VllmSleeper()
    store = None
    startup = VllmStartupLog()

    def api(self, options: Options) -> Api:  # noqa: ARG002
        return Api.OPENAI

    def concurrency(self, options: Options) -> int:
        return narrow(options, VllmOptions).max_num_seqs or memory.DEFAULT_SEQUENCES

    def probes(self, options: Options) -> Probes:  # noqa: ARG002
        """Limit silence at the start: each reported phase restarts the deadline."""
        return Probes(
            startup=ProbeSpec(http="/health", period_s=0.25, timeout_s=2.0, failures=1, deadline_s=600.0),
            readiness=ProbeSpec(http="/health", period_s=2.0, timeout_s=2.0, failures=3),
            liveness=ProbeSpec(completion=True, period_s=30.0, timeout_s=20.0, failures=3),
        )

    def validate(self, context: LaunchContext) -> Sequence[OptionProblem]:
        return problems(context, narrow(context.options, VllmOptions))

    def launch(self, context: LaunchContext) -> Launch:
        return command.launch(context, narrow(context.options, VllmOptions))

    def estimate(self, context: LaunchContext, model: ServedModel | None) -> Footprint | None:  # noqa: ARG002
        return memory.estimate(context)

    def classify_exit(self, code: int | None, signal: str | None, log_tail: Sequence[str]) -> ExitVerdict:
        return verdict(code, signal, log_tail)

    async def alive(
        self, http: ClientSession, endpoint: Endpoint, model: ServedModel | None, timeout_s: float
    ) -> ProbeOutcome:
        """Request one token, since /health succeeds in a hang; skip a sleeping server."""
        try:
            if await is_sleeping(http, endpoint, timeout_s):
                return ProbeOutcome(True, "asleep", asleep=True)
            served_as = model.served_as if model is not None else ""
            return await _one_token(http, endpoint, served_as or await first_served_name(http, endpoint), timeout_s)
        except EngineError as error:
            return ProbeOutcome.failed(error)


ENGINE: Engine = Vllm()


async def _one_token(http: ClientSession, endpoint: Endpoint, served_as: str, timeout_s: float) -> ProbeOutcome:
    """Complete one token; an embedding model embeds one instead."""
    payload = {"model": served_as, "prompt": "a", "max_tokens": 1, "temperature": 0}
    reply = await call(http, endpoint, "POST", "/v1/completions", payload, timeout_s=timeout_s)
    if reply.ok and reply.listing("choices"):
        return ProbeOutcome(True, f"{served_as} generated one token")
    if reply.status == 503 and "EngineDead" not in reply.text:
        return ProbeOutcome(True, f"{served_as} is busy: {reply.message}")
    if reply.status in (400, 404, 405, 501):
        pooled = {"model": served_as, "input": "a"}
        second = await call(http, endpoint, "POST", "/v1/embeddings", pooled, timeout_s=timeout_s)
        if second.ok and second.listing("data"):
            return ProbeOutcome(True, f"{served_as} embedded one token")
    return ProbeOutcome(False, f"{served_as}: HTTP {reply.status}: {reply.message}")
