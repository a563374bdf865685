"""The engine `process`: any program that serves models on a port, such as mlx_lm.server, SGLang or a whisper server.

Invariants:
- fleetd knows nothing about the program: the command is the user's, memory is declared or learned, and health is a path that
  the user names, else an open port.
- A model is requested by the name that the program knows (`served_as`).
- This module loads no pydantic: a daemon that only runs services never needs it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

from fleetd.core.data.specs import Capabilities, ExitKind, Footprint, Probes, ProbeSpec
from fleetd.engines import exit_text
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
from fleetd.engines.visible_devices import visible_devices
from fleetd.errors import EngineError

if TYPE_CHECKING:
    from aiohttp import ClientSession

    from fleetd.engines.generic.options import ProcessOptions
    from fleetd.engines.options import Options

_CAUSES = (
    (ExitKind.PORT_IN_USE, ("address already in use", "eaddrinuse", "only one usage of each socket address")),
    (ExitKind.OOM, ("out of memory", "outofmemoryerror", "cannot allocate memory", "memoryerror", "bad_alloc")),
)
_WORK = ("choices", "data", "embeddings", "message")  # the keys under which the dialects return results


class GenericEngine:
    """The engine `process`."""

    name = "process"
    capabilities = Capabilities()
    server = None
    sleep = None
    store = None
    startup = None

    @property
    def options(self) -> type[Options]:
        """Import the options on demand, since they need pydantic."""
        from fleetd.engines.generic.options import ProcessOptions

        return ProcessOptions

    def api(self, options: Options) -> Api:
        return _process_options(options).api

    def concurrency(self, options: Options) -> int:
        return _process_options(options).concurrency

    def probes(self, options: Options) -> Probes:
        """Probe the health path, or an open port without one; no liveness by default."""
        path = _process_options(options).health
        return Probes(
            startup=ProbeSpec(http=path, tcp=path is None, period_s=0.1, timeout_s=2.0, failures=1, deadline_s=900.0),
            readiness=ProbeSpec(http=path, tcp=path is None, period_s=2.0, timeout_s=2.0, failures=3),
        )

    def validate(self, context: LaunchContext) -> Sequence[OptionProblem]:
        from fleetd.engines.load_options import build_key_problems, load_option_problems  # they need pydantic

        server = "a program of your own"
        problems = [*load_option_problems(context.models, {}, server), *build_key_problems(context.models, server)]
        if not context.command:
            problems.append(OptionProblem(("command",), "is required by the engine process: it has no default program"))
        return problems

    def launch(self, context: LaunchContext) -> Launch:
        if not context.command:
            raise EngineError(f"{context.name}: the engine process needs a command", recoverable=False)
        env = visible_devices(context.device_uuid, None)  # an unknown program keeps its GPUs on `host` too
        return Launch(
            argv=(*context.command, *context.args),
            env={key: value for key, value in env.items() if key not in context.env},
        )

    def estimate(self, context: LaunchContext, model: ServedModel | None) -> Footprint | None:  # noqa: ARG002
        return None

    def classify_exit(self, code: int | None, signal: str | None, log_tail: Sequence[str]) -> ExitVerdict:
        found = exit_text.from_log(_CAUSES, log_tail) if code != 0 else None
        return found or exit_text.from_status(code, signal, exit_text.last_line(log_tail) if code else "")

    async def alive(
        self, http: ClientSession, endpoint: Endpoint, model: ServedModel | None, timeout_s: float
    ) -> ProbeOutcome:
        """Request one token, or one vector, in the first dialect whose route exists."""
        deadline = Deadline(timeout_s)
        failure = ""
        try:
            for path, payload in _requests(model):
                reply = await call(http, endpoint, "POST", path, payload, timeout_s=deadline.left(0.001))
                if reply.ok:
                    done = isinstance(reply.data, Mapping) and any(reply.data.get(key) for key in _WORK)
                    return ProbeOutcome(done, "" if done else f"{reply.url} answered without work: {reply.message}")
                failure = f"HTTP {reply.status} from {path}: {reply.message}"
                if reply.status not in (404, 405, 501):
                    break
        except EngineError as error:
            return ProbeOutcome.failed(error)
        return ProbeOutcome(False, failure)


ENGINE: Engine = GenericEngine()


def _process_options(options: Options) -> ProcessOptions:
    """Return the options unchecked: the daemon has a plain object with the attributes."""
    return cast("ProcessOptions", options)


def _requests(model: ServedModel | None) -> list[tuple[str, Mapping[str, Any]]]:
    name = {"model": model.served_as} if model is not None and model.served_as else {}
    if model is not None and model.embedding:
        return [("/v1/embeddings", {**name, "input": "a"}), ("/api/embed", {**name, "input": "a"})]
    messages = [{"role": "user", "content": "a"}]
    return [
        ("/v1/chat/completions", {**name, "messages": messages, "max_tokens": 1}),
        ("/v1/completions", {**name, "prompt": "a", "max_tokens": 1}),
        ("/api/chat", {**name, "messages": messages, "stream": False, "options": {"num_predict": 1}}),
    ]
