"""Estimate the memory of a llama.cpp process from the headers of its files."""

from __future__ import annotations

from pathlib import Path

from fleetd.core.data.specs import Footprint
from fleetd.engines.base import LaunchContext
from fleetd.engines.llamacpp.command import extra_files
from fleetd.engines.llamacpp.options import LlamaCppOptions
from fleetd.errors import EngineError
from fleetd.models import memory_estimate
from fleetd.models.formats import gguf


def estimate(context: LaunchContext, options: LlamaCppOptions) -> Footprint | None:
    """Return the bytes per device; None while the model's file cannot be read."""
    try:
        sizes = memory_estimate.estimate_gguf(
            [Path(path) for path in gguf.shards(context.resolve(options.model))],
            memory_estimate.GgufServing(
                context_length=options.context_length,
                slots=options.parallel,
                cache_type_k=options.cache_type_k,
                cache_type_v=options.cache_type_v,
                flash_attention=options.flash_attention is not False,
                ubatch=min(options.ubatch or 512, options.batch or 2048),
                logits=not (options.embeddings or options.rerank),
                gpu_layers=0 if context.device in (None, "host") else options.layers,
                unified=context.device == "unified",
                extra_files=tuple(Path(path) for path in extra_files(context, options)),
                prompt_cache_bytes=options.cache_ram,
            ),
        )
    except EngineError:
        return None
    device = context.device or "host"
    amounts = {device: sizes.device_bytes, "host": sizes.host_bytes}
    if device in ("host", "unified"):
        amounts = {device: sizes.device_bytes + sizes.host_bytes}
    return Footprint({name: size for name, size in amounts.items() if size})
