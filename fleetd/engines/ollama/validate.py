"""Check what the types of Ollama's options cannot express: variables in `env`, risky settings, and the models it serves.

Invariants:
- Ollama takes a boolean in Go's grammar and every other text as true, so `off` would enable an option: such text is rejected.
- A variable that an option (or its default) sets is rejected in `env`, where one of the two would lose silently.
- `from`, `quantize` and `modelfile` are checked here, since Ollama reports mistakes only when it builds the model.
- Load-time options are rejected for a model that fleetd does not build: they would be lost at the first request to /v1.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from fleetd.config.validate.raw_entries import read
from fleetd.engines.base import LaunchContext, OptionProblem, ServedModel
from fleetd.engines.load_options import load_option_problems
from fleetd.engines.ollama.environment import SCRUBBED, TYPED, models_dir, rendered, store_folder
from fleetd.engines.ollama.options import LOAD_TIME_OPTIONS, OllamaOptions
from fleetd.models.ollama import store
from fleetd.models.ollama.modelfile import (
    absolute,
    looks_like_path,
    modelfile_problems,
    quantize_problems,
    source_problems,
)
from fleetd.units import shown

RUNNER_PORTS_FROM = 32768
GO_BOOLEANS = frozenset({"1", "t", "T", "TRUE", "true", "True", "0", "f", "F", "FALSE", "false", "False"})
# variables of Ollama without an option of their own
UNTYPED = frozenset(
    {
        "OLLAMA_NOHISTORY", "OLLAMA_EDITOR", "OLLAMA_AUTH", "OLLAMA_API_KEY", "OLLAMA_EXPERIMENT", "OLLAMA_CLOUD_BASE_URL",
        "OLLAMA_LLAMA_CPP_COMPAT", "OLLAMA_AGENT_DISABLE_SHELL", "OLLAMA_AGENT_DISABLE_WEBSEARCH", "OLLAMA_HOST",
    }
)  # fmt: skip
REMOVED = frozenset(
    {
        "OLLAMA_NEW_ENGINE", "OLLAMA_NEW_ESTIMATES", "OLLAMA_MULTIUSER_CACHE", "OLLAMA_INTEL_GPU", "OLLAMA_TMPDIR",
        "OLLAMA_RUNNERS_DIR", "OLLAMA_MAX_VRAM",
    }
)  # fmt: skip

_BOOLEANS = frozenset(
    {
        "OLLAMA_FLASH_ATTENTION", "OLLAMA_SCHED_SPREAD", "OLLAMA_IGPU_ENABLE", "OLLAMA_VULKAN", "OLLAMA_NOPRUNE",
        "OLLAMA_NO_CLOUD", "OLLAMA_GO_TEMPLATE", "OLLAMA_DEBUG_LOG_REQUESTS", "OLLAMA_NOHISTORY",
    }
)  # fmt: skip
_NUMBERS = frozenset(
    {
        "OLLAMA_CONTEXT_LENGTH", "OLLAMA_NUM_PARALLEL", "OLLAMA_MAX_LOADED_MODELS", "OLLAMA_MAX_QUEUE", "OLLAMA_GPU_OVERHEAD",
        "OLLAMA_MAX_TRANSFER_STREAMS",
    }
)  # fmt: skip
_DURATIONS = frozenset({"OLLAMA_KEEP_ALIVE", "OLLAMA_LOAD_TIMEOUT"})
_GO_DURATION = re.compile(
    r"[+-]?(\d+(\.\d*)?|\.\d+)(ns|us|µs|ms|s|m|h)((\d+(\.\d*)?|\.\d+)(ns|us|µs|ms|s|m|h))*|[+-]?\d+"
)
_GPU_LIBRARIES = ("cuda_", "rocm", "vulkan", "metal", "mlx")
_RESERVED = (":local", ":cloud", "-cloud")


def problems(context: LaunchContext, options: OllamaOptions) -> list[OptionProblem]:
    """Return every mistake and warning of an entry and of the models it serves."""
    return [
        *_variables(rendered(context), context.env),
        *_options(context, options),
        *_warnings(context, options),
        *_models(context.models),
        *_missing_sources(context.models, context.config_dir, store_folder(context)),
    ]


def _options(context: LaunchContext, options: OllamaOptions) -> Iterator[OptionProblem]:
    if context.args:
        yield OptionProblem(("args",), "`ollama serve` takes no arguments")
    if options.api_key is not None and not context.external:
        yield OptionProblem(("api_key",), "Ollama itself requires no key: this is for an `external` server")
    kind = options.kv_cache_type
    if kind not in (None, "f32", "f16", "bf16"):
        if options.flash_attention is False:
            yield OptionProblem(("kv_cache_type",), f"{kind} needs flash attention, which is false here")
        elif options.flash_attention is None:
            message = f"{kind} has an effect only with flash attention: set flash_attention: true"
            yield OptionProblem(("kv_cache_type",), message, warning=True)


def _variables(owned: Mapping[str, tuple[str, str]], env: Mapping[str, str]) -> list[OptionProblem]:
    """Return the mistakes in `env`; `owned` are the variables that the engine sets."""
    problems = []
    for key, value in env.items():
        if key in owned:
            option = owned[key][1]
            owner = option if option in ("port", "device") else f"options.{option}"
            problems.append(OptionProblem(("env", key), f"{owner} sets it already: remove one of the two"))
        elif key in SCRUBBED:
            problems.append(
                OptionProblem(("env", key), "every load would fail: Ollama cannot reach its runners with it")
            )
        elif key in REMOVED:
            problems.append(OptionProblem(("env", key), "has no effect: Ollama no longer reads it", warning=True))
        elif key.startswith("OLLAMA_"):
            problems.extend(_value_problems(key, value))
    return problems


def _value_problems(key: str, value: str) -> list[OptionProblem]:
    text = value.strip().strip("\"'")
    if key in _BOOLEANS and text and text not in GO_BOOLEANS:
        return [OptionProblem(("env", key), f"{value!r} is neither true nor false: Ollama would take it as true")]
    if key in _NUMBERS and text and not text.isdecimal():
        return [OptionProblem(("env", key), f"{value!r} is not a whole number: Ollama would use its default")]
    if key in _DURATIONS and text and not _GO_DURATION.fullmatch(text):
        message = f"{value!r} is not a duration (use 5m, 1h30m, or seconds): Ollama would use its default"
        return [OptionProblem(("env", key), message)]
    known = [*TYPED.values(), *UNTYPED, "OLLAMA_MODELS"]
    if key not in known:
        near = difflib.get_close_matches(key, known, 1)
        hint = f": did you mean {near[0]}?" if near else ""
        return [OptionProblem(("env", key), f"unknown variable of Ollama{hint}", warning=True)]
    return []


def _warnings(context: LaunchContext, options: OllamaOptions) -> list[OptionProblem]:
    found: list[tuple[str, str]] = []
    if options.gpu_overhead:
        found.append(("gpu_overhead", "has no effect since Ollama 0.30: set the budget of the device instead"))
    if options.keep_alive >= 0:
        found.append(("keep_alive", "Ollama would unload models by itself: leave it at -1 and use the model's ttl"))
    limit, count = options.max_loaded_models, len(context.models)
    if limit is not None and limit < count:
        message = f"{limit} is less than the {count} models served here: Ollama would evict models by itself"
        found.append(("max_loaded_models", message))
    if not options.noprune and options.models_dir is not None:
        found.append(("noprune", "false: at every start the server deletes blobs that no manifest names"))
    library = options.llm_library
    if library is not None and not library.startswith(_GPU_LIBRARIES):
        found.append(("llm_library", f"{library!r} is not a GPU library: the server would run without a GPU"))
    folder = models_dir(context)
    if folder is not None and options.models_dir is None and not Path(folder).is_dir():
        found.append(("", f"{folder} (OLLAMA_MODELS) does not exist: the server stays BLOCKED until it does"))
    if context.port is not None and context.port >= RUNNER_PORTS_FROM:
        ports = f"that Ollama's runners use at random ({RUNNER_PORTS_FROM} and up)"
        found.append(("", f"port {context.port} is in the range {ports}"))
    if context.host not in ("127.0.0.1", "localhost", "::1"):
        risk = "Ollama requires no key; every client that reaches it can use and delete models"
        found.append(("", f"host {context.host}: {risk}"))
    return [OptionProblem((path,) if path else (), message, warning=True) for path, message in found]


def _models(models: Iterable[ServedModel]) -> list[OptionProblem]:
    found: list[OptionProblem] = []
    hint = "; parameters other than load options go into modelfile.parameters"
    for model in models:
        found += (OptionProblem(("models", model.name, *where), message) for where, message in _mistakes(model))
        found += load_option_problems([model], LOAD_TIME_OPTIONS, "Ollama", hint) or _lost_options(model)
    return found


def _mistakes(model: ServedModel) -> Iterator[tuple[tuple[str | int, ...], str]]:
    try:
        store.ModelName.parse(model.served_as)
    except ValueError as error:
        yield ("served_as",), str(error)
    if model.served_as.lower().endswith(_RESERVED):
        yield ("served_as",), f"Ollama reserves the ending of {model.served_as!r}"
    for message in source_problems(model.source):
        yield ("from",), message
    if model.source is None and (model.quantize or model.modelfile):
        yield ("from",), "is required: quantize and modelfile need a model to change"
    if model.source is not None and store.same_name(model.source, model.served_as):
        message = f"names the model itself: give the new model another name (served_as: {model.served_as}-own)"
        yield ("from",), message
    yield from (*quantize_problems(model.quantize), *modelfile_problems(model.modelfile), *_contradictions(model))


def _missing_sources(models: Iterable[ServedModel], config_dir: Path, folder: Path) -> Iterator[OptionProblem]:
    """Yield a warning for each missing source file of a model not in the store."""
    for model in models:
        if model.source is None or not looks_like_path(model.source):
            continue
        path = absolute(model.source, config_dir)
        exists = os.path.exists(path)  # noqa: PTH110 - Path.exists raises for a folder without permission
        if not exists and not _is_stored(folder, model.served_as):
            message = f"{path} does not exist: {model.name} cannot be built until it does"
            yield OptionProblem(("models", model.name, "from"), message, warning=True)


def _is_stored(folder: Path, served_as: str) -> bool:
    try:
        return store.model_file(folder, served_as) is not None
    except (OSError, ValueError):
        return False


def _contradictions(model: ServedModel) -> Iterator[tuple[tuple[str | int, ...], str]]:
    """Yield the load options that the modelfile sets to another value."""
    parameters: Any = model.modelfile.get("parameters")
    if not isinstance(parameters, Mapping):
        return
    for key, value in model.options.items():
        kind = LOAD_TIME_OPTIONS.get(key)
        if kind is None or key not in parameters:
            continue
        kept, loaded = read(kind, parameters[key]), read(kind, value)
        if None not in (kept, loaded) and kept != loaded:
            conflict = f"{shown(value)} conflicts with modelfile.parameters.{key}, which is {shown(parameters[key])}"
            yield ("options", key), f"{conflict}: set it in one of the two"


def _lost_options(model: ServedModel) -> list[OptionProblem]:
    """Return a problem for load options that the first request to /v1 would reset."""
    if not model.options or model.source is not None or model.quantize or model.modelfile:
        return []
    reason = "the first request to /v1 would reset them: fleetd does not build this model"
    message = f"{reason} (build one: from: {model.served_as}, served_as: {model.served_as}-own)"
    return [OptionProblem(("models", model.name, "options"), message)]
