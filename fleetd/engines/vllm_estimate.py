"""What a vLLM with a stated KV cache takes, from the model's folder: weights by file size, the rest by its shape.

The rules of this file
- An estimate that is a little high; the first run measures better. None where the folder cannot be read here.
- Without a stated KV cache there is nothing to reckon: vLLM takes its share of the device, whatever the model.

Sources: vLLM's memory profile as it logs it (weights, activation peak, graphs), and measured processes on the CPU.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CONFIG_LIMIT_BYTES = 4 * 1024 * 1024
MIB, GIB = 1 << 20, 1 << 30
CONTEXT_BYTES = 512 * MIB  # driver context, communication buffers, allocator slack
GRAPH_BYTES = 1 * GIB
LEAST_ACTIVATION_BYTES = 256 * MIB
HOST_BYTES = 1536 * MIB  # the API server and the engine's own process
CPU_HOST_BYTES = 2560 * MIB  # on the CPU a worker process comes on top
DEFAULT_BATCHED_TOKENS = 8192
DEFAULT_SEQUENCES = 256


@dataclass(frozen=True, slots=True)
class Need:
    """Bytes on the entry's device and on the host; on the CPU everything is host."""

    device_bytes: int
    host_bytes: int


def reckon(
    folder: Path,
    *,
    kv_bytes: int,
    shards: int = 1,
    max_num_batched_tokens: int | None = None,
    max_num_seqs: int | None = None,
    eager: bool = False,
    half_weights: bool = False,
    on_cpu: bool = False,
) -> Need | None:
    """Return what one server needs per device. `half_weights`: 16-bit weights that are quantised to 8 bits while loading."""
    weights = weight_bytes(folder)
    if weights is None:
        return None
    if half_weights:
        weights = weights * 55 // 100
    per_device = weights // max(1, shards) + kv_bytes
    per_device += activation_bytes(
        _config(folder), max_num_batched_tokens or DEFAULT_BATCHED_TOKENS, max_num_seqs or DEFAULT_SEQUENCES
    )
    if on_cpu:
        return Need(0, per_device + CPU_HOST_BYTES)
    return Need(per_device + CONTEXT_BYTES + (0 if eager else GRAPH_BYTES), HOST_BYTES)


def weight_bytes(folder: Path) -> int | None:
    """Return the size of the weight files that vLLM would load: those of the index, else all safetensors, else all .bin."""
    try:
        named = _index(folder)
        if named:
            return sum((folder / name).stat().st_size for name in named)
        for pattern in ("*.safetensors", "*.bin", "*.gguf"):
            files = [path for path in folder.glob(pattern) if not path.name.startswith("consolidated")]
            if files:
                return sum(path.stat().st_size for path in files)
        return folder.stat().st_size if folder.is_file() else None
    except OSError:
        return None


def activation_bytes(config: Mapping[str, Any], tokens: int, sequences: int) -> int:
    """Return the peak of one step: the widest layer over all its tokens, and the logits of every sequence."""
    hidden, inner = _number(config, "hidden_size"), _number(config, "intermediate_size")
    step = tokens * (4 * hidden + 2 * inner) * 2
    logits = sequences * _number(config, "vocab_size") * 4
    return max(LEAST_ACTIVATION_BYTES, step + logits)


def _index(folder: Path) -> set[str]:
    """Return the files that model.safetensors.index.json names, without a way out of the folder."""
    mapping = _object(folder / "model.safetensors.index.json").get("weight_map")
    names = mapping.values() if isinstance(mapping, Mapping) else ()
    return {
        name
        for name in names
        if isinstance(name, str) and "/" not in name and "\\" not in name and name not in ("", "..")
    }


def _config(folder: Path) -> Mapping[str, Any]:
    config = _object(folder / "config.json")
    text = config.get("text_config")
    return text if isinstance(text, Mapping) else config


def _object(path: Path) -> Mapping[str, Any]:
    try:
        with path.open("rb") as file:
            data = json.loads(file.read(CONFIG_LIMIT_BYTES))
    except (OSError, ValueError, RecursionError):
        return {}
    return data if isinstance(data, Mapping) else {}


def _number(config: Mapping[str, Any], key: str) -> int:
    value = config.get(key)
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 < value < 1 << 32 else 0
