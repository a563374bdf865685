"""The engine `external`: any server of the OpenAI dialect that fleetd does not start, such as a cloud endpoint.

Invariants:
- It is probed and routed, never started or stopped, and takes none of this machine's memory.
- A probe reads the list of models and requests no token, since tokens may cost money.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from fleetd.core.data.specs import Capabilities, ExitKind, Footprint, Probes, ProbeSpec
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
from fleetd.engines.external.options import ExternalOptions
from fleetd.engines.listed_models import LISTED_MODELS, listed_names
from fleetd.engines.load_options import build_key_problems, load_option_problems
from fleetd.engines.options import Options, narrow
from fleetd.errors import EngineError

if TYPE_CHECKING:
    from aiohttp import ClientSession


class External:
    """The engine `external`."""

    name = "external"
    capabilities = Capabilities(owns_process=False, many_models=True)
    options = ExternalOptions
    server = LISTED_MODELS
    sleep = None
    store = None
    startup = None

    def api(self, options: Options) -> Api:
        return narrow(options, ExternalOptions).api

    def concurrency(self, options: Options) -> int:
        return narrow(options, ExternalOptions).concurrency

    def probes(self, options: Options) -> Probes:  # noqa: ARG002
        """Probe slowly through `alive`, which sends the key and checks the answer."""
        probe = ProbeSpec(completion=True, period_s=15.0, timeout_s=10.0, failures=3)
        return Probes(
            startup=ProbeSpec(completion=True, period_s=2.0, timeout_s=10.0, failures=1), readiness=probe, liveness=None
        )

    def validate(self, context: LaunchContext) -> Sequence[OptionProblem]:
        problems = []
        if context.command or context.args:
            problems.append(
                OptionProblem(("command",), "fleetd does not start an external server (give its address: external: …)")
            )
        if narrow(context.options, ExternalOptions).api == Api.NONE:
            problems.append(OptionProblem(("api",), "an external server must be routed to: use openai or ollama"))
        models = context.models
        return [*problems, *load_option_problems(models, {}, "external"), *build_key_problems(models, "external")]

    def launch(self, context: LaunchContext) -> Launch:
        raise EngineError(
            f"{context.name}: the engine external starts no process",
            hint="give the server's address: external: https://…",
            recoverable=False,
        )

    def estimate(self, context: LaunchContext, model: ServedModel | None) -> Footprint | None:  # noqa: ARG002
        return Footprint()

    def classify_exit(self, code: int | None, signal: str | None, log_tail: Sequence[str]) -> ExitVerdict:  # noqa: ARG002
        return ExitVerdict(ExitKind.UNKNOWN, "an external server: fleetd does not see why it exited")

    async def alive(
        self, http: ClientSession, endpoint: Endpoint, model: ServedModel | None, timeout_s: float
    ) -> ProbeOutcome:
        """Read the list of models and check its shape."""
        try:
            names = await listed_names(http, endpoint, timeout_s)
        except EngineError as error:
            return ProbeOutcome.failed(error)
        if model is not None and names and model.served_as not in names:
            return ProbeOutcome(False, f"{endpoint.base_url} no longer lists {model.served_as}")
        return ProbeOutcome(True, f"it lists {len(names)} models")


ENGINE: Engine = External()
