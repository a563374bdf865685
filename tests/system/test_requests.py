"""Supervisor 9, 10, 12, 15, 17 and case 26: what clients see while processes start, stop and restart."""

from __future__ import annotations

import http.client
import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tests.support.daemon import Fleetd, fake, fleetd
from tests.support.fleet_files import SLEEPER, fleet, order, ready
from tests.support.ports import free_port
from tests.support.waiting import until


def model(*flags: str, **keys: Any) -> dict[str, Any]:
    return {
        "engine": "process",
        "command": json.loads(fake(*flags)),
        "memory": "40MiB",
        "min_resident": 0,
        "port": free_port(),
        **keys,
    }


def streamed(daemon: Fleetd, name: str, tokens: int, begun: threading.Event | None = None) -> tuple[int, bytes]:
    """Return status and bytes of a streamed chat; `begun` is set at the first byte."""
    connection = http.client.HTTPConnection("127.0.0.1", daemon.port, timeout=30)
    body = json.dumps(
        {"model": name, "messages": [{"role": "user", "content": "hi"}], "max_tokens": tokens, "stream": True}
    )
    try:
        connection.request("POST", "/v1/chat/completions", body, {"Content-Type": "application/json"})
        response = connection.getresponse()
        first = response.read(1)
        if begun is not None:
            begun.set()
        return response.status, first + response.read()
    finally:
        connection.close()


def test_supervisor_09_shutdown_in_a_stream_is_an_error_event(tmp_path: Path) -> None:
    """Force the shutdown: an ordered one waits for requests in flight."""
    models = {"m": model("--tps", "5", "--tokens", "500")}
    with fleetd(tmp_path, fleet(models=models)) as daemon:
        daemon.start()
        assert daemon.chat("m", max_tokens=1).status == 200
        with ThreadPoolExecutor(1) as pool:
            begun = threading.Event()
            running = pool.submit(streamed, daemon, "m", 500, begun)
            assert begun.wait(20)
            assert daemon.control("POST", "/v1/shutdown", {"force": True}).status == 202
            assert daemon.wait() == 0
            status, body = running.result(20)
        assert status == 200
        assert b'"error"' in body
        assert b"[DONE]" not in body


def test_supervisor_10_shutdown_finishes_running_rejects_new(tmp_path: Path) -> None:
    models = {"m": model("--tps", "10", "--tokens", "15")}
    with fleetd(tmp_path, fleet({"a": {"command": SLEEPER}}, models=models)) as daemon:
        daemon.start()
        assert daemon.chat("m", max_tokens=1).status == 200
        with ThreadPoolExecutor(1) as pool:
            running = pool.submit(streamed, daemon, "m", 15)
            until(lambda: daemon.model_row("m")["in_flight"] == 1, "it streams")
            assert daemon.control("POST", "/v1/shutdown", {}).status == 202
            until(lambda: daemon.get("/ready").status == 503, "it says that it leaves")
            refused = daemon.chat("m")
            assert (refused.status, refused.code) == (503, "draining")
            assert 1 <= int(refused.headers["Retry-After"]) <= 120
            status, body = running.result(30)
        assert (status, body.rstrip().endswith(b"data: [DONE]")) == (200, True)
        assert daemon.wait() == 0
        assert daemon.children() == []


def test_supervisor_12_server_with_503_gets_no_requests(tmp_path: Path) -> None:
    models = {"m": model("--load-time", "1.5", probes={"startup": {"http": "/health", "period": "50ms"}})}
    with fleetd(tmp_path, fleet(models=models)) as daemon:
        daemon.start()
        began = time.monotonic()
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(daemon.chat, "m")
            until(lambda: daemon.process_row("m")["state"] == "STARTING", "it listens, and loads")
            answer = waiting.result(30)
        assert answer.status == 200
        assert time.monotonic() - began >= 1.5
        assert int(answer.headers["X-Fleet-Load-Ms"]) >= 1000


def test_supervisor_15_loads_that_fit_only_alone_never_overlap(tmp_path: Path) -> None:
    probes = {"startup": {"http": "/health", "period": "50ms"}}
    models = {name: model("--load-time", "0.2", probes=probes) for name in ("m1", "m2")}
    with fleetd(tmp_path, fleet(devices={"host": {"budget": "64MiB"}}, models=models)) as daemon:
        daemon.start()
        most, stop = [0], threading.Event()

        def look() -> None:
            while not stop.is_set():
                most[0] = max(most[0], daemon.status()["devices"][0]["reserved_bytes"])

        watcher = threading.Thread(target=look)
        watcher.start()
        try:
            with ThreadPoolExecutor(4) as pool:
                answers = list(pool.map(daemon.chat, ["m1", "m2"] * 4))
        finally:
            stop.set()
            watcher.join()
        assert {answer.status for answer in answers} == {200}, [answer.body for answer in answers]
        assert 0 < most[0] <= 64 << 20


def test_supervisor_17_unload_waits_for_requests_in_flight(tmp_path: Path) -> None:
    models = {"m": model("--tps", "10", "--tokens", "12")}
    with fleetd(tmp_path, fleet(models=models)) as daemon:
        daemon.start()
        assert daemon.chat("m", max_tokens=1).status == 200
        with ThreadPoolExecutor(1) as pool:
            running = pool.submit(streamed, daemon, "m", 12)
            until(lambda: daemon.model_row("m")["in_flight"] == 1, "it streams")
            assert daemon.control("POST", "/v1/models/m/unload", {}).status == 200
            status, body = running.result(20)
        assert (status, b"[DONE]" in body) == (200, True)
        assert daemon.model_row("m")["state"] == "ABSENT"
        assert daemon.children() == []


def test_case_26_server_that_never_gets_ready_is_not_ready(tmp_path: Path) -> None:
    """A start that exceeds its deadline is a failure, not a success."""
    service = {
        "command": json.loads(fake("--load-time", "60")), "restart": {"crash_loop": {"count": 1}},
        "probes": {"startup": {"http": "/health", "deadline": "500ms"}},
    }  # fmt: skip
    with fleetd(tmp_path, fleet({"a": service})) as daemon:
        daemon.start()
        seen = set()

        def failed() -> bool:
            state = daemon.process_row("a")["state"]
            seen.add(state)
            return bool(state == "FAILED")

        until(failed, "it is given up")
        assert "READY" not in seen


def test_case_26_two_restarts_at_once_leave_one_process(tmp_path: Path) -> None:
    service = {"command": json.loads(fake("--load-time", "0.3")), "probes": {"startup": {"http": "/health"}}}
    with fleetd(tmp_path, fleet({"a": service})) as daemon:
        daemon.start()
        ready(daemon, "a")
        with ThreadPoolExecutor(6) as pool:
            answers = list(pool.map(lambda _: order(daemon, "restart", "a").status, range(6)))
        assert set(answers) == {200}
        ready(daemon, "a")
        assert len(daemon.children()) == 1
