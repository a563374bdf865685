"""Cases 13, 14, 15, 18, 20, 21, 36: invalid names, commands, clients and state files; the daemon stays up."""

from __future__ import annotations

import http.client
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.parse
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.support.daemon import ROOT, Fleetd, fleetd
from tests.support.fleet_files import QUICK, SLEEPER, crash, ctl, fleet, order, python, ready, sh, until_logged
from tests.support.waiting import until


def subscribe(daemon: Fleetd, path: str) -> socket.socket:
    client = socket.socket(socket.AF_UNIX)
    client.settimeout(10)
    client.connect(str(daemon.socket))
    client.sendall(f"GET {path} HTTP/1.1\r\nHost: fleetd\r\nAccept: text/event-stream\r\n\r\n".encode())
    return client


def test_case_13_slow_event_reader_costs_the_daemon_nothing(tmp_path: Path) -> None:
    services = {"a": {"command": sh("exit 1"), "restart": {**QUICK, "backoff": {"initial": "5ms", "max": "5ms"}}}}
    with fleetd(tmp_path, fleet(services)) as daemon:
        daemon.start()
        with subscribe(daemon, "/v1/events") as slow, subscribe(daemon, "/v1/events") as quick:
            assert slow.recv(1)
            until(lambda: daemon.process_row("a")["generation"] > 60, "much happens")
            assert daemon.status()["daemon"]["pid"] == daemon.pid
            seen = b""
            while seen.count(b"\nevent: ") < 20 and seen.count(b"data:") < 20:
                seen += quick.recv(65536)
        assert daemon.status()["daemon"]["rss_bytes"] < 300 << 20


def test_case_13_subscription_starts_with_past_events(tmp_path: Path) -> None:
    with fleetd(tmp_path, fleet({"a": {"command": SLEEPER}})) as daemon:
        daemon.start()
        ready(daemon, "a")
        first = daemon.control("GET", "/v1/events?follow=0").json["events"]
        last = max(event["seq"] for event in first)
        for _ in range(3):
            assert order(daemon, "restart", "a").status == 200
        found = daemon.control("GET", f"/v1/events?follow=0&after={last}").json["events"]
        numbers = [event["seq"] for event in found]
        assert numbers == list(range(last + 1, last + 1 + len(numbers)))


@pytest.mark.parametrize("name", ["a/b", "a+b", "a b", "größe", "日本", "a%2fb", "a:b", "..", "a" * 200, "-x", ""])
def test_case_14_odd_names_work_or_are_rejected_with_place(tmp_path: Path, name: str) -> None:
    with fleetd(tmp_path, fleet({name: {"command": SLEEPER}, "ok": {"command": SLEEPER}})) as daemon:
        done = subprocess.run(
            [sys.executable, "-m", "fleetd", "check", str(daemon.config)],
            cwd=ROOT, capture_output=True, text=True, timeout=30, check=False,
        )  # fmt: skip
        if done.returncode:
            assert done.returncode == 2
            assert "fleet.yaml:" in done.stderr
            assert "Traceback" not in done.stderr
            return
        daemon.start()
        ready(daemon, name)
        quoted = urllib.parse.quote(name, safe="")
        assert daemon.control("GET", f"/v1/processes/{quoted}").json["process"]["name"] == name
        assert order(daemon, "restart", name).status == 200
        assert ctl(daemon, "status", name).returncode == 0
        assert ctl(daemon, "stop", name).returncode == 0
        crash(daemon)
        daemon.start()
        assert daemon.process_row(name)["state"] == "STOPPED"
        assert {path.parent.name for path in tmp_path.rglob("*.log")} <= {"logs", tmp_path.name}, (
            "no name leaves the folder"
        )


def bad_programs(folder: Path) -> dict[str, tuple[dict[str, Any], str]]:
    (folder / "plain").write_text("no program")
    (folder / "script").write_text("#!/no/such/interpreter\n")
    (folder / "garbage").write_bytes(b"\x7fELF\x01garbage")
    for name in ("script", "garbage"):
        (folder / name).chmod(0o755)
    (folder / "logs").mkdir()
    (folder / "logs" / "log-is-folder.log").mkdir()
    return {
        "missing": ({"command": ["/no/such/program"]}, "does not exist"),
        "not-on-path": ({"command": ["no-such-program-anywhere"]}, "not found on PATH"),
        "not-executable": ({"command": ["./plain"]}, "is not executable"),
        "folder": ({"command": [str(folder)]}, "is a directory"),
        "interpreter": ({"command": ["./script"]}, "interpreter"),
        "garbage": ({"command": ["./garbage"]}, "cannot run on this machine"),
        "cwd": ({"command": SLEEPER, "cwd": "/no/such/folder"}, "working directory"),
        "cwd-is-file": ({"command": SLEEPER, "cwd": "plain"}, "not a directory"),
        "log-is-folder": ({"command": SLEEPER}, "log"),
        "cpu": ({"command": SLEEPER, "limits": {"cpu": [4095]}}, "CPUs 4095"),
        "long": ({"command": ["true", "x" * 200_000]}, "longer than the kernel allows"),
    }


def test_case_15_every_start_failure_is_final_and_explained(tmp_path: Path) -> None:
    bad = bad_programs(tmp_path)
    services = {name: service for name, (service, _) in bad.items()}
    with fleetd(tmp_path, fleet({**services, "good": {"command": SLEEPER}})) as daemon:
        daemon.start()
        pid = ready(daemon, "good")
        for name, (_, words) in bad.items():
            row = daemon.until_state(name, "FAILED")
            assert words in row["reason"], (name, row["reason"])
            assert row["generation"] == 1, name
        assert ready(daemon, "good") == pid
        assert "Traceback" not in daemon.log()


def test_case_15_bad_quoting_is_found_before_anything_runs(tmp_path: Path) -> None:
    with fleetd(tmp_path, fleet({"a": {"command": "echo 'not closed"}})) as daemon:
        done = subprocess.run(
            [sys.executable, "-m", "fleetd", "check", str(daemon.config)],
            cwd=ROOT, capture_output=True, text=True, timeout=30, check=False,
        )  # fmt: skip
        assert done.returncode == 2
        assert "services.a.command" in done.stderr


def test_case_15_out_of_descriptors_is_retried(tmp_path: Path) -> None:
    """Lower the descriptor limit of the running daemon, then raise it again."""
    import resource

    services = {"a": {"command": SLEEPER, "restart": QUICK}}
    with fleetd(tmp_path, fleet(services)) as daemon:
        daemon.start()
        pid = ready(daemon, "a")
        process = psutil.Process(daemon.pid)
        high = process.rlimit(resource.RLIMIT_NOFILE)
        process.rlimit(resource.RLIMIT_NOFILE, (5, high[1]))
        os.kill(pid, 9)
        time_limit = time.monotonic() + 1.5
        until(lambda: time.monotonic() > time_limit, "it tries for a while")
        assert daemon.process is not None
        assert daemon.process.poll() is None
        process.rlimit(resource.RLIMIT_NOFILE, high)
        assert ready(daemon, "a") != pid
        assert "unexpected failure" not in daemon.log()


def test_case_18_percent_and_dollar_reach_the_program(tmp_path: Path) -> None:
    code = "import os, sys, time; print(sys.argv[1:], os.environ['A'], os.environ['B'], flush=True); time.sleep(1000)"
    service = {
        "command": python(code, "%(ENV_X)s", "100%", "%%", "$$HOME", "$${x}", "{x}", "a'b\"c"),
        "env": {"A": "50% of $$5", "B": "%(x)s {name}"},
    }
    with fleetd(tmp_path, fleet({"a": service})) as daemon:
        daemon.start()
        ready(daemon, "a")
        printed = until_logged(daemon, "a", "\n").splitlines()[0]
        assert printed == str(["%(ENV_X)s", "100%", "%%", "$HOME", "${x}", "{x}", "a'b\"c"]) + " 50% of $5 %(x)s a"


def test_case_20_second_daemon_leaves_the_first_its_files(tmp_path: Path) -> None:
    """Supervisor 7."""
    with fleetd(tmp_path, fleet({"a": {"command": SLEEPER}})) as daemon:
        daemon.start()
        pid = ready(daemon, "a")
        before = {path.name: path.stat().st_ino for path in daemon.run.iterdir()}
        for _ in range(3):
            done = subprocess.run(
                [sys.executable, "-m", "fleetd", "run", "--config", str(daemon.config)],
                cwd=ROOT, capture_output=True, text=True, timeout=30, check=False,
            )  # fmt: skip
            assert done.returncode == 1
            assert f"already running, pid {daemon.pid}" in done.stderr
        assert {path.name: path.stat().st_ino for path in daemon.run.iterdir()} == before
        assert daemon.process_row("a")["pid"] == pid


def test_case_20_many_daemons_at_once_leave_one(tmp_path: Path) -> None:
    with fleetd(tmp_path, fleet({"a": {"command": SLEEPER}})) as daemon:
        command = [sys.executable, "-m", "fleetd", "run", "--config", str(daemon.config)]
        env = {**os.environ, **daemon.env}
        others = [subprocess.Popen(command, cwd=ROOT, env=env, stderr=subprocess.DEVNULL) for _ in range(4)]
        try:
            until(lambda: sum(other.poll() is None for other in others) == 1, "all but one gave up")
            daemon.process = next(other for other in others if other.poll() is None)  # type: ignore[assignment]
            until(daemon.is_up, "the one is up")
            ready(daemon, "a")
            assert len(daemon.children()) == 1
            assert {other.returncode for other in others} == {1, None}
        finally:
            for other in others:
                if other is not daemon.process:
                    other.kill()
                    other.wait()


def test_case_21_leaving_clients_and_garbage_cost_no_cpu(tmp_path: Path) -> None:
    with fleetd(tmp_path, fleet({"a": {"command": SLEEPER}})) as daemon:
        daemon.start()
        ready(daemon, "a")
        messages = [
            b"\0\xff\xfe garbage \r\n\r\n", b"GET", b"POST /v1/apply HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{",
            b"GET /v1/status HTTP/1.1\r\nHost: x\r\n\r\n", b"GET /v1/events HTTP/1.1\r\nHost: x\r\n\r\n",
            b"POST /v1/processes/a/stop HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n[]", b"x" * 100_000,
        ]  # fmt: skip
        for message in messages * 10:
            with socket.socket(socket.AF_UNIX) as client:
                client.connect(str(daemon.socket))
                client.sendall(message)
        for message in messages * 10:
            with socket.create_connection(("127.0.0.1", daemon.port)) as client:
                client.sendall(message)
        assert daemon.process_row("a")["state"] == "READY"
        process = psutil.Process(daemon.pid)
        fds = process.num_fds()
        until(lambda: process.num_fds() <= fds, "descriptors are given back")
        before = sum(process.cpu_times()[:2])
        end = time.monotonic() + 1.0
        until(lambda: time.monotonic() > end, "a second passes")
        assert sum(process.cpu_times()[:2]) - before < 0.5
        assert "Traceback" not in daemon.log()


@pytest.mark.parametrize(
    ("method", "path", "body", "status"),
    [
        ("POST", "/v1/processes/stop", {"names": ["no-such-name"]}, 404),
        ("POST", "/v1/processes/stop", {"names": "a"}, 400),
        ("POST", "/v1/processes/a/signal", {"signal": "SIGNOPE"}, 400),
        ("POST", "/v1/processes/a/stop", {"unknown": 1}, 400),
        ("GET", "/v1/logs/a?lines=-1", None, 400),
        ("GET", "/v1/logs/a?grep=(", None, 400),
        ("GET", "/v1/nothing", None, 404),
        ("POST", "/v1/plan", {"text": "version: [" * 2000}, 400),
    ],
)
def test_case_21_invalid_requests_change_nothing(
    shared: Fleetd, method: str, path: str, body: Any, status: int
) -> None:
    answer = shared.control(method, path, body)
    assert answer.status in (status, 422), answer.body
    assert b"Traceback" not in answer.body
    assert shared.process_row("a")["state"] == "READY"
    assert shared.process_row("a")["generation"] == 1


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with fleetd(tmp_path_factory.mktemp("shared"), fleet({"a": {"command": SLEEPER}})) as daemon:
        daemon.start()
        ready(daemon, "a")
        yield daemon


def test_case_36_socket_is_private_and_shutdown_exits_0(tmp_path: Path) -> None:
    with fleetd(tmp_path, fleet({"a": {"command": SLEEPER}})) as daemon:
        daemon.start()
        ready(daemon, "a")
        assert daemon.socket.stat().st_mode & 0o777 == 0o600
        assert daemon.run.stat().st_mode & 0o077 == 0
        assert (tmp_path / "state").stat().st_mode & 0o077 == 0
        assert daemon.control("POST", "/v1/shutdown", {}).status == 202
        assert daemon.wait() == 0
        assert daemon.children() == []
        assert not daemon.socket.exists()
        daemon.start()
        ready(daemon, "a")
        assert daemon.stop() == 0


def test_case_36_state_of_other_versions_is_read_or_set_aside(tmp_path: Path) -> None:
    with fleetd(tmp_path, fleet({"a": {"command": SLEEPER}, "b": {"command": SLEEPER}})) as daemon:
        state = tmp_path / "state"
        state.mkdir()
        (state / "remembered.json").write_text(
            json.dumps({"version": 1, "processes": {"a": {"stopped": True, "of_a_later_version": 1}}})
        )
        daemon.start()
        ready(daemon, "b")
        assert daemon.process_row("a")["state"] == "STOPPED"
        crash(daemon)
        (state / "remembered.json").write_text(json.dumps({"version": 99, "processes": {}}))
        daemon.start()
        ready(daemon, "a")
        (aside,) = state.glob("remembered.json.corrupt*")
        assert str(aside) in ctl(daemon, "events").stdout
        assert str(aside) in daemon.log()


@pytest.mark.parametrize("lost", ["a record and its copy", "the whole state"])
def test_case_36_process_without_a_record_is_killed_not_doubled(tmp_path: Path, lost: str) -> None:
    """The environment names the daemon that spawned it: proof of ownership only."""
    with fleetd(
        tmp_path, fleet({"a": {"command": sh("sleep 1000 & exec sleep 1001")}, "b": {"command": SLEEPER}})
    ) as daemon:
        daemon.start()
        pid, other = ready(daemon, "a"), ready(daemon, "b")
        crash(daemon)
        if lost == "the whole state":
            shutil.rmtree(tmp_path / "state")
        else:
            for record in (tmp_path / "state" / "handles").glob("a.*"):
                record.write_bytes(record.read_bytes()[:40])
        daemon.start()
        assert ready(daemon, "a") != pid
        assert pid not in [process.pid for process in daemon.children()]
        assert (ready(daemon, "b") == other) == (lost != "the whole state")
        until(lambda: len(daemon.children()) == 3, "a, its child, and b: each once")
        assert "its record was lost" in daemon.log()


def test_case_21_client_that_stops_reading_is_disconnected(tmp_path: Path) -> None:
    code = "import time\nfor n in range(30000): print('x' * 100)\ntime.sleep(1000)"
    with fleetd(tmp_path, fleet({"a": {"command": python(code)}})) as daemon:
        daemon.start()
        ready(daemon, "a")
        until(lambda: (tmp_path / "logs" / "a.log").stat().st_size > 3_000_000, "there is much to read")
        with subscribe(daemon, "/v1/logs/a?lines=30000&follow=1") as slow:
            assert slow.recv(1)
            assert daemon.status()["daemon"]["rss_bytes"] < 300 << 20
        connection = http.client.HTTPConnection("127.0.0.1", daemon.port, timeout=5)
        connection.request("GET", "/health")
        assert connection.getresponse().status == 200
        connection.close()
