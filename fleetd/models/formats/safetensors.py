"""Hugging Face model folders: weights and KV cache of a model for vLLM, from safetensors headers and config.json.

The rules of this file
- Every byte is untrusted, as in `gguf.py`: lengths are checked before anything is read by them, files are read, not mapped.
- Only the files that the index names count; `original/` and a second, consolidated copy of the weights do not.
- KV bytes per token follow vLLM's layout: per layer, for the heads that one GPU keeps.
"""

from __future__ import annotations

import json
import math
import os
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fleetd.errors import EngineError

MAX_HEADER_BYTES = 100 << 20  # the format's own bound
MAX_CONFIG_BYTES = 16 << 20
MAX_FILES = 2_000
MAX_LAYERS = 10_000
MIB = 1 << 20
_DTYPES = {"auto": 2.0, "float16": 2.0, "bfloat16": 2.0, "half": 2.0, "float32": 4.0, "float": 4.0, "nvfp4": 0.5625}


class SafetensorsError(EngineError):
    """A folder or file that is not a model that we can read."""

    recoverable = False


@dataclass(frozen=True, slots=True)
class ModelFolder:
    """What a folder holds: bytes of all weights, its files, and the text model's configuration."""

    path: str
    weight_bytes: int
    files: tuple[str, ...]
    config: Mapping[str, Any]

    def number(self, *names: str) -> int | None:
        """Return the first of these keys that is a positive whole number."""
        for name in names:
            value = self.config.get(name)
            if isinstance(value, int) and not isinstance(value, bool) and 0 < value < 2**40:
                return value
        return None


@dataclass(frozen=True, slots=True)
class Serving:
    """How vLLM serves it. `kv_cache_bytes` is what was given by hand; None: `sequences` of the longest length."""

    max_model_len: int | None = None
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 2048
    sequences: int = 1
    tensor_parallel: int = 1
    block_size: int = 16
    dtype: str = "auto"
    kv_dtype: str = "auto"
    weight_factor: float = 1.0  # below 1 for a quantisation that is made while loading
    enforce_eager: bool = False
    kv_cache_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class Sizes:
    """Bytes on one GPU."""

    weight_bytes: int
    kv_bytes: int
    activation_bytes: int
    overhead_bytes: int

    @property
    def total_bytes(self) -> int:
        return self.weight_bytes + self.kv_bytes + self.activation_bytes + self.overhead_bytes


# -- reading ------------------------------------------------------------------------------------------------------------


def tensor_bytes(path: Path) -> int:
    """Return the bytes of all tensors of one .safetensors file, from its header. Raises SafetensorsError."""
    size, (prefix, header) = _head(path)
    if not isinstance(header, dict):
        raise SafetensorsError(f"{path} is not a usable safetensors file: its header is not a JSON object")
    total, room = 0, size - prefix
    for name, row in header.items():
        if name == "__metadata__":
            continue
        span = row.get("data_offsets") if isinstance(row, dict) else None
        begin, end = span if isinstance(span, list) and len(span) == 2 else (None, None)
        if type(begin) is not int or type(end) is not int or not 0 <= begin <= end:
            raise SafetensorsError(f"{path} is not a usable safetensors file: the tensor {name[:80]!r} has no offsets")
        if end > room:
            raise SafetensorsError(
                f"{path}: the tensor {name[:80]!r} ends at byte {prefix + end}, the file at {size}: "
                "it is cut off or still being written"
            )
        total += end - begin
    return min(total, room)


def _head(path: Path) -> tuple[int, tuple[int, Any]]:
    """Return the file's size, the length of its head, and the parsed head."""
    handle, size = _open(path)
    try:
        raw = os.pread(handle, 8, 0)
        length = int.from_bytes(raw, "little")
        if len(raw) < 8 or length > min(MAX_HEADER_BYTES, size - 8):
            raise SafetensorsError(f"{path} is not a usable safetensors file: a header of {length} bytes in {size}")
        body = os.pread(handle, length, 8)
    except OSError as error:
        raise SafetensorsError(f"{path}: {error.strerror}", recoverable=True) from None
    finally:
        os.close(handle)
    return size, (8 + length, _json(path, body))


def _open(path: Path) -> tuple[int, int]:
    """Open a regular file without ever waiting; returns the descriptor and the size."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise SafetensorsError(f"{path}: {error.strerror}", recoverable=True) from None
    except ValueError as error:
        raise SafetensorsError(f"{str(path)!r} is not a path: {error}") from None
    status = os.fstat(handle)
    if not stat.S_ISREG(status.st_mode):
        os.close(handle)
        raise SafetensorsError(f"{path} is not a regular file")
    return handle, status.st_size


def _json(path: Path, body: bytes) -> Any:
    try:
        return json.loads(body)
    except (ValueError, RecursionError) as error:
        said = "it is nested too deep" if isinstance(error, RecursionError) else str(error)
        raise SafetensorsError(f"{path} holds no usable JSON: {said[:200]}") from None


def read_json(path: Path) -> Mapping[str, Any]:
    """Return a JSON object of at most 16 MiB. Raises SafetensorsError."""
    handle, size = _open(path)
    try:
        if size > MAX_CONFIG_BYTES:
            raise SafetensorsError(f"{path} has {size} bytes, too many for a configuration")
        body = os.pread(handle, size, 0)
    except OSError as error:
        raise SafetensorsError(f"{path}: {error.strerror}", recoverable=True) from None
    finally:
        os.close(handle)
    value = _json(path, body)
    if not isinstance(value, dict):
        raise SafetensorsError(f"{path} is not a JSON object")
    return value


def read_folder(folder: Path) -> ModelFolder:
    """Return what a model folder holds. Raises SafetensorsError."""
    if not folder.is_dir():
        raise SafetensorsError(f"{folder} is not a folder", recoverable=not folder.exists())
    config = read_json(folder / "config.json")
    text = config.get("text_config")
    merged = {**config, **text} if isinstance(text, dict) else config
    files = _files(folder)
    if not files:
        raise SafetensorsError(f"{folder} holds no .safetensors files")
    total = sum(tensor_bytes(path) for path in files)
    return ModelFolder(str(folder), total, tuple(str(path) for path in files), merged)


def _files(folder: Path) -> list[Path]:
    """Return the weight files: those of the index, else those in the folder itself, without a consolidated copy."""
    index = folder / "model.safetensors.index.json"
    if index.exists():
        names = read_json(index).get("weight_map")
        if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
            raise SafetensorsError(f"{index} has no weight_map")
        wanted = sorted(set(names.values()))
        if any("/" in name or name.startswith(".") for name in wanted):
            raise SafetensorsError(f"{index} names files outside of its folder")
        found = [folder / name for name in wanted]
    else:
        found = sorted(folder.glob("*.safetensors"))
        plain = [path for path in found if not path.name.startswith("consolidated")]
        found = plain or found
    if len(found) > MAX_FILES:
        raise SafetensorsError(f"{folder} names {len(found)} weight files")
    return found


# -- estimates ----------------------------------------------------------------------------------------------------------


def estimate(model: ModelFolder, serving: Serving) -> Sizes:
    """Return the bytes on each GPU. Activations and graphs are rules of thumb, to be replaced by what vLLM logs."""
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
    return Sizes(weights, kv, step + logits, graphs + context)


def minimum_kv_bytes(model: ModelFolder, serving: Serving) -> int:
    """Return the KV bytes of `sequences` sequences of the longest length, in whole blocks."""
    longest = serving.max_model_len or model.number("max_position_embeddings", "n_positions", "seq_length") or 2048
    block = max(1, serving.block_size)
    total = 0.0
    for window, size in kv_bytes_per_token(model, serving):
        tokens = longest if window is None else min(longest, window + serving.max_num_batched_tokens)
        total += math.ceil(tokens / block) * block * size
    return math.ceil(total * serving.sequences)


def kv_bytes_per_token(model: ModelFolder, serving: Serving) -> Sequence[tuple[int | None, float]]:
    """Return (window, bytes per token) for every layer that keeps keys and values, on one GPU; window None: all of it."""
    layers = min(model.number("num_hidden_layers", "n_layer", "num_layers") or 0, MAX_LAYERS)
    size = _kv_dtype_bytes(model, serving)
    rank = model.number("kv_lora_rank")
    if rank is not None:  # latent attention is not divided between GPUs
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
    """Return the kind of every layer; layers of linear attention or state spaces keep no keys and values."""
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
    """Return the bytes of one number in memory. `stored` is the file's own; `auto` halves f32, as vLLM does.

    A quantised model says 16 bits, whatever its weights are packed into: it is served as it is stored.
    """
    own = str(model.config.get("dtype") or model.config.get("torch_dtype") or "auto").removeprefix("torch.")
    if dtype == "stored" or model.config.get("quantization_config"):
        return _DTYPES.get(own, 2.0)
    if dtype == "auto":
        return 2.0
    return _DTYPES.get(dtype, 2.0)


def _kv_dtype_bytes(model: ModelFolder, serving: Serving) -> float:
    if serving.kv_dtype.startswith("fp8"):
        return 1.0
    if serving.kv_dtype == "auto":
        return 2.0 if model.config.get("quantization_config") else _dtype_bytes(model, serving.dtype)
    return _DTYPES.get(serving.kv_dtype, 2.0)
