"""Estimate the memory of a model in Ollama from headers: of the file it is built from, or of the blob in the store.

Invariants:
- The store's blob is what is loaded; it counts where it exists and differs from the file (quantised, or without a `from`).
- A model that is not quantised yet is estimated by its tensors in the target type.
- A file that exists and cannot be read is an error about the key that names it. Where there is nothing to read yet, the bytes
  are learned from the first load.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

from fleetd.core.data.specs import Footprint
from fleetd.engines.base import LaunchContext, ServedModel
from fleetd.engines.ollama.environment import store_folder
from fleetd.engines.ollama.options import OllamaOptions
from fleetd.engines.options import narrow
from fleetd.errors import EngineError
from fleetd.models import memory_estimate
from fleetd.models.formats import gguf
from fleetd.models.ollama import store
from fleetd.models.ollama.modelfile import absolute, looks_like_path

# bytes per weight of a matrix, for each target type of Ollama; the K types are mixtures, so these are a little high
_WEIGHT_BYTES = {"F32": 4.0, "F16": 2.0, "Q8_0": 1.0625, "Q4_K_M": 0.62, "Q4_K_S": 0.59}


def estimate_model(context: LaunchContext, model: ServedModel) -> Footprint | None:
    """Return the bytes per device; None: unknown. Raises EngineError for a bad `from`."""
    serving = _serving(context)
    try:
        found = _weights(context, model, store_folder(context))
        if found is None:
            return None
        header, parameters, weight_bytes = found
        length = model.options.get("num_ctx") or parameters.get("num_ctx") or serving.context_length
        trained = header.number("context_length")
        if not isinstance(length, int) or length < 1:
            length = serving.context_length
        limit = trained if trained and trained > 0 else length
        layers = model.options.get("num_gpu", serving.gpu_layers)
        own = replace(
            serving,
            context_length=min(length, limit),
            slots=1 if _embeds(header) or model.embedding else serving.slots,
            gpu_layers=layers if isinstance(layers, int) and layers >= 0 else serving.gpu_layers,
        )
        sizes = memory_estimate.estimate([header], own)
    except _BadSourceError as error:
        raise EngineError(str(error), recoverable=False, key="from") from None
    except (EngineError, ValueError, OSError):
        return None
    change = weight_bytes - header.weight_bytes
    device = context.device or "host"
    if device in ("host", "unified"):
        return Footprint({device: max(0, sizes.total_bytes + change)})
    return Footprint({device: max(0, sizes.device_bytes + change), "host": sizes.host_bytes})


def _weights(
    context: LaunchContext, model: ServedModel, models_dir: Path
) -> tuple[gguf.Header, Mapping[str, Any], int] | None:
    """Return header, parameters and bytes of loaded weights; None: nothing to read."""
    source, inherited = _source(context, model, models_dir)
    parameters: Mapping[str, Any] = {**inherited, **(model.modelfile.get("parameters") or {})}
    stored = store.model_file(models_dir, model.served_as)
    if stored is not None and (model.quantize or source is None or not source.is_file()):
        header = gguf.read(stored)
        return header, {**store.stored_parameters(models_dir, model.served_as), **parameters}, header.weight_bytes
    if source is None or not source.is_file():
        return None
    header = _header_of_source(source)
    per_weight = _WEIGHT_BYTES.get((model.quantize or "").upper())
    if per_weight is None:
        return header, parameters, header.weight_bytes
    sizes = (
        int(prod(tensor.dims) * per_weight) if len(tensor.dims) > 1 else tensor.size_bytes for tensor in header.tensors
    )
    return header, parameters, sum(sizes)


def _source(context: LaunchContext, model: ServedModel, models_dir: Path) -> tuple[Path | None, Mapping[str, Any]]:
    """Return the source file, possibly another model's blob, and its parameters."""
    if model.source is None:
        return None, {}
    if looks_like_path(model.source):
        return absolute(model.source, context.config_dir), {}
    return store.model_file(models_dir, model.source), store.stored_parameters(models_dir, model.source)


class _BadSourceError(Exception):
    pass


def _header_of_source(path: Path) -> gguf.Header:
    try:
        return gguf.read(path)
    except EngineError as error:
        raise _BadSourceError(str(error)) from None


def _embeds(header: gguf.Header) -> bool:
    return header.number("pooling_type") is not None


def _serving(context: LaunchContext) -> memory_estimate.GgufServing:
    """Return how the server serves a model that overrides nothing."""
    options = narrow(context.options, OllamaOptions)
    kind = options.kv_cache_type or "f16"
    return memory_estimate.GgufServing(
        context_length=options.context_length,
        slots=options.num_parallel,
        cache_type_k=kind,
        cache_type_v=kind,
        flash_attention=options.flash_attention is not False,
        gpu_layers=0 if context.device in (None, "host") else options.n_gpu_layers,
        unified=context.device == "unified",
        prompt_cache_bytes=options.cache_ram,
    )
