"""Cases 5, 7, 24, 25, 37 and Supervisor 3, 4: a stop empties the whole process set within its time."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.support.daemon import FAKE, Fleetd, fake, fleetd
from tests.support.fleet_files import QUICK, SLEEPER, fleet, order, python, ready, sh, until_gone, until_logged
from tests.support.ports import free_port
from tests.support.waiting import alive, until

# Starts a child that ignores TERM and INT, a child in its own session, and one that was forked twice and has no parent
# in the set. Prints their pids.
TREE = '''
import os, signal, subprocess, sys, time
stubborn = """
import signal, time
for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, signal.SIG_IGN)
print("up", flush=True)
time.sleep(1000)
"""
python = [sys.executable, "-I", "-S", "-c", stubborn]
pids = []
for session in (False, True):
    child = subprocess.Popen(python, start_new_session=session, stdout=subprocess.PIPE)
    child.stdout.readline()
    pids.append(child.pid)
read, write = os.pipe()
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        os.write(write, str(os.getpid()).encode() + b"\\n")
        os.execv(sys.executable, [sys.executable, "-I", "-S", "-c", stubborn])
    os._exit(0)
os.wait()
pids.append(int(os.read(read, 100)))
print("tree", *pids, flush=True)
{end}
'''


def tree_of(daemon: Fleetd, name: str, times: int = 1) -> list[int]:
    text = until_logged(daemon, name, "tree ", times)
    line = [line for line in text.splitlines() if line.startswith("tree ")][-1]
    return [int(word) for word in line.split()[1:]]


@pytest.mark.parametrize(
    "leader", ["time.sleep(1000)", "signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(1000)"]
)
def test_case_24_stop_kills_every_kind_of_tree(tmp_path: Path, leader: str) -> None:
    services = {"a": {"command": python(TREE.replace("{end}", leader)), "stop": {"timeout": "500ms"}}}
    with fleetd(tmp_path, fleet(services)) as daemon:
        daemon.start()
        pids = [ready(daemon, "a"), *tree_of(daemon, "a")]
        assert len(pids) == 4
        began = time.monotonic()
        assert order(daemon, "stop", "a").status == 200
        assert time.monotonic() - began < 5
        assert not any(map(alive, pids))
        assert order(daemon, "stop", "a").status == 200, "what is dead already is stopped"
        assert daemon.children() == []


def test_case_24_dead_leader_is_swept_before_the_next_start(tmp_path: Path) -> None:
    services = {"a": {"command": python(TREE.replace("{end}", "time.sleep(1000)")), "restart": QUICK}}
    with fleetd(tmp_path, fleet(services)) as daemon:
        daemon.start()
        leader, first = ready(daemon, "a"), tree_of(daemon, "a")
        os.kill(leader, signal.SIGKILL)
        second = tree_of(daemon, "a", 2)
        assert not any(map(alive, first)), "swept before the next generation began"
        assert all(map(alive, second))


def test_case_05_program_ignoring_term_is_killed_at_deadline(tmp_path: Path) -> None:
    """Supervisor 3."""
    code = "trap '' TERM; echo up; while true; do sleep 0.05; done"
    with fleetd(tmp_path, fleet({"a": {"command": sh(code), "stop": {"timeout": "700ms"}}})) as daemon:
        daemon.start()
        ready(daemon, "a")
        until_logged(daemon, "a", "up")
        began = time.monotonic()
        assert order(daemon, "stop", "a").status == 200
        assert time.monotonic() - began >= 0.7
        row = daemon.process_row("a")
        assert (row["state"], row["last_exit"]["signal"]) == ("STOPPED", "SIGKILL")
        assert daemon.children() == []


def test_case_05_clean_exit_within_grace_is_reported_as_clean(tmp_path: Path) -> None:
    code = "trap 'echo bye; exit 7' TERM; echo up; while true; do sleep 0.05; done"
    with fleetd(tmp_path, fleet({"a": {"command": sh(code)}})) as daemon:
        daemon.start()
        ready(daemon, "a")
        until_logged(daemon, "a", "up")
        assert order(daemon, "stop", "a").status == 200
        assert daemon.process_row("a")["last_exit"]["code"] == 7
        assert "bye" in daemon.log_of("a")


def test_case_07_child_holding_the_output_delays_nothing(tmp_path: Path) -> None:
    code = "import subprocess, time\nsubprocess.Popen(['sleep', '1000'], start_new_session=True)\nprint('up')\ntime.sleep(1000)"
    for capture in ("file", "pipe"):
        services = {
            "a": {"command": python(code), "logs": {"capture": capture}, "stop": {"timeout": "5s"}, "restart": QUICK}
        }
        folder = tmp_path / capture
        folder.mkdir()
        with fleetd(folder, fleet(services)) as daemon:
            daemon.start()
            pid = ready(daemon, "a")
            until_logged(daemon, "a", "up")
            os.kill(pid, signal.SIGKILL)
            until(lambda: daemon.process_row("a")["generation"] == 2, "its death is seen at once", 3)
            ready(daemon, "a")
            until_logged(daemon, "a", "up", 2)
            began = time.monotonic()
            assert order(daemon, "stop", "a").status == 200
            assert time.monotonic() - began < 4
            assert daemon.children() == []


def test_case_25_stop_timeout_is_kept_and_shown(tmp_path: Path) -> None:
    code = "trap '' TERM INT; echo up; while true; do sleep 0.05; done"
    with fleetd(tmp_path, fleet({"a": {"command": sh(code), "stop": {"signal": "SIGINT", "timeout": "2s"}}})) as daemon:
        daemon.start()
        ready(daemon, "a")
        until_logged(daemon, "a", "up")
        began = time.monotonic()
        assert order(daemon, "stop", "a", wait=False).status == 202
        until(lambda: time.monotonic() - began > 1.2, "time passes")
        row = daemon.process_row("a")
        assert (row["state"], row["pid"] is not None) == ("STOPPING", True)
        daemon.until_state("a", "STOPPED")
        assert 1.9 < time.monotonic() - began < 6


def test_case_25_delayed_exit_is_awaited_with_its_stop_signal(tmp_path: Path) -> None:
    code = (
        "import signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: print('wrong signal'))\n"
        "signal.signal(signal.SIGUSR2, lambda *_: (print('ending'), time.sleep(0.7), print('ended'), sys.exit(0)))\n"
        "print('up')\nwhile True: time.sleep(1000)"
    )
    services = {"a": {"command": python(code), "stop": {"signal": "SIGUSR2", "timeout": "20s"}}}
    with fleetd(tmp_path, fleet(services)) as daemon:
        daemon.start()
        ready(daemon, "a")
        until_logged(daemon, "a", "up")
        assert order(daemon, "stop", "a").status == 200
        assert daemon.process_row("a")["last_exit"]["code"] == 0
        assert "ended" in daemon.log_of("a")
        assert "wrong signal" not in daemon.log_of("a")


def test_case_25_only_a_forced_shutdown_shortens_the_grace(tmp_path: Path) -> None:
    code = "trap '' TERM; echo up; while true; do sleep 0.05; done"
    with fleetd(tmp_path, fleet({"a": {"command": sh(code), "stop": {"timeout": "1h"}}})) as daemon:
        daemon.start()
        pid = ready(daemon, "a")
        until_logged(daemon, "a", "up")
        order(daemon, "stop", "a", wait=False)
        daemon.until_state("a", "STOPPING")
        order(daemon, "stop", "a", wait=False)
        assert alive(pid)
        daemon.signal(signal.SIGTERM)
        until(lambda: "shutting down" in daemon.log(), "the order is taken")
        daemon.signal(signal.SIGTERM)
        assert daemon.wait() == 0
        until_gone(pid)


def test_case_37_killed_engine_leader_is_swept_and_restarted(tmp_path: Path) -> None:
    """A vLLM leader dies; its worker holds the pipe and another port."""
    command = json.loads(fake("--orphan-worker", api="vllm"))
    services = {
        "a": {"command": command, "port": free_port(), "probes": {"startup": {"http": "/health"}}, "restart": QUICK}
    }
    with fleetd(tmp_path, fleet(services)) as daemon:
        daemon.start()
        pid = ready(daemon, "a")
        workers = [child.pid for child in psutil.Process(pid).children(recursive=True)]
        assert workers
        os.kill(pid, signal.SIGKILL)
        killed = time.monotonic()
        until(lambda: daemon.process_row("a")["pid"] != pid, "the death is seen", 2)
        assert time.monotonic() - killed < 2
        assert ready(daemon, "a") != pid
        assert not any(map(alive, workers))


def test_supervisor_04_grandchild_holding_the_port_is_killed(tmp_path: Path) -> None:
    port = free_port()
    code = (
        "import os, sys, time\n"
        f"pid = os.spawnv(os.P_NOWAIT, sys.executable, [sys.executable, '-I', {str(FAKE)!r}, '--port', sys.argv[1]])\n"
        "time.sleep(1000)"
    )
    service = {
        "command": [sys.executable, "-I", "-S", "-c", code, "{port}"], "port": port, "restart": QUICK,
        "probes": {"startup": {"http": "/health"}},
    }  # fmt: skip
    with fleetd(tmp_path, fleet({"a": service})) as daemon:
        daemon.start()
        pid = ready(daemon, "a")
        os.kill(pid, signal.SIGKILL)
        until(lambda: daemon.process_row("a")["generation"] == 2, "a second generation")
        assert ready(daemon, "a") != pid, "the same port was free for it"
        assert order(daemon, "stop", "a").status == 200
        assert daemon.children() == []


def test_case_05_shutdown_stops_everything_in_reverse_order(tmp_path: Path) -> None:
    noisy = sh("trap 'echo ended $(date +%s%N); exit 0' TERM; while true; do sleep 0.05; done")
    services = {
        "base": {"command": noisy},
        "middle": {"command": noisy, "depends_on": {"base": "started"}},
        "top": {"command": noisy, "depends_on": {"middle": "started"}},
        "alone": {"command": SLEEPER},
    }
    with fleetd(tmp_path, fleet(services)) as daemon:
        daemon.start()
        for name in services:
            ready(daemon, name)
        assert daemon.stop() == 0
        assert daemon.children() == []
        ended = {
            name: int(until_logged(daemon, name, "ended ").split("ended ")[1].split()[0])
            for name in ("top", "middle", "base")
        }
        assert ended["top"] < ended["middle"] < ended["base"]
