"""Render the options of Ollama as environment variables.

Invariants:
- Ollama rejects no bad value: it warns, uses its default, or takes any text as true. So every variable is typed here.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fleetd.engines.base import LaunchContext
from fleetd.engines.ollama.options import OllamaOptions
from fleetd.engines.options import narrow
from fleetd.engines.visible_devices import visible_devices

DEFAULT_LOADED_MODELS = 8
MIB = 1024 * 1024
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
# Ollama reaches its runners by plain HTTP without a key: with one of these set, every load fails
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


def _plain(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    return str(value)


def _go_duration(value: float) -> str:
    """Return -1 (for ever), or whole milliseconds, since Go accepts no exponent here."""
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


def render_options(options: OllamaOptions) -> dict[str, tuple[str, str]]:
    """Return variable → (value, option) for the set options, without folder and host."""
    found: dict[str, tuple[str, str]] = {}
    for option, variable in TYPED.items():
        value = getattr(options, option)
        if value is None or value == () or value == "auto" or option in ("models_dir", "max_loaded_models"):
            continue
        found[variable] = (_RENDER.get(option, _plain)(value), option)
    return found


def rendered(context: LaunchContext) -> dict[str, tuple[str, str]]:
    """Return variable → (value, option) for everything that the engine sets."""
    options = narrow(context.options, OllamaOptions)
    found = render_options(options)
    if options.models_dir is not None:
        found["OLLAMA_MODELS"] = (models_dir(context) or "", "models_dir")
    loaded = options.max_loaded_models or max(len(context.models), DEFAULT_LOADED_MODELS)
    found["OLLAMA_MAX_LOADED_MODELS"] = (str(loaded), "max_loaded_models")
    host = f"[{context.host}]" if ":" in context.host else context.host
    found["OLLAMA_HOST"] = (f"{host}:{context.port or 11434}", "port")
    for variable, value in visible_devices(context.device_uuid, context.device).items():
        found[variable] = (value, "device")
    if "GIN_MODE" not in context.env:
        found["GIN_MODE"] = ("release", "")  # otherwise each start logs the list of all routes
    return found


def models_dir(context: LaunchContext) -> str | None:
    """Return the absolute folder of the store; None: Ollama's default applies."""
    text = narrow(context.options, OllamaOptions).models_dir
    text = text or context.env.get("OLLAMA_MODELS") or os.environ.get("OLLAMA_MODELS")
    return str(context.resolve(text)) if text else None


def store_folder(context: LaunchContext) -> Path:
    """Return the folder of the store, Ollama's own default included."""
    return Path(models_dir(context) or Path.home() / ".ollama" / "models")
