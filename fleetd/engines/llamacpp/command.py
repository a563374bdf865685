"""Write the command line of llama.cpp: `llama-server` from PATH, or the embedded server of the `xllamacpp` wheel.

Both programs take the same flags; `server_main.py` implements those that are written here.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from fleetd.engines.base import LaunchContext
from fleetd.engines.llamacpp import server_main
from fleetd.engines.llamacpp.options import LlamaCppOptions
from fleetd.errors import EngineError
from fleetd.models.formats import gguf

PROGRAM = "llama-server"
EMBEDDED_SERVER = Path(server_main.__file__)
T = TypeVar("T")


def extra_files(context: LaunchContext, options: LlamaCppOptions) -> dict[str, str]:
    """Return the files besides the model that take memory: path → option."""
    named = {"mmproj": options.mmproj} if options.mmproj else {}
    named |= {f"lora[{index}]": adapter.path for index, adapter in enumerate(options.lora)}
    return {str(context.resolve(path)): option for option, path in named.items()}


def required_files(context: LaunchContext, options: LlamaCppOptions) -> dict[str, str]:
    """Return the files that must exist before a start: path → option."""
    files = dict.fromkeys(gguf.shards(context.resolve(options.model)), "model") | extra_files(context, options)
    if options.chat_template_file:
        files[str(context.resolve(options.chat_template_file))] = "chat_template_file"
    return files


def program(context: LaunchContext) -> tuple[str, ...]:
    """Return the user's command, llama-server, or the embedded. Raises EngineError."""
    if context.command:
        return context.command
    if found := server_path(context):
        return (found,)
    if _cached(_EMBEDDED, None, lambda: importlib.util.find_spec("xllamacpp") is not None):
        return (sys.executable, "-I", str(EMBEDDED_SERVER))
    raise EngineError(
        f"{context.name}: no {PROGRAM} on PATH, and no embedded llama.cpp",
        hint="pip install 'fleetd[llamacpp]'",
        recoverable=False,
    )


def server_path(context: LaunchContext) -> str | None:
    """Return the path of llama-server; None: it is not on PATH."""
    path = context.env.get("PATH", os.environ.get("PATH"))
    return _cached(_SERVERS, path, lambda: shutil.which(PROGRAM, path=path))


_SERVERS: dict[str | None, tuple[float, str | None]] = {}
_EMBEDDED: dict[str | None, tuple[float, bool]] = {}


def _cached(cache: dict[str | None, tuple[float, T]], key: str | None, look: Callable[[], T]) -> T:
    """Return the result of `look`, at most 1 s old: thousands of models may ask."""
    known, now = cache.get(key), time.monotonic()
    if known is None or now - known[0] > 1.0:
        if len(cache) > 64:
            cache.clear()
        known = cache[key] = (now, look())
    return known[1]


def flags(context: LaunchContext, options: LlamaCppOptions) -> list[str]:
    """Return the flags for these options, `extra_args` not included."""
    words = ["--model", str(context.resolve(options.model)), "--host", context.host, "--port", str(context.port)]
    words += ["--alias", context.served_as or context.name]
    words += ["--ctx-size", str(options.context_length * options.parallel), "--parallel", str(options.parallel)]
    for flag, value in _valued(context, options).items():
        if value is not None:
            words += [flag, str(value)]
    for adapter in options.lora:
        words += ["--lora-scaled", f"{context.resolve(adapter.path)}:{adapter.scale:g}"]
    switches = {
        "--embeddings": options.embeddings and not options.rerank,
        "--rerank": options.rerank,
        "--jinja": options.jinja is True,
        "--no-jinja": options.jinja is False,
    }
    return [*words, *(flag for flag, on in switches.items() if on), "--metrics", "--slots", "--offline", "--no-webui"]


def _valued(context: LaunchContext, options: LlamaCppOptions) -> dict[str, object]:
    """Return flag → value; a flag whose value is None is left out."""
    template = options.chat_template_file
    flash = {True: "on", False: "off"}
    return {
        "--threads": options.threads,
        "--threads-batch": options.threads_batch,
        "--gpu-layers": 0 if context.device == "host" and options.gpu_layers == "auto" else options.layers,
        "--batch-size": options.batch,
        "--ubatch-size": options.ubatch,
        "--cache-type-k": None if options.cache_type_k == "f16" else options.cache_type_k,
        "--cache-type-v": None if options.cache_type_v == "f16" else options.cache_type_v,
        "--flash-attn": flash[options.flash_attention] if isinstance(options.flash_attention, bool) else None,
        "--load-mode": _load_mode(options),
        "--pooling": options.pooling,
        "--split-mode": options.split_mode,
        "--main-gpu": options.main_gpu,
        "--tensor-split": ",".join(f"{share:g}" for share in options.tensor_split) or None,
        "--mmproj": context.resolve(options.mmproj) if options.mmproj else None,
        "--chat-template": options.chat_template,
        "--chat-template-file": context.resolve(template) if template else None,
        "--cache-ram": options.cache_ram // 2**20,
        "--seed": options.seed,
    }


def _load_mode(options: LlamaCppOptions) -> str | None:
    """Return llama.cpp's name of the load mode; None: its default."""
    mode = options.load_mode
    if mode == "auto" and options.mmap is not None:
        mode = "mmap" if options.mmap else "read"
    if options.mlock:
        return "mlock" if mode == "read" else "mmap+mlock"
    return {"auto": None, "mmap": "mmap", "read": "none", "direct": "dio"}[mode]
