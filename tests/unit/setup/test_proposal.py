"""Which entries a machine's fleet.yaml gets: decided from facts alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fleetd.host.system.memory import DeviceSample
from fleetd.models.scan import Found
from fleetd.setup.machine import Candidate, Machine, Need
from fleetd.setup.programs import Installed
from fleetd.setup.proposal import FleetProposal, propose, unique
from fleetd.setup.servers import Listed, Running

GIB = 1 << 30
HOST = DeviceSample("host", "host", 32 * GIB, 2 * GIB, 30 * GIB)
MAC = DeviceSample("unified", "unified", 32 * GIB, 2 * GIB, 30 * GIB, limit_bytes=20 * GIB)


def gpu(index: int, gib: int) -> DeviceSample:
    return DeviceSample(f"gpu{index}", "gpu", gib * GIB, 0, gib * GIB)


def need(gib: float, context: int = 4096) -> Need:
    size = int(gib * GIB)
    return Need(context, size, GIB // 4, size, size)


def gguf(name: str, *gib: float, **more: Any) -> Candidate:
    """Return a file that needs these sizes with ever shorter contexts."""
    sizes = gib or (1.0,)
    needs = tuple(need(size, 8192 >> index) for index, size in enumerate(sizes))
    found = Found(name, "gguf", Path(f"/m/{name}.gguf"), int(sizes[-1] * GIB), "llama", **more)
    return Candidate(found, needs)


LLAMA = Installed("llama-server", "/usr/bin/llama-server", "b9000", gpu=True)
WHEEL = Installed("xllamacpp", "/lib/xllamacpp", "1.0")
OLLAMA = Installed("ollama", "/usr/bin/ollama", "0.35.0")


def proposed(*files: Candidate, devices: tuple[DeviceSample, ...] = (HOST,), **facts: Any) -> FleetProposal:
    return propose(Machine(devices=devices, files=files, **({"programs": (LLAMA,)} | facts)))


def test_model_gets_the_longest_context_that_fits() -> None:
    entry = proposed(gguf("a", 40, 20, 10)).models["a"]
    assert entry == {"engine": "llamacpp", "options": {"model": "/m/a.gguf", "context_length": 4096}}


def test_model_that_fits_nowhere_is_left_out_with_its_numbers() -> None:
    result = proposed(gguf("big", 60), gguf("small", 1))
    assert list(result.models) == ["small"]
    assert result.left_out["big"] == ("does not fit: needs host 60.00 GiB of 25.60 GiB at 8192 tokens: /m/big.gguf")


def test_model_goes_to_a_gpu_with_room_else_to_the_host() -> None:
    models = proposed(gguf("a", 6), gguf("b", 10), gguf("c", 20), devices=(HOST, gpu(0, 8), gpu(1, 16))).models
    assert "device" not in models["a"], "the first GPU is the default"
    assert models["b"]["device"] == "gpu1"
    assert models["c"]["device"] == "host"


def test_models_are_spread_over_equal_gpus() -> None:
    models = proposed(gguf("a", 6), gguf("b", 6.1), devices=(HOST, gpu(0, 16), gpu(1, 16))).models
    assert [models["a"].get("device"), models["b"].get("device")] == [None, "gpu1"]


def test_build_without_gpu_support_serves_on_the_host() -> None:
    result = proposed(gguf("a", 1), devices=(HOST, gpu(0, 16)), programs=(WHEEL,))
    assert result.models["a"]["device"] == "host"
    assert "on the CPU: this build of llama.cpp has no GPU support" in result.comments["models.a"]


def test_mac_counts_what_its_gpu_may_use() -> None:
    result = proposed(gguf("a", 15), gguf("b", 17), devices=(MAC,))
    assert list(result.models) == ["a"], "80 % of 20 GiB"
    assert result.document["devices"] == {"unified": {"budget": "80%"}}


@pytest.mark.parametrize(
    ("kind", "option"), [({"embedding": True}, "embeddings"), ({"rerank": True, "embedding": True}, "rerank")]
)
def test_embedding_model_is_served_as_such(kind: dict[str, bool], option: str) -> None:
    result = proposed(gguf("e", 0.1, **kind), gguf("chat", 1))
    assert result.models["e"]["options"][option] is True
    assert result.first_model() == "chat", "an embedding model does not answer in words"


def test_projector_is_passed_to_its_model() -> None:
    result = proposed(gguf("a", 1, projector=Path("/m/mmproj.gguf")))
    assert result.models["a"]["options"]["mmproj"] == "/m/mmproj.gguf"


def test_running_ollama_is_used_as_it_is() -> None:
    listed = (Listed("llama3.2:3b", 2 * GIB), Listed("bge-m3", GIB, True), Listed("big:405b", 200 * GIB))
    server = Running("ollama", 11434, "0.35.0", listed)
    result = proposed(servers=(server,), programs=(OLLAMA,), stored=(gguf("x"),), store=Path("/s"))
    assert result.document["instances"] == {"ollama": {"engine": "ollama", "external": "http://127.0.0.1:11434"}}
    assert result.models == {
        "llama3.2:3b": {"instance": "ollama"},
        "bge-m3": {"instance": "ollama", "embedding": True},
    }
    assert "does not fit" in result.left_out["big:405b"]


def test_installed_ollama_is_run_with_the_models_of_its_store() -> None:
    stored = tuple(
        Candidate(one.found, one.needs, one.name) for one in (gguf("llama3.2:3b", 2), gguf("llama3:405b", 200))
    )
    result = proposed(programs=(OLLAMA,), stored=stored, store=Path("/data/ollama"))
    assert result.document["instances"]["ollama"] == {
        "engine": "ollama", "port": 11434, "options": {"models_dir": "/data/ollama"},
    }  # fmt: skip
    assert result.models == {"llama3.2:3b": {"instance": "ollama"}}
    assert "llama3:405b" in result.left_out
    home = proposed(programs=(OLLAMA,), stored=stored, store=Path("/home/me/.ollama/models"))
    assert "options" not in home.document["instances"]["ollama"], "Ollama's own default"


def test_store_without_ollama_is_served_by_llamacpp() -> None:
    stored = (Candidate(gguf("llama3.2:3b", 2).found, (need(2),), "llama3.2:3b"),)
    result = proposed(stored=stored, store=Path("/s"))
    entry = result.models["llama3.2-3b"]
    assert (entry["engine"], entry["aliases"]) == ("llamacpp", ["llama3.2:3b"]), "a process has no ':' in its name"


def test_files_without_llamacpp_are_built_by_ollama() -> None:
    result = proposed(gguf("a", 1), gguf("split", 1, shards=3), programs=(OLLAMA,))
    assert result.models == {"a": {"instance": "ollama", "from": "/m/a.gguf"}}
    assert "several files" in result.left_out["split"]


def test_other_servers_are_external_and_a_locked_one_is_advice() -> None:
    servers = (
        Running("lmstudio", 1234, models=(Listed("qwen"),)),
        Running("external", 8000, models=(Listed("qwen"), Listed("a b")), owner="vllm"),
    )
    result = proposed(servers=servers)
    assert result.document["instances"]["lmstudio"] == {"engine": "lmstudio", "external": "http://127.0.0.1:1234"}
    assert result.document["instances"]["server-8000"] == {"engine": "external", "external": "http://127.0.0.1:8000"}
    assert result.models == {
        "qwen": {"instance": "lmstudio"},
        "qwen-2": {"instance": "server-8000", "served_as": "qwen"},
        "a-b": {"instance": "server-8000", "served_as": "a b"},
    }
    locked = proposed(servers=(Running("external", 8000, locked=True),))
    assert "instances" not in locked.document
    assert "asks for a key" in " ".join(locked.advice)


def test_machine_with_nothing_says_what_to_install() -> None:
    result = proposed(programs=())
    assert "models" not in result.document
    assert result.advice[0].startswith("no engine is installed. llama.cpp is not installed: pipx inject")
    assert any("fleetctl init DIR" in line for line in result.advice)


def test_models_of_one_name_are_left_out_as_two() -> None:
    assert list(proposed(gguf("a"), gguf("a"), programs=()).left_out) == ["a", "a-2"]


def test_taken_gateway_port_is_advice() -> None:
    result = proposed(gateway_port=8485)
    assert result.document["gateway"] == {"listen": "127.0.0.1:8485"}
    assert "port 8484 is taken: the gateway gets 8485" in result.advice


def test_files_without_any_program_are_named_as_left_out() -> None:
    result = proposed(gguf("a"), programs=())
    assert result.left_out == {"a": "no program serves it: /m/a.gguf"}


def safetensors(name: str, architecture: str = "Qwen2ForCausalLM", gib: float = 4) -> Candidate:
    found = Found(name, "safetensors", Path(f"/h/{name}"), int(gib * GIB), architecture, 32768)
    return Candidate(found, (need(gib),))


def test_safetensors_are_served_by_vllm_on_a_gpu() -> None:
    vllm = Installed("vllm", "/v/bin/vllm", "0.20.0")
    machine = {"programs": (vllm,), "devices": (HOST, gpu(0, 24))}
    result = proposed(safetensors("q"), safetensors("sd", "UNet2DConditionModel"), safetensors("h", gib=60), **machine)
    assert result.models == {
        "q": {"engine": "vllm", "options": {"model": "/h/q", "max_model_len": 8192, "gpu_memory_utilization": 0.85}}
    }
    assert "not a text model" in result.left_out["sd"]
    assert "does not fit" in result.left_out["h"]
    assert "does not fit" in proposed(safetensors("n", gib=21), **machine).left_out["n"], "85 % of 24 GiB are 20.4"
    assert "needs vLLM and a GPU" in proposed(safetensors("q"), programs=(vllm,)).left_out["q"]


def test_safetensors_are_served_by_mlx_on_a_mac() -> None:
    mlx = Installed("mlx_lm.server", "/v/bin/mlx_lm.server", "0.30.0")
    entry = proposed(safetensors("q"), programs=(mlx,), devices=(MAC,), platform="darwin").models["q"]
    assert entry["command"] == ["mlx_lm.server", "--model", "/h/q", "--host", "127.0.0.1", "--port", "{port}"]
    assert entry["engine"] == "process"


@pytest.mark.parametrize(
    ("wanted", "name"),
    [
        ("llama3.2:3b", "llama3.2:3b"),
        ("hf.co/a/b:Q4", "hf.co/a/b:Q4"),
        ("taken", "taken-2"),
        ("all", "all-2"),
        ("-x", "x"),
        ("a b$c", "a-b-c"),
        ("日本", "model"),
        ("x" * 300, "x" * 190),
    ],
)
def test_unique_returns_a_valid_free_name(wanted: str, name: str) -> None:
    assert unique(wanted, {"taken": {}}) == name


@pytest.mark.parametrize(
    ("wanted", "name"), [("llama3.2:3b", "llama3.2-3b"), ("hf.co/a/b:q4", "hf.co-a-b-q4"), ("x" * 63, "x" * 58)]
)
def test_unique_of_a_process_allows_fewer_characters(wanted: str, name: str) -> None:
    assert unique(wanted, {}, process=True) == name
