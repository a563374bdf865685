"""fleetd with a real vLLM on the CPU: chat, a killed server, a killed engine, an invalid option, sleep, stop.

Invariants:
- FLEETD_VLLM is the folder that `tests/real/install_vllm.sh` installed into (default: ~/.cache/fleetd-vllm).
- One daemon for the whole file: a start of vLLM takes most of a minute. Every test leaves the model loaded or loadable.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from aiohttp import ClientSession

from fleetd.engines.base import Endpoint
from fleetd.engines.vllm.engine import ENGINE
from fleetd.engines.vllm.options import VllmOptions
from fleetd.engines.vllm.sleep import VllmSleeper, canary
from fleetd.errors import EngineError
from tests.support.daemon import Fleetd, fleetd
from tests.support.waiting import until

pytestmark = [pytest.mark.real, pytest.mark.timeout(900)]

CACHE = Path(os.environ.get("FLEETD_VLLM", Path.home() / ".cache" / "fleetd-vllm"))
READY_S = 300.0  # 40 s on an idle machine with two cores; imports of libraries dominate, and the machine is shared
GONE_S = 20.0
SLEEPER = VllmSleeper()

FLEET = """
devices: {{host: {{budget: 90%}}}}
models:
  tiny:
    engine: vllm
    aliases: [gpt-tiny]
    command: [{vllm}, serve]
    device: host
    env: {{VLLM_CPU_OMP_THREADS_BIND: nobind, HF_HUB_DISABLE_TELEMETRY: "1", OMP_NUM_THREADS: "2"}}
    ttl: 0
    queue: {{timeout: 5m}}
    restart: {{backoff: {{initial: 100ms}}}}
    options:
      model: {model}
      offline: true
      dtype: bfloat16
      max_model_len: 512
      max_num_seqs: 16
      enforce_eager: true
      gpu_memory_utilization: 0.15
"""


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleetd]:
    if not (CACHE / "vllm").exists():
        pytest.skip(f"vLLM is not in {CACHE}: bash tests/real/install_vllm.sh {CACHE}")
    folder = tmp_path_factory.mktemp("vllm")
    made = subprocess.run(
        [CACHE / "venv/bin/python", Path(__file__).parent / "tiny_hf.py", folder / "model"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert made.returncode == 0, made.stderr
    with fleetd(folder, text(folder)) as running:
        running.start()
        yield running


def text(folder: Path) -> str:
    return FLEET.format(vllm=CACHE / "vllm", model=folder / "model")


@pytest.fixture
def loaded(fleet: Fleetd) -> Fleetd:
    load(fleet)
    return fleet


def load(fleet: Fleetd) -> None:
    """Have the model loaded, and its process ready; a request would be patient for `gateway.queue.timeout` only."""
    assert fleet.control("POST", "/v1/models/load", {"names": ["tiny"], "wait": False}).status in (200, 202)
    until(lambda: fleet.model_row("tiny")["state"] == "LOADED", f"it is loaded: {fleet.log()[-2000:]}", READY_S)
    fleet.until_state("tiny", "READY")


def ask(fleet: Fleetd, model: str = "tiny", **more: object) -> str:
    """Ask for eight tokens; the model is loaded for it if it has to be. Return the content of the answer."""
    body = {"model": model, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 8, **more}
    answer = fleet.ask("POST", "/v1/chat/completions", body, timeout_s=READY_S)
    assert answer.status == 200, (answer.body[:500], fleet.log()[-3000:], fleet.log_of("tiny")[-3000:])
    assert answer.json["usage"]["completion_tokens"] > 0
    return str(answer.json["choices"][0]["message"]["content"])


def processes(fleet: Fleetd) -> dict[int, str]:
    """Return the pids and titles of everything that the daemon started."""
    found = {}
    for process in fleet.children():
        try:
            found[process.pid] = " ".join(process.cmdline())[:60] or process.name()
        except psutil.Error:
            continue
    return found


def alive(pids: object) -> dict[int, str]:
    found = {}
    for pid in pids:  # type: ignore[attr-defined]
        try:
            process = psutil.Process(pid)
            if process.status() != psutil.STATUS_ZOMBIE:
                found[pid] = process.name()
        except psutil.NoSuchProcess:
            continue
    return found


def test_vllm_answers_whole_and_streamed(loaded: Fleetd) -> None:
    assert ask(loaded, temperature=0) == ask(loaded, "gpt-tiny", temperature=0)
    streamed = loaded.chat("tiny", stream=True)
    events = [line[6:] for line in streamed.body.decode().splitlines() if line.startswith("data: ")]
    assert events[-1] == "[DONE]"
    assert all("choices" in json.loads(event) for event in events[:-1])


def test_vllm_processes_are_counted(loaded: Fleetd) -> None:
    row = loaded.process_row("tiny")
    titles = processes(loaded)
    assert row["pid"] in titles
    assert len(titles) >= 3, "the server, its engine and a worker; their titles must not hide whose they are"
    total = sum(psutil.Process(pid).memory_info().rss for pid in titles)
    assert row["rss_bytes"] > 0.5 * total, "memory is that of the whole set"
    (model,) = [entry for entry in loaded.get("/v1/models").json["data"] if entry["id"] == "tiny"]
    assert model["fleet"]["engine"] == "vllm"
    assert model["fleet"]["state"] == "LOADED"


@pytest.mark.parametrize("victim", ["the server", "its engine"])
def test_killed_vllm_leaves_no_process_and_restarts(loaded: Fleetd, victim: str) -> None:
    row, before = loaded.process_row("tiny"), processes(loaded)
    pid = row["pid"] if victim == "the server" else next(pid for pid, title in before.items() if "Engine" in title)
    os.kill(pid, signal.SIGKILL)
    until(lambda: not alive(before), f"all of {before} are gone", READY_S if victim == "its engine" else GONE_S)
    load(loaded)
    after = loaded.process_row("tiny")
    assert after["restarts"] - row["restarts"] in (0, 1), "counted where it was asked for before the old one was gone"
    assert after["generation"] > row["generation"]
    assert not set(processes(loaded)) & set(before)


def test_invalid_option_fails_once_with_its_reason(fleet: Fleetd) -> None:
    """vLLM finds that one request of the longest length has no room, after most of a minute: trying again would not help."""
    try:
        reloaded(fleet, "      max_model_len: 512\n", "      max_model_len: 512\n      num_gpu_blocks_override: 1\n")
        fleet.control("POST", "/v1/models/load", {"names": ["tiny"], "wait": False})
        until(lambda: fleet.process_row("tiny")["state"] == "FAILED", "it failed for good", READY_S)
        row = fleet.process_row("tiny")
        assert "No available memory for the cache blocks" in row["reason"], row
        until(lambda: not processes(fleet), "nothing is left of it")
        answer = fleet.chat("tiny")
        assert (answer.status, answer.code) == (503, "model_failed"), answer.body
    finally:
        reloaded(fleet, "", "")
    load(fleet)


def test_too_much_memory_is_rejected_with_the_numbers(fleet: Fleetd) -> None:
    try:
        reloaded(fleet, "gpu_memory_utilization: 0.15", "gpu_memory_utilization: 1.0")
        answer = fleet.ask("POST", "/v1/chat/completions", {"model": "tiny", "messages": []}, timeout_s=READY_S)
        assert (answer.status, answer.code) == (422, "model_too_large"), answer.body
        assert "GiB" in answer.json["error"]["message"]
        until(lambda: not processes(fleet), "the one that was loaded with the options before is gone")
    finally:
        reloaded(fleet, "", "")
    load(fleet)


def reloaded(fleet: Fleetd, old: str, new: str) -> None:
    """Replace a part of the fleet's file, and have it applied."""
    original = text(fleet.folder)
    assert old in original
    fleet.write(original.replace(old, new) if old else original)
    answer = fleet.control("POST", "/v1/reload", {})
    assert answer.status == 200, answer.body


def test_vllm_sleeps_and_wakes(fleet: Fleetd) -> None:
    """On the CPU the flag of the sleep mode fails the start, but without it the routes and the states are vLLM's own."""
    options = VllmOptions(model="tiny", sleep_level=1)

    async def go(endpoint: Endpoint) -> None:
        async with ClientSession() as http:
            assert not await SLEEPER.is_asleep(http, endpoint, 10)
            known = await SLEEPER.sleep(http, endpoint, options, None, 60)
            assert known.level == 1
            assert known.canary
            assert await SLEEPER.is_asleep(http, endpoint, 10)
            async with http.get(f"{endpoint.base_url}/health") as answer:
                assert answer.status == 200, "it says that it is well, and that is true"
            assert (await ENGINE.alive(http, endpoint, None, 10)).detail == "asleep"
            with pytest.raises(EngineError, match="did not answer"):
                await canary(http, endpoint, "tiny", 2.0)  # accepted, queued, silent
            with pytest.raises(EngineError, match="sleeps already"):
                await SLEEPER.sleep(http, endpoint, options, known, 60)
            await SLEEPER.wake(http, endpoint, known, 60)
            assert not await SLEEPER.is_asleep(http, endpoint, 10)
            assert await canary(http, endpoint, "tiny", 60) == known.canary

    try:
        reloaded(fleet, 'OMP_NUM_THREADS: "2"}', 'OMP_NUM_THREADS: "2", VLLM_SERVER_DEV_MODE: "1"}')
        load(fleet)
        generation = fleet.process_row("tiny")["generation"]
        asyncio.run(go(Endpoint(f"http://127.0.0.1:{fleet.process_row('tiny')['port']}")))
        for path in ("/sleep", "/wake_up", "/is_sleeping"):
            assert fleet.ask("POST", path, {}).status == 404, "the gateway does not forward this route"
        assert ask(fleet)
        assert fleet.process_row("tiny")["generation"] == generation, "it is the same process"
    finally:
        reloaded(fleet, "", "")
    load(fleet)


def test_stop_frees_all_memory(loaded: Fleetd) -> None:
    before = processes(loaded)
    assert before
    assert loaded.control("POST", "/v1/processes/tiny/stop", {"wait": True, "timeout_s": 60}).status == 200
    loaded.until_state("tiny", "STOPPED")
    assert alive(before) == {}
    assert [device["reserved_bytes"] for device in loaded.status()["devices"]] == [0]
    assert loaded.control("POST", "/v1/processes/tiny/start", {"wait": False}).status in (200, 202)
    load(loaded)
