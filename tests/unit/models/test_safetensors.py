"""Hugging Face model folders and the estimate for vLLM: hand-checked numbers, and every broken file raises one sentence."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fleetd.models import vllm_memory
from fleetd.models.formats import safetensors
from fleetd.models.formats.safetensors import ModelFolder, SafetensorsError
from fleetd.models.vllm_memory import VllmServing

LLAMA_8B = {
    "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
    "vocab_size": 128256, "max_position_embeddings": 8192, "torch_dtype": "bfloat16",
}  # fmt: skip


def tensors(*sizes: int) -> bytes:
    rows, at = {"__metadata__": {"format": "pt"}}, 0
    for number, size in enumerate(sizes):
        rows[f"t{number}"] = {"dtype": "U8", "shape": [size], "data_offsets": [at, at + size]}  # type: ignore[dict-item]
        at += size
    head = json.dumps(rows).encode()
    return len(head).to_bytes(8, "little") + head + bytes(at)


def folder(path: Path, config: Any = None, **files: bytes) -> Path:
    (path / "config.json").write_text(json.dumps(LLAMA_8B if config is None else config))
    for name, data in files.items():
        (path / f"{name}.safetensors").write_bytes(data)
    return path


def model(weight_bytes: int = 0, **config: Any) -> ModelFolder:
    return ModelFolder("m", weight_bytes, (), {**LLAMA_8B, **config})


def test_read_folder_adds_up_tensors(tmp_path: Path) -> None:
    found = safetensors.read_folder(folder(tmp_path, model=tensors(100, 28), consolidated=tensors(128)))
    assert found.weight_bytes == 128
    assert len(found.files) == 1


def test_read_folder_counts_only_files_of_index(tmp_path: Path) -> None:
    folder(tmp_path, a=tensors(10), b=tensors(20), stray=tensors(500))
    index = {"weight_map": {"x": "a.safetensors", "y": "b.safetensors", "z": "a.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert safetensors.read_folder(tmp_path).weight_bytes == 30


def test_read_folder_uses_text_config(tmp_path: Path) -> None:
    found = safetensors.read_folder(
        folder(tmp_path, {"hidden_size": 1, "text_config": {"hidden_size": 64}}, m=tensors(1))
    )
    assert found.number("hidden_size") == 64


KV: list[tuple[dict[str, Any], VllmServing, int]] = [
    ({}, VllmServing(max_model_len=8192), 1 << 30),  # 128 KiB per token
    ({}, VllmServing(max_model_len=8192, tensor_parallel=2), 1 << 29),
    ({}, VllmServing(max_model_len=8192, tensor_parallel=16), 1 << 27),  # never less than one head
    ({}, VllmServing(max_model_len=8192, kv_dtype="fp8"), 1 << 29),
    ({}, VllmServing(max_model_len=8192, sequences=3), 3 << 30),
    ({}, VllmServing(max_model_len=1), 16 * 131072),  # whole blocks
    ({}, VllmServing(), 1 << 30),
    ({"torch_dtype": "float32"}, VllmServing(), 1 << 30),  # served in 16 bits
    ({"torch_dtype": "float32"}, VllmServing(dtype="float32"), 2 << 30),
    ({"kv_lora_rank": 512, "qk_rope_head_dim": 64}, VllmServing(max_model_len=4096, tensor_parallel=8), 32 * 576 * 2 * 4096),
    ({"full_attention_interval": 4}, VllmServing(max_model_len=8192), 1 << 28),
    ({"layer_types": ["sliding_attention", "full_attention"] * 16, "sliding_window": 1024}, VllmServing(8192, max_num_batched_tokens=1024),
     16 * 4096 * (8192 + 2048)),
]  # fmt: skip


@pytest.mark.parametrize(("config", "serving", "wanted"), KV)
def test_minimum_kv_bytes_per_configuration(config: dict[str, Any], serving: VllmServing, wanted: int) -> None:
    assert vllm_memory.minimum_kv_bytes(model(**config), serving) == wanted


def test_estimate_known_model() -> None:
    sizes = vllm_memory.estimate(model(16_060_000_000), VllmServing(max_model_len=8192, enforce_eager=True))
    assert sizes.weight_bytes == 16_060_000_000
    assert sizes.kv_bytes == 1 << 30
    assert 17e9 < sizes.total_bytes < 20e9
    shared = vllm_memory.estimate(model(16_060_000_000), VllmServing(max_model_len=8192, tensor_parallel=2))
    assert shared.weight_bytes == 8_030_000_000
    halved = vllm_memory.estimate(model(1000, torch_dtype="float32"), VllmServing())
    assert halved.weight_bytes == 500
    given_kv = vllm_memory.estimate(model(), VllmServing(kv_cache_bytes=123))
    assert given_kv.kv_bytes == 123


BAD = {
    "empty": b"",
    "short": b"\x01\x02",
    "endless header": (2**63).to_bytes(8, "little") + b"{}",
    "no JSON": (2).to_bytes(8, "little") + b"xx",
    "not an object": (2).to_bytes(8, "little") + b"[]",
    "nested": (40_000).to_bytes(8, "little") + b"[" * 40_000,
    "no offsets": (8).to_bytes(8, "little") + b'{"t":{}}',
    "cut off": tensors(100)[:-1],
    "backwards": (29).to_bytes(8, "little") + b'{"t":{"data_offsets":[9, 1]}}',
    "text offsets": (33).to_bytes(8, "little") + b'{"t":{"data_offsets":["0", "1"]}}',
}


@pytest.mark.parametrize("case", BAD)
def test_tensor_bytes_invalid_file_raises(case: str, tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    path.write_bytes(BAD[case])
    with pytest.raises(SafetensorsError) as caught:
        safetensors.tensor_bytes(path)
    assert str(path) in str(caught.value)
    assert len(str(caught.value)) < 600


def test_read_folder_invalid_folder_raises(tmp_path: Path) -> None:
    with pytest.raises(SafetensorsError, match="not a folder"):
        safetensors.read_folder(tmp_path / "absent")
    with pytest.raises(SafetensorsError, match="No such file"):
        safetensors.read_folder(tmp_path)
    with pytest.raises(SafetensorsError, match=r"no \.safetensors"):
        safetensors.read_folder(folder(tmp_path))
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": "../../etc/passwd"}}))
    with pytest.raises(SafetensorsError, match="outside"):
        safetensors.read_folder(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(SafetensorsError, match="weight_map"):
        safetensors.read_folder(tmp_path)
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(SafetensorsError, match="not a JSON object"):
        safetensors.read_folder(tmp_path)


def test_read_folder_fifo_raises_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "config.json")
    with pytest.raises(SafetensorsError, match="not a regular file"):
        safetensors.read_folder(tmp_path)


def test_tensor_bytes_every_truncation_raises(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    data = tensors(8, 4)
    path.write_bytes(data)
    assert safetensors.tensor_bytes(path) == 12
    for length in range(len(data) - 1, -1, -1):
        os.truncate(path, length)
        with pytest.raises(SafetensorsError):
            safetensors.tensor_bytes(path)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    config=st.dictionaries(
        st.sampled_from([*LLAMA_8B, "layer_types", "sliding_window", "kv_lora_rank", "text_config"]), JSON
    )
)
def test_estimate_absurd_configuration_gives_a_number(tmp_path: Path, config: dict[str, Any]) -> None:
    found = safetensors.read_folder(folder(tmp_path, config, m=tensors(5)))
    assert vllm_memory.estimate(found, VllmServing()).total_bytes >= 0
