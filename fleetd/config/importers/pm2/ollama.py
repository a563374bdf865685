"""Convert `ollama serve` under PM2 to an instance with typed options.

Invariants:
- A variable with a typed option becomes that option; any other stays in `env`.
- A variable that fleetd decides itself (how long a model stays) is skipped and reported.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from fleetd.config.importers.report import Report

DEFAULT_PORT = 11434
_NUMBERS = {
    "OLLAMA_NUM_PARALLEL": "num_parallel", "OLLAMA_MAX_LOADED_MODELS": "max_loaded_models", "OLLAMA_MAX_QUEUE": "max_queue",
    "OLLAMA_CONTEXT_LENGTH": "context_length", "OLLAMA_GPU_OVERHEAD": "gpu_overhead",
}  # fmt: skip
_TEXTS = {"OLLAMA_MODELS": "models_dir", "OLLAMA_KV_CACHE_TYPE": "kv_cache_type", "OLLAMA_LLM_LIBRARY": "llm_library"}
_FLAGS = {
    "OLLAMA_FLASH_ATTENTION": "flash_attention", "OLLAMA_SCHED_SPREAD": "sched_spread", "OLLAMA_NOPRUNE": "noprune",
    "OLLAMA_DEBUG": "debug", "OLLAMA_VULKAN": "vulkan",
}  # fmt: skip
_HOST = re.compile(r"(?:https?://)?(?P<host>\[[^\]]+\]|[^:/]*)(?::(?P<port>\d+))?/?")
_VOLUME = re.compile(r"(/Volumes/[^/]+)(?:/|$)")


def volume_of(path: str) -> str | None:
    """Return the external drive of a Mac that a path is on."""
    found = _VOLUME.match(path)
    return found[1] if found else None


def is_ollama(words: list[str]) -> bool:
    """Return whether a command line starts an Ollama server."""
    return len(words) >= 2 and words[0].rsplit("/", 1)[-1] == "ollama" and words[1] == "serve"


def to_instance(name: str, words: list[str], env: Mapping[str, str], report: Report) -> dict[str, Any]:
    """Return the keys of the instance; the caller adds the other PM2 fields."""
    rest = dict(env)
    entry: dict[str, Any] = {"engine": "ollama"}
    if words != ["ollama", "serve"]:
        entry["command"] = words
    entry["port"] = _port(name, rest.pop("OLLAMA_HOST", None), report)
    options = _options(name, rest, report)
    if options:
        entry["options"] = options
    volume = volume_of(str(options.get("models_dir", "")))
    if volume is not None:
        entry["requires"] = [volume]
        report.warn(name, "requires", f"{volume} must be mounted before a start: PM2 did not wait for it")
    if rest:
        entry["env"] = rest
    return entry


def _port(name: str, host: str | None, report: Report) -> int:
    if host is None:
        report.mapped(name, "env.OLLAMA_HOST", f"not set: port {DEFAULT_PORT}, Ollama's own")
        return DEFAULT_PORT
    bare = re.fullmatch(r"\d+", host)
    found = _HOST.fullmatch(host)
    port = int(bare[0]) if bare else int(found["port"]) if found and found["port"] else DEFAULT_PORT
    address = found["host"] if found and not bare else ""
    if address in ("0.0.0.0", "[::]", "::"):
        detail = (
            f"port: {port}, on loopback only: other machines reach it no longer. The gateway listens on loopback too; "
            "with gateway.listen on another address and gateway.insecure: true it serves OpenAI requests to them"
        )
        report.approximated(name, "env.OLLAMA_HOST", detail)
    else:
        report.mapped(name, "env.OLLAMA_HOST", f"port: {port}")
    return port


def _options(name: str, env: dict[str, str], report: Report) -> dict[str, Any]:
    options: dict[str, Any] = {}
    for variable in list(env):
        value = env[variable].strip()
        if variable == "OLLAMA_KEEP_ALIVE":
            report.approximated(name, f"env.{variable}", "left out: fleetd decides what stays; say models.NAME.ttl")
        elif variable in _NUMBERS and value.isdigit():
            options[_NUMBERS[variable]] = int(value)
        elif variable in _TEXTS:
            options[_TEXTS[variable]] = value
        elif variable in _FLAGS and value.lower() in ("0", "1", "true", "false"):
            options[_FLAGS[variable]] = value.lower() in ("1", "true")
        elif variable == "OLLAMA_ORIGINS":
            options["origins"] = [one.strip() for one in value.split(",") if one.strip()]
        else:
            continue
        del env[variable]
        if variable != "OLLAMA_KEEP_ALIVE":
            report.mapped(name, f"env.{variable}", "a typed option")
    return options
