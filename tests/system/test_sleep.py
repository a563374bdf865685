"""Sleeping models: two that do not fit together alternate by waking; every failure leads to a cold start.

The fake engine has vLLM's traps: asleep it accepts requests and never answers, its /health stays 200, and after level 2 it
generates garbage unless its weights are read again.
"""

from __future__ import annotations

import http.client
import json
import signal
from pathlib import Path

import pytest

from tests.support.daemon import Fleetd, fake, fleetd
from tests.support.ports import free_port
from tests.support.waiting import alive, until

DEV_ROUTES = (
    "/sleep", "/sleep?level=1", "/wake_up", "/is_sleeping", "/collective_rpc", "/reset_prefix_cache", "/reset_mm_cache",
    "/reset_encoder_cache", "/server_info", "/pause", "/resume", "/is_paused", "/abort_requests", "/release_kv_cache_memory",
    "/v1/../sleep", "//sleep", "/v1/models/../../sleep", "/V1/sleep", "/sleep/", "/%73leep", "/v1/completions/../../wake_up",
)  # fmt: skip


def fleet(
    *flags: str, level: int = 1, more: str = "", budget: str = "10GiB", host: str = "8GiB", names: str = "ab"
) -> str:
    """Return two vLLMs of 8 GiB on a card of 10; `flags` are those of the first."""
    text = f"devices: {{gpu0: {{budget: {budget}}}, host: {{budget: {host}}}}}\nmodels:\n"
    for name in names:
        command = fake(*(flags if name == "a" else ()), api="vllm")
        text += (
            f"  {name}:\n    engine: vllm\n    command: {command}\n    device: gpu0\n    memory: {{gpu0: 8GiB}}\n"
            f"    port: {free_port()}\n"  # an assigned port depends on the name, and many tests have an `a`
            "    probes: {liveness: {completion: true, period: 50ms, timeout: 500ms, failures: 1}}\n"
            "    restart: {backoff: {initial: 50ms}}\n"
            f"    options: {{model: org/{name}, gpu_memory_utilization: 0.5, kv_cache_memory: 7GiB,"
            f" enable_sleep_mode: true, sleep_level: {level}}}\n"
        )
        text += "".join(f"    {line}\n" for line in more.splitlines())
    return text


def answered(daemon: Fleetd, name: str) -> str:
    answer = daemon.chat(name)
    assert answer.status == 200, (answer.body, daemon.log()[-3000:])
    return str(answer.json["choices"][0]["message"]["content"])


def story(daemon: Fleetd, name: str) -> str:
    return json.dumps(daemon.control("GET", f"/v1/story/{name}").json)


def booked(daemon: Fleetd, device: str) -> float:
    row = next(row for row in daemon.status()["devices"] if row["name"] == device)
    return float(row["reserved_bytes"] / 2**30)


@pytest.mark.parametrize("level", [1, 2])
def test_two_models_alternate_by_sleep_and_wake(tmp_path: Path, level: int) -> None:
    with fleetd(tmp_path, fleet(level=level)).start() as daemon:
        first = {name: answered(daemon, name) for name in "ab"}
        pids = {name: daemon.process_row(name)["pid"] for name in "ab"}
        row = daemon.model_row("a")
        assert (row["state"], row["reason"]) == ("ASLEEP", "put to sleep: evicted for b")
        assert booked(daemon, "gpu0") == pytest.approx(9.5)  # one awake, and the residual of a sleeper
        assert booked(daemon, "host") == pytest.approx(1.2 if level == 1 else 0.0, abs=0.01)
        assert 'fleetd_model_state{model="a",state="ASLEEP"} 1' in daemon.control("GET", "/metrics").body.decode()
        explained = " ".join(daemon.control("GET", "/v1/explain/a").json["text"])
        assert "a is asleep (process a," in explained
        assert "b would be put to sleep for it" in explained
        for name in "abab":
            assert answered(daemon, name) == first[name]
        assert {name: daemon.process_row(name)["pid"] for name in "ab"} == pids
        rows = {name: daemon.model_row(name) for name in "ab"}
        counts = {name: (row["loads"], row["sleeps"], row["wakes"], row["evictions"]) for name, row in rows.items()}
        assert counts == {"a": (1, 3, 2, 0), "b": (1, 2, 2, 0)}
        assert rows["b"]["wake_s"] is not None
        assert '"state": "ASLEEP"' in story(daemon, "a")
        assert {daemon.process_row(name)["generation"] for name in "ab"} == {1}, "no probe took a sleeper for dead"


def test_operator_loads_and_unloads_a_sleeper(tmp_path: Path) -> None:
    with fleetd(tmp_path, fleet()).start() as daemon:
        for name in "ab":
            answered(daemon, name)
        loaded = daemon.control("POST", "/v1/models/load", {"names": ["a"], "wait": True, "timeout_s": 20}).json
        assert "woken" in json.dumps(loaded)
        assert (daemon.model_row("a")["state"], daemon.model_row("b")["state"]) == ("LOADED", "ASLEEP")
        pid = daemon.process_row("b")["pid"]
        daemon.control("POST", "/v1/models/unload", {"names": ["b"], "wait": True, "timeout_s": 20})
        assert daemon.model_row("b")["state"] == "ABSENT"
        assert not alive(pid)
        assert booked(daemon, "gpu0") == pytest.approx(8.0)


def test_sleeper_without_room_is_unloaded(tmp_path: Path) -> None:
    """At level 1 the weights go to the host: a full host rules out sleep."""
    with fleetd(tmp_path, fleet(host="1GiB")).start() as daemon:
        for name in "aba":
            answered(daemon, name)
        rows = [daemon.model_row(name) for name in "ab"]
        assert [(row["sleeps"], row["evictions"]) for row in rows] == [(0, 1), (0, 1)]
        assert rows[0]["loads"] == 2


def test_failed_sleep_kills_and_starts_cold(tmp_path: Path) -> None:
    with fleetd(tmp_path, fleet("--fail-sleep", "--ignore-term")).start() as daemon:
        text = answered(daemon, "a")
        pid = daemon.process_row("a")["pid"]
        answered(daemon, "b")
        assert not alive(pid)
        events = story(daemon, "a")
        assert "sleep failed" in events
        assert "freed memory is negative" in events
        assert answered(daemon, "a") == text
        assert daemon.process_row("a")["generation"] == 2
        answered(daemon, "b")  # for a while `a` is unloaded instead
        assert daemon.model_row("a")["sleeps"] == 0
        assert story(daemon, "a").count("sleep failed") == events.count("sleep failed")


def test_wake_without_answer_kills_and_starts_cold(tmp_path: Path) -> None:
    with fleetd(tmp_path, fleet("--hang-wake", more="load_timeout: 1s")).start() as daemon:
        text = answered(daemon, "a")
        answered(daemon, "b")
        pid = daemon.process_row("a")["pid"]
        assert daemon.model_row("a")["state"] == "ASLEEP"
        assert answered(daemon, "a") == text
        row = daemon.process_row("a")
        assert (row["generation"], row["restarts"]) == (2, 1)
        assert not alive(pid)
        assert "wake failed" in story(daemon, "a")


@pytest.mark.parametrize("level", [1, 2])
def test_sleeper_is_found_asleep_after_a_daemon_crash(tmp_path: Path, level: int) -> None:
    with fleetd(tmp_path, fleet(level=level)).start() as daemon:
        first = {name: answered(daemon, name) for name in "ab"}
        pids = {name: daemon.process_row(name)["pid"] for name in "ab"}
        daemon.signal(signal.SIGKILL)
        daemon.wait()
        daemon.start()
        until(
            lambda: [daemon.model_row(name)["state"] for name in "ab"] == ["ASLEEP", "LOADED"], "both are known again"
        )
        assert daemon.model_row("a")["reason"] == "found asleep"
        assert booked(daemon, "gpu0") == pytest.approx(9.5)
        assert {name: answered(daemon, name) for name in "ab"} == first
        assert {name: daemon.process_row(name)["pid"] for name in "ab"} == pids


def test_half_asleep_engine_is_killed_and_started_cold(tmp_path: Path) -> None:
    """The daemon dies while it wakes `a`: the state of its memory is unknown."""
    with fleetd(tmp_path, fleet("--hang-wake")).start() as daemon:
        text = answered(daemon, "a")
        answered(daemon, "b")
        pid = daemon.process_row("a")["pid"]
        daemon.control("POST", "/v1/models/load", {"names": ["a"], "wait": False})
        until(
            lambda: daemon.model_row("a")["state"] == "LOADING" and "/wake_up" in daemon.log_of("a"),
            "it is ordered to wake",
        )
        daemon.signal(signal.SIGKILL)
        daemon.wait()
        daemon.start()
        until(lambda: not alive(pid), "it was killed")
        assert "its last transition was interrupted" in story(daemon, "a")
        assert answered(daemon, "a") == text


def test_engine_put_to_sleep_by_others_is_restarted(tmp_path: Path) -> None:
    """It accepts requests, never answers them, and reports that it is healthy."""
    with fleetd(tmp_path, fleet(names="a")).start() as daemon:
        text = answered(daemon, "a")
        row = daemon.process_row("a")
        call = http.client.HTTPConnection("127.0.0.1", row["port"], timeout=10)
        call.request("POST", "/sleep?level=1")
        assert call.getresponse().status == 200
        call.close()
        until(lambda: not alive(row["pid"]), "it was killed")
        assert answered(daemon, "a") == text
        assert daemon.process_row("a")["generation"] == 2
        assert "fleetd did not put it to sleep" in story(daemon, "a")


def test_gateway_never_reaches_a_sleep_route(tmp_path: Path) -> None:
    with fleetd(tmp_path, fleet(names="a")).start() as daemon:
        answered(daemon, "a")
        for path in DEV_ROUTES:
            for method in ("GET", "POST"):
                answer = daemon.ask(method, path, {"model": "a"} if method == "POST" else None)
                assert answer.status in (404, 405), (method, path, answer.status)
        answered(daemon, "a")
        assert daemon.model_row("a")["sleeps"] == 0
