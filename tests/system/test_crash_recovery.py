"""Cases 1, 3, 4, 6, 28, 31 and Supervisor 5: processes outlive the daemon, and none is killed by mistake."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from pathlib import Path

import pytest

from tests.support.daemon import fake, fleetd
from tests.support.fleet_files import (
    QUICK,
    SLEEPER,
    all_lines,
    crash,
    fleet,
    numbers,
    order,
    piped_lines,
    python,
    ready,
    sh,
    until_logged,
)
from tests.support.ports import free_port
from tests.support.waiting import alive, until

COUNTER = python("import time\nn = 0\nwhile True:\n    print(n); n += 1; time.sleep(0.002)")


def test_case_01_ten_daemon_kills_keep_the_child(tmp_path: Path) -> None:
    with fleetd(tmp_path, fleet({"a": {"command": SLEEPER}})) as daemon:
        daemon.start()
        pid = ready(daemon, "a")
        for _ in range(10):
            crash(daemon)
            assert alive(pid)
            daemon.start()
            row = daemon.until_state("a", "READY")
            assert (row["pid"], row["restarts"], row["generation"]) == (pid, 0, 1)
        assert len(daemon.children()) == 1


@pytest.mark.parametrize("damage", ["", "{", "null", '{"version": 99}', "\0\0\0\0", '{"name": "a", "pid": 1}'])
def test_case_03_damaged_record_is_set_aside_and_kills_nothing(tmp_path: Path, damage: str) -> None:
    port = free_port()
    server = json.loads(fake())
    services = {"a": {"command": server, "port": port, "restart": QUICK}, "b": {"command": SLEEPER}}
    with fleetd(tmp_path, fleet(services)) as daemon:
        daemon.start()
        pids = {name: ready(daemon, name) for name in services}
        until(lambda: all(p["pid"] for p in daemon.status()["processes"]), "both run")
        crash(daemon)
        record = next((tmp_path / "state" / "handles").glob("a*.json"))
        record.write_text(damage)
        daemon.start()
        assert {name: ready(daemon, name) for name in services} == pids, "its copy is as good"
        assert "set aside" in daemon.log()
        assert len(daemon.children()) == 2
        crash(daemon)
        record.unlink()
        daemon.start()
        assert {name: ready(daemon, name) for name in services} == pids, "gone is as good as torn"


def test_case_03_torn_database_does_not_stop_the_daemon(tmp_path: Path) -> None:
    with fleetd(tmp_path, fleet({"a": {"command": SLEEPER}})) as daemon:
        daemon.start()
        pid = ready(daemon, "a")
        crash(daemon)
        database = next((tmp_path / "state").glob("*.db"))
        database.write_bytes(database.read_bytes()[:100] + b"\xff" * 5000)
        for extra in (tmp_path / "state").glob("*.db-*"):
            extra.unlink()
        (tmp_path / "state" / "ports.json").write_text("{torn")
        daemon.start()
        assert ready(daemon, "a") == pid
        assert daemon.stop() == 0


@pytest.mark.parametrize("capture", ["file", "pipe"])
@pytest.mark.parametrize("how", ["crash", "reexec"])
def test_case_04_killed_collector_loses_no_line(tmp_path: Path, capture: str, how: str) -> None:
    services = {"a": {"command": COUNTER, "logs": {"capture": capture}}}
    with fleetd(tmp_path, fleet(services)) as daemon:
        daemon.start()
        pid = ready(daemon, "a")
        read = piped_lines if capture == "pipe" else all_lines
        until(lambda: len(numbers(read(tmp_path, "a"))) > 50, "lines come")
        if how == "crash":
            crash(daemon)
            daemon.start()
        else:
            assert daemon.control("POST", "/v1/reexec", {}).status == 202
            until(lambda: daemon.log().count("fleetd is up") == 2, "the new program is up")
        assert ready(daemon, "a") == pid
        before = len(numbers(read(tmp_path, "a")))
        until(lambda: len(numbers(read(tmp_path, "a"))) > before + 50, "lines come again")
        assert order(daemon, "stop", "a").status == 200
        found = numbers(read(tmp_path, "a"))
        assert found == list(range(len(found))), "none lost, none twice, none cut"


@pytest.mark.parametrize(
    ("policy", "code", "again"),
    [("always", 0, True), ("always", 3, True), ("on-failure", 0, True), ("never", 3, False)],
)
def test_case_06_death_while_the_daemon_is_down_is_noticed(tmp_path: Path, policy: str, code: int, again: bool) -> None:
    """An unknown exit code counts as a failure, so `on-failure` restarts."""
    wait = f"while [ ! -e go ]; do sleep 0.02; done; rm go; exit {code}"
    with fleetd(tmp_path, fleet({"a": {"command": sh(wait), "restart": {**QUICK, "policy": policy}}})) as daemon:
        daemon.start()
        pid = ready(daemon, "a")
        crash(daemon)
        (tmp_path / "go").touch()
        until(lambda: not alive(pid), "it ended by itself")
        daemon.start()
        if again:
            row = daemon.until_state("a", "READY")
            assert row["pid"] != pid
            assert len(daemon.children()) <= 2  # the shell and its sleep
        else:
            row = daemon.until_state("a", "FAILED", "EXITED", "READY")
            assert row["state"] == "FAILED", "a process that is never restarted stays down, whichever daemon saw it die"


def test_case_06_operator_stop_is_kept_but_a_kill_is_not(tmp_path: Path) -> None:
    services = {name: {"command": SLEEPER, "restart": QUICK} for name in ("stopped", "killed", "removed")}
    with fleetd(tmp_path, fleet(services)) as daemon:
        daemon.start()
        pids = {name: ready(daemon, name) for name in services}
        assert order(daemon, "stop", "stopped").status == 200
        crash(daemon)
        os.kill(pids["killed"], signal.SIGKILL)
        daemon.write(fleet({name: services[name] for name in ("stopped", "killed")}))
        daemon.start()
        assert ready(daemon, "killed") != pids["killed"]
        row = daemon.process_row("stopped")
        assert (row["state"], row["desired"]) == ("STOPPED", "down")
        until(lambda: not alive(pids["removed"]), "what left fleet.yaml while the daemon was away is ended")


def test_case_06_counters_and_crash_loop_are_kept(tmp_path: Path) -> None:
    loop = {"backoff": {"initial": "10ms", "max": "10ms"}, "crash_loop": {"count": 3}}
    services = {"bad": {"command": sh("exit 4"), "restart": loop}, "good": {"command": SLEEPER, "restart": QUICK}}
    with fleetd(tmp_path, fleet(services)) as daemon:
        daemon.start()
        daemon.until_state("bad", "FAILED")
        os.kill(ready(daemon, "good"), signal.SIGKILL)
        until(lambda: daemon.process_row("good")["restarts"] == 1, "it started again")
        ready(daemon, "good")
        generation = daemon.process_row("bad")["generation"]
        crash(daemon)
        daemon.start()
        row = daemon.until_state("bad", "FAILED")
        assert row["generation"] == generation, "giving up outlives the daemon: no new tries"
        assert "fleetd has given up" in row["reason"]
        assert daemon.until_state("good", "READY")["restarts"] == 1


def test_case_06_daemon_killed_before_saving_loses_no_count(tmp_path: Path) -> None:
    """A run's record is written before its start, with the earlier restarts."""
    with fleetd(tmp_path, fleet({"good": {"command": SLEEPER, "restart": QUICK}})) as daemon:
        daemon.start()
        for count in (1, 2):
            os.kill(ready(daemon, "good"), signal.SIGKILL)
            until(lambda count=count: daemon.process_row("good")["restarts"] == count, "it started again")
        pid = ready(daemon, "good")
        crash(daemon)
        (tmp_path / "state" / "remembered.json").unlink(missing_ok=True)
        daemon.start()
        assert daemon.until_state("good", "READY")["restarts"] == 2
        crash(daemon)
        (tmp_path / "state" / "remembered.json").unlink(missing_ok=True)
        os.kill(pid, signal.SIGKILL)  # and of one that died in between
        daemon.start()
        assert daemon.until_state("good", "READY")["restarts"] == 3


def test_case_28_power_loss_during_a_save_keeps_the_stop(tmp_path: Path) -> None:
    with fleetd(tmp_path, fleet({"a": {"command": SLEEPER}, "b": {"command": SLEEPER}})) as daemon:
        daemon.start()
        ready(daemon, "a")
        ready(daemon, "b")
        assert order(daemon, "stop", "a").status == 200
        crash(daemon)
        handles = tmp_path / "state" / "handles"
        record = next(handles.glob("b*.json"))
        (handles / f".{record.name}.1.tmp").write_bytes(record.read_bytes()[:20])  # a write without its rename
        daemon.start()
        assert daemon.process_row("a")["state"] == "STOPPED"
        ready(daemon, "b")
        assert daemon.stop() == 0
        daemon.write(fleet({}))
        daemon.start()
        daemon.write(fleet({"b": {"command": SLEEPER}}))
        assert daemon.stop() == 0


@pytest.mark.parametrize("forged", ["init", "itself", "missing", "foreign"])
def test_case_31_forged_record_signals_no_process(tmp_path: Path, forged: str) -> None:
    foreign = subprocess.Popen(SLEEPER)
    try:
        with fleetd(tmp_path, fleet({"a": {"command": SLEEPER}})) as daemon:
            daemon.start()
            mine = ready(daemon, "a")
            crash(daemon)
            record = next((tmp_path / "state" / "handles").glob("a*.json"))
            content = json.loads(record.read_text())
            target = {"init": 1, "itself": os.getpid(), "missing": 2**22 - 3, "foreign": foreign.pid}[forged]
            text = json.dumps(content).replace(f'"pid": {mine}', f'"pid": {target}')
            assert text != json.dumps(content)
            record.write_text(text)
            daemon.start()
            assert ready(daemon, "a") not in (1, os.getpid(), foreign.pid)
            assert daemon.stop() == 0
            assert foreign.poll() is None
    finally:
        foreign.kill()
        foreign.wait()


def test_case_31_linked_record_is_not_followed(tmp_path: Path) -> None:
    foreign = subprocess.Popen(SLEEPER)
    try:
        with fleetd(tmp_path, fleet({"a": {"command": SLEEPER}})) as daemon:
            daemon.start()
            ready(daemon, "a")
            crash(daemon)
            record = next((tmp_path / "state" / "handles").glob("a*.json"))
            elsewhere = tmp_path / "elsewhere.json"
            elsewhere.write_text(f'{{"pid": {foreign.pid}}}')
            record.unlink()
            record.symlink_to(elsewhere)
            daemon.start()
            ready(daemon, "a")
            assert daemon.stop() == 0
            assert foreign.poll() is None
            assert elsewhere.exists()
    finally:
        foreign.kill()
        foreign.wait()


def test_case_05_supervisor_crash_during_a_start_leaves_no_copy(tmp_path: Path) -> None:
    port = free_port()
    slow = json.loads(fake("--load-time", "2"))
    services = {"a": {"command": slow, "port": port, "probes": {"startup": {"http": "/health"}}}}
    with fleetd(tmp_path, fleet(services)) as daemon:
        daemon.start(wait=False)
        until(daemon.is_up, "the daemon is up")
        until(lambda: daemon.process_row("a")["pid"], "it was spawned")
        pid = daemon.process_row("a")["pid"]
        assert daemon.process_row("a")["state"] == "STARTING"
        crash(daemon)
        daemon.start()
        assert ready(daemon, "a") == pid
        assert len(daemon.children()) == 1


def test_case_04_exit_of_adopted_process_is_marked_in_its_log(tmp_path: Path) -> None:
    with fleetd(tmp_path, fleet({"a": {"command": sh("echo hello; exec sleep 1000"), "restart": QUICK}})) as daemon:
        daemon.start()
        pid = ready(daemon, "a")
        until_logged(daemon, "a", "hello")
        crash(daemon)
        daemon.start()
        assert ready(daemon, "a") == pid
        os.kill(pid, signal.SIGKILL)
        text = until_logged(daemon, "a", "hello", 2)
        assert text.index("--- exited") > text.index("hello")
