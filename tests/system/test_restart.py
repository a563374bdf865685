"""Cases 23, 27, 30 and Supervisor 1, 2, 11, 13: backoff, crash loops and restart limits."""

from __future__ import annotations

import json
import os
import signal
import socket
import time
from itertools import pairwise
from pathlib import Path

import pytest

from tests.support.daemon import Fleetd, fake, fleetd
from tests.support.fleet_files import QUICK, SLEEPER, fleet, order, python, ready, sh, until_logged
from tests.support.ports import free_port
from tests.support.waiting import until


def stamps(daemon: Fleetd, name: str) -> list[float]:
    """Return when each run of `date +%s.%N` began."""
    return [float(line) for line in daemon.log_of(name).split() if line.replace(".", "", 1).isdigit() and "." in line]


def test_supervisor_01_delay_doubles_and_restarts_count(tmp_path: Path) -> None:
    restart = {"backoff": {"initial": "200ms", "factor": 2, "max": "10s", "jitter": 0}, "crash_loop": {"count": 100}}
    with fleetd(tmp_path, fleet({"a": {"command": sh("date +%s.%N; exit 1"), "restart": restart}})) as daemon:
        daemon.start()
        until(lambda: len(stamps(daemon, "a")) >= 4, "four runs")
        times = stamps(daemon, "a")
        gaps = [later - earlier for earlier, later in pairwise(times)]
        assert gaps[0] >= 0.2
        assert gaps[1] >= 0.4
        assert gaps[2] >= 0.8
        row = daemon.until_state("a", "BACKOFF")
        assert row["restarts"] == row["generation"] - 1 >= 3
        assert row["pid"] is None
        assert 0 < row["next_start_s"] <= 0.2 * 2 ** (row["generation"] - 1)
        assert row["last_exit"]["code"] == 1


def test_supervisor_02_crash_loop_fails_and_costs_nothing(tmp_path: Path) -> None:
    restart = {"backoff": {"initial": "10ms", "max": "10ms"}, "crash_loop": {"count": 4, "window": "1m"}}
    with fleetd(tmp_path, fleet({"a": {"command": sh("echo the reason >&2; exit 3"), "restart": restart}})) as daemon:
        daemon.start()
        row = daemon.until_state("a", "FAILED")
        assert row["generation"] == 4
        assert "crashed 4 times" in row["reason"]
        assert row["next_start_s"] is None
        detail = daemon.control("GET", "/v1/processes/a").json
        assert any("the reason" in line["line"] for line in detail["log"])
        cpu = daemon_cpu(daemon)
        time_was = time.monotonic()
        until(lambda: time.monotonic() - time_was > 1, "a second passes")
        assert daemon.process_row("a")["generation"] == 4, "nothing more is tried"
        assert daemon_cpu(daemon) - cpu < 0.5, "no busy loop"
        assert order(daemon, "start", "a", wait=False).status == 202
        until(lambda: daemon.process_row("a")["generation"] > 4, "a person gives it a new chance")


def daemon_cpu(daemon: Fleetd) -> float:
    import psutil

    times = psutil.Process(daemon.pid).cpu_times()
    return float(times.user + times.system)


def test_case_23_late_fast_crasher_trips_the_crash_loop(tmp_path: Path) -> None:
    """PM2 counts such crashes only in the first seconds after a start."""
    restart = {"backoff": {"initial": "10ms", "max": "10ms"}, "stable_after": "500ms", "crash_loop": {"count": 5}}
    code = "while [ -e good ]; do sleep 0.02; done; exit 1"
    (tmp_path / "good").touch()
    with fleetd(tmp_path, fleet({"a": {"command": sh(code), "restart": restart}})) as daemon:
        daemon.start()
        ready(daemon, "a")
        until(lambda: (daemon.process_row("a")["uptime_s"] or 0) > 2, "it has been up, and stable, for long")
        (tmp_path / "good").unlink()
        row = daemon.until_state("a", "FAILED")
        assert row["generation"] == 5
        assert "fleetd has given up" in row["reason"]


def test_case_23_program_dying_after_0_3_s_is_no_success(tmp_path: Path) -> None:
    """supervisord reports this program as RUNNING."""
    restart = {"backoff": {"initial": "10ms", "max": "10ms"}, "crash_loop": {"count": 3}, "stable_after": "1s"}
    with fleetd(tmp_path, fleet({"a": {"command": sh("sleep 0.3; exit 1"), "restart": restart}})) as daemon:
        daemon.start()
        row = daemon.until_state("a", "FAILED")
        assert row["generation"] == 3


def test_case_23_start_delay_hides_no_crash_loop(tmp_path: Path) -> None:
    restart = {"backoff": {"initial": "300ms", "factor": 1, "jitter": 0}, "crash_loop": {"count": 4, "window": "1m"}}
    with fleetd(tmp_path, fleet({"a": {"command": sh("exit 1"), "restart": restart}})) as daemon:
        daemon.start()
        assert daemon.until_state("a", "FAILED")["generation"] == 4


def test_case_27_backoff_grows_and_a_stable_run_resets_it(tmp_path: Path) -> None:
    restart = {
        "backoff": {"initial": "50ms", "factor": 3, "jitter": 0},
        "stable_after": "600ms",
        "crash_loop": {"count": 100},
    }
    code = "if [ -e good ]; then exec sleep 1000; fi; exit 1"
    with fleetd(tmp_path, fleet({"a": {"command": sh(code), "restart": restart}})) as daemon:
        daemon.start()
        until(lambda: (daemon.process_row("a")["next_start_s"] or 0) > 0.4, "the delay has grown")
        (tmp_path / "good").touch()
        ready(daemon, "a")
        until(lambda: "stable for" in json.dumps(daemon.control("GET", "/v1/story/a").json), "it is stable")
        os.kill(daemon.process_row("a")["pid"], signal.SIGKILL)
        until(
            lambda: "next start in 0.05 s" in json.dumps(daemon.control("GET", "/v1/story/a").json),
            "from the beginning",
        )
        ready(daemon, "a")


def test_case_27_memory_limit_restarts_without_a_death(tmp_path: Path) -> None:
    """The sum over the set counts: the leader alone is below the limit."""
    code = (
        "import os, time\nif os.fork() == 0:\n    block = bytearray(os.urandom(1)) * (90 << 20)\n    time.sleep(1000)\n"
        "print('up')\nos.wait()"
    )
    services = {"a": {"command": python(code), "limits": {"memory": "64MiB"}, "restart": QUICK}}
    with fleetd(tmp_path, fleet(services)) as daemon:
        daemon.start()
        ready(daemon, "a")
        until(lambda: daemon.process_row("a")["generation"] == 2, "it is restarted")
        assert "memory limit exceeded" in json.dumps(daemon.control("GET", "/v1/story/a").json)
        assert "deaths" not in daemon.process_row("a")["reason"]
        ready(daemon, "a")


def test_case_30_start_limit_of_three_is_three_runs(tmp_path: Path) -> None:
    restart = {"backoff": {"initial": "20ms", "max": "20ms"}, "crash_loop": {"count": 3, "window": "1m"}}
    services = {"a": {"command": sh("echo run; exit 1"), "restart": {**restart, "policy": "on-failure"}}}
    with fleetd(tmp_path, fleet(services)) as daemon:
        daemon.start()
        daemon.until_state("a", "FAILED")
        began = time.monotonic()
        until(lambda: time.monotonic() - began > 1.5, "time passes")
        assert daemon.log_of("a").count("run\n") == 3


@pytest.mark.parametrize(
    ("policy", "codes", "code", "state", "runs"),
    [
        ("on-failure", [0], 0, "EXITED", 1),
        ("on-failure", [0, 143], 143, "EXITED", 1),
        ("on-failure", [3], 0, "FAILED", 2),
        ("on-failure", [0], 5, "FAILED", 2),
        ("always", [0], 0, "FAILED", 2),
        ("never", [0], 0, "EXITED", 1),
        ("never", [0, 9], 9, "EXITED", 1),
        ("never", [0], 9, "FAILED", 1),
    ],
)
def test_case_30_exit_codes_decide_about_a_restart(
    tmp_path: Path, policy: str, codes: list[int], code: int, state: str, runs: int
) -> None:
    restart = {"policy": policy, "success_codes": codes, "backoff": {"initial": "10ms"}, "crash_loop": {"count": 2}}
    with fleetd(tmp_path, fleet({"a": {"command": sh(f"exit {code}"), "restart": restart}})) as daemon:
        daemon.start()
        row = daemon.until_state("a", "EXITED", "FAILED")
        assert (row["state"], row["generation"], row["last_exit"]["code"]) == (state, runs, code)


def test_case_30_crash_loop_can_continue_slowly(tmp_path: Path) -> None:
    loop = {"count": 3, "window": "1m", "then": "slow", "every": "700ms"}
    restart = {"backoff": {"initial": "10ms", "max": "10ms"}, "crash_loop": loop}
    with fleetd(tmp_path, fleet({"a": {"command": sh("exit 1"), "restart": restart}})) as daemon:
        daemon.start()
        until(lambda: "one try every" in daemon.process_row("a")["reason"], "it slows down")
        row = daemon.process_row("a")
        assert row["state"] == "BACKOFF"
        assert row["next_start_s"] <= 0.7
        until(lambda: daemon.process_row("a")["generation"] > row["generation"], "and tries again")


def test_supervisor_11_taken_port_names_its_owner_and_waits(tmp_path: Path) -> None:
    port = free_port()
    with socket.socket() as other:
        other.bind(("127.0.0.1", port))
        other.listen()
        services = {"a": {"command": json.loads(fake()), "port": port, "restart": QUICK}}
        with fleetd(tmp_path, fleet(services)) as daemon:
            daemon.start()
            until(
                lambda: (
                    f"port {port} is taken by pid {os.getpid()}" in daemon.process_row("a")["reason"]
                    or f"pid {os.getpid()}" in daemon.process_row("a")["reason"]
                ),
                "the owner is named",
            )
            other.close()
            ready(daemon, "a")


def test_supervisor_13_slow_start_is_killed_and_counted(tmp_path: Path) -> None:
    services = {
        "a": {
            "command": json.loads(fake("--load-time", "60")),
            "probes": {"startup": {"http": "/health", "deadline": "400ms"}},
            "restart": {"backoff": {"initial": "10ms"}, "crash_loop": {"count": 2}},
        }
    }
    with fleetd(tmp_path, fleet(services)) as daemon:
        daemon.start()
        row = daemon.until_state("a", "FAILED")
        assert "not ready within 0.4 s" in row["reason"]
        assert row["generation"] == 2
        assert daemon.children() == []


def test_case_30_manual_restart_is_no_death(tmp_path: Path) -> None:
    restart = {"crash_loop": {"count": 2}}
    with fleetd(tmp_path, fleet({"a": {"command": SLEEPER, "restart": restart}})) as daemon:
        daemon.start()
        pid = ready(daemon, "a")
        for _ in range(4):
            assert order(daemon, "restart", "a").status == 200
            row = daemon.until_state("a", "READY")
            assert row["pid"] != pid
            pid = row["pid"]
        assert row["restarts"] == 4
        assert row["generation"] == 5


def test_case_30_running_process_always_has_a_pid(tmp_path: Path) -> None:
    """State and pid agree in every status of a process that starts and stops."""
    services = {"a": {"command": sh("sleep 0.05; exit 1"), "restart": QUICK}}
    with fleetd(tmp_path, fleet(services)) as daemon:
        daemon.start()
        until(lambda: daemon.process_row("a")["generation"] > 3, "it comes and goes")
        for _ in range(60):
            row = daemon.process_row("a")
            if row["state"] in ("READY", "UNHEALTHY", "DRAINING"):
                assert row["pid"]
                assert row["uptime_s"] is not None
            if row["state"] == "BACKOFF":
                assert row["next_start_s"] is not None
                assert row["pid"] is None
        until_logged(daemon, "a", "exited code=1")
