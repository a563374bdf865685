"""The environment variables of Ollama: which option renders to which, how, and what is wrong with those a user writes.

The rules of this file
- Ollama reads a boolean with Go's grammar and takes every other text as true, so `off` would switch on.
- A variable that an option (or its default) sets may not stand in `env` too: one of the two would lose silently.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fleetd.engines.base import LaunchContext, OptionProblem, Options

RUNNER_PORTS_FROM = 32768
MIB = 1024 * 1024
GO_BOOLEANS = frozenset({"1", "t", "T", "TRUE", "true", "True", "0", "f", "F", "FALSE", "false", "False"})

# option → variable
TYPED = {
    "models_dir": "OLLAMA_MODELS",
    "keep_alive": "OLLAMA_KEEP_ALIVE",
    "load_timeout": "OLLAMA_LOAD_TIMEOUT",
    "context_length": "OLLAMA_CONTEXT_LENGTH",
    "num_parallel": "OLLAMA_NUM_PARALLEL",
    "max_loaded_models": "OLLAMA_MAX_LOADED_MODELS",
    "max_queue": "OLLAMA_MAX_QUEUE",
    "kv_cache_type": "OLLAMA_KV_CACHE_TYPE",
    "flash_attention": "OLLAMA_FLASH_ATTENTION",
    "sched_spread": "OLLAMA_SCHED_SPREAD",
    "gpu_overhead": "OLLAMA_GPU_OVERHEAD",
    "igpu": "OLLAMA_IGPU_ENABLE",
    "vulkan": "OLLAMA_VULKAN",
    "llm_library": "OLLAMA_LLM_LIBRARY",
    "origins": "OLLAMA_ORIGINS",
    "noprune": "OLLAMA_NOPRUNE",
    "no_cloud": "OLLAMA_NO_CLOUD",
    "remotes": "OLLAMA_REMOTES",
    "go_template": "OLLAMA_GO_TEMPLATE",
    "debug": "OLLAMA_DEBUG",
    "debug_log_requests": "OLLAMA_DEBUG_LOG_REQUESTS",
    "max_transfer_streams": "OLLAMA_MAX_TRANSFER_STREAMS",
    "cache_ram": "LLAMA_ARG_CACHE_RAM",
    "fit": "LLAMA_ARG_FIT",
    "fit_target": "LLAMA_ARG_FIT_TARGET",
    "n_gpu_layers": "LLAMA_ARG_N_GPU_LAYERS",
    "n_cpu_moe": "LLAMA_ARG_N_CPU_MOE",
    "ctx_checkpoints": "LLAMA_ARG_CTX_CHECKPOINTS",
    "hsa_override_gfx_version": "HSA_OVERRIDE_GFX_VERSION",
}
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
# Ollama talks to its runners in plain HTTP without a key: with one of these set, every load would fail
SCRUBBED = (
    "LLAMA_API_KEY",
    "LLAMA_ARG_API_KEY_FILE",
    "LLAMA_ARG_SSL_KEY_FILE",
    "LLAMA_ARG_SSL_CERT_FILE",
    "LLAMA_ARG_API_PREFIX",
    "LLAMA_ARG_HOST",
    "LLAMA_ARG_PORT",
    "LLAMA_ARG_MODEL",
)

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


def _plain(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    return str(value)


def _go_duration(value: float) -> str:
    """-1 is for ever; whole milliseconds otherwise, since Go knows no exponents here."""
    return "-1" if value < 0 else f"{round(value * 1000)}ms"


def _mib(value: int) -> str:
    return str(-(-value // MIB))


_RENDER: Mapping[str, Callable[[Any], str]] = {
    "keep_alive": _go_duration,
    "load_timeout": _go_duration,
    "origins": ",".join,
    "remotes": ",".join,
    "cache_ram": _mib,
    "fit_target": _mib,
    "fit": lambda value: "on" if value else "off",
}


def render_env(options: Options) -> dict[str, tuple[str, str]]:
    """Return variable → (value, option) for every option that is set; the server's own path and host are not among them."""
    rendered: dict[str, tuple[str, str]] = {}
    for option, variable in TYPED.items():
        value = getattr(options, option)
        if value is None or value == () or value == "auto" or option in ("models_dir", "max_loaded_models"):
            continue
        rendered[variable] = (_RENDER.get(option, _plain)(value), option)
    return rendered


def env_problems(rendered: Mapping[str, tuple[str, str]], env: Mapping[str, str]) -> list[OptionProblem]:
    """Return what is wrong with the variables that a user wrote under `env`."""
    problems = []
    for key, value in env.items():
        if key in rendered:
            option = rendered[key][1]
            where = option if option in ("port", "device") else f"options.{option}"
            problems.append(OptionProblem(("env", key), f"{where} sets it already; state it there only"))
        elif key in SCRUBBED:
            problems.append(
                OptionProblem(("env", key), "Ollama reaches its runners without it, so every load would fail")
            )
        elif key in REMOVED:
            problems.append(OptionProblem(("env", key), "has no effect, Ollama no longer reads it", warning=True))
        elif key.startswith("OLLAMA_"):
            problems.extend(_value_problems(key, value))
    return problems


def _value_problems(key: str, value: str) -> list[OptionProblem]:
    text = value.strip().strip("\"'")
    if key in _BOOLEANS and text and text not in GO_BOOLEANS:
        return [OptionProblem(("env", key), f"{value!r} is neither true nor false; Ollama would take it as true")]
    if key in _NUMBERS and text and not text.isdecimal():
        return [OptionProblem(("env", key), f"{value!r} is not a whole number; Ollama would take its default")]
    if key in _DURATIONS and text and not _GO_DURATION.fullmatch(text):
        message = f"{value!r} is no duration that Ollama reads (5m, 1h30m, or seconds); it would take its default"
        return [OptionProblem(("env", key), message)]
    known = [*TYPED.values(), *UNTYPED, "OLLAMA_MODELS"]
    if key not in known:
        near = difflib.get_close_matches(key, known, 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        return [OptionProblem(("env", key), f"Ollama has no variable of this name{hint}", warning=True)]
    return []


def doubts(context: LaunchContext, options: Any, folder: str | None) -> list[OptionProblem]:
    """Return what is worth a warning; `folder` is the store's absolute path, None for Ollama's own default."""
    found: list[tuple[str, str]] = []
    if options.gpu_overhead:
        found.append(("gpu_overhead", "has no effect since Ollama 0.30; state a device budget instead"))
    if options.keep_alive >= 0:
        found.append(("keep_alive", "Ollama would unload by itself; leave it at -1 and use the model's ttl"))
    if options.max_loaded_models is not None and options.max_loaded_models < len(context.models):
        count = len(context.models)
        found.append(
            (
                "max_loaded_models",
                f"{options.max_loaded_models} is less than the {count} models held here: Ollama would evict by itself",
            )
        )
    if not options.noprune and options.models_dir is not None:
        found.append(("noprune", "false lets this server delete blobs that no manifest names, at every start"))
    if options.llm_library is not None and not options.llm_library.startswith(_LIBRARIES):
        found.append(
            ("llm_library", f"{options.llm_library!r} names no GPU library: the server would run without a GPU")
        )
    if folder is not None and options.models_dir is None and not Path(folder).is_dir():
        found.append(
            (
                "",
                f"{folder}, which OLLAMA_MODELS names, does not exist: the server stays BLOCKED until it does",
            )
        )
    if context.port is not None and context.port >= RUNNER_PORTS_FROM:
        found.append(
            (
                "",
                f"port {context.port} lies among those that Ollama's runners take at random ({RUNNER_PORTS_FROM} and up)",
            )
        )
    if context.host not in ("127.0.0.1", "localhost", "::1"):
        found.append(
            ("", f"host {context.host}: Ollama asks nobody for a key; whoever reaches it may use and delete models")
        )
    return [OptionProblem((path,) if path else (), message, warning=True) for path, message in found]


_LIBRARIES = ("cuda_", "rocm", "vulkan", "metal", "mlx")
