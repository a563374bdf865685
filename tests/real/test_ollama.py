"""fleetd with the real Ollama: replicas, parallel requests, created models, evictions, a killed server, its own clients.

Invariants:
- One daemon for the whole file, two servers on one store; every test leaves both ready.
- Needs `ollama` on PATH. The models have a few hundred KB, and the runner does real work on the CPU.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import threading
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest

from bench import tiny_gguf
from tests.support.daemon import Fleetd, fleetd
from tests.support.waiting import alive, until

pytestmark = [pytest.mark.real, pytest.mark.timeout(300)]

FLEET = """
devices: {{host: {{budget: 700MiB}}}}
defaults:
  process: {{restart: {{backoff: {{initial: 100ms}}}}, stop: {{timeout: 5s}}}}
instances:
  ollama:
    engine: ollama
    replicas: 2
    env: {{HOME: {folder}}}
    options: {{models_dir: {store}, num_parallel: 3, context_length: 512}}
models:
  first: {{instance: [ollama], from: {file}, min_resident: 0, ttl: 0, concurrency: 3}}
  second: {{instance: [ollama], from: {file}, min_resident: 0, ttl: 0, quantize: q8_0}}
  large: {{instance: [ollama], from: {file}, min_resident: 0, ttl: 0, memory: 650MiB}}
  long: {{instance: ollama-1, from: {file}, min_resident: 0, ttl: 0, options: {{num_ctx: 2048}}}}
"""


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleetd]:
    if shutil.which("ollama") is None:
        pytest.skip("there is no ollama on PATH")
    folder = tmp_path_factory.mktemp("ollama")
    (folder / "store").mkdir()
    file = tiny_gguf.write(folder / "tiny.gguf")
    with fleetd(folder, FLEET.format(folder=folder, store=folder / "store", file=file)) as running:
        running.start()
        yield running
        assert running.stop() == 0
        assert runners(running) == []


@pytest.fixture
def ready(fleet: Fleetd) -> Fleetd:
    for name in ("ollama-1", "ollama-2"):
        fleet.until_state(name, "READY")
    return fleet


def runners(fleet: Fleetd) -> list[psutil.Process]:
    return [one for one in fleet.children() if "runner" in one.cmdline()]


def say(fleet: Fleetd, model: str, tokens: int = 4) -> str:
    answer = fleet.chat(model, max_tokens=tokens)
    assert answer.status == 200, (answer.body, fleet.log()[-2000:])
    return answer.headers["X-Fleet-Instance"]


def test_created_model_is_not_copied(ready: Fleetd) -> None:
    say(ready, "first")
    blobs = list((ready.folder / "store" / "blobs").iterdir())
    assert any(blob.is_symlink() and blob.resolve() == ready.folder / "tiny.gguf" for blob in blobs), "no copy is made"


def test_six_requests_at_once_overlap_on_two_servers(ready: Fleetd) -> None:
    say(ready, "first")
    most: list[int] = []
    done = threading.Event()

    def watch() -> None:
        while not done.is_set():
            most.append(ready.model_row("first")["in_flight"])

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        with ThreadPoolExecutor(6) as pool:
            answers = list(pool.map(lambda _: ready.chat("first", max_tokens=40), range(6)))
    finally:
        done.set()
        watcher.join()
    assert [answer.status for answer in answers] == [200] * 6
    assert max(most) >= 3, f"they came one after another: {max(most)}"


def test_reported_memory_is_learned(ready: Fleetd) -> None:
    say(ready, "first")
    until(lambda: ready.model_row("first")["footprint"] == "learned", "what /api/ps says is learned")
    row = ready.model_row("first")
    servers = [one for name in row["instances"] for one in [ready.process_row(name)]]
    listed = 0
    for server in servers:
        held = ollama(ready, server["port"], "ps")
        listed += "first" in held
    assert listed == len(servers)
    assert row["device_bytes"]["host"] > 2**20


def test_created_model_is_quantized(ready: Fleetd) -> None:
    say(ready, "second")
    port = ready.process_row("ollama-1")["port"]
    shown = ollama(ready, port, "show", "second")
    assert "Q8_0" in shown, shown


def test_load_options_apply_to_requests_without_options(ready: Fleetd) -> None:
    assert ready.control("POST", "/v1/models/long/load", {}).status == 200
    server = ready.process_row("ollama-1")
    lengths = listed_lengths(server["port"])
    held = {one.pid for one in psutil.Process(server["pid"]).children(recursive=True)}
    for _ in range(2):
        assert say(ready, "long") == "ollama-1"
    assert listed_lengths(server["port"]) == lengths
    assert lengths["long:latest"] == 2048
    assert {one.pid for one in psutil.Process(server["pid"]).children(recursive=True)} == held, "it was loaded again"
    assert ready.model_row("long")["context_length"] == 2048


def listed_lengths(port: int) -> dict[str, int]:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/api/ps", timeout=10) as answer:
        return {one["name"]: one["context_length"] for one in json.load(answer)["models"]}


def test_full_budget_evicts_and_is_never_exceeded(ready: Fleetd) -> None:
    say(ready, "first")
    say(ready, "second")
    before = {name: ready.model_row(name)["evictions"] for name in ("first", "second")}
    say(ready, "large")
    host = next(one for one in ready.status()["devices"] if one["name"] == "host")
    assert host["reserved_bytes"] <= host["budget_bytes"]
    assert any(ready.model_row(name)["evictions"] > before[name] for name in before)
    for name in ("first", "second", "large", "second"):
        say(ready, name)
        host = next(one for one in ready.status()["devices"] if one["name"] == "host")
        assert host["reserved_bytes"] <= host["budget_bytes"]


def test_killed_server_is_restarted_and_its_runners_killed(ready: Fleetd) -> None:
    where = say(ready, "first")
    row = ready.process_row(where)
    lost = [one.pid for one in psutil.Process(row["pid"]).children(recursive=True)]
    assert lost, "it has a runner"
    os.kill(row["pid"], signal.SIGKILL)
    began = time.monotonic()
    until(lambda: ready.process_row(where)["generation"] > row["generation"], "it is started again")
    assert not any(map(alive, lost)), "runners of the dead server live on"
    ready.until_state(where, "READY")
    assert time.monotonic() - began < 20
    say(ready, "first")


def test_ollama_command_works_on_a_server_port(ready: Fleetd) -> None:
    port = say_port(ready, "first")
    assert "first" in ollama(ready, port, "list")
    assert ollama(ready, port, "run", "first", "hi").strip() != ""
    assert ready.process_row("ollama-1")["state"] == "READY"


def say_port(fleet: Fleetd, model: str) -> int:
    return int(fleet.process_row(say(fleet, model))["port"])


def ollama(fleet: Fleetd, port: int, *words: str) -> str:
    """Run the `ollama` command against a port; return its output."""
    env = {**os.environ, "OLLAMA_HOST": f"127.0.0.1:{port}", "HOME": str(fleet.folder)}
    done = subprocess.run(["ollama", *words], capture_output=True, text=True, env=env, timeout=60, check=False)
    assert done.returncode == 0, (words, done.stderr, done.stdout)
    return done.stdout


def test_restarted_daemon_finds_loaded_models(ready: Fleetd) -> None:
    where = say(ready, "first")
    pid = ready.process_row(where)["pid"]
    ready.signal(signal.SIGKILL)
    ready.wait()
    ready.start()
    assert ready.until_state(where, "READY")["pid"] == pid
    until(lambda: ready.model_row("first")["state"] == "LOADED", "what it held is seen")
    loads = ready.model_row("first")["loads"]
    say(ready, "first")
    assert ready.model_row("first")["loads"] == loads, json.dumps(ready.model_row("first"))
