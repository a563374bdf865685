"""Real vLLM, Ollama and llama.cpp in one fleet, with a budget for two of the three: they evict each other.

Invariants:
- FLEETD_VLLM is the folder of `tests/real/install_vllm.sh`; Ollama is taken from PATH. The file is skipped if one is missing.
- A start of vLLM takes most of a minute; meanwhile no other model is loaded or evicted.
"""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench import tiny_gguf
from tests.real.test_vllm import CACHE, READY_S
from tests.support.daemon import Fleetd, fleetd
from tests.support.waiting import until

pytestmark = [pytest.mark.real, pytest.mark.timeout(900)]

FLEET = """
devices: {{host: {{budget: 5GiB}}}}
instances:
  ollama:
    engine: ollama
    env: {{HOME: {folder}}}
    options: {{models_dir: {folder}/store, num_parallel: 2, context_length: 512}}
models:
  by-ollama: {{instance: [ollama], from: {gguf}, memory: 1GiB, min_resident: 0}}
  by-llamacpp:
    engine: llamacpp
    memory: 1GiB
    min_resident: 0
    options: {{model: {gguf}, context_length: 512}}
  by-vllm:
    engine: vllm
    command: [{vllm}, serve]
    device: host
    memory: 4GiB  # more than it is seen to take: what is declared is what is planned with
    min_resident: 0
    env: {{VLLM_CPU_OMP_THREADS_BIND: nobind, OMP_NUM_THREADS: "2"}}
    queue: {{timeout: 5m}}
    options:
      model: {folder}/model
      offline: true
      dtype: bfloat16
      max_model_len: 512
      max_num_seqs: 16
      enforce_eager: true
      gpu_memory_utilization: 0.15
"""
ALL = ("by-ollama", "by-llamacpp", "by-vllm")


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleetd]:
    if not (CACHE / "vllm").exists():
        pytest.skip(f"vLLM is not in {CACHE}")
    if shutil.which("ollama") is None:
        pytest.skip("there is no ollama on PATH")
    folder = tmp_path_factory.mktemp("together")
    (folder / "store").mkdir()
    made = [str(CACHE / "venv/bin/python"), str(Path(__file__).parent / "tiny_hf.py"), str(folder / "model")]
    subprocess.run(made, check=True, capture_output=True, timeout=300)
    gguf = tiny_gguf.write(folder / "tiny.gguf")
    with fleetd(folder, FLEET.format(folder=folder, gguf=gguf, vllm=CACHE / "vllm")) as running:
        running.start()
        yield running
        assert running.stop() == 0
        assert running.children() == []


def ask(fleet: Fleetd, model: str) -> float:
    """Ask one question; return the seconds it took. The budget holds whatever happens."""
    began = time.monotonic()
    load(fleet, model)
    until(lambda: fleet.model_row(model)["state"] == "LOADED", f"{model} is loaded", READY_S)
    body = {"model": model, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 4}
    answer = fleet.ask("POST", "/v1/chat/completions", body, timeout_s=READY_S)
    assert answer.status == 200, (answer.body, fleet.log()[-3000:])
    host = next(one for one in fleet.status()["devices"] if one["name"] == "host")
    assert host["reserved_bytes"] <= host["budget_bytes"]
    return time.monotonic() - began


def load(fleet: Fleetd, model: str) -> None:
    """Wish for a model, without a client's patience: on a busy machine vLLM takes minutes to start."""
    assert fleet.control("POST", f"/v1/models/{model}/load", {"wait": False}).status < 300


def loaded(fleet: Fleetd) -> set[str]:
    return {name for name in ALL if fleet.model_row(name)["state"] == "LOADED"}


def test_three_engines_share_one_budget_and_evict_each_other(fleet: Fleetd) -> None:
    took = {name: ask(fleet, name) for name in ("by-ollama", "by-llamacpp")}
    assert loaded(fleet) == {"by-ollama", "by-llamacpp"}
    took["by-vllm"] = ask(fleet, "by-vllm")
    assert "by-vllm" in loaded(fleet)
    assert len(loaded(fleet)) == 2, "it needed the room of one"
    gone = ({"by-ollama", "by-llamacpp"} - loaded(fleet)).pop()
    took[f"{gone} again"] = ask(fleet, gone)
    print({name: round(seconds, 2) for name, seconds in took.items()})
    assert sum(fleet.model_row(name)["evictions"] for name in ALL) >= 2


def test_vllm_start_shows_phases_and_blocks_other_loads(fleet: Fleetd) -> None:
    for name in ALL:
        fleet.control("POST", f"/v1/models/{name}/unload")
    until(lambda: not loaded(fleet), "all are unloaded")
    load(fleet, "by-vllm")
    until(lambda: fleet.process_row("by-vllm")["state"] == "STARTING", "vLLM starts")
    seen: list[str] = []
    load(fleet, "by-ollama")

    def ready() -> bool:
        row = fleet.process_row("by-vllm")
        if row["reason"] not in seen:
            seen.append(row["reason"])
        if row["state"] == "STARTING":
            assert fleet.model_row("by-ollama")["state"] != "LOADED", "it was loaded while vLLM measured memory"
        return bool(row["state"] == "READY")

    until(ready, "vLLM is ready", READY_S)
    until(lambda: fleet.model_row("by-ollama")["state"] == "LOADED", "then the other one is loaded")
    print(seen)
    assert len([reason for reason in seen if reason.startswith("starting: ")]) >= 2, seen
