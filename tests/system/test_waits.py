"""Orders and waits: each ends with what it asked for, with a later order, or with a daemon that hangs."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from fleetd.cli.client import Client, Unreachable
from tests.support.cli import fleetctl
from tests.support.daemon import Fleetd, fake, fleetd
from tests.support.waiting import until

WITHIN_S = 5.0
AT_ONCE = 4


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Fleetd]:
    sleeper = "{command: [sleep, '1000'], stop: {signal: SIGTERM, timeout: 20s}}"
    stubborn = "{command: [sh, -c, 'trap \"\" TERM; echo up; while :; do sleep 0.1; done'], stop: {timeout: 25s}}"
    with fleetd(tmp_path, f"services:\n  a: {sleeper}\n  hard: {stubborn}\n") as started:
        started.start()
        started.until_state("hard", "READY")
        yield started


VERBS = [
    ("status",),
    ("status", "a"),
    ("ps",),
    ("logs", "hard"),
    ("events",),
    ("story", "a"),
    ("explain", "m"),
    ("start", "a"),
    ("stop", "a"),
    ("load", "m"),
    ("chat", "m", "hi"),
    ("diff",),
    ("shutdown",),
]


def test_every_verb_reports_a_daemon_that_hangs(daemon: Fleetd) -> None:
    os.kill(daemon.pid, signal.SIGSTOP)

    def run(words: tuple[str, ...]) -> tuple[int, str]:
        ran = fleetctl(*words, FLEETD_SOCKET=str(daemon.run / "fleetd.sock"))
        return ran.code, ran.err

    try:
        client = Client([daemon.run / "fleetd.sock"])
        began = time.monotonic()
        with pytest.raises(Unreachable, match="does not answer"):
            client.post("/v1/models/load", {"names": ["m"], "wait": True, "timeout_s": 300}, wait_s=300)
        assert time.monotonic() - began < WITHIN_S
        with ThreadPoolExecutor(AT_ONCE) as pool:
            found = dict(zip(VERBS, pool.map(run, VERBS), strict=True))
    finally:
        os.kill(daemon.pid, signal.SIGCONT)
    assert {words: code for words, (code, _) in found.items() if code != 5} == {}
    assert all("does not answer" in err for _, err in found.values()), found
    until(lambda: daemon.process_row("a")["state"] == "READY", "nothing that timed out is carried out later")
    assert daemon.process_row("hard")["state"] == "READY"


def test_stop_that_is_overtaken_by_a_start_ends_at_once(daemon: Fleetd) -> None:
    done: list[object] = []
    body = {"names": ["hard"], "wait": True, "timeout_s": 60}
    thread = threading.Thread(target=lambda: done.append(daemon.control("POST", "/v1/processes/stop", body).json))
    thread.start()
    daemon.until_state("hard", "STOPPING")
    daemon.control("POST", "/v1/processes/start", {"names": ["hard"], "wait": False})
    thread.join(10.0)
    assert done, "the stop waits no longer"
    assert done[0]["results"][0]["reason"] == "overtaken by a start"  # type: ignore[index]


def test_unload_ends_though_the_next_request_loads_again(tmp_path: Path) -> None:
    with fleetd(
        tmp_path, "models:\n  m: {engine: process, command: " + fake("--model", "m") + ", memory: 1MiB}\n"
    ) as daemon:
        daemon.start()
        assert daemon.chat("m").status == 200
        stop = threading.Event()

        def ask() -> None:
            while not stop.is_set():
                daemon.chat("m")

        with ThreadPoolExecutor(3) as pool:
            for _ in range(3):
                pool.submit(ask)
            try:
                body = {"names": ["m"], "wait": True, "timeout_s": 20}
                result = daemon.control("POST", "/v1/models/unload", body).json["results"][0]
            finally:
                stop.set()
        assert result["result"] == "ok"
        assert "unloaded, loaded again" in result["reason"] or result["reason"] == "not in memory"


def test_restart_passes_over_what_does_not_run(daemon: Fleetd) -> None:
    daemon.control("POST", "/v1/processes/stop", {"names": ["a"]})
    found = daemon.control("POST", "/v1/processes/restart", {"names": ["all"]}).json["results"]
    assert {row["name"]: row["state"] for row in found} == {"a": "STOPPED", "hard": "READY"}
    assert daemon.control("POST", "/v1/processes/restart", {"names": ["a"]}).json["results"][0]["state"] == "READY"


def test_start_of_what_dies_at_once_is_no_success(tmp_path: Path) -> None:
    bot = "{command: [sh, -c, 'sleep 0.3; exit 3'], restart: {crash_loop: {count: 1}}}"
    with fleetd(tmp_path, f"services:\n  bot: {bot}\n") as daemon:
        daemon.start()
        daemon.until_state("bot", "FAILED")
        result = daemon.control("POST", "/v1/processes/start", {"names": ["bot"]}).json["results"][0]
        assert (result["result"], result["state"]) == ("failed", "FAILED")
        assert result["hint"] == "fleetctl logs bot -n 30; when it is fixed: fleetctl start bot"


def test_rolling_restart_takes_replicas_in_turn(tmp_path: Path) -> None:
    with fleetd(tmp_path, "services:\n  web: {command: [sleep, '1000'], replicas: 2}\n") as daemon:
        daemon.start()
        before = {name: daemon.process_row(name)["generation"] for name in ("web-1", "web-2")}
        body = {"names": ["web"], "rolling": True}
        found = daemon.control("POST", "/v1/processes/restart", body).json["results"]
        assert {row["result"] for row in found} == {"ok"}
        assert all(daemon.process_row(name)["generation"] == number + 1 for name, number in before.items())
