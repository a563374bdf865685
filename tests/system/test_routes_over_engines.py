"""One name over two engines: weights while both serve, the other one when one is killed, full or removed."""

from __future__ import annotations

import os
import signal
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.support.daemon import Fleetd, fake, fleetd
from tests.support.ports import free_port
from tests.support.waiting import until


def fleet(store: Path, left: str = "", right: str = "", weights: tuple[int, int] = (50, 50)) -> str:
    """`chat` is served by a held model and by a model with its own process."""
    port, other = free_port(), free_port()
    return f"""
    instances:
      store: {{engine: ollama, command: {fake("--models", "inside=1000", *left.split(), api="ollama")}, port: {port},
               options: {{models_dir: {store}}}}}
    models:
      inside: {{instance: store, memory: 1MiB, queue: {{max: 0}}, concurrency: 1, fallback: [outside]}}
      outside: {{engine: process, port: {other}, command: {fake("--model", "outside", *right.split())}, memory: 1MiB, start: always,
                 fallback: [inside]}}
      chat: {{route: [{{to: inside, weight: {weights[0]}}}, {{to: outside, weight: {weights[1]}}}]}}
    """


def served(daemon: Fleetd, times: int) -> Counter[str]:
    count: Counter[str] = Counter()
    for _ in range(times):
        answer = daemon.chat("chat")
        assert answer.status == 200, answer.body
        count[answer.headers["X-Fleet-Model"]] += 1
    return count


def up(daemon: Fleetd) -> None:
    daemon.start()
    daemon.until_state("store", "READY")
    daemon.until_state("outside", "READY")
    # no request may wait for `inside` (its queue is 0), so the test loads it
    daemon.control("POST", "/v1/models/inside/load", {"wait": True})


def test_killed_engine_leaves_its_route_served_by_weight(tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    with fleetd(tmp_path, fleet(tmp_path / "store", weights=(70, 30))) as daemon:
        up(daemon)
        count = served(daemon, 60)
        assert count["inside"] > count["outside"] > 0
        os.kill(daemon.process_row("outside")["pid"], signal.SIGKILL)
        assert sum(served(daemon, 10).values()) == 10  # no request is lost while it restarts
        daemon.control("POST", "/v1/processes/outside/stop", {"wait": True})
        assert served(daemon, 10) == {"inside": 10}
        daemon.control("POST", "/v1/processes/outside/start", {"wait": True})
        daemon.control("POST", "/v1/processes/store/stop", {"wait": True})
        assert served(daemon, 10) == {"outside": 10}


def test_full_engine_overflows_to_the_other(tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    text = fleet(tmp_path / "store", left="--tps 20 --tokens 200", weights=(100, 0))
    with fleetd(tmp_path, text) as daemon:
        up(daemon)
        began = threading.Event()

        def long() -> int:
            began.set()
            return daemon.chat("chat", max_tokens=100).status

        with ThreadPoolExecutor(1) as pool:
            first = pool.submit(long)
            until(lambda: daemon.model_row("inside")["in_flight"] == 1, "one request fills the engine")
            assert served(daemon, 5) == {"outside": 5}
            assert not first.done()
            assert first.result() == 200


def test_other_engine_serves_during_a_restart(tmp_path: Path) -> None:
    """Its start takes longer than any request waits."""
    (tmp_path / "store").mkdir()
    text = fleet(tmp_path / "store", right="--load-time 1.5", weights=(0, 100))
    text = text.replace("start: always,", "start: always, probes: {startup: {http: /health, period: 50ms}},")
    with fleetd(tmp_path, text) as daemon:
        up(daemon)
        assert served(daemon, 3) == {"outside": 3}
        os.kill(daemon.process_row("outside")["pid"], signal.SIGKILL)
        until(lambda: daemon.process_row("outside")["state"] in ("BACKOFF", "STARTING"), "its death is seen")
        assert served(daemon, 5) == {"inside": 5}
        daemon.until_state("outside", "READY")
        until(lambda: served(daemon, 1) == {"outside": 1}, "the first serves again")


def test_silent_external_server_leaves_its_route_served(tmp_path: Path) -> None:
    text = f"""
    instances: {{far: {{engine: external, external: "http://127.0.0.1:{free_port()}"}}}}
    models:
      away: {{instance: far, fallback: [here]}}
      here: {{engine: process, command: {fake("--model", "here")}, memory: 1MiB, start: always}}
      chat: {{route: [{{to: away, weight: 99}}, {{to: here, weight: 1}}]}}
    """
    with fleetd(tmp_path, text).start() as daemon:
        daemon.until_state("here", "READY")
        assert served(daemon, 3) == {"here": 3}
        answer = daemon.chat("away")
        assert (answer.status, answer.headers["X-Fleet-Model"]) == (200, "here")


def test_removed_engine_leaves_its_route_served(tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    text = fleet(tmp_path / "store")
    with fleetd(tmp_path, text) as daemon:
        up(daemon)
        lines = text.splitlines()
        stop = threading.Event()
        bad: list[int] = []

        def ask() -> None:
            while not stop.is_set():
                answer = daemon.chat("chat")
                if answer.status != 200:
                    bad.append(answer.status)

        asking = threading.Thread(target=ask)
        asking.start()
        try:
            start = next(i for i, line in enumerate(lines) if line.strip().startswith("outside:"))
            kept = [*lines[:start], *lines[start + 2 :]]
            text = "\n".join(kept).replace(", fallback: [outside]", "").replace(", {to: outside, weight: 50}", "")
            daemon.write(text.replace("queue: {max: 0}, ", ""))
            until(lambda: "outside" not in daemon.control("GET", "/v1/names").json["models"], "the file was applied")
            until(lambda: served(daemon, 3) == {"inside": 3}, "the other engine serves alone")
        finally:
            stop.set()
            asking.join()
        assert bad == []
