"""Every flag of the fake model server works as documented, so that other tests can rely on it."""

from __future__ import annotations

import hashlib
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.fakes.launch import FakeServer, command, fake
from tests.support.waiting import alive, until

APIS = ("openai", "llamacpp", "vllm", "ollama", "lmstudio")
BROKEN = (OSError, http.client.HTTPException)


def in_thread(action: Any) -> threading.Thread:
    thread = threading.Thread(target=action, daemon=True)
    thread.start()
    return thread


def ignoring(server: FakeServer, **more: Any) -> Any:
    """Return an action that asks for a chat and forgets how it ended."""

    def action() -> None:
        try:
            server.chat(**more)
        except BROKEN:
            pass

    return action


@pytest.mark.parametrize("api", APIS)
def test_every_dialect_answers_openai(api: str) -> None:
    with fake("--api", api, "--tokens", "4") as server:
        answer = server.chat().json()
        assert answer["choices"][0]["message"]["content"].split() == ["word0", "word1", "word2", "word3"]
        assert answer["usage"]["completion_tokens"] == 4
        assert server.request("GET", "/v1/models").json()["object"] == "list"
        until(lambda: server.stats()["finished"] == 1, "it is counted, a moment after its answer")


@pytest.mark.parametrize("api", APIS)
def test_streams_end_with_usage_and_done(api: str) -> None:
    with fake("--api", api, "--tokens", "3") as server:
        lines = server.chat(stream=True, stream_options={"include_usage": True}).body.decode().split("\n\n")
        assert [line for line in lines if line][-1] == "data: [DONE]"
        chunks = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: {")]
        assert chunks[-1]["usage"]["completion_tokens"] == 3
        assert not chunks[-1]["choices"]
        assert chunks[-2]["choices"][0]["finish_reason"] == "stop"
        assert "".join(c["choices"][0]["delta"].get("content", "") for c in chunks[:-1]).split() == [
            "word0",
            "word1",
            "word2",
        ]
        plain = server.chat(stream=True).body.decode()
        assert '"usage"' not in plain


def test_max_tokens_limits_the_answer() -> None:
    with fake("--tokens", "8") as server:
        answer = server.chat(max_tokens=2).json()
        assert answer["usage"]["completion_tokens"] == 2
        assert answer["choices"][0]["finish_reason"] == "length"


@pytest.mark.parametrize("api", ["openai", "llamacpp"])
def test_health_before_load_returns_503(api: str) -> None:
    with fake("--api", api, "--load-time", "0.3") as server:
        begun = time.monotonic()
        assert server.request("GET", "/health").status == 503
        assert server.chat().status == 503
        until(lambda: server.request("GET", "/health").status == 200, "it is ready")
        assert time.monotonic() - begun > 0.1
        assert server.chat().status == 200


def test_vllm_refuses_connections_until_ready() -> None:
    with fake("--api", "vllm", "--load-time", "0.3", wait=False) as server:
        with pytest.raises(ConnectionRefusedError):
            server.request("GET", "/health")
        until(server.answers, "it listens")
        assert "Application startup complete" in server.log()
        assert server.request("GET", "/health").status == 200


def test_tps_paces_the_tokens() -> None:
    with fake("--tps", "50", "--tokens", "10") as server:
        begun = time.monotonic()
        server.chat()
        assert time.monotonic() - begun >= 0.18


def test_crash_after_requests() -> None:
    with fake("--crash-after", "2", "--exit-code", "3") as server:
        assert server.chat().status == 200
        assert server.chat().status == 200
        with pytest.raises(BROKEN):
            server.chat()
        assert server.exit_code() == 3


def test_crash_after_seconds_and_exit_zero() -> None:
    with fake("--crash-after", "0.1s", "--exit-zero-on-death") as server:
        assert server.exit_code() == 0


def test_crash_mid_stream() -> None:
    with fake("--crash-after", "0", "--crash-mid-stream") as server:
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)
        body = json.dumps({"messages": [], "stream": True})
        connection.request("POST", "/v1/chat/completions", body)
        response = connection.getresponse()
        assert response.status == 200
        with pytest.raises(BROKEN):
            response.read()
        connection.close()
        assert server.exit_code() == 1


def test_sigterm_exits_unless_ignore_term() -> None:
    with fake() as server:
        server.process.terminate()
        assert server.exit_code() == 0
    with fake("--ignore-term") as server:
        server.process.terminate()
        assert server.answers()
        assert server.process.poll() is None
        server.process.kill()
        assert server.exit_code() == -signal.SIGKILL


def test_hang_accepts_and_never_answers() -> None:
    with fake("--hang") as server, pytest.raises(TimeoutError):
        server.request("GET", "/health", timeout_s=0.2)


def test_hang_after_wedges_inference_only() -> None:
    with fake("--api", "vllm", "--hang-after", "1") as server:
        assert server.chat().status == 200
        with pytest.raises(TimeoutError):
            server.request("POST", "/v1/completions", {"prompt": "x"}, timeout_s=0.2)
        assert server.request("GET", "/health").status == 200


def test_memory_flag_allocates_memory() -> None:
    with fake("--memory", "60000000") as server:
        until(lambda: server.request("GET", "/health").status == 200, "it is ready")
        assert psutil.Process(server.process.pid).memory_info().rss > 60_000_000
        assert server.stats()["held_bytes"] == 60_000_000


@pytest.mark.parametrize("setsid", [False, True])
def test_orphan_worker_outlives_its_leader(setsid: bool) -> None:
    flags = [
        "--api",
        "vllm",
        "--orphan-worker",
        "--memory",
        "30000000",
        *(["--orphan-setsid"] if setsid else []),
    ]
    with fake(*flags) as server:
        (worker,) = server.stats()["workers"]
        server.process.kill()
        assert server.exit_code() == -signal.SIGKILL
        assert alive(worker)
        process = psutil.Process(worker)
        assert process.memory_info().rss > 30_000_000
        assert (os.getsid(worker) == worker) == setsid
        assert os.path.samestat(Path(f"/proc/{worker}/fd/1").stat(), os.fstat(server.output.fileno()))


def test_sigterm_kills_the_worker() -> None:
    with fake("--api", "vllm", "--orphan-worker") as server:
        (worker,) = server.stats()["workers"]
        server.process.terminate()
        assert server.exit_code() == 0
        until(lambda: not alive(worker), "the worker is gone")


@pytest.mark.parametrize(
    ("api", "line"),
    [("openai", "failed to load model"), ("llamacpp", "invalid magic"), ("vllm", "No available memory")],
)
def test_fail_load_prints_the_reason(api: str, line: str) -> None:
    with fake("--api", api, "--fail-load", wait=False) as server:
        assert server.exit_code() == 1
        assert line in server.log()


def test_garbage_and_reset() -> None:
    with fake("--garbage") as server:
        assert server.request("GET", "/health").status == 200
        with pytest.raises(http.client.BadStatusLine):
            server.chat()
    with fake("--rst-mid-stream") as server, pytest.raises(BROKEN):
        server.chat(stream=True)


def test_slots_limit_parallel_requests() -> None:
    with fake("--slots", "2", "--tps", "40", "--tokens", "4") as server:
        threads = [in_thread(server.chat) for _ in range(6)]
        for thread in threads:
            thread.join(20)
        until(lambda: server.stats()["finished"] == 6, "all are done")
        assert server.stats()["max_in_flight"] == 2


def test_disconnected_client_is_counted_as_aborted() -> None:
    with fake("--tps", "5", "--tokens", "1000") as server:
        with pytest.raises(TimeoutError):
            server.request("POST", "/v1/chat/completions", {"messages": []}, timeout_s=0.2)
        until(lambda: server.stats()["aborted"] == 1, "the abort is seen")
        assert server.stats()["in_flight"] == 0


def test_port_in_use_is_an_error() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        done = subprocess.run(command("--port", port), capture_output=True, timeout=20, check=False)
    assert done.returncode == 1
    assert b"address already in use" in done.stdout


def test_start_takes_milliseconds() -> None:
    def start_s() -> float:
        begun = time.monotonic()
        with fake():
            return time.monotonic() - begun

    assert min(start_s() for _ in range(5)) < 0.6  # some 40 ms on an idle machine


# -- vllm ---------------------------------------------------------------------------------------------------------------


def test_vllm_sleep_behaves_as_the_real_one() -> None:
    with fake("--api", "vllm", "--memory", "1000", env={"VLLM_SERVER_DEV_MODE": "1"}) as server:
        assert server.request("POST", "/sleep?level=3").status == 400
        assert server.request("POST", "/sleep?level=1").json() == {"status": "sleeping", "level": 1}
        assert server.request("GET", "/is_sleeping").json() == {"is_sleeping": True}
        assert server.stats()["held_bytes"] == 0
        assert server.request("GET", "/health").status == 200
        with pytest.raises(TimeoutError):
            server.request("POST", "/v1/completions", {"prompt": "x"}, timeout_s=0.2)
        assert server.request("POST", "/sleep?level=2").json()["level"] == 2  # it says so, and did nothing
        assert server.request("POST", "/wake_up").json()["status"] == "awake"
        assert "word0" in server.chat().json()["choices"][0]["message"]["content"]
        assert server.stats()["held_bytes"] == 1000
        assert server.request("POST", "/wake_up?tags=nonsense").status == 200


def test_vllm_fails_to_sleep_and_hangs_while_waking() -> None:
    with fake("--api", "vllm", "--fail-sleep", env={"VLLM_SERVER_DEV_MODE": "1"}) as server:
        assert server.request("POST", "/sleep").status == 500
        assert server.request("GET", "/is_sleeping").json() == {"is_sleeping": False}
    with fake("--api", "vllm", "--hang-wake", env={"VLLM_SERVER_DEV_MODE": "1"}) as server:
        assert server.request("POST", "/sleep").status == 200
        with pytest.raises(TimeoutError):
            server.request("POST", "/wake_up", timeout_s=0.2)
        assert server.request("GET", "/is_sleeping").json() == {"is_sleeping": True}


def test_vllm_wake_from_level_two_needs_weights() -> None:
    with fake("--api", "vllm", env={"VLLM_SERVER_DEV_MODE": "1"}) as server:
        server.request("POST", "/sleep?level=2")
        server.request("POST", "/wake_up")
        assert "!!!!" in server.chat().json()["choices"][0]["message"]["content"]
        server.request("POST", "/sleep?level=2")
        server.request("POST", "/wake_up?tags=weights")
        server.request("POST", "/collective_rpc", {"method": "reload_weights"})
        assert server.request("POST", "/wake_up?tags=kv_cache").json()["status"] == "awake"
        assert "word0" in server.chat().json()["choices"][0]["message"]["content"]


def test_vllm_without_dev_mode_has_no_sleep_routes() -> None:
    with fake("--api", "vllm", "--served-model-name", "mine", env={"VLLM_SERVER_DEV_MODE": "0"}) as server:
        assert server.request("POST", "/sleep").status == 404
        assert server.chat("other").status == 404
        assert server.chat("mine").status == 200
        idle = r"vllm:num_requests_running\{.*\} 0"
        until(lambda: bool(re.search(idle, server.request("GET", "/metrics").body.decode())), "the request is finished")


# -- ollama -------------------------------------------------------------------------------------------------------------


def resident(server: FakeServer) -> list[str]:
    return [entry["name"] for entry in server.request("GET", "/api/ps").json()["models"]]


def test_ollama_keep_alive_grammar() -> None:
    with fake("--api", "ollama", "--models", "a") as server:
        for value, status in (
            (-1, 200),
            ("-1m", 200),
            ("5m", 200),
            (1.5, 200),
            ("-1", 400),
            ("300", 400),
            ("x", 400),
            ([], 400),
        ):
            assert server.request("POST", "/api/generate", {"model": "a", "keep_alive": value}).status == status, value


def test_ollama_answers_before_it_unloads() -> None:
    with fake("--api", "ollama", "--models", "a=123,b", "--unload-time", "0.2", "--memory", "1000") as server:
        done = server.request("POST", "/api/generate", {"model": "a", "keep_alive": -1}).json()
        assert (done["done"], done["done_reason"]) == (True, "load")
        (entry,) = server.request("GET", "/api/ps").json()["models"]
        assert (entry["name"], entry["size"]) == ("a:latest", 123)
        assert entry["expires_at"].startswith("2319")
        gone = server.request("POST", "/api/generate", {"model": "a", "keep_alive": 0}).json()
        assert gone["done_reason"] == "unload"
        assert resident(server) == ["a:latest"]  # it has answered, and not done it yet
        until(lambda: not resident(server), "the model is gone")
        assert server.stats()["held_bytes"] == 0


def test_ollama_loads_one_at_a_time() -> None:
    with fake("--api", "ollama", "--models", "a,b", "--load-time", "0.2") as server:
        begun = time.monotonic()
        loads = [
            in_thread(lambda name=name: server.request("POST", "/api/generate", {"model": name, "keep_alive": -1}))
            for name in ("a", "b")
        ]
        for load in loads:
            load.join(20)
        assert time.monotonic() - begun >= 0.4
        assert len(resident(server)) == 2


def test_ollama_aborts_load_when_client_disconnects() -> None:
    with fake("--api", "ollama", "--models", "a", "--load-time", "0.5") as server:
        with pytest.raises(TimeoutError):
            server.request("POST", "/api/generate", {"model": "a"}, timeout_s=0.1)
        assert server.request("POST", "/api/generate", {"model": "a"}).status == 200  # it loaded again
        assert resident(server) == ["a:latest"]


def test_ollama_evicts_the_shortest_keep_alive() -> None:
    with fake("--api", "ollama", "--models", "a,b,c", env={"OLLAMA_MAX_LOADED_MODELS": "2"}) as server:
        for name, keep in (("b", "1m"), ("a", -1), ("c", "5m")):  # the last to answer may count as busy a moment longer
            server.request("POST", "/api/generate", {"model": name, "keep_alive": keep})
        assert sorted(resident(server)) == ["a:latest", "c:latest"]


def test_ollama_full_queue_returns_503() -> None:
    with fake("--api", "ollama", "--models", "a,b", "--load-time", "1", env={"OLLAMA_MAX_QUEUE": "1"}) as server:
        first = in_thread(lambda: server.request("POST", "/api/generate", {"model": "a"}))
        until(lambda: "starting runner" in server.log(), "the first load is under way")
        answer = server.request("POST", "/api/generate", {"model": "b"})
        assert answer.status == 503
        assert "server busy" in answer.json()["error"]
        first.join(20)


def test_ollama_errors_after_the_first_byte_are_lines() -> None:
    with fake("--api", "ollama", "--models", "a", "--error-after", "2") as server:
        answer = server.request("POST", "/api/chat", {"model": "a", "messages": [{"role": "user", "content": "x"}]})
        lines = [json.loads(line) for line in answer.body.splitlines()]
        assert answer.status == 200
        assert answer.headers["Content-Type"] == "application/x-ndjson"
        assert "error" in lines[-1]
        assert not any(line.get("done") for line in lines)


def test_ollama_creates_and_deletes_a_model() -> None:
    with fake("--api", "ollama", "--models", "x") as server:
        data = b"GGUF data"
        digest = "sha256:" + hashlib.sha256(data).hexdigest()
        assert server.request("HEAD", f"/api/blobs/{digest}").status == 404
        assert server.request("POST", f"/api/blobs/{digest}", b"other").status == 400
        assert server.request("POST", f"/api/blobs/{digest}", data).status == 201
        made = server.request("POST", "/api/create", {"model": "new:q8_0", "files": {"m.gguf": digest}})
        assert json.loads(made.body.splitlines()[-1]) == {"status": "success"}
        names = [entry["name"] for entry in server.request("GET", "/api/tags").json()["models"]]
        assert names == ["x:latest", "new:q8_0"]
        assert server.request("DELETE", "/api/delete", {"model": "new:q8_0"}).status == 200
        assert server.request("POST", "/api/generate", {"model": "new:q8_0"}).status == 404


def test_ollama_finds_a_linked_blob(tmp_path: Path) -> None:
    digest = "a" * 64
    (tmp_path / "blobs").mkdir()
    (tmp_path / "model").write_bytes(b"x")
    (tmp_path / "blobs" / f"sha256-{digest}").symlink_to(tmp_path / "model")
    with fake("--api", "ollama", env={"OLLAMA_MODELS": str(tmp_path)}) as server:
        assert server.request("HEAD", f"/api/blobs/sha256:{digest}").status == 200


def test_ollama_embedding_model_rejects_generate() -> None:
    with fake("--api", "ollama", "--models", "embedder") as server:
        refused = server.request("POST", "/api/generate", {"model": "embedder", "prompt": "x"})
        assert refused.status == 400
        assert "does not support generate" in refused.json()["error"]
        assert (
            len(server.request("POST", "/api/embed", {"model": "embedder", "input": ["a", "b"]}).json()["embeddings"])
            == 2
        )


# -- lmstudio -----------------------------------------------------------------------------------------------------------


def test_lmstudio_loads_unloads_and_answers_unknown_routes() -> None:
    with fake("--api", "lmstudio", "--models", "a,b") as server:
        assert server.request("GET", "/lmstudio-greeting").json() == {"lmstudio": True}
        unknown = server.request("GET", "/nothing")
        assert unknown.status == 200
        assert "error" in unknown.json()
        loaded = server.request("POST", "/api/v1/models/load", {"model": "a", "context_length": 512}).json()
        assert (loaded["instance_id"], loaded["status"]) == ("a", "loaded")
        models = {
            entry["key"]: entry["loaded_instances"]
            for entry in server.request("GET", "/api/v1/models").json()["models"]
        }
        assert models["a"][0]["config"]["context_length"] == 512
        assert models["b"] == []
        assert server.chat("b").status == 200  # just in time
        assert server.request("POST", "/api/v1/models/unload", {"instance_id": "a"}).status == 200
        assert server.request("POST", "/api/v1/models/unload", {"instance_id": "a"}).status == 404
        states = {entry["id"]: entry["state"] for entry in server.request("GET", "/api/v0/models").json()["data"]}
        assert states == {"a": "not-loaded", "b": "loaded"}
