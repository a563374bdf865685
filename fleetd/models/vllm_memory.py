"""Estimate the GPU memory that vLLM needs for a model folder: weights, KV cache, activations, overhead.

Invariants:
- KV bytes per token follow vLLM's layout: per layer, for the heads that one GPU keeps.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from fleetd.models.formats.safetensors import ModelFolder

MIB = 1 << 20
MAX_LAYERS = 10_000  # a configuration may state any number
_DTYPES = {"auto": 2.0, "float16": 2.0, "bfloat16": 2.0, "half": 2.0, "float32": 4.0, "float": 4.0, "nvfp4": 0.5625}


@dataclass(frozen=True, slots=True)
class VllmServing:
    """How vLLM serves a model.

    `kv_cache_bytes`: as configured; None: for `sequences` of the longest length.
    """

    max_model_len: int | None = None
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 2048
    sequences: int = 1
    tensor_parallel: int = 1
    block_size: int = 16
    dtype: str = "auto"
    kv_dtype: str = "auto"
    weight_factor: float = 1.0  # below 1 for a quantisation at load time
    enforce_eager: bool = False
    kv_cache_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class VllmSizes:
    """Estimated bytes on one GPU."""

    weight_bytes: int
    kv_bytes: int
    activation_bytes: int
    overhead_bytes: int

    @property
    def total_bytes(self) -> int:
        return self.weight_bytes + self.kv_bytes + self.activation_bytes + self.overhead_bytes


def estimate(model: ModelFolder, serving: VllmServing) -> VllmSizes:
    """Return the bytes on each GPU.

    Activations and graphs are rules of thumb until vLLM logs measured ones.
    """
    shards = max(1, serving.tensor_parallel)
    hidden = model.number("hidden_size", "n_embd", "d_model") or 0
    inner = model.number("intermediate_size", "ffn_dim") or 4 * hidden
    vocabulary = model.number("vocab_size") or 0
    stored, served = _dtype_bytes(model, "stored"), _dtype_bytes(model, serving.dtype)
    weights = math.ceil(model.weight_bytes * serving.weight_factor * served / stored / shards)
    step = serving.max_num_batched_tokens * (4 * hidden + 2 * inner // shards) * 2
    logits = serving.max_num_seqs * vocabulary * 4
    graphs = 0 if serving.enforce_eager else 512 * MIB
    context = (400 + 150 + (1024 if shards > 1 else 0)) * MIB
    kv = serving.kv_cache_bytes if serving.kv_cache_bytes is not None else minimum_kv_bytes(model, serving)
    return VllmSizes(weights, kv, step + logits, graphs + context)


def minimum_kv_bytes(model: ModelFolder, serving: VllmServing) -> int:
    """Return the KV bytes of `sequences` of the longest length, in whole blocks."""
    longest = serving.max_model_len or model.number("max_position_embeddings", "n_positions", "seq_length") or 2048
    block = max(1, serving.block_size)
    total = 0.0
    for window, size in kv_bytes_per_token(model, serving):
        tokens = longest if window is None else min(longest, window + serving.max_num_batched_tokens)
        total += math.ceil(tokens / block) * block * size
    return math.ceil(total * serving.sequences)


def kv_bytes_per_token(model: ModelFolder, serving: VllmServing) -> Sequence[tuple[int | None, float]]:
    """Return (window or None, bytes per token) on one GPU per layer with a KV cache."""
    layers = min(model.number("num_hidden_layers", "n_layer", "num_layers") or 0, MAX_LAYERS)
    size = _kv_dtype_bytes(model, serving)
    rank = model.number("kv_lora_rank")
    if rank is not None:  # latent attention is not split between GPUs
        return [(None, (rank + (model.number("qk_rope_head_dim") or 0)) * size)] * layers
    heads = model.number("num_attention_heads", "n_head") or 0
    hidden = model.number("hidden_size", "n_embd", "d_model") or 0
    width = model.number("head_dim") or (hidden // heads if heads else 0)
    kept = model.number("num_key_value_heads", "num_kv_heads", "multi_query_group_num") or heads
    per_token = max(1, math.ceil(kept / max(1, serving.tensor_parallel))) * 2 * width * size if kept else 0.0
    kinds = _layer_kinds(model, layers)
    window = model.number("sliding_window")
    return [
        (window if kind == "sliding_attention" else None, per_token)
        for kind in kinds
        if kind in ("full_attention", "attention", "sliding_attention")
    ]


def _layer_kinds(model: ModelFolder, layers: int) -> list[str]:
    """Return the kind of every layer; linear attention and state spaces have no KV."""
    kinds = model.config.get("layer_types")
    if isinstance(kinds, list) and kinds and all(isinstance(kind, str) for kind in kinds):
        return kinds[:layers]
    interval = model.number("full_attention_interval")
    if interval:
        return ["full_attention" if (layer + 1) % interval == 0 else "linear_attention" for layer in range(layers)]
    if model.number("sliding_window") and model.config.get("use_sliding_window", True):
        period = model.number("sliding_window_pattern")
        if period is None:
            return ["sliding_attention"] * layers
        return ["full_attention" if (layer + 1) % period == 0 else "sliding_attention" for layer in range(layers)]
    return ["full_attention"] * layers


def _dtype_bytes(model: ModelFolder, dtype: str) -> float:
    """Return the bytes of one number in memory.

    `stored` is the file's own; `auto` halves f32, as vLLM does.

    A quantised model states 16 bits, however its weights are packed: it is served as stored.
    """
    own = str(model.config.get("dtype") or model.config.get("torch_dtype") or "auto").removeprefix("torch.")
    if dtype == "stored" or model.config.get("quantization_config"):
        return _DTYPES.get(own, 2.0)
    if dtype == "auto":
        return 2.0
    return _DTYPES.get(dtype, 2.0)


def _kv_dtype_bytes(model: ModelFolder, serving: VllmServing) -> float:
    if serving.kv_dtype.startswith("fp8"):
        return 1.0
    if serving.kv_dtype == "auto":
        return 2.0 if model.config.get("quantization_config") else _dtype_bytes(model, serving.dtype)
    return _DTYPES.get(serving.kv_dtype, 2.0)
