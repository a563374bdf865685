"""The daemon with real llama.cpp and tiny random models: loads, memory and crashes."""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from bench.tiny_gguf import write
from tests.support.daemon import fleetd
from tests.support.waiting import until

pytestmark = [
    pytest.mark.real_engine,
    pytest.mark.skipif(
        importlib.util.find_spec("xllamacpp") is None and shutil.which("llama-server") is None,
        reason="llamacpp is not installed",
    ),
]
MIB = 2**20


def models(folder: Path, *names: str, budget: str = "110MiB", more: str = "") -> str:
    """Write models and return the fleet that serves them."""
    text = f"devices: {{host: {{budget: {budget}}}}}\nmodels:\n"
    for seed, name in enumerate(names, start=1):
        write(folder / f"{name}.gguf", seed=seed)
        options = f"{{model: ./{name}.gguf, context_length: 256, parallel: 2, threads: 1}}"
        text += f"  {name}: {{engine: llamacpp, options: {options}, min_resident: 0{more}}}\n"
    return text


def test_six_workers_over_more_models_than_fit(tmp_path: Path) -> None:
    names = ("a", "b", "c", "d", "e")
    with fleetd(tmp_path, models(tmp_path, *names)) as daemon:
        daemon.start()
        most, stop = [0, 0], threading.Event()

        def look() -> None:
            parent = psutil.Process(daemon.pid)
            while not stop.is_set():
                most[0] = max(most[0], daemon.status()["devices"][0]["reserved_bytes"])
                try:
                    # Between fork and exec a child shows the memory of the daemon: count only engines.
                    engines = [
                        child for child in parent.children() if any("llama" in word for word in child.cmdline()[:4])
                    ]
                    most[1] = max(most[1], sum(engine.memory_info().rss for engine in engines))
                except psutil.Error:
                    continue

        watcher = threading.Thread(target=look)
        watcher.start()
        try:
            with ThreadPoolExecutor(6) as pool:
                answers = list(pool.map(daemon.chat, names * 6))
        finally:
            stop.set()
            watcher.join()
        assert [answer.status for answer in answers] == [200] * 30
        assert all(answer.json["usage"]["completion_tokens"] >= 1 for answer in answers)
        assert sum(row["evictions"] for row in daemon.status()["models"]) >= 2
        assert 0 < most[0] <= 110 * MIB
        assert 0 < most[1] <= 110 * MIB


def test_killed_engine_is_back_before_the_next_answer(tmp_path: Path) -> None:
    with fleetd(tmp_path, models(tmp_path, "a", more=", restart: {backoff: {initial: 20ms}}")) as daemon:
        daemon.start()
        assert daemon.chat("a").status == 200
        pid = daemon.process_row("a")["pid"]
        os.kill(pid, signal.SIGKILL)
        until(lambda: daemon.process_row("a")["last_exit"] is not None, "the death is seen")
        assert daemon.chat("a").status == 200
        assert daemon.process_row("a")["pid"] != pid


def test_truncated_model_reports_the_engines_own_error(tmp_path: Path) -> None:
    fleet = models(tmp_path, "cut", more=", memory: 30MiB, restart: {backoff: {initial: 10ms, max: 20ms}}")
    path = tmp_path / "cut.gguf"
    path.write_bytes(path.read_bytes()[:100_000])
    with fleetd(tmp_path, fleet) as daemon:
        daemon.start(wait=False)
        try:
            until(daemon.is_up, "up")
        except AssertionError:
            # The header may be read before a start: then the file is rejected and nothing runs.
            assert "cut.gguf" in daemon.log()
            assert "Traceback" not in daemon.log()
            return
        answer = daemon.chat("cut")
        assert (answer.status, answer.code) == (503, "model_failed")
        assert "Traceback" not in answer.body.decode()
        assert len(answer.json["error"]["message"]) > 30


def test_model_larger_than_the_budget_is_rejected(tmp_path: Path) -> None:
    with fleetd(tmp_path, models(tmp_path, "a", budget="16MiB")) as daemon:
        daemon.start()
        answer = daemon.chat("a")
        assert (answer.status, answer.code) == (422, "model_too_large")
        assert "16.0 MiB" in answer.json["error"]["message"]


def test_missing_model_file_blocks_until_it_exists(tmp_path: Path) -> None:
    fleet = models(tmp_path, "a", more=", memory: 30MiB")
    (tmp_path / "a.gguf").rename(tmp_path / "away")
    with fleetd(tmp_path, fleet) as daemon:
        daemon.start()
        answer = daemon.chat("a")
        assert (answer.status, answer.code) == (503, "model_blocked")
        assert "a.gguf" in answer.json["error"]["message"]
        (tmp_path / "away").rename(tmp_path / "a.gguf")
        until(lambda: daemon.chat("a").status == 200, "the model is served")


def test_measured_memory_is_learned_and_kept(tmp_path: Path) -> None:
    with fleetd(tmp_path, models(tmp_path, "a")) as daemon:
        daemon.start()
        assert daemon.model_row("a")["footprint"] == "estimated"
        assert daemon.chat("a").status == 200
        until(lambda: daemon.model_row("a")["footprint"] == "learned", "a sample was taken")
        learned = daemon.model_row("a")["device_bytes"]["host"]
        assert 5 * MIB < learned < 110 * MIB
        daemon.stop()
        daemon.start()
        assert daemon.model_row("a")["footprint"] == "learned"


def test_systemd_is_notified(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager, fleetd(tmp_path, models(tmp_path, "a")) as daemon:
        address = daemon.run / "notify"
        manager.bind(str(address))
        manager.settimeout(30)
        daemon.env = {**daemon.env, "NOTIFY_SOCKET": str(address), "WATCHDOG_USEC": "400000"}
        daemon.start()
        received = set()
        while not {"READY=1", "WATCHDOG=1"} <= received:
            received.update(manager.recv(4096).decode().splitlines())
        assert daemon.chat("a").status == 200
        environ = psutil.Process(daemon.process_row("a")["pid"]).environ()
        assert not {"NOTIFY_SOCKET", "WATCHDOG_USEC"} & environ.keys()
        daemon.signal(signal.SIGTERM)
        while "STOPPING=1" not in received:
            received.update(manager.recv(4096).decode().splitlines())
        assert daemon.wait() == 0
