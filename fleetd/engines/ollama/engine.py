"""The engine `ollama`: one server that loads many models.

Invariants:
- fleetd makes every decision that Ollama would otherwise make itself: what is loaded, for how long, and with which context
  length, since Ollama's default depends on the machine.
- Runners are children of the server and survive its kill: the host sweeps the whole process group.
"""

from __future__ import annotations

from collections.abc import Sequence
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
from fleetd.engines.ollama import model_server
from fleetd.engines.ollama.environment import SCRUBBED, TYPED, models_dir, rendered
from fleetd.engines.ollama.memory import estimate_model
from fleetd.engines.ollama.model_server import OllamaServer
from fleetd.engines.ollama.model_store import OllamaStore
from fleetd.engines.ollama.options import OllamaOptions
from fleetd.engines.ollama.validate import problems
from fleetd.engines.options import Options, narrow
from fleetd.engines.program import find_program
from fleetd.errors import EngineError

if TYPE_CHECKING:
    from aiohttp import ClientSession

_HINT = "install Ollama, or set its path: command: [/path/to/ollama, serve]"
PLACES = ("/opt/homebrew/bin", "/usr/local/bin", "/usr/bin", "/Applications/Ollama.app/Contents/Resources")
_PHRASES = (
    (ExitKind.PORT_IN_USE, "address already in use"),
    (ExitKind.BAD_CONFIG, "permission denied"),
    (ExitKind.BAD_CONFIG, "read-only file system"),
    (ExitKind.BAD_CONFIG, "not a directory"),
    (ExitKind.BAD_CONFIG, "unknown command"),
    (ExitKind.BAD_CONFIG, "unknown flag"),
    (ExitKind.BAD_CONFIG, "cannot assign requested address"),
    (ExitKind.OOM, "cannot allocate memory"),
    (ExitKind.OOM, "out of memory"),
    (ExitKind.CRASH, "panic:"),
    (ExitKind.CRASH, "fatal error:"),
)


class Ollama:
    """The engine `ollama`."""

    name = "ollama"
    capabilities = Capabilities(many_models=True)
    options = OllamaOptions
    server = OllamaServer()
    sleep = None
    store = OllamaStore()
    startup = None

    def api(self, options: Options) -> Api:  # noqa: ARG002
        return Api.OLLAMA

    def concurrency(self, options: Options) -> int:
        return narrow(options, OllamaOptions).num_parallel

    def probes(self, options: Options) -> Probes:  # noqa: ARG002
        """Probe by requests, since the port opens before the GPUs are found."""
        return Probes(
            startup=ProbeSpec(completion=True, period_s=0.05, timeout_s=2.0, failures=1, deadline_s=120.0),
            readiness=ProbeSpec(http="/api/version", period_s=2.0, timeout_s=2.0, failures=3),
            liveness=ProbeSpec(completion=True, period_s=30.0, timeout_s=20.0, failures=3),
        )

    def validate(self, context: LaunchContext) -> Sequence[OptionProblem]:
        return problems(context, narrow(context.options, OllamaOptions))

    def launch(self, context: LaunchContext) -> Launch:
        env = {variable: value for variable, (value, _) in rendered(context).items()}
        unset = (*SCRUBBED, *(variable for variable in TYPED.values() if variable not in env))
        folder = models_dir(context)
        return Launch(
            argv=(*(context.command or (find_program(context, "ollama", _HINT, PLACES), "serve")), *context.args),
            env=env,
            # OLLAMA_MODELS of the daemon's own environment stays, or the user's models would seem to be lost
            unset_env=tuple(key for key in unset if key not in context.env and key != "OLLAMA_MODELS"),
            requires=(folder,) if folder else (),
            named={folder: "models_dir"} if folder and narrow(context.options, OllamaOptions).models_dir else {},
        )

    def estimate(self, context: LaunchContext, model: ServedModel | None) -> Footprint | None:
        """Return the estimate from a GGUF header; the server's 50 MB are not counted."""
        return Footprint() if model is None else estimate_model(context, model)

    def classify_exit(self, code: int | None, signal: str | None, log_tail: Sequence[str]) -> ExitVerdict:
        for line in reversed(log_tail):
            for kind, phrase in _PHRASES:
                if phrase in line.lower():
                    return ExitVerdict(kind, line.strip()[: exit_text.LONGEST])
        return exit_text.from_status(code, signal, exit_text.last_line(log_tail) if code else "")

    async def alive(
        self, http: ClientSession, endpoint: Endpoint, model: ServedModel | None, timeout_s: float
    ) -> ProbeOutcome:
        try:
            return await model_server.alive(http, endpoint, model, timeout_s)
        except EngineError as error:
            return ProbeOutcome.failed(error)


ENGINE: Engine = Ollama()
