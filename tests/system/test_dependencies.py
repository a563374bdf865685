"""Cases 9, 10, 11: dependencies between processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

from tests.support.daemon import ROOT, fake, fleetd
from tests.support.fleet_files import QUICK, SLEEPER, fleet, order, ready, sh, until_logged
from tests.support.waiting import until

# Prints `up` once a file named go exists.
SLOW = sh("while [ ! -e go ]; do sleep 0.02; done; echo up; exec sleep 1000")
UP = {"startup": {"log_line": "^up$", "period": "20ms"}}


def test_case_09_waiting_process_can_be_stopped_and_restarted(tmp_path: Path) -> None:
    services = {"base": {"command": SLOW, "probes": UP}, "a": {"command": SLEEPER, "depends_on": {"base": "ready"}}}
    with fleetd(tmp_path, fleet(services)) as daemon:
        daemon.start()
        row = daemon.until_state("a", "BLOCKED")
        assert row["reason"] == "waiting for base to be ready"
        assert order(daemon, "restart", "a", wait=False).status == 202
        assert daemon.until_state("a", "BLOCKED")["generation"] == 0
        assert order(daemon, "stop", "a").status == 200
        assert daemon.process_row("a")["state"] == "STOPPED"
        (tmp_path / "go").touch()
        ready(daemon, "base")
        assert daemon.process_row("a")["state"] == "STOPPED", "the dependency comes, and the stop still holds"
        assert order(daemon, "start", "a").status == 200
        assert daemon.process_row("a")["generation"] == 1, "one start, no second copy"
        assert len(daemon.children()) == 2


def test_case_09_restart_all_waits_in_order_of_dependency(tmp_path: Path) -> None:
    base = {"command": sh("sleep 0.3; echo up; exec sleep 1000"), "probes": UP}
    chain = {name: {"command": SLEEPER, "depends_on": {on: "ready"}} for name, on in (("a", "base"), ("b", "a"))}
    held = {"command": SLEEPER, "requires": ["volume"]}
    services = {"base": base, **chain, "held": held, "c": {"command": SLEEPER, "depends_on": {"held": "ready"}}}
    with fleetd(tmp_path, fleet(services)) as daemon:
        daemon.start()
        ready(daemon, "b")
        answer = order(daemon, "restart", "all")
        results = {row["name"]: (row["result"], row["state"]) for row in answer.json["results"]}
        assert {name: results[name] for name in ("base", "a", "b")} == dict.fromkeys(
            ("base", "a", "b"), ("ok", "READY")
        )
        assert results["held"] == results["c"] == ("failed", "BLOCKED"), "the time of a mount is unknown"
        assert [daemon.process_row(name)["generation"] for name in ("base", "a", "b")] == [2, 2, 2]


def test_case_09_stop_during_a_restart_wins(tmp_path: Path) -> None:
    code = sh("trap 'sleep 0.4; exit 0' TERM; echo up; while true; do sleep 0.02; done")
    with fleetd(tmp_path, fleet({"a": {"command": code}})) as daemon:
        daemon.start()
        ready(daemon, "a")
        until_logged(daemon, "a", "up")
        order(daemon, "restart", "a", wait=False)
        daemon.until_state("a", "STOPPING")
        assert order(daemon, "stop", "a").status == 200
        row = daemon.until_state("a", "STOPPED")
        assert (row["generation"], row["desired"]) == (1, "down")


def test_case_10_changed_probe_releases_waiting_processes(tmp_path: Path) -> None:
    services = {"base": {"command": SLOW, "probes": UP}, "a": {"command": SLEEPER, "depends_on": {"base": "ready"}}}
    with fleetd(tmp_path, fleet(services)) as daemon:
        daemon.start()
        pid = daemon.until_state("base", "STARTING")["pid"]
        daemon.until_state("a", "BLOCKED")
        services["base"] = {"command": SLOW, "probes": {"startup": {"exec": ["true"], "period": "20ms"}}}
        daemon.write(fleet(services))
        ready(daemon, "a")
        assert daemon.process_row("base")["pid"] in (pid, None) or pid is None


def test_case_10_late_waiter_starts_after_dependency_restarts(tmp_path: Path) -> None:
    """A waiting process counts only the current generation of its dependency."""
    services = {
        "base": {
            "command": json.loads(fake()),
            "restart": QUICK,
            "probes": {"readiness": {"http": "/health", "period": "50ms"}},
        },
        "late": {"command": SLEEPER, "depends_on": {"base": "ready"}, "requires": ["volume"]},
    }
    with fleetd(tmp_path, fleet(services)) as daemon:
        daemon.start()
        pid = ready(daemon, "base")
        daemon.until_state("late", "BLOCKED")
        os.kill(pid, signal.SIGKILL)
        (tmp_path / "volume").mkdir()
        ready(daemon, "late")
        assert ready(daemon, "base") != pid


def test_case_10_failed_dependency_is_reported_until_it_returns(tmp_path: Path) -> None:
    services = {
        "base": {
            "command": sh("[ -e go ] && echo up && exec sleep 1000; exit 1"),
            "probes": UP,
            "restart": {**QUICK, "crash_loop": {"count": 2}},
        },
        "a": {"command": SLEEPER, "depends_on": {"base": "ready"}},
    }
    with fleetd(tmp_path, fleet(services)) as daemon:
        daemon.start()
        row = daemon.until_state("a", "FAILED")
        assert "depends on base, which failed" in row["reason"]
        (tmp_path / "go").touch()
        assert order(daemon, "start", "base").status == 200
        ready(daemon, "a")


def test_case_11_dependency_cycle_is_rejected_with_its_path(tmp_path: Path) -> None:
    services = {
        name: {"command": SLEEPER, "depends_on": [after]} for name, after in (("a", "b"), ("b", "c"), ("c", "a"))
    }
    with fleetd(tmp_path, fleet(services)) as daemon:
        done = subprocess.run(
            [sys.executable, "-m", "fleetd", "check", str(daemon.config)],
            cwd=ROOT, capture_output=True, text=True, timeout=30, check=False,
        )  # fmt: skip
        assert done.returncode == 2
        assert "a" in done.stderr
        assert "->" in done.stderr or "cycle" in done.stderr or "→" in done.stderr


def test_case_11_order_is_transitive_through_completed_steps(tmp_path: Path) -> None:
    services = {
        "three": {"command": SLEEPER, "depends_on": {"two": "completed"}},
        "two": {
            "command": sh("date +%s%N > two; exit 0"),
            "depends_on": {"one": "started"},
            "restart": {"policy": "never"},
        },
        "one": {"command": sh("date +%s%N > one; exec sleep 1000")},
    }
    with fleetd(tmp_path, fleet(services)) as daemon:
        daemon.start()
        ready(daemon, "three")
        assert daemon.process_row("two")["state"] == "EXITED"
        assert int((tmp_path / "one").read_text()) < int((tmp_path / "two").read_text())
        assert daemon.get("/ready").status == 200


def test_case_11_failed_step_starts_no_dependents(tmp_path: Path) -> None:
    services = {
        "step": {"command": sh("exit 3"), "restart": {"policy": "never"}},
        "a": {"command": SLEEPER, "depends_on": {"step": "completed"}},
    }
    with fleetd(tmp_path, fleet(services)) as daemon:
        daemon.start()
        row = daemon.until_state("a", "FAILED")
        assert "step" in row["reason"]
        assert row["generation"] == 0


def test_case_11_completed_step_is_not_rerun_by_the_next_daemon(tmp_path: Path) -> None:
    services = {
        "step": {"command": sh("echo ran >> ran"), "restart": {"policy": "on-failure"}},
        "a": {"command": SLEEPER, "depends_on": {"step": "completed"}},
    }
    with fleetd(tmp_path, fleet(services)) as daemon:
        daemon.start()
        pid = ready(daemon, "a")
        assert daemon.control("POST", "/v1/reexec", {}).status == 202
        until(lambda: daemon.log().count("fleetd is up") == 2, "the new program is up")
        assert ready(daemon, "a") == pid
        daemon.signal(signal.SIGKILL)
        daemon.wait()
        daemon.start()
        assert ready(daemon, "a") == pid
        assert daemon.process_row("step")["state"] == "EXITED"
        assert (tmp_path / "ran").read_text() == "ran\n"
        assert daemon.stop() == 0
        daemon.start()
        ready(daemon, "a")
        assert (tmp_path / "ran").read_text() == "ran\nran\n", "an ordered start is a start of everything"


def test_case_11_failing_readiness_never_restarts(tmp_path: Path) -> None:
    """Readiness affects routing only; liveness restarts."""
    (tmp_path / "well").touch()
    probe = {"exec": ["test", "-e", "well"], "period": "50ms", "failures": 2}
    with fleetd(tmp_path, fleet({"a": {"command": SLEEPER, "probes": {"readiness": probe}}})) as daemon:
        daemon.start()
        pid = ready(daemon, "a")
        (tmp_path / "well").unlink()
        row = daemon.until_state("a", "UNHEALTHY")
        assert row["pid"] == pid
        (tmp_path / "well").touch()
        assert ready(daemon, "a") == pid
        daemon.write(fleet({"a": {"command": SLEEPER, "probes": {"liveness": probe}}}))
        (tmp_path / "well").unlink()
        until(lambda: daemon.process_row("a")["pid"] not in (pid, None), "liveness restarts it")


def test_case_11_scaling_leaves_other_replicas_running(tmp_path: Path) -> None:
    def of(count: int) -> str:
        return fleet({"a": {"command": SLEEPER, "replicas": count}})

    with fleetd(tmp_path, of(2)) as daemon:
        daemon.start()
        pids = {name: ready(daemon, name) for name in ("a-1", "a-2")}
        daemon.write(of(4))
        until(lambda: len(daemon.status()["processes"]) == 4, "four of them")
        ready(daemon, "a-4")
        daemon.write(of(2))
        until(lambda: len(daemon.status()["processes"]) == 2, "two of them")
        assert {name: ready(daemon, name) for name in pids} == pids
        until(lambda: len(daemon.children()) == 2, "no more than two run")
