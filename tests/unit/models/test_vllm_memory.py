"""The memory estimate for vLLM: hand-checked numbers, and a number for every configuration."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fleetd.models import vllm_memory
from fleetd.models.formats import safetensors
from fleetd.models.formats.safetensors import ModelFolder
from fleetd.models.vllm_memory import VllmServing
from tests.unit.models.test_safetensors import LLAMA_8B, folder, tensors


def model(weight_bytes: int = 0, **config: Any) -> ModelFolder:
    return ModelFolder("m", weight_bytes, (), {**LLAMA_8B, **config})


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
