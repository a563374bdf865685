"""Any program that serves models on a port: mlx_lm.server, SGLang, TabbyAPI, whisper servers, a proxy to something else.

The rules of this file
- Nothing is known of the program, so nothing is guessed: the command is the user's, memory is declared and then learned,
  health is a path that the user names, else an open port.
- A served model is asked for by the name that the program knows it by (`served_as`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fleetd.core.data.specs import Capabilities, ExitKind, Footprint, Probes, ProbeSpec
from fleetd.engines.base import (
    Api,
    Endpoint,
    ExitVerdict,
    HeldModel,
    Launch,
    LaunchContext,
    OptionProblem,
    ProbeOutcome,
    Resident,
)
from fleetd.engines.http import call
from fleetd.engines.visible import visible_devices
from fleetd.errors import EngineError

if TYPE_CHECKING:
    from aiohttp import ClientSession

    from fleetd.engines.generic.options import ProcessOptions
    from fleetd.engines.options import Options

_PORT = ("address already in use", "eaddrinuse", "only one usage of each socket address")
_MEMORY = ("out of memory", "outofmemoryerror", "cannot allocate memory", "memoryerror", "bad_alloc")
_LONGEST = 300
_WORK = ("choices", "data", "embeddings", "message")  # where the dialects put what was asked for


class Process:
    """The engine `process`."""

    name = "process"
    capabilities = Capabilities()

    @property
    def options(self) -> type[Options]:
        """Loaded when asked for: a daemon that runs services needs none of it."""
        from fleetd.engines.generic.options import ProcessOptions

        return ProcessOptions

    def api(self, options: ProcessOptions) -> Api:
        return options.api

    def concurrency(self, options: ProcessOptions) -> int:
        return options.concurrency

    def probes(self, options: ProcessOptions) -> Probes:
        """Without a health path an open port is all that can be asked for; there is no liveness probe unless one is stated."""
        path = options.health
        return Probes(
            startup=ProbeSpec(http=path, tcp=path is None, period_s=0.1, timeout_s=2.0, failures=1, deadline_s=900.0),
            readiness=ProbeSpec(http=path, tcp=path is None, period_s=2.0, timeout_s=2.0, failures=3),
        )

    def validate(self, context: LaunchContext) -> Sequence[OptionProblem]:
        # imported when asked for: a daemon that runs services needs none of it
        from fleetd.engines.load_options import held_option_problems, unmade_problems

        server = "a program of your own"
        problems = [*held_option_problems(context.models, {}, server), *unmade_problems(context.models, server)]
        if not context.command:
            problems.append(
                OptionProblem(("command",), "the engine process needs a command: it starts whatever you name")
            )
        return problems

    def launch(self, context: LaunchContext) -> Launch:
        if not context.command:
            raise EngineError(f"{context.name}: the engine process needs a command", recoverable=False)
        env = visible_devices(context.device_uuid, None)  # nothing is hidden from a program that we do not know
        return Launch(
            argv=(*context.command, *context.args),
            env={key: value for key, value in env.items() if key not in context.env},
        )

    def estimate(self, context: LaunchContext, model: HeldModel | None) -> Footprint | None:  # noqa: ARG002
        return None

    def classify_exit(self, code: int | None, signal: str | None, log_tail: Sequence[str]) -> ExitVerdict:
        if code == 0:
            return ExitVerdict(ExitKind.EXPECTED)
        for kind, needles in ((ExitKind.PORT_IN_USE, _PORT), (ExitKind.OOM, _MEMORY)):
            for line in reversed(log_tail):
                if any(needle in line.lower() for needle in needles):
                    return ExitVerdict(kind, line.strip()[:_LONGEST])
        if signal is not None:
            return ExitVerdict(ExitKind.CRASH)
        if code is None:
            return ExitVerdict(ExitKind.UNKNOWN)
        last = next((line.strip()[:_LONGEST] for line in reversed(log_tail) if line.strip()), "")
        return ExitVerdict(ExitKind.CRASH, last)

    async def load(
        self,
        http: ClientSession,  # noqa: ARG002
        endpoint: Endpoint,
        model: HeldModel,
        timeout_s: float,  # noqa: ARG002
    ) -> Mapping[str, int]:
        raise EngineError(f"{endpoint.base_url} serves one model: {model.name} is loaded by starting its process")

    async def unload(
        self,
        http: ClientSession,  # noqa: ARG002
        endpoint: Endpoint,
        model: HeldModel,
        timeout_s: float,  # noqa: ARG002
    ) -> None:
        raise EngineError(f"{endpoint.base_url} serves one model: {model.name} is unloaded by stopping its process")

    async def loaded(self, http: ClientSession, endpoint: Endpoint) -> Sequence[Resident]:
        """Return the models that its OpenAI route lists; nothing where it has none."""
        reply = await call(http, endpoint, "GET", "/v1/models", timeout_s=5.0)
        if not reply.ok or not isinstance(reply.data, Mapping):
            return ()
        return tuple(Resident(reply.word(entry, "id")) for entry in reply.listing("data"))

    async def alive(
        self, http: ClientSession, endpoint: Endpoint, model: HeldModel | None, timeout_s: float
    ) -> ProbeOutcome:
        """Ask for one token (one vector of an embedding model), in the first dialect that has such a route."""
        loop = asyncio.get_running_loop()
        end = loop.time() + timeout_s
        said = ""
        try:
            for path, payload in _requests(model):
                left = max(0.001, end - loop.time())
                reply = await call(http, endpoint, "POST", path, payload, timeout_s=left)
                if reply.ok:
                    done = isinstance(reply.data, Mapping) and any(reply.data.get(key) for key in _WORK)
                    return ProbeOutcome(done, "" if done else f"{reply.url} answered without work: {reply.message}")
                said = f"HTTP {reply.status} from {path}: {reply.message}"
                if reply.status not in (404, 405, 501):
                    break
        except EngineError as error:
            return ProbeOutcome.failed(error)
        return ProbeOutcome(False, said)


ENGINE = Process()


def _requests(model: HeldModel | None) -> list[tuple[str, Mapping[str, Any]]]:
    name = {"model": model.served_as} if model is not None and model.served_as else {}
    if model is not None and model.embedding:
        return [("/v1/embeddings", {**name, "input": "a"}), ("/api/embed", {**name, "input": "a"})]
    messages = [{"role": "user", "content": "a"}]
    return [
        ("/v1/chat/completions", {**name, "messages": messages, "max_tokens": 1}),
        ("/v1/completions", {**name, "prompt": "a", "max_tokens": 1}),
        ("/api/chat", {**name, "messages": messages, "stream": False, "options": {"num_predict": 1}}),
    ]
