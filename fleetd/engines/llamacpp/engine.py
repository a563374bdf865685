"""The engine `llamacpp`: one process per model.

Invariants:
- `context_length` is what one request gets; llama.cpp's `--ctx-size` is the pool of all slots, their product.
- llama.cpp's prompt cache (8 GiB of host memory by default) is off unless `cache_ram` asks for it.
- The model answers under its fleet name (`--alias`), so `model` in an answer is what the client requested.
- The API key is passed in the environment, never on the command line.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

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
from fleetd.engines.http import Deadline, call
from fleetd.engines.llamacpp import command, memory
from fleetd.engines.llamacpp.exits import classify
from fleetd.engines.llamacpp.options import LlamaCppOptions
from fleetd.engines.llamacpp.validate import problems
from fleetd.engines.options import Options, narrow
from fleetd.engines.visible_devices import visible_devices
from fleetd.errors import EngineError

if TYPE_CHECKING:
    from aiohttp import ClientSession

SCRUBBED = (
    "LLAMA_API_KEY", "LLAMA_ARG_API_KEY_FILE", "LLAMA_ARG_API_PREFIX", "LLAMA_ARG_SSL_KEY_FILE", "LLAMA_ARG_SSL_CERT_FILE",
    "LLAMA_ARG_HOST", "LLAMA_ARG_PORT", "LLAMA_ARG_ALIAS", "LLAMA_ARG_MODEL", "LLAMA_ARG_HF_REPO", "LLAMA_ARG_MODEL_URL",
)  # fmt: skip


class LlamaCpp:
    """The engine `llamacpp`."""

    name = "llamacpp"
    capabilities = Capabilities(exit_zero_is_failure=True)
    options = LlamaCppOptions
    server = None
    sleep = None
    store = None
    startup = None

    def api(self, options: Options) -> Api:  # noqa: ARG002
        return Api.OPENAI

    def concurrency(self, options: Options) -> int:
        return narrow(options, LlamaCppOptions).parallel

    def probes(self, options: Options) -> Probes:  # noqa: ARG002
        """Poll fast, since a tiny model is ready in 40 ms; a large one takes minutes."""
        return Probes(
            startup=ProbeSpec(http="/health", period_s=0.025, timeout_s=2.0, failures=1, deadline_s=900.0),
            readiness=ProbeSpec(http="/health", period_s=2.0, timeout_s=2.0, failures=3),
            liveness=ProbeSpec(completion=True, period_s=30.0, timeout_s=20.0, failures=3),
        )

    def validate(self, context: LaunchContext) -> Sequence[OptionProblem]:
        embedded = not context.command and command.server_path(context) is None
        return problems(context, narrow(context.options, LlamaCppOptions), embedded=embedded)

    def launch(self, context: LaunchContext) -> Launch:
        options = narrow(context.options, LlamaCppOptions)
        if context.port is None:
            raise EngineError(f"{context.name}: llamacpp needs a port, and none is assigned", recoverable=False)
        env = visible_devices(context.device_uuid, context.device)
        if options.api_key is not None:
            env["LLAMA_API_KEY"] = options.api_key.get_secret_value()
        required = command.required_files(context, options)
        flags = command.flags(context, options)
        return Launch(
            argv=(*command.program(context), *flags, *options.extra_args, *context.args),
            env={key: value for key, value in env.items() if key not in context.env},
            unset_env=tuple(key for key in SCRUBBED if key not in context.env and key not in env),
            requires=tuple(required),
            secret_env=frozenset({"LLAMA_API_KEY"}),
            named=required,
        )

    def estimate(self, context: LaunchContext, model: ServedModel | None) -> Footprint | None:  # noqa: ARG002
        return memory.estimate(context, narrow(context.options, LlamaCppOptions))

    def classify_exit(self, code: int | None, signal: str | None, log_tail: Sequence[str]) -> ExitVerdict:
        return classify(code, signal, log_tail)

    async def alive(
        self, http: ClientSession, endpoint: Endpoint, model: ServedModel | None, timeout_s: float
    ) -> ProbeOutcome:
        """Request one token, or one vector. A server with all slots busy is alive."""
        deadline = Deadline(timeout_s)
        try:
            slots = await call(http, endpoint, "GET", "/slots?fail_on_no_slot=1", timeout_s=timeout_s)
            if slots.status == 503 and "slot" in slots.message.lower():
                return ProbeOutcome(True, "all slots are busy")
            return await _one_token(http, endpoint, model, deadline)
        except EngineError as error:
            return ProbeOutcome.failed(error)


ENGINE: Engine = LlamaCpp()


async def _one_token(
    http: ClientSession, endpoint: Endpoint, model: ServedModel | None, deadline: Deadline
) -> ProbeOutcome:
    """Request a completion, or an embedding where the server supports only those."""
    tries: list[tuple[str, Mapping[str, Any]]] = [("/embeddings", {"content": "a"})]
    if model is None or not model.embedding:
        tries.insert(0, ("/completion", {"prompt": "a", "n_predict": 1, "cache_prompt": False}))
    for path, payload in tries:
        reply = await call(http, endpoint, "POST", path, payload, timeout_s=deadline.left(0.001))
        if reply.ok:
            done = isinstance(reply.data, (Mapping, list)) and bool(reply.data)
            return ProbeOutcome(done, "" if done else f"{reply.url} answered without work: {reply.message}")
        if reply.status not in (400, 404, 501):
            break
    return ProbeOutcome(False, f"HTTP {reply.status}: {reply.message}")
