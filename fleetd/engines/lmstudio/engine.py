"""The engine `lmstudio`: one server per user that loads many models; external, or started and stopped through `lms`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

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
from fleetd.engines.lmstudio import model_server
from fleetd.engines.lmstudio.model_server import LmStudioServer
from fleetd.engines.lmstudio.options import LOAD_OPTIONS, LmStudioOptions
from fleetd.engines.load_options import build_key_problems, load_option_problems
from fleetd.engines.options import Options, narrow
from fleetd.engines.program import find_program
from fleetd.errors import EngineError

if TYPE_CHECKING:
    from aiohttp import ClientSession

SERVER_MAIN = Path(__file__).with_name("server_main.py")
_HINT = "install LM Studio and run `lms bootstrap`, or use a running server: external: http://127.0.0.1:1234"
PLACES = ("~/.lmstudio/bin", "~/.cache/lm-studio/bin", "/opt/homebrew/bin", "/usr/local/bin")


class LmStudio:
    """The engine `lmstudio`."""

    name = "lmstudio"
    capabilities = Capabilities(many_models=True)
    options = LmStudioOptions
    server = LmStudioServer()
    sleep = None
    store = None
    startup = None

    def api(self, options: Options) -> Api:  # noqa: ARG002
        return Api.OPENAI

    def concurrency(self, options: Options) -> int:
        return narrow(options, LmStudioOptions).concurrency

    def probes(self, options: Options) -> Probes:  # noqa: ARG002
        """Probe readiness by the greeting, the only route whose answer names LM Studio."""
        return Probes(
            startup=ProbeSpec(completion=True, period_s=0.25, timeout_s=5.0, failures=1, deadline_s=120.0),
            readiness=ProbeSpec(http="/lmstudio-greeting", period_s=2.0, timeout_s=2.0, failures=3),
            liveness=ProbeSpec(completion=True, period_s=30.0, timeout_s=20.0, failures=3),
        )

    def validate(self, context: LaunchContext) -> Sequence[OptionProblem]:
        models = context.models
        return [*load_option_problems(models, LOAD_OPTIONS, "LM Studio"), *build_key_problems(models, "LM Studio")]

    def launch(self, context: LaunchContext) -> Launch:
        """Run `server_main.py`, which controls the server that `lms` starts."""
        options = narrow(context.options, LmStudioOptions)
        command = context.command or (find_program(context, "lms", _HINT, PLACES),)
        argv = [sys.executable, "-I", str(SERVER_MAIN), "--host", context.host, "--port", str(context.port or 1234)]
        argv += ["--cors"] if options.cors else []
        return Launch(argv=(*argv, *context.args, "--", *command))

    def estimate(self, context: LaunchContext, model: ServedModel | None) -> Footprint | None:  # noqa: ARG002
        """Return None for a model, which is learned at its first load; 0 for the server."""
        return Footprint() if model is None else None

    def classify_exit(self, code: int | None, signal: str | None, log_tail: Sequence[str]) -> ExitVerdict:
        last = exit_text.last_line(log_tail)
        if any("address already in use" in line.lower() or "eaddrinuse" in line.lower() for line in log_tail):
            return ExitVerdict(ExitKind.PORT_IN_USE, last or "its port is in use")
        if code == 2 and signal is None:
            return ExitVerdict(ExitKind.BAD_CONFIG, last or "the command line is wrong")
        return exit_text.from_status(code, signal, last if code or signal else "")

    async def alive(
        self, http: ClientSession, endpoint: Endpoint, model: ServedModel | None, timeout_s: float
    ) -> ProbeOutcome:
        try:
            return await model_server.alive(http, endpoint, model, timeout_s)
        except EngineError as error:
            return ProbeOutcome.failed(error)


ENGINE: Engine = LmStudio()
