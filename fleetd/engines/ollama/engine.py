"""Ollama: one server that holds many models. `fleetd` owns every decision that Ollama would else take by itself.

The rules of this file
- Ollama refuses no bad value: it warns, takes its default, or takes any text as true. So every variable is typed here.
- A loaded model stays until fleetd unloads it (keep_alive -1); loads run on fleetd's own connection, since Ollama aborts a
  load whose client leaves; the context length is always given, since Ollama's default depends on the machine.
- A model counts as loaded when GET /api/ps lists it, as unloaded when that no longer does.
- Runners are children of the server: they live on when it is killed. The host sweeps its whole process group.
- Measured bytes are filed under `gpu`, which stands for the server's own device, and `host`; the daemon knows their names.
"""

from __future__ import annotations

import asyncio
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
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
    Options,
    ProbeOutcome,
    Resident,
)
from fleetd.engines.http import Reply, call, until
from fleetd.engines.load_options import load_options
from fleetd.engines.ollama.environment import SCRUBBED, TYPED, doubts, env_problems, render_env
from fleetd.engines.ollama.memory import estimate_held
from fleetd.engines.ollama.models import (
    LOAD_TIME_OPTIONS,
    absent_sources,
    held_problems,
    library,
    one_at_a_time,
    prepare,
    recipe_of,
    shared_store,
)
from fleetd.engines.ollama.options import OllamaOptions
from fleetd.engines.visible import visible_devices
from fleetd.errors import EngineError
from fleetd.models.memory_estimate import PROCESS_BYTES, GgufServing
from fleetd.models.ollama import store
from fleetd.models.ollama.sync import Library, StoreChange
from fleetd.units import expand_home

if TYPE_CHECKING:
    from aiohttp import ClientSession

    from fleetd.models.ollama.api import Progress
    from fleetd.models.ollama.modelfile import ModelRecipe


DEFAULT_LOADED_MODELS = 8
GENERATE_REFUSED = "does not support generate"
POLL_S = 0.015
OLDEST = (0, 5, 5)  # the first whose /api/create takes files by their digest

PLACES = ("/opt/homebrew/bin", "/usr/local/bin", "/usr/bin", "/Applications/Ollama.app/Contents/Resources")


class Ollama:
    """The engine `ollama`."""

    name = "ollama"
    capabilities = Capabilities(many_models=True, loads_in_place=True, can_quantize=True)
    options: type[Options] = OllamaOptions

    def api(self, options: Any) -> Api:  # noqa: ARG002
        return Api.OLLAMA

    def concurrency(self, options: OllamaOptions) -> int:
        return options.num_parallel

    def probes(self, options: Any) -> Probes:  # noqa: ARG002
        """Readiness is an answer: the port is open long before GPUs are found, which may take 30 s. The first one has a version."""
        version = "/api/version"
        return Probes(
            startup=ProbeSpec(completion=True, period_s=0.05, timeout_s=2.0, failures=1, deadline_s=120.0),
            readiness=ProbeSpec(http=version, period_s=2.0, timeout_s=2.0, failures=3),
            liveness=ProbeSpec(completion=True, period_s=30.0, timeout_s=20.0, failures=3),
        )

    # -- configuration --------------------------------------------------------------------------------------------------

    def validate(self, context: LaunchContext) -> Sequence[OptionProblem]:
        options = _options(context)
        problems = env_problems(_rendered(context), context.env)
        if context.args:
            problems.append(OptionProblem(("args",), "`ollama serve` takes no arguments"))
        if options.api_key is not None and not context.external:
            problems.append(
                OptionProblem(("api_key",), "Ollama itself asks for no key: this is for an `external` server")
            )
        if options.kv_cache_type not in (None, "f32", "f16", "bf16"):
            if options.flash_attention is False:
                problems.append(
                    OptionProblem(
                        ("kv_cache_type",), f"{options.kv_cache_type} needs flash attention, which is false here"
                    )
                )
            elif options.flash_attention is None:
                message = f"{options.kv_cache_type} takes effect with flash attention only: set flash_attention: true"
                problems.append(OptionProblem(("kv_cache_type",), message, warning=True))
        absent = absent_sources(context.models, context.config_dir, _store(context))
        return [*problems, *doubts(context, options, _models_dir(context)), *held_problems(context.models), *absent]

    def launch(self, context: LaunchContext) -> Launch:
        rendered = {variable: value for variable, (value, _) in _rendered(context).items()}
        unset = (*SCRUBBED, *(variable for variable in TYPED.values() if variable not in rendered))
        return Launch(
            argv=(*(context.command or (_program(context), "serve")), *context.args),
            env=rendered,
            # OLLAMA_MODELS of the daemon's own environment stays: without it a user's models would seem to be gone
            unset_env=tuple(key for key in unset if key not in context.env and key != "OLLAMA_MODELS"),
            requires=tuple(filter(None, (folder := _models_dir(context),))),
            named={folder: "models_dir"} if folder and _options(context).models_dir is not None else {},
        )

    def estimate(self, context: LaunchContext, model: HeldModel | None) -> Footprint | None:
        """The server itself costs some 50 MB, which is not accounted for; a held model costs what its GGUF header says."""
        if model is None:
            return Footprint()
        return estimate_held(context, model, _store(context), _serving(context, _options(context)))

    def classify_exit(self, code: int | None, signal: str | None, log_tail: Sequence[str]) -> ExitVerdict:
        for line in reversed(log_tail):
            for needle, kind in _EXITS:
                if needle in line.lower():
                    return ExitVerdict(kind, line.strip()[:300])
        if signal is not None:
            return ExitVerdict(ExitKind.CRASH)
        if code == 0:
            return ExitVerdict(ExitKind.EXPECTED)
        if code is None:
            return ExitVerdict(ExitKind.UNKNOWN)
        last = next((line.strip()[:300] for line in reversed(log_tail) if line.strip()), "")
        return ExitVerdict(ExitKind.CRASH, last)

    # -- the store ------------------------------------------------------------------------------------------------------

    def store_key(self, context: LaunchContext, endpoint: Endpoint) -> str:
        """Return what is equal for servers that share one store."""
        folder = shared_store(endpoint, _store(context))
        return str(folder.resolve()) if folder is not None else endpoint.base_url

    def library(self, http: ClientSession, endpoint: Endpoint, context: LaunchContext, state_dir: Path) -> Library:
        """Return the store of a server, to compare with what fleet.yaml wants."""
        return library(http, endpoint, _store(context), state_dir)

    def recipe(self, context: LaunchContext, model: HeldModel) -> ModelRecipe:
        """Return how a held model is made. Raises EngineError."""
        return recipe_of(model, context.config_dir)

    def one_at_a_time(self, key: str) -> asyncio.Lock:
        return one_at_a_time(key)

    def stands_alone(
        self, context: LaunchContext, endpoint: Endpoint | None, model: HeldModel, state_dir: Path
    ) -> bool:
        """Return whether the store has the model's own bytes: the file that it was made from may be absent then. Blocks."""
        if endpoint is None:
            return False
        folder = shared_store(endpoint, _store(context))
        if folder is not None:
            return store.model_file(folder, model.served_as) is not None
        return Library(None, endpoint.base_url, state_dir).copied(model.served_as)  # type: ignore[arg-type]

    # -- models ---------------------------------------------------------------------------------------------------------

    async def prepare(
        self,
        http: ClientSession,
        endpoint: Endpoint,
        context: LaunchContext,
        model: HeldModel,
        state_dir: Path,
        progress: Progress | None = None,
    ) -> str | None:
        """Make a model that fleet.yaml gives a `from` for, before it is loaded; return a sentence when something was done."""
        step = await prepare(
            http, endpoint, context, model, models_dir=_store(context), state_dir=state_dir, progress=progress
        )
        if step is None or step.change in (StoreChange.NONE, StoreChange.FOREIGN):
            return None
        return f"{model.served_as}: {step.change}d, {step.reason}"

    async def load(
        self, http: ClientSession, endpoint: Endpoint, model: HeldModel, timeout_s: float
    ) -> Mapping[str, int]:
        """Load with no prompt, then wait until the server lists it. The bytes are the server's own measure."""
        loop = asyncio.get_running_loop()
        end = loop.time() + timeout_s
        reply = await _ask_empty(http, endpoint, model, -1, timeout_s)
        _check_load(reply, model, endpoint)
        found: dict[str, Mapping[str, Any]] = {}

        async def listed() -> bool:
            entry = await _entry(http, endpoint, model.served_as, max(0.1, end - loop.time()))
            if entry is not None:
                found["entry"] = entry
            return entry is not None

        what = f"{endpoint.base_url} says it loaded {model.served_as}, yet /api/ps does not list it"
        try:
            await until(listed, timeout_s=max(0.1, min(2.0, end - loop.time())), period_s=POLL_S, what=what)
        except EngineError as error:
            error.hint = (
                "two names over one blob share a runner in Ollama, which then lists one of them: give each a `from:`"
            )
            raise
        return device_bytes(found["entry"])

    async def unload(self, http: ClientSession, endpoint: Endpoint, model: HeldModel, timeout_s: float) -> None:
        """Ask, then poll until the server no longer lists it: Ollama answers before the runner is gone."""
        loop = asyncio.get_running_loop()
        end = loop.time() + timeout_s
        payload = {"model": model.served_as, "keep_alive": 0, "stream": False}
        reply = await call(http, endpoint, "POST", "/api/generate", payload, timeout_s=timeout_s)
        if reply.status != 404:  # a model deleted from the store meanwhile may still be resident: the poll tells
            reply.expect(f"unloading {model.served_as}")

        async def gone() -> bool:
            return await _entry(http, endpoint, model.served_as, max(0.1, end - loop.time())) is None

        what = f"{endpoint.base_url} still holds {model.served_as}"
        await until(gone, timeout_s=max(0.1, end - loop.time()), period_s=POLL_S, what=what)

    async def loaded(self, http: ClientSession, endpoint: Endpoint) -> Sequence[Resident]:
        """Return what /api/ps lists, by canonical name. A model that is still loading is not listed by Ollama."""
        return tuple(
            Resident(self.canonical_name(_name(entry)), device_bytes(entry), entry["context_length"] or None)
            for entry in await _entries(http, endpoint, 5.0)
        )

    async def alive(
        self, http: ClientSession, endpoint: Endpoint, model: HeldModel | None, timeout_s: float
    ) -> ProbeOutcome:
        """One real token from a model that is loaded; when none is, an answer of the server. Never causes a load."""
        try:
            entries = await _entries(http, endpoint, timeout_s)
            if model is not None:
                entries = [entry for entry in entries if store.same_name(_name(entry), model.served_as)]
            if not entries:
                version = await _check_version(http, endpoint, timeout_s)
                return ProbeOutcome(True, f"no model is loaded; the server answers, version {version}")
            return await _one_token(http, endpoint, entries[0], model, timeout_s)
        except EngineError as error:
            return ProbeOutcome.failed(error)

    def canonical_name(self, served_as: str) -> str:
        """Return the form in which `loaded` names a model: implied parts left out, `:latest` too."""
        try:
            return store.ModelName.parse(served_as).short.removesuffix(":latest")
        except ValueError:
            return served_as


ENGINE = Ollama()

_EXITS = (
    ("address already in use", ExitKind.PORT_IN_USE),
    ("permission denied", ExitKind.BAD_CONFIG),
    ("read-only file system", ExitKind.BAD_CONFIG),
    ("not a directory", ExitKind.BAD_CONFIG),
    ("unknown command", ExitKind.BAD_CONFIG),
    ("unknown flag", ExitKind.BAD_CONFIG),
    ("cannot assign requested address", ExitKind.BAD_CONFIG),
    ("cannot allocate memory", ExitKind.OOM),
    ("out of memory", ExitKind.OOM),
    ("panic:", ExitKind.CRASH),
    ("fatal error:", ExitKind.CRASH),
)


def device_bytes(entry: Mapping[str, Any]) -> dict[str, int]:
    """Split one entry of /api/ps: `size_vram` lies on the server's own device, named "gpu" here, the rest on "host".

    The runner's own process, which Ollama leaves out, is added to the host's part.
    """
    size, vram = entry["size"], entry["size_vram"]
    parts = {"gpu": min(size, vram), "host": max(0, size - vram) + PROCESS_BYTES}
    return {name: count for name, count in parts.items() if count}


def pinned_options(model: HeldModel) -> dict[str, Any]:
    """The load-time options that every request to this model must carry: others would make Ollama load it anew."""
    return load_options(model, LOAD_TIME_OPTIONS)


# -- configuration, from here on ----------------------------------------------------------------------------------------


def _options(context: LaunchContext) -> OllamaOptions:
    if not isinstance(context.options, OllamaOptions):
        raise TypeError(f"{context.name}: options of another engine: {type(context.options).__name__}")
    return context.options


def _program(context: LaunchContext) -> str:
    found = shutil.which("ollama", path=context.env.get("PATH"))
    if found is None:
        found = shutil.which("ollama", path=os.pathsep.join(PLACES))
    if found is None:
        raise EngineError(
            f"{context.name}: no program named ollama on PATH",
            hint="install Ollama, or name the program: command: [/path/to/ollama, serve]",
            recoverable=False,
        )
    return found


def _models_dir(context: LaunchContext) -> str | None:
    """The store's absolute path; None where Ollama's own default applies."""
    text = _options(context).models_dir or context.env.get("OLLAMA_MODELS") or os.environ.get("OLLAMA_MODELS")
    if not text:
        return None
    return str(context.config_dir.absolute() / expand_home(text))


def _store(context: LaunchContext) -> Path:
    """The store's folder, Ollama's own default included."""
    return Path(_models_dir(context) or Path.home() / ".ollama" / "models")


def _rendered(context: LaunchContext) -> dict[str, tuple[str, str]]:
    """Variable → (value, the option that sets it)."""
    options = _options(context)
    rendered = render_env(options)
    if options.models_dir is not None:
        rendered["OLLAMA_MODELS"] = (_models_dir(context) or "", "models_dir")
    wanted = options.max_loaded_models or max(len(context.models), DEFAULT_LOADED_MODELS)
    rendered["OLLAMA_MAX_LOADED_MODELS"] = (str(wanted), "max_loaded_models")
    host = f"[{context.host}]" if ":" in context.host else context.host
    rendered["OLLAMA_HOST"] = (f"{host}:{context.port or 11434}", "port")
    for variable, value in visible_devices(context.device_uuid, context.device).items():
        rendered[variable] = (value, "device")
    if "GIN_MODE" not in context.env:
        rendered["GIN_MODE"] = ("release", "")  # else every start logs the list of its routes
    return rendered


def _serving(context: LaunchContext, options: OllamaOptions) -> GgufServing:
    kind = options.kv_cache_type or "f16"
    return GgufServing(
        context_length=options.context_length,
        slots=options.num_parallel,
        cache_type_k=kind,
        cache_type_v=kind,
        flash_attention=options.flash_attention is not False,
        gpu_layers=0 if context.device in (None, "host") else options.n_gpu_layers,
        unified=context.device == "unified",
        prompt_cache_bytes=options.cache_ram,
    )


# -- the wire -----------------------------------------------------------------------------------------------------------


def _name(entry: Mapping[str, Any]) -> str:
    return str(entry["name"])


async def _entries(http: ClientSession, endpoint: Endpoint, timeout_s: float) -> list[Mapping[str, Any]]:
    """Return what is loaded, in the shape that is read here: a name, and counts that may be left out."""
    reply = await call(http, endpoint, "GET", "/api/ps", timeout_s=timeout_s)
    entries = reply.expect("listing loaded models").listing("models")
    counted = ("size", "size_vram", "context_length")
    return [
        {"name": reply.word(entry, "model", "name"), **{key: reply.count(entry, key) for key in counted}}
        for entry in entries
    ]


async def _check_version(http: ClientSession, endpoint: Endpoint, timeout_s: float) -> str:
    """Return the server's version. Raises EngineError for one that lacks what is asked of it here; builds have none (0.0.0)."""
    reply = (await call(http, endpoint, "GET", "/api/version", timeout_s=timeout_s)).expect("asking for the version")
    text = reply.word(reply.mapping(), "version")
    found = re.match(r"v?(\d+)\.(\d+)\.(\d+)", text)
    version = tuple(map(int, found.groups())) if found is not None else (0, 0, 0)
    if (0, 0, 0) < version < OLDEST:
        oldest = ".".join(map(str, OLDEST))
        message = f"{reply.url} says Ollama {text}; fleetd needs {oldest} or newer"
        raise EngineError(message, key="command", recoverable=False)
    return text


async def _entry(http: ClientSession, endpoint: Endpoint, served_as: str, timeout_s: float) -> Mapping[str, Any] | None:
    entries = await _entries(http, endpoint, timeout_s)
    return next((entry for entry in entries if store.same_name(_name(entry), served_as)), None)


async def _ask_empty(
    http: ClientSession, endpoint: Endpoint, model: HeldModel, keep_alive: int, timeout_s: float
) -> Reply:
    """A request without a prompt: Ollama loads and generates nothing. Models that only embed have a route of their own."""
    payload = {"model": model.served_as, "keep_alive": keep_alive, "options": pinned_options(model), "stream": False}
    if not model.embedding:
        reply = await call(http, endpoint, "POST", "/api/generate", payload, timeout_s=timeout_s)
        if reply.status != 400 or GENERATE_REFUSED not in reply.message:
            return reply
    del payload["stream"]
    return await call(http, endpoint, "POST", "/api/embed", payload, timeout_s=timeout_s)


def _check_load(reply: Reply, model: HeldModel, endpoint: Endpoint) -> None:
    """Raise EngineError unless the model is loaded; say whether trying again can help."""
    if reply.ok:
        reply.mapping()
        return
    message = reply.message
    lowered = message.lower()
    if reply.status == 404:
        hint = f"ollama pull {model.served_as} (with OLLAMA_HOST={endpoint.base_url}), or name its file: models.{model.name}.from"
        raise EngineError(
            f"{model.name}: {endpoint.base_url} has no model {model.served_as}", hint=hint, recoverable=False
        )
    if reply.status == 400 and GENERATE_REFUSED in lowered:
        hint = "its file may be gone: is the drive mounted? Else create the model again"
        raise EngineError(f"{model.name}: {message}", hint=hint, recoverable=False)
    recoverable = reply.status >= 499 and not any(needle in lowered for needle in _HOPELESS)
    raise EngineError(
        f"{model.name}: {endpoint.base_url} cannot load {model.served_as}: {message}", recoverable=recoverable
    )


_HOPELESS = (
    "unable to load model",
    "unsupported model architecture",
    "unknown model architecture",
    "unsupported cache type",
    "must be of type",
    "invalid model name",
)


async def _one_token(
    http: ClientSession, endpoint: Endpoint, entry: Mapping[str, Any], model: HeldModel | None, timeout_s: float
) -> ProbeOutcome:
    """Generate one token with the very options the model is loaded with, so that the probe causes no new load."""
    name = _name(entry)
    options = pinned_options(model) if model is not None else {}
    context_length = entry["context_length"]
    if context_length:
        options["num_ctx"] = context_length
    payload: dict[str, Any] = {"model": name, "keep_alive": -1, "options": options}
    if model is None or not model.embedding:
        generate = {**payload, "prompt": "a", "raw": True, "stream": False, "options": {**options, "num_predict": 1}}
        reply = await call(http, endpoint, "POST", "/api/generate", generate, timeout_s=timeout_s)
        if reply.ok:
            return ProbeOutcome(reply.mapping().get("done") is True, f"{name} generated one token")
        if reply.status == 503:
            return ProbeOutcome(True, f"{name} is busy: {reply.message}")
        if reply.status != 400 or GENERATE_REFUSED not in reply.message:
            return ProbeOutcome(False, f"{name}: HTTP {reply.status}: {reply.message}")
    reply = await call(http, endpoint, "POST", "/api/embed", {**payload, "input": "a"}, timeout_s=timeout_s)
    return ProbeOutcome(reply.ok, f"{name} embedded one token" if reply.ok else f"{name}: {reply.message}")
