"""The memory estimate: the arithmetic of each shape of attention, and a comparison with the real engine."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench import tiny_gguf
from fleetd.engines import registry
from fleetd.engines.base import LaunchContext
from fleetd.models import memory_estimate
from fleetd.models.formats import gguf
from fleetd.models.formats.gguf import Header, Tensor
from fleetd.models.memory_estimate import MIB, GgufServing
from tests.support.ports import free_port


def header(arch: str = "llama", lengths: dict[str, int] | None = None, **numbers: Any) -> Header:
    keys: dict[str, Any] = {"general.architecture": arch}
    keys |= {f"{arch}.{name.replace('__', '.')}": value for name, value in numbers.items()}
    return Header("m.gguf", 3, 10**9, 1000, keys, lengths or {}, (Tensor("token_embd.weight", (1,), 0, 0, 1000),))


LLAMA_8B = header(
    block_count=32,
    embedding_length=4096,
    feed_forward_length=14336,
    attention__head_count=32,
    attention__head_count_kv=8,
)
GEMMA_27B = header(
    "gemma3", block_count=62, embedding_length=5376, attention__head_count=32, attention__head_count_kv=16,
    attention__key_length=128, attention__value_length=128, attention__sliding_window=1024,
)  # fmt: skip
DEEPSEEK = header(
    "deepseek2", block_count=61, embedding_length=7168, attention__head_count=128, attention__head_count_kv=1,
    attention__kv_lora_rank=512, attention__key_length=576, attention__value_length=512, rope__dimension_count=64,
)  # fmt: skip
HYBRID = header(
    "qwen3next", block_count=48, embedding_length=2048, attention__head_count=16, attention__head_count_kv=2,
    attention__key_length=256, attention__value_length=256, full_attention_interval=4, ssm__inner_size=4096,
    ssm__state_size=128, ssm__group_count=16, ssm__conv_kernel=4,
)  # fmt: skip
GIB = 1 << 30
KV = [
    # 32 layers x 8 heads x 2 x 128 numbers x 2 bytes: 128 KiB per token
    (LLAMA_8B, GgufServing(8192), 1 * GIB),
    (LLAMA_8B, GgufServing(8192, slots=4), 4 * GIB),
    (LLAMA_8B, GgufServing(8192, cache_type_k="q8_0", cache_type_v="q8_0"), int(1.0625 / 2 * GIB)),
    (LLAMA_8B, GgufServing(8192, cache_type_k="q4_0", cache_type_v="f32"), int((0.5625 + 4) / 4 * GIB)),
    (LLAMA_8B, GgufServing(1), 256 * 131072),
    # 10 global layers keep everything, 52 keep their window and one batch
    (GEMMA_27B, GgufServing(32768), 2 * 16 * 128 * 2 * (10 * 32768 + 52 * 1536)),
    (GEMMA_27B, GgufServing(512), 2 * 16 * 128 * 2 * 62 * 512),
    (DEEPSEEK, GgufServing(4096), 61 * (512 + 64) * 2 * 4096),
    (HYBRID, GgufServing(4096), 12 * 2 * 512 * 2 * 4096 + 36 * (3 * (4096 + 2 * 16 * 128) + 128 * 4096) * 4),
    (header(block_count=2, embedding_length=64, attention__head_count=4, attention__head_count_kv=(1, 3)),
     GgufServing(256), 4 * 32 * 2 * 256),
    (header("bert", block_count=12, embedding_length=768, attention__head_count=12, attention__causal=False), GgufServing(512), 0),
    (header("unknown"), GgufServing(4096), 0),
]  # fmt: skip


@pytest.mark.parametrize(("model", "serving", "wanted"), KV)
def test_kv_bytes_per_attention_shape(model: Header, serving: GgufServing, wanted: int) -> None:
    assert memory_estimate.kv_bytes(model, serving) == wanted


def test_kv_bytes_header_pattern_overrides_architecture() -> None:
    pattern = header(
        "gemma3", block_count=2, embedding_length=64, attention__head_count=1, attention__head_count_kv=1,
        attention__sliding_window=256, attention__sliding_window_pattern=(True, False),
    )  # fmt: skip
    assert memory_estimate.kv_bytes(pattern, GgufServing(4096, ubatch=256)) == 64 * 2 * 2 * (512 + 4096)


def test_estimate_splits_layers_between_gpu_and_host() -> None:
    host = memory_estimate.estimate([LLAMA_8B], GgufServing(gpu_layers=0))
    half = memory_estimate.estimate([LLAMA_8B], GgufServing(gpu_layers=16))
    whole = memory_estimate.estimate([LLAMA_8B], GgufServing(gpu_layers=None))
    unified = memory_estimate.estimate([LLAMA_8B], GgufServing(gpu_layers=None, unified=True))
    assert host.device_bytes == 0
    assert 0 < half.device_bytes < whole.device_bytes
    assert half.host_bytes > whole.host_bytes
    assert unified.device_bytes < whole.device_bytes  # no driver context
    assert whole.total_bytes >= host.total_bytes


def test_estimate_counts_prompt_cache_and_extra_files(tmp_path: Path) -> None:
    path = tiny_gguf.write(tmp_path / "m.gguf")
    plain = memory_estimate.estimate_gguf([path], GgufServing()).total_bytes
    assert (
        memory_estimate.estimate_gguf([path], GgufServing(prompt_cache_bytes=64 * MIB)).total_bytes == plain + 64 * MIB
    )
    with_lora = memory_estimate.estimate_gguf([path], GgufServing(extra_files=(path,))).total_bytes
    assert with_lora == plain + gguf.read(path).weight_bytes


NUMBERS = st.one_of(st.integers(-(2**40), 2**40), st.just(0), st.tuples(st.integers(0, 2**31), st.integers(0, 2**31)))
KEYS = st.sampled_from(
    ["block_count", "embedding_length", "attention__head_count", "attention__head_count_kv", "attention__key_length",
     "attention__sliding_window", "attention__sliding_window_pattern", "attention__kv_lora_rank", "ssm__state_size",
     "full_attention_interval", "nextn_predict_layers", "feed_forward_length", "ssm__inner_size"]
)  # fmt: skip


@settings(deadline=None)
@given(numbers=st.dictionaries(KEYS, NUMBERS), slots=st.integers(1, 64), length=st.integers(1, 10**6))
def test_estimate_absurd_header_gives_a_number(numbers: dict[str, Any], slots: int, length: int) -> None:
    sizes = memory_estimate.estimate([header(**numbers)], GgufServing(length, slots))
    assert min(sizes.kv_bytes, sizes.compute_bytes, sizes.device_bytes, sizes.host_bytes) >= 0


# -- compared with the real engine ---------------------------------------------------------------------------------------------

STEP = {"ubatch": 128, "batch": 128}  # a small step, so that it is quick on a busy machine
MEASURED: list[tuple[tiny_gguf.TinyModel, dict[str, Any]]] = [
    (tiny_gguf.TinyModel(), {}),
    (tiny_gguf.sized(8), {"parallel": 2, **STEP}),
    (tiny_gguf.sized(30), {"context_length": 2048, "parallel": 2, **STEP}),
    (tiny_gguf.sized(8), {"flash_attention": False, "context_length": 1024, **STEP}),
    (tiny_gguf.sized(30), {"cache_type_k": "q8_0", "cache_type_v": "q8_0", "context_length": 8192, **STEP}),
    (tiny_gguf.sized(100), {"load_mode": "read", **STEP}),
]


def post(port: int, path: str, payload: Any) -> None:
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", json.dumps(payload).encode())
    with urllib.request.urlopen(request, timeout=60) as response:
        response.read()


def wait_ready(port: int, process: subprocess.Popen[bytes]) -> None:
    end = time.monotonic() + 60
    while True:
        assert process.poll() is None
        assert time.monotonic() < end
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.02)


@pytest.mark.skipif(importlib.util.find_spec("xllamacpp") is None, reason="xllamacpp is not installed")
@pytest.mark.parametrize(("shape", "options"), MEASURED)
def test_estimate_is_close_to_measured_memory(
    shape: tiny_gguf.TinyModel, options: dict[str, Any], tmp_path: Path
) -> None:
    """Measure after a prompt of a full batch, which touches the compute buffer; without flash attention, of all cells."""
    engine = registry.load("llamacpp")
    path = tiny_gguf.write(tmp_path / "m.gguf", shape)
    port = free_port()
    entry = LaunchContext(
        "m",
        engine.options(model=str(path), threads=1, **options),
        "127.0.0.1",
        port,
        device="host",
        env={"PATH": "/nowhere"},
    )
    prompt = options.get("ubatch", 512) + 10 if options.get("flash_attention", True) else options["context_length"] - 20
    estimated = engine.estimate(entry, None)
    assert estimated is not None
    quiet = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(engine.launch(entry).argv, env=dict(os.environ), **quiet) as process:  # type: ignore[call-overload]
        try:
            wait_ready(port, process)
            post(
                port,
                "/completion",
                {"prompt": "a" * prompt, "n_predict": 2},
            )
            taken = psutil.Process(process.pid).memory_info().rss
        finally:
            process.kill()
    assert estimated.total_bytes == pytest.approx(taken, rel=0.25)
    assert estimated.total_bytes > taken * 0.95
