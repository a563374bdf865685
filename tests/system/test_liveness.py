"""Liveness by a one-token request: a hung server is restarted, a busy one is not."""

from __future__ import annotations

import http.client
import json
import threading
import time
from pathlib import Path

from tests.support.daemon import Fleetd, fake, fleetd
from tests.support.waiting import until

PROBE = "probes: {liveness: {completion: true, period: 250ms, timeout: 250ms, failures: 2}}"


def fleet(*flags: str, slots: int = 1) -> str:
    command = fake("--model", "m", *flags)
    options = f"{{api: openai, health: /health, concurrency: {slots}}}"
    return f"models:\n  m: {{engine: process, command: {command}, options: {options}, {PROBE}, preload: true}}\n"


def test_liveness_restarts_a_server_that_never_answers(tmp_path: Path) -> None:
    with fleetd(tmp_path, fleet("--hang-after", "2", slots=4)).start() as daemon:
        daemon.until_state("m", "READY")
        until(lambda: daemon.process_row("m")["generation"] >= 2, "it is ended")
        assert "liveness probe failed 2 times" in daemon.log()


def test_liveness_ignores_clients_that_give_up(tmp_path: Path) -> None:
    with fleetd(tmp_path, fleet("--hang-after", "1", slots=4)).start() as daemon:
        daemon.until_state("m", "READY")

        def ended() -> bool:
            try:
                daemon.ask("POST", "/v1/chat/completions", {"model": "m", "messages": []}, timeout_s=0.1)
            except (OSError, http.client.HTTPException):
                pass
            return bool(daemon.process_row("m")["generation"] >= 2)

        until(ended, "it is ended although clients come and go")


def stays(daemon: Fleetd, asked: threading.Thread) -> None:
    """Send a slow request in the background and watch the process until its answer."""
    generation = daemon.until_state("m", "READY")["generation"]
    began = time.monotonic()
    asked.start()
    while asked.is_alive():
        assert daemon.process_row("m")["generation"] == generation, daemon.log()
        asked.join(0.05)
    assert time.monotonic() - began > 2.0, "it was answered too soon to show anything"
    assert daemon.process_row("m")["state"] == "READY"


def test_liveness_counts_slow_tokens_as_alive(tmp_path: Path) -> None:
    answers: list[bytes] = []
    with fleetd(tmp_path, fleet("--tps", "5", "--tokens", "16", "--slots", "1", slots=4)).start() as daemon:
        asked = threading.Thread(target=lambda: answers.append(daemon.chat("m", max_tokens=16, stream=True).body))
        stays(daemon, asked)
        assert answers[0].rstrip().endswith(b"[DONE]")


def test_liveness_spares_a_server_with_all_slots_busy(tmp_path: Path) -> None:
    answers: list[int] = []
    with fleetd(tmp_path, fleet("--tps", "5", "--tokens", "16", "--slots", "1")).start() as daemon:
        asked = threading.Thread(target=lambda: answers.append(daemon.chat("m", max_tokens=16).status))
        stays(daemon, asked)
        assert answers == [200]
        assert "liveness probe failed" not in json.dumps(daemon.log())
