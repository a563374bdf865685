"""`fleetd run` as a black box with fake model servers: what a user sees, and that nothing is left behind."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from tests.support.daemon import ROOT, fake, fleetd
from tests.support.ports import free_port
from tests.support.waiting import until

SLEEPER = '[sleep, "1000"]'


def test_services_start_in_order_and_stop_without_a_trace(tmp_path: Path) -> None:
    fleet = f"""
    services:
      base: {{command: {fake()}, probes: {{startup: {{http: /health}}}}}}
      app:
        command: {SLEEPER}
        depends_on: {{base: ready}}
        replicas: 2
    """
    with fleetd(tmp_path, fleet) as daemon:
        daemon.start()
        for name in ("base", "app-1", "app-2"):
            daemon.until_state(name, "READY")
        rows = {row["name"]: row for row in daemon.status()["processes"]}
        assert rows["base"]["uptime_s"] > rows["app-1"]["uptime_s"]
        assert daemon.get("/ready").status == 200
        assert len(daemon.children()) == 3
        assert daemon.stop() == 0
        assert daemon.children() == []
        assert not daemon.socket.exists()


def test_request_loads_its_model_and_full_budget_evicts(tmp_path: Path) -> None:
    fleet = "devices: {host: {budget: 100MiB}}\nmodels:\n"
    for name in ("a", "b", "c"):
        fleet += f"  {name}: {{engine: process, command: {fake('--model', name)}, memory: 40MiB, min_resident: 0}}\n"
    with fleetd(tmp_path, fleet) as daemon:
        daemon.start()
        assert {daemon.model_row(name)["state"] for name in "abc"} == {"ABSENT"}
        for name in ("a", "b", "c", "a"):
            answer = daemon.chat(name)
            assert answer.status == 200, answer.body
            assert answer.headers["X-Fleet-Model"] == name
            assert daemon.status()["devices"][0]["reserved_bytes"] <= 100 * 2**20
        rows = [daemon.model_row(name) for name in "abc"]
        evictions = sum(row["evictions"] for row in rows)
        assert evictions >= 1, "c needs the place of a or of b, whichever took less time to load"
        assert sum(row["loads"] for row in rows) - evictions == 2


def test_crash_is_seen_at_once_and_restarted(tmp_path: Path) -> None:
    fleet = f"""
    services:
      web: {{command: {fake()}, probes: {{startup: {{http: /health}}}}, restart: {{backoff: {{initial: 50ms}}}}}}
    """
    with fleetd(tmp_path, fleet) as daemon:
        daemon.start()
        before = daemon.until_state("web", "READY")
        os.kill(before["pid"], signal.SIGKILL)
        until(lambda: daemon.process_row("web")["generation"] == 2, "a second generation")
        after = daemon.until_state("web", "READY")
        assert after["pid"] != before["pid"]
        assert after["restarts"] == 1
        assert after["last_exit"]["signal"] == "SIGKILL"


def test_crash_loop_fails_with_a_reason(tmp_path: Path) -> None:
    fleet = """
    services:
      bad:
        command: [sh, -c, "echo cannot find module x; exit 3"]
        restart: {backoff: {initial: 10ms, max: 20ms}, crash_loop: {count: 3, window: 1m}}
    """
    with fleetd(tmp_path, fleet) as daemon:
        daemon.start()
        row = daemon.until_state("bad", "FAILED")
        assert row["last_exit"]["code"] == 3
        assert "cannot find module x" in daemon.control("GET", "/v1/processes/bad").body.decode()
        assert daemon.get("/ready").status == 503


def test_engine_death_while_loading_is_reported_at_once(tmp_path: Path) -> None:
    command = '[sh, -c, "echo CUDA out of memory; sleep 0.2; exit 1"]'
    fleet = f"models:\n  m: {{engine: process, command: {command}, memory: 1MiB}}\n"
    with fleetd(tmp_path, fleet) as daemon:
        daemon.start()
        answer = daemon.chat("m")
        assert answer.status == 503
        assert answer.code == "model_failed"
        assert "out of memory" in answer.json["error"]["message"].lower()


def test_missing_binary_is_one_error_and_final(tmp_path: Path) -> None:
    fleet = "services:\n  gone: {command: [/no/such/program]}\n"
    with fleetd(tmp_path, fleet) as daemon:
        daemon.start()
        row = daemon.until_state("gone", "FAILED")
        assert "/no/such/program does not exist" in row["reason"]
        assert row["restarts"] == 0


def test_model_that_never_fits_is_rejected_with_numbers(tmp_path: Path) -> None:
    fleet = (
        f"devices: {{host: {{budget: 64MiB}}}}\nmodels:\n  big: {{engine: process, command: {fake()}, memory: 1GiB}}\n"
    )
    with fleetd(tmp_path, fleet) as daemon:
        daemon.start()
        answer = daemon.chat("big")
        assert (answer.status, answer.code) == (422, "model_too_large")
        assert "1.00 GiB" in answer.json["error"]["message"]
        assert "64.0 MiB" in answer.json["error"]["message"]
        assert daemon.children() == []


def test_all_candidates_pinned_is_a_clear_error(tmp_path: Path) -> None:
    fleet = f"""
    devices: {{host: {{budget: 64MiB}}}}
    models:
      kept: {{engine: process, command: {fake()}, memory: 40MiB, pin: true, preload: true}}
      late: {{engine: process, command: {fake()}, memory: 40MiB}}
    """
    with fleetd(tmp_path, fleet) as daemon:
        daemon.start()
        until(lambda: daemon.model_row("kept")["state"] == "LOADED", "the pinned model is loaded")
        answer = daemon.chat("late")
        assert (answer.status, answer.code) == (503, "model_blocked")
        assert "kept" in answer.json["error"]["message"]
        assert int(answer.headers["Retry-After"]) >= 1


def test_unknown_model_is_404_and_starts_nothing(tmp_path: Path) -> None:
    fleet = f"models:\n  m: {{engine: process, command: {fake()}, memory: 1MiB}}\n"
    with fleetd(tmp_path, fleet) as daemon:
        daemon.start()
        answer = daemon.chat("nope")
        assert (answer.status, answer.code) == (404, "model_not_found")
        assert daemon.children() == []


def test_second_daemon_is_refused_and_the_first_continues(tmp_path: Path) -> None:
    with fleetd(tmp_path, f"services:\n  a: {{command: {SLEEPER}}}\n") as daemon:
        daemon.start()
        pid = daemon.until_state("a", "READY")["pid"]
        second = subprocess.run(
            [sys.executable, "-m", "fleetd", "run", "--config", str(daemon.config)],
            cwd=ROOT, capture_output=True, text=True, timeout=30, check=False,
        )  # fmt: skip
        assert second.returncode == 1
        assert f"already running, pid {daemon.pid}" in second.stderr
        assert "Traceback" not in second.stderr
        assert daemon.process_row("a")["pid"] == pid


def test_stale_socket_is_replaced(tmp_path: Path) -> None:
    with fleetd(tmp_path, f"services:\n  a: {{command: {SLEEPER}}}\n") as daemon:
        with socket.socket(socket.AF_UNIX) as stale:
            stale.bind(str(daemon.socket))
        daemon.start()
        assert daemon.status()["name"] == "test"


def test_sigterm_during_a_load_leaves_nothing(tmp_path: Path) -> None:
    command = fake("--load-time", "60", "--orphan-worker")
    fleet = f"models:\n  slow: {{engine: process, command: {command}, memory: 1MiB, stop: {{timeout: 1s}}}}\n"
    with fleetd(tmp_path, fleet) as daemon:
        daemon.start()
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(daemon.chat, "slow")
            until(
                lambda: daemon.process_row("slow")["state"] == "STARTING" and len(daemon.children()) >= 1,
                "the load has begun",
            )
            assert daemon.stop() == 0
            assert waiting.result(20).status == 503
        assert daemon.children() == []


def test_second_signal_forces_the_shutdown(tmp_path: Path) -> None:
    fleet = f"services:\n  stubborn: {{command: {fake('--ignore-term')}, stop: {{timeout: 1h}}, probes: {{startup: {{http: /health}}}}}}\n"
    with fleetd(tmp_path, fleet) as daemon:
        daemon.start()
        daemon.until_state("stubborn", "READY")
        daemon.signal(signal.SIGTERM)
        until(lambda: "shutting down" in daemon.log(), "the first signal is taken")
        daemon.signal(signal.SIGINT)
        assert daemon.wait() == 0
        assert daemon.children() == []


def test_requests_in_flight_finish_before_shutdown(tmp_path: Path) -> None:
    fleet = f"models:\n  m: {{engine: process, command: {fake('--tps', '10', '--tokens', '10')}, memory: 1MiB}}\n"
    with fleetd(tmp_path, fleet) as daemon:
        daemon.start()
        assert daemon.chat("m").status == 200
        with ThreadPoolExecutor(1) as pool:
            running = pool.submit(daemon.chat, "m", max_tokens=10)
            until(lambda: daemon.model_row("m")["in_flight"] == 1, "a request is in flight")
            assert daemon.stop() == 0
            assert running.result(20).status == 200


def test_taken_port_names_its_owner(tmp_path: Path) -> None:
    port = free_port()
    with socket.socket() as other:
        other.bind(("127.0.0.1", port))
        other.listen()
        restart = "{backoff: {initial: 50ms, max: 50ms}, crash_loop: {count: 1000}}"
        fleet = f"services:\n  web: {{command: {fake()}, port: {port}, restart: {restart}}}\n"
        with fleetd(tmp_path, fleet) as daemon:
            daemon.start()
            until(lambda: f"port {port}" in str(daemon.process_row("web")), "the reason names the port")
            assert f"pid {os.getpid()}" in str(daemon.process_row("web"))
            other.close()
            daemon.until_state("web", "READY")


def test_required_file_blocks_until_it_exists(tmp_path: Path) -> None:
    wanted = tmp_path / "volume"
    with fleetd(tmp_path, f"services:\n  a: {{command: {SLEEPER}, requires: [{wanted}]}}\n") as daemon:
        daemon.start()
        row = daemon.until_state("a", "BLOCKED")
        assert str(wanted) in row["reason"]
        assert row["generation"] == 0
        wanted.mkdir()
        daemon.until_state("a", "READY")


def test_saved_file_changes_only_what_differs(tmp_path: Path) -> None:
    keep = f"  keep: {{command: {SLEEPER}}}\n"
    with fleetd(
        tmp_path, f"services:\n{keep}  edit: {{command: {SLEEPER}}}\n  drop: {{command: {SLEEPER}}}\n"
    ) as daemon:
        daemon.start()
        before = {name: daemon.until_state(name, "READY")["pid"] for name in ("keep", "edit", "drop")}
        daemon.write(
            f'services:\n{keep}  edit: {{command: {SLEEPER}, env: {{A: "1"}}}}\n  fresh: {{command: {SLEEPER}}}\n'
        )
        until(
            lambda: {row["name"] for row in daemon.status()["processes"]} == {"keep", "edit", "fresh"},
            "the file is applied",
        )
        until(
            lambda: (
                daemon.process_row("edit")["state"] == "READY" and daemon.process_row("edit")["pid"] != before["edit"]
            ),
            "edit restarts",
        )
        daemon.until_state("fresh", "READY")
        assert daemon.process_row("keep")["pid"] == before["keep"]
        assert not psutil.pid_exists(before["drop"])


def test_invalid_file_is_reported_and_changes_nothing(tmp_path: Path) -> None:
    good = f"services:\n  a: {{command: {SLEEPER}}}\n"
    with fleetd(tmp_path, good) as daemon:
        daemon.start()
        pid = daemon.until_state("a", "READY")["pid"]
        daemon.write(good + "  b: {comand: x}\n")
        until(lambda: daemon.status()["daemon"]["config_error"], "the mistake is shown")
        assert "fleet.yaml:" in daemon.status()["daemon"]["config_error"]
        assert daemon.process_row("a")["pid"] == pid
        daemon.write(good)
        until(lambda: not daemon.status()["daemon"]["config_error"], "the mistake is gone")
        assert daemon.process_row("a")["pid"] == pid


def test_sighup_reads_the_file_again(tmp_path: Path) -> None:
    with fleetd(tmp_path, f"watch: false\nservices:\n  a: {{command: {SLEEPER}}}\n") as daemon:
        daemon.start()
        daemon.write(f"watch: false\nservices:\n  a: {{command: {SLEEPER}}}\n  b: {{command: {SLEEPER}}}\n")
        daemon.signal(signal.SIGHUP)
        until(lambda: len(daemon.status()["processes"]) == 2, "the new process is there")


def test_next_daemon_adopts_after_a_crash(tmp_path: Path) -> None:
    fleet = f"""
    services:
      kept: {{command: {fake()}, probes: {{startup: {{http: /health}}, readiness: {{http: /health}}}}}}
      dying: {{command: {SLEEPER}}}
    models:
      m: {{engine: process, command: {fake()}, memory: 1MiB}}
    """
    with fleetd(tmp_path, fleet) as daemon:
        daemon.start()
        assert daemon.chat("m").status == 200
        pids = {name: daemon.until_state(name, "READY")["pid"] for name in ("kept", "dying", "m")}
        daemon.signal(signal.SIGKILL)
        daemon.wait()
        assert psutil.pid_exists(pids["kept"])
        os.kill(pids["dying"], signal.SIGKILL)
        daemon.start()
        assert daemon.until_state("kept", "READY")["pid"] == pids["kept"]
        assert daemon.until_state("m", "READY")["pid"] == pids["m"]
        assert daemon.chat("m").headers["X-Fleet-Load-Ms"] == "0"
        assert daemon.until_state("dying", "READY")["pid"] != pids["dying"]
        os.kill(pids["kept"], signal.SIGKILL)
        until(
            lambda: daemon.process_row("kept")["pid"] not in (None, pids["kept"]),
            "the death of an adopted process is seen",
        )
        assert daemon.stop() == 0
        assert daemon.children() == []


def test_operator_stop_outlives_the_daemon(tmp_path: Path) -> None:
    with fleetd(tmp_path, f"services:\n  a: {{command: {SLEEPER}}}\n") as daemon:
        daemon.start()
        daemon.until_state("a", "READY")
        assert daemon.control("POST", "/v1/processes/a/stop", {}).status == 200
        assert daemon.process_row("a")["state"] == "STOPPED"
        daemon.stop()
        daemon.start()
        assert daemon.process_row("a")["state"] == "STOPPED"
        daemon.control("POST", "/v1/processes/a/start", {})
        daemon.until_state("a", "READY")


def test_reexec_keeps_pid_children_and_exit_codes(tmp_path: Path) -> None:
    fleet = f"""
    services:
      a: {{command: {SLEEPER}}}
      piped: {{command: [sh, -c, "while true; do date; sleep 0.05; done"], logs: {{capture: pipe}}}}
      seven: {{command: [sh, -c, "while [ ! -e go ]; do sleep 0.02; done; exit 7"], restart: {{policy: never}}}}
    """
    with fleetd(tmp_path, fleet) as daemon:
        daemon.start()
        pids = {name: daemon.until_state(name, "READY")["pid"] for name in ("a", "piped", "seven")}
        assert daemon.control("POST", "/v1/reexec", {}).status in (200, 202)
        until(lambda: daemon.log().count("fleetd is up") == 2, "the new program has taken over")
        assert daemon.status()["daemon"]["pid"] == daemon.pid
        for name, pid in pids.items():
            assert daemon.until_state(name, "READY")["pid"] == pid
        size = len(daemon.log_of("piped"))
        until(lambda: len(daemon.log_of("piped")) > size, "the pipe is still read")
        (tmp_path / "go").touch()
        row = daemon.until_state("seven", "EXITED", "FAILED")
        assert row["last_exit"]["code"] == 7
        assert daemon.stop() == 0
        assert daemon.children() == []


def test_exit_codes_for_an_invalid_file(tmp_path: Path) -> None:
    with fleetd(tmp_path, "services:\n  a: {comand: x}\n  b: {command: y, stop: {timeout: 10}}\n") as daemon:
        for verb in (["run", "--config"], ["check"]):
            done = subprocess.run(
                [sys.executable, "-m", "fleetd", *verb, str(daemon.config)],
                cwd=ROOT,
                capture_output=True,
                text=True,
                timeout=30,
                check=False,
            )
            assert done.returncode == 2
            assert "services.a" in done.stderr
            assert "services.b.stop.timeout" in done.stderr
            assert "Traceback" not in done.stderr


def test_taken_gateway_port_is_one_clear_error(tmp_path: Path) -> None:
    with fleetd(tmp_path, f"services:\n  a: {{command: {SLEEPER}}}\n") as daemon, socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        other.bind(("127.0.0.1", daemon.port))
        other.listen()
        daemon.start(wait=False)
        assert daemon.wait() == 1
        assert "cannot listen on" in daemon.log()
        assert "Traceback" not in daemon.log()
        assert daemon.children() == []


def test_secrets_are_never_shown(tmp_path: Path) -> None:
    (tmp_path / ".env").write_text("DB_PASSWORD=hunter2-file\n")
    fleet = f"services:\n  a: {{command: {SLEEPER}, env: {{API_KEY: hunter2-env}}, env_file: .env}}\n"
    with fleetd(tmp_path, fleet) as daemon:
        shown = subprocess.run(
            [sys.executable, "-m", "fleetd", "render", str(daemon.config)],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=30,
            check=True,
        )
        assert "API_KEY" in shown.stdout
        assert "DB_PASSWORD" in shown.stdout
        assert "hunter2" not in shown.stdout
        daemon.start()
        daemon.until_state("a", "READY")
        seen = [
            daemon.control("GET", path).body.decode()
            for path in ("/v1/processes/a", "/v1/config", "/v1/status", "/v1/story/a")
        ]
        assert "hunter2" not in "".join(seen) + daemon.log()


def test_many_concurrent_requests_are_all_answered(tmp_path: Path) -> None:
    fleet = "devices: {host: {budget: 100MiB}}\nmodels:\n"
    for name in ("a", "b", "c", "d"):
        fleet += f"  {name}: {{engine: process, command: {fake('--model', name)}, memory: 40MiB, min_resident: 0}}\n"
    with fleetd(tmp_path, fleet) as daemon:
        daemon.start()
        most, stop = [0], threading.Event()

        def look() -> None:
            while not stop.is_set():
                most[0] = max(most[0], daemon.status()["devices"][0]["reserved_bytes"])

        watcher = threading.Thread(target=look)
        watcher.start()
        try:
            with ThreadPoolExecutor(8) as pool:
                answers = list(pool.map(daemon.chat, ["a", "b", "c", "d"] * 8))
        finally:
            stop.set()
            watcher.join()
        assert {answer.status for answer in answers} == {200}
        assert 0 < most[0] <= 100 * 2**20


@pytest.mark.parametrize("flag", ["--orphan-worker", "--ignore-term"])
def test_stop_empties_the_whole_process_set(tmp_path: Path, flag: str) -> None:
    fleet = (
        f"services:\n  a: {{command: {fake(flag)}, stop: {{timeout: 300ms}}, probes: {{startup: {{http: /health}}}}}}\n"
    )
    with fleetd(tmp_path, fleet) as daemon:
        daemon.start()
        daemon.until_state("a", "READY")
        answer = daemon.control("POST", "/v1/processes/a/stop", {})
        assert answer.status == 200
        assert daemon.children() == []
