"""Any server of the OpenAI dialect that is not ours to start: a cloud endpoint, another machine, a colleague's box.

The rules of this file
- It is probed and routed, never started or stopped, and takes nothing of this machine's memory.
- A probe costs nothing that somebody pays for: it reads the list of models; a token is asked for only where `completion` says so.
- A key comes from the environment: `api_key: ${NAME}`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pydantic import Field

from fleetd.core.data.specs import Capabilities, ExitKind, Footprint, Probes, ProbeSpec
from fleetd.engines.base import (
    Api,
    Endpoint,
    ExitVerdict,
    HeldModel,
    Launch,
    LaunchContext,
    OptionProblem,
    Options,
    ProbeOutcome,
    Resident,
)
from fleetd.engines.http import call
from fleetd.engines.load_options import held_option_problems, unmade_problems
from fleetd.engines.option_types import Count, Dialect, Secret
from fleetd.errors import EngineError

if TYPE_CHECKING:
    from aiohttp import ClientSession


class ExternalOptions(Options):
    """How the server is spoken to."""

    api: Dialect = Field(Api.OPENAI, description="the dialect of its port")
    api_key: Secret | None = Field(None, description="sent as a bearer token; write it as ${NAME}")
    concurrency: Count = Field(16, description="requests that it is given at once")


class External:
    """The engine `external`."""

    name = "external"
    capabilities = Capabilities(owns_process=False, many_models=True)
    options: type[Options] = ExternalOptions

    def api(self, options: ExternalOptions) -> Api:
        return options.api

    def concurrency(self, options: ExternalOptions) -> int:
        return options.concurrency

    def probes(self, options: Any) -> Probes:  # noqa: ARG002
        """Slow, since somebody else pays for it; through `alive`, which carries the key and looks at the answer's shape."""
        probe = ProbeSpec(completion=True, period_s=15.0, timeout_s=10.0, failures=3)
        return Probes(
            startup=ProbeSpec(completion=True, period_s=2.0, timeout_s=10.0, failures=1), readiness=probe, liveness=None
        )

    def validate(self, context: LaunchContext) -> Sequence[OptionProblem]:
        problems = []
        if context.command or context.args:
            problems.append(
                OptionProblem(("command",), "an external server is not ours to start: name it by `external:`")
            )
        if context.options.model_dump().get("api") == Api.NONE:
            problems.append(OptionProblem(("api",), "an external server that nothing is routed to has no use"))
        held = (*held_option_problems(context.models, {}, "external"), *unmade_problems(context.models, "external"))
        return [*problems, *held]

    def launch(self, context: LaunchContext) -> Launch:
        raise EngineError(
            f"{context.name}: the engine external starts nothing",
            hint="say where the server is: external: https://…",
            recoverable=False,
        )

    def estimate(self, context: LaunchContext, model: HeldModel | None) -> Footprint | None:  # noqa: ARG002
        return Footprint()

    def classify_exit(self, code: int | None, signal: str | None, log_tail: Sequence[str]) -> ExitVerdict:  # noqa: ARG002
        return ExitVerdict(ExitKind.UNKNOWN, "it is not ours: nobody saw how it ended")

    async def load(
        self, http: ClientSession, endpoint: Endpoint, model: HeldModel, timeout_s: float
    ) -> Mapping[str, int]:
        """Nothing is loaded; the server must know the model. Where it lists no models, that is taken on trust."""
        names = await _names(http, endpoint, timeout_s)
        if names and model.served_as not in names:
            shown = ", ".join(sorted(names)[:8]) + (" …" if len(names) > 8 else "")
            raise EngineError(
                f"{model.name}: {endpoint.base_url} has no model {model.served_as}; it lists {shown}", recoverable=False
            )
        return {}

    async def unload(self, http: ClientSession, endpoint: Endpoint, model: HeldModel, timeout_s: float) -> None:
        """Nothing of ours is held there."""

    async def loaded(self, http: ClientSession, endpoint: Endpoint) -> Sequence[Resident]:
        return tuple(Resident(name) for name in await _names(http, endpoint, 10.0))

    async def alive(
        self, http: ClientSession, endpoint: Endpoint, model: HeldModel | None, timeout_s: float
    ) -> ProbeOutcome:
        """The list of models, in its shape: no token, since somebody may pay for it."""
        try:
            names = await _names(http, endpoint, timeout_s)
        except EngineError as error:
            return ProbeOutcome.failed(error)
        if model is not None and names and model.served_as not in names:
            return ProbeOutcome(False, f"{endpoint.base_url} no longer lists {model.served_as}")
        return ProbeOutcome(True, f"it lists {len(names)} models")


ENGINE = External()


async def _names(http: ClientSession, endpoint: Endpoint, timeout_s: float) -> tuple[str, ...]:
    """Return the models it lists. Raises EngineError for a refusal, and for an answer that is no list of models."""
    reply = await call(http, endpoint, "GET", "/v1/models", timeout_s=timeout_s)
    return tuple(reply.word(entry, "id") for entry in reply.expect("listing models").listing("data"))
