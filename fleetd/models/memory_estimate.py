"""Estimate the memory that llama.cpp needs for a GGUF model: weights, KV cache, compute buffers, overhead.

An estimate is meant to be a little high; a measured footprint replaces it. Device bytes are the bytes on the entry's device if all
layers are there; host bytes are the rest. Each of five shapes of attention has its own function: latent (MLA), hybrid with
recurrent layers, sliding windows, per-layer heads, and plain grouped heads. A header without the keys of any of them gives weights
and overhead only.

Sources: llama.cpp's buffer rules as read in its KV-cache code, and measurements of its server on small models.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fleetd.models.formats import gguf
from fleetd.models.formats.gguf import Header

MIB = 1 << 20
KV_BYTES = {
    "f32": 4.0, "f16": 2.0, "bf16": 2.0, "q8_0": 1.0625, "q5_1": 0.75, "q5_0": 0.6875, "q4_1": 0.625, "q4_0": 0.5625,
    "iq4_nl": 0.5625,
}  # fmt: skip
PROCESS_BYTES = 32 * MIB  # the server itself, with its code pages
GPU_CONTEXT_BYTES = 400 * MIB  # driver context and allocator slack per process
MMPROJ_HEADROOM_BYTES = 1024 * MIB
CELL_STEP = 256
MAX_LAYERS = 4_096  # a header may state any number


@dataclass(frozen=True, slots=True)
class GgufServing:
    """How llama.cpp serves a model.

    `context_length` is per slot; `gpu_layers` None: all layers on the GPU, 0: none.
    """

    context_length: int = 4096
    slots: int = 1
    cache_type_k: str = "f16"
    cache_type_v: str = "f16"
    flash_attention: bool = True
    ubatch: int = 512
    logits: bool = True
    gpu_layers: int | None = 0
    unified: bool = False
    extra_files: tuple[Path, ...] = ()
    prompt_cache_bytes: int = 0


@dataclass(frozen=True, slots=True)
class GgufSizes:
    """The parts of an estimate, and their sum by device (host only, without a GPU)."""

    weight_bytes: int
    kv_bytes: int
    compute_bytes: int
    overhead_bytes: int
    device_bytes: int
    host_bytes: int

    @property
    def total_bytes(self) -> int:
        return self.device_bytes + self.host_bytes


def estimate_gguf(paths: Sequence[Path], serving: GgufServing) -> GgufSizes:
    """Return the bytes that a GGUF model (all its parts) needs. Raises GgufError."""
    headers = gguf.read_all(paths)
    extra = sum(gguf.read(path).weight_bytes for path in serving.extra_files)
    return estimate(headers, serving, extra)


def estimate(headers: Sequence[Header], serving: GgufServing, extra_weight_bytes: int = 0) -> GgufSizes:
    """Return the bytes for headers; `extra_weight_bytes`: adapters and projectors."""
    first = headers[0]
    weights = sum(header.weight_bytes for header in headers)
    kv = kv_bytes(first, serving)
    compute = compute_bytes(first, serving)
    host = PROCESS_BYTES + vocabulary_bytes(first) + serving.prompt_cache_bytes
    if any(path.name.startswith("mmproj") for path in serving.extra_files):
        compute += MMPROJ_HEADROOM_BYTES
    layers = first.number("block_count") or 1
    share = 1.0 if serving.gpu_layers is None else min(1.0, serving.gpu_layers / (layers + 1))
    if share == 0.0:
        total = weights + extra_weight_bytes + kv + compute + host
        return GgufSizes(weights + extra_weight_bytes, kv, compute, host, 0, total)
    embedding = _embedding_on_host(headers) if not serving.unified else 0
    movable = weights - embedding + kv
    context = 0 if serving.unified else GPU_CONTEXT_BYTES
    device = int(movable * share) + extra_weight_bytes + compute + context
    left = movable - int(movable * share) + embedding + host
    return GgufSizes(weights + extra_weight_bytes, kv, compute, host + context, device, left)


# -- KV cache -----------------------------------------------------------------------------------------------------------


def kv_bytes(header: Header, serving: GgufServing) -> int:
    """Return the bytes of the KV cache and of recurrent state, for all slots together."""
    layers = header.number("block_count") or 0
    layers -= header.number("nextn_predict_layers") or 0
    layers -= header.number("attention.shared_kv_layers") or 0
    causal = header.keys.get(f"{header.architecture}.attention.causal")
    if layers <= 0 or causal is False:  # an encoder has no cache
        return 0
    layers = min(layers, MAX_LAYERS)
    if header.number("attention.kv_lora_rank"):
        return max(0, _latent(header, serving, layers))
    if header.number("ssm.state_size") or header.number("ssm.inner_size"):
        return max(0, _hybrid(header, serving, layers))
    if header.number("attention.sliding_window"):
        return max(0, _windowed(header, serving, layers))
    return max(0, _grouped(header, serving, layers))


def cells(serving: GgufServing) -> int:
    """Return the cells of a full-attention layer, slots padded as llama.cpp does."""
    per_slot = -(-serving.context_length // CELL_STEP) * CELL_STEP
    return per_slot * serving.slots


def _per_layer(header: Header, key: str, layers: int, fallback: int) -> list[int]:
    """Return one number per layer for a key that is a scalar or an array."""
    values = header.numbers(key)
    if not values:
        return [fallback] * layers
    if len(values) == 1:
        return list(values) * layers
    return list(values[:layers]) + [values[-1]] * (layers - len(values))


def _heads(header: Header) -> int:
    return max(header.numbers("attention.head_count"), default=0)


def head_widths(header: Header, suffix: str = "") -> tuple[int, int]:
    """Return the length of a key and of a value vector per head, in numbers."""
    heads = _heads(header)
    default = (header.number("embedding_length") or 0) // heads if heads else 0
    key = header.number(f"attention.key_length{suffix}") or header.number("attention.key_length") or default
    value = header.number(f"attention.value_length{suffix}") or header.number("attention.value_length") or default
    return key, value


def _cell_bytes(key: int, value: int, serving: GgufServing) -> float:
    """Return the bytes of one head in one cell."""
    return key * KV_BYTES.get(serving.cache_type_k, 2.0) + value * KV_BYTES.get(serving.cache_type_v, 2.0)


def _grouped(header: Header, serving: GgufServing, layers: int) -> int:
    key, value = head_widths(header)
    heads = _per_layer(header, "attention.head_count_kv", layers, _heads(header))
    return int(sum(heads) * _cell_bytes(key, value, serving) * cells(serving))


def _latent(header: Header, serving: GgufServing, layers: int) -> int:
    """Latent attention (MLA): one compressed vector and the rotary part per cell."""
    rank = header.number("attention.kv_lora_rank") or 0
    rotary = header.number("rope.dimension_count") or 64
    return int(layers * (rank + rotary) * KV_BYTES.get(serving.cache_type_k, 2.0) * cells(serving))


def _hybrid(header: Header, serving: GgufServing, layers: int) -> int:
    """Hybrid: some layers have a cache, the others a fixed f32 state per slot."""
    interval = header.number("full_attention_interval")
    heads = _per_layer(header, "attention.head_count_kv", layers, _heads(header))
    if interval:
        full = [count for layer, count in enumerate(heads) if (layer + 1) % interval == 0]
    else:
        full = [count for count in heads if count]  # a layer without heads is recurrent
    key, value = head_widths(header)
    inner, state = header.number("ssm.inner_size") or 0, header.number("ssm.state_size") or 0
    groups, kernel = header.number("ssm.group_count") or 0, header.number("ssm.conv_kernel") or 1
    per_slot = ((kernel - 1) * (inner + 2 * groups * state) + state * inner) * 4
    recurrent = (layers - len(full)) * per_slot * serving.slots
    return int(sum(full) * _cell_bytes(key, value, serving) * cells(serving)) + recurrent


def _windowed(header: Header, serving: GgufServing, layers: int) -> int:
    """Sliding windows: such layers keep only the window and one batch per slot."""
    window = header.number("attention.sliding_window") or 0
    heads = _per_layer(header, "attention.head_count_kv", layers, _heads(header))
    per_slot = -(-serving.context_length // CELL_STEP) * CELL_STEP
    short = min(per_slot, -(-(window + serving.ubatch) // CELL_STEP) * CELL_STEP) * serving.slots
    full_cell, short_cell = (
        _cell_bytes(*head_widths(header), serving),
        _cell_bytes(*head_widths(header, "_swa"), serving),
    )
    total = 0.0
    for count, sliding in zip(heads, _sliding(header, layers), strict=True):
        total += count * (short_cell * short if sliding else full_cell * cells(serving))
    return int(total)


# architecture -> period of the layers with full attention, if the header does not state it
_PATTERNS = {"gemma2": 2, "gemma3": 6, "gemma3n": 5, "gpt-oss": 2, "cohere2": 4, "llama4": 4, "exaone4": 4, "olmo2": 4}


def _sliding(header: Header, layers: int) -> list[bool]:
    """Return for each layer whether it has a sliding window."""
    value = header.keys.get(f"{header.architecture}.attention.sliding_window_pattern")
    if isinstance(value, tuple) and value:
        return [bool(value[layer % len(value)]) for layer in range(layers)]
    period = value if isinstance(value, int) and value > 0 else _PATTERNS.get(header.architecture, 0)
    if not period:  # every layer has one, as in Mistral 7B v0.1: llama.cpp keeps the whole context then
        return [False] * layers
    return [(layer + 1) % period != 0 for layer in range(layers)]


# -- other parts -----------------------------------------------------------------------------------------------------------


def vocabulary_bytes(header: Header) -> int:
    """Return the host bytes of the tokenizer's tables, about 200 per token."""
    return min(header.vocabulary, 2_000_000) * 200


def compute_bytes(header: Header, serving: GgufServing) -> int:
    """Return the compute buffer: `ubatch` tokens through the widest layer or logits."""
    batch = min(serving.ubatch, serving.context_length * serving.slots)
    width, heads = header.number("embedding_length") or 0, _heads(header)
    vocabulary = header.vocabulary if serving.logits else 0
    inner = max(header.numbers("feed_forward_length"), default=0)
    graph = 4 * batch * (6 * width + 5 * inner // 2)
    per_slot = -(-serving.context_length // CELL_STEP) * CELL_STEP
    mask = 2 * batch * per_slot
    if not serving.flash_attention:  # the mask in f32, and the scores of every head
        mask = 4 * batch * per_slot * (1 + heads)
    return max(0, graph, 4 * batch * (width + vocabulary)) + max(0, mask)


def _embedding_on_host(headers: Sequence[Header]) -> int:
    """Return the bytes of the token embedding on the host, 0 if it is the output too."""
    tensors = {tensor.name: tensor.size_bytes for header in headers for tensor in header.tensors}
    return tensors.get("token_embd.weight", 0) if "output.weight" in tensors else 0
