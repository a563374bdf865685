"""Cases 32, 34 and Config/CLI 21 to 28: a change restarts only what it must; secrets stay hidden."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.support.daemon import ROOT, Fleetd, fake, fleetd
from tests.support.fleet_files import QUICK, SLEEPER, crash, ctl, fleet, order, ready, sh, until_logged
from tests.support.waiting import until

BASE: dict[str, Any] = {
    "a": {"command": SLEEPER, "env": {"ONE": "1", "TWO": "2"}},
    "b": {"command": SLEEPER},
    "c": {"command": SLEEPER},
}


def pids(daemon: Fleetd) -> dict[str, int]:
    return {name: ready(daemon, name) for name in (row["name"] for row in daemon.status()["processes"])}


def applied(daemon: Fleetd, *words: str) -> subprocess.CompletedProcess[str]:
    return ctl(daemon, "apply", "-y", "--wait", *words)


def with_changes(**changes: Any) -> dict[str, Any]:
    found = {name: dict(service) for name, service in BASE.items()}
    for name, change in changes.items():
        if change is None:
            del found[name]
        else:
            found[name] = {**found.get(name, {"command": SLEEPER}), **change}
    return found


@pytest.mark.parametrize(
    ("change", "restarted", "code"),
    [
        ({}, set(), 0),
        ({"a": {"env": {"TWO": "2", "ONE": "1"}}}, set(), 0),  # the order of variables means nothing
        ({"a": {"env": {"ONE": "1", "TWO": "3"}}}, {"a"}, 1),
        ({"a": {"stop": {"timeout": "4s"}, "restart": QUICK, "limits": {"memory": "1GiB"}}}, set(), 1),
        ({"b": {"args": ["1"]}, "c": None, "d": {}}, {"b"}, 1),
        ({"b": {"umask": "0077"}}, {"b"}, 1),
        ({"b": {"limits": {"nofile": 512}}}, {"b"}, 1),
        ({"b": {"cwd": "/"}}, {"b"}, 1),
        ({"b": {"logs": {"capture": "pipe"}}}, {"b"}, 1),
        ({"b": {"logs": {"keep": 2}}, "a": {"watch": {"paths": ["."]}, "max_age": "1d"}}, set(), 1),
        ({"b": {"stop": {"timeout": "10000ms"}}}, set(), 0),  # the default, written in another unit
    ],
)
def test_case_34_change_restarts_only_what_it_must(
    tmp_path: Path, change: dict[str, Any], restarted: set[str], code: int
) -> None:
    """Covers Config/CLI 23 and 25: exit codes of diff, a second empty apply."""
    with fleetd(tmp_path, fleet(BASE, watch=False)) as daemon:
        daemon.start()
        before = pids(daemon)
        new = with_changes(**change)
        daemon.write(fleet(new, watch=False))
        assert ctl(daemon, "diff").returncode == code
        dry = ctl(daemon, "apply", "--dry-run")
        assert dry.returncode == 0
        assert {row["name"] for row in daemon.status()["processes"]} == set(BASE), "a dry run changes nothing"
        assert applied(daemon).returncode == 0
        until(lambda: {row["name"] for row in daemon.status()["processes"]} == set(new), "what left is gone")
        after = pids(daemon)
        assert {name for name in before if name in after and before[name] != after[name]} == restarted
        assert ctl(daemon, "diff").returncode == 0
        assert applied(daemon).returncode == 0
        assert pids(daemon) == after


BAD_FILES = [
    ('services: {"a": {"command": ["x"]}, "a": {"command": ["y"]}}\n', "a"),
    ('services: {"a": {"comand": ["x"]}}\n', "command"),
    ('services:\n\ta: {"command": ["x"]}\n', "tab"),
    ('services: {"a": {"command": ["x"], "stop": {"timeout": 10}}}\n', "services.a.stop.timeout"),
    ('services: {"a": {"command": ["x"], "limits": {"memory": "10G"}}}\n', "GiB"),
    ('services: {"a": {"command": ["x"], "env": {"KEY": "${NOT_SET_ANYWHERE}"}}}\n', "NOT_SET_ANYWHERE"),
    ('services: {"a": {"command": ["x"], "schedule": {"restart": "99 * * * *"}}}\n', "schedule"),
    ('services: {"a": {"command": ["x"], "depends_on": ["no-such-name"]}}\n', "no-such-name"),
    ("services: [\n", "fleet.yaml"),
    ("\0\0\0", "fleet.yaml"),
]


def test_config_21_26_invalid_file_changes_nothing(tmp_path: Path) -> None:
    with fleetd(tmp_path, fleet(BASE, watch=False)) as daemon:
        daemon.start()
        before = pids(daemon)
        good = daemon.config.read_text()
        head = "".join(line + "\n" for line in good.splitlines()[:4])
        for number, (text, words) in enumerate(BAD_FILES):
            daemon.config.write_text(head + text)
            command = (("diff",), ("apply", "-y"), ("reload",))[number % 3]
            done = ctl(daemon, *command)
            assert done.returncode == 2, (text, command, done.stdout, done.stderr)
            assert words in done.stderr
            assert "Traceback" not in done.stderr
            daemon.signal(signal.SIGHUP)
            until(lambda: daemon.status()["daemon"]["config_error"], "status says so")
            daemon.config.write_text(good)
            daemon.signal(signal.SIGHUP)
            until(lambda: daemon.status()["daemon"]["config_error"] is None, "and takes it back")
        daemon.config.write_text("not: [")
        assert pids(daemon) == before
        assert ctl(daemon, "restart", "a").returncode == 0, "the fleet that runs can be steered"
        assert "Traceback" not in daemon.log()


BOUNDED = (
    "import resource, sys\nresource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))\n"
    "from fleetd.cli.fleetd import main\nsys.exit(main())"
)


def test_config_22_alias_bomb_is_rejected_quickly(tmp_path: Path) -> None:
    bombs = {
        "laughs": "a: &a [x,x,x,x,x,x,x,x,x]\n"
        + "".join(f"{chr(98 + n)}: &{chr(98 + n)} [{','.join(['*' + chr(97 + n)] * 9)}]\n" for n in range(12)),
        "deep": "x: " + "[" * 50_000,
        "large": "x: '" + "y" * (50 << 20) + "'",
    }
    for name, text in bombs.items():
        path = tmp_path / f"{name}.yaml"
        path.write_text(text)
        began = time.monotonic()
        done = subprocess.run(
            [sys.executable, "-c", BOUNDED, "check", str(path)],
            cwd=ROOT, capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
        assert done.returncode == 2, (name, done.stderr[-500:])
        assert "Traceback" not in done.stderr
        assert time.monotonic() - began < 10


def test_config_24_killed_apply_is_finished_by_the_next_daemon(tmp_path: Path) -> None:
    slow = sh("trap 'sleep 0.5; exit 0' TERM; echo up; while true; do sleep 0.02; done")
    old = {f"s{n}": {"command": slow, "env": {"V": "1"}} for n in range(4)}
    new = {f"s{n}": {"command": slow, "env": {"V": "2"}} for n in range(1, 5)}
    with fleetd(tmp_path, fleet(old, watch=False)) as daemon:
        daemon.start()
        for name in old:
            ready(daemon, name)
            until_logged(daemon, name, "up")
        daemon.write(fleet(new, watch=False))
        client = subprocess.Popen(
            [sys.executable, "-m", "fleetd.cli.fleetctl", "--socket", str(daemon.socket), "apply", "-y", "--wait"],
            cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        until(
            lambda: any(row["state"] in ("STOPPING", "STARTING") for row in daemon.status()["processes"]),
            "it has begun",
        )
        client.kill()
        client.wait()
        crash(daemon)
        daemon.start()
        until(
            lambda: {row["name"]: row["state"] for row in daemon.status()["processes"]} == dict.fromkeys(new, "READY"),
            "it converges",
        )
        assert ctl(daemon, "diff").returncode == 0
        until(lambda: versions(daemon) == ["2"] * len(new), "no copy of the old ones is left")


def versions(daemon: Fleetd) -> list[str]:
    """Return V of every shell of the fleet; one that exits in between does not count."""
    found = []
    for child in daemon.children():
        try:
            if child.name() == "sh":
                found.append(child.environ()["V"])
        except psutil.Error:
            continue
    return found


def test_case_32_reload_flood_with_a_death_in_the_middle(tmp_path: Path) -> None:
    services = {"a": {"command": SLEEPER}, "b": {"command": SLEEPER, "restart": QUICK}}
    with fleetd(tmp_path, fleet(services, watch=False)) as daemon:
        daemon.start()
        pid, other = ready(daemon, "a"), ready(daemon, "b")
        for number in range(200):
            daemon.signal(signal.SIGHUP)
            if number == 100:
                os.kill(other, signal.SIGKILL)
        stop = threading.Event()

        def flood() -> None:
            while not stop.is_set():
                daemon.control("POST", "/v1/reload", {})

        threads = [threading.Thread(target=flood) for _ in range(3)]
        for thread in threads:
            thread.start()
        daemon.write(fleet({**services, "late": {"command": SLEEPER}}, watch=False))
        daemon.signal(signal.SIGHUP)
        try:
            ready(daemon, "late")
        finally:
            stop.set()
            for thread in threads:
                thread.join()
        assert ready(daemon, "a") == pid
        assert ready(daemon, "b") != other
        assert "Traceback" not in daemon.log()


def test_case_32_reload_keeps_running_streams(tmp_path: Path) -> None:
    services = {"a": {"command": SLEEPER}}
    models = {
        "m": {"engine": "process", "command": json.loads(fake("--tps", "20", "--tokens", "160")), "memory": "1MiB"}
    }
    with fleetd(tmp_path, fleet(services, models=models)) as daemon:
        daemon.start()
        assert daemon.chat("m", max_tokens=1).status == 200
        answers: list[int] = []
        thread = threading.Thread(target=lambda: answers.append(daemon.chat("m", max_tokens=160).status))
        thread.start()
        until(lambda: daemon.model_row("m")["in_flight"] == 1, "it streams")
        pid = daemon.process_row("m")["pid"]
        daemon.write(fleet({**services, "b": {"command": SLEEPER}}, models={"m": {**models["m"], "ttl": "1h"}}))
        ready(daemon, "b")
        assert daemon.model_row("m")["in_flight"] == 1
        thread.join()
        assert answers == [200]
        assert daemon.process_row("m")["pid"] == pid


def test_config_27_planted_secret_is_found_nowhere(tmp_path: Path) -> None:
    canary = "canary-7f3a91"
    service = {
        "command": ["sh", "-c", "exec sleep 1000"], "env": {"API_KEY": f"{canary}-1", "URL": f"http://u:{canary}-2@h/"},
        "env_file": ".env",
    }  # fmt: skip
    (tmp_path / ".env").write_text(f"DB_PASSWORD={canary}-3\n")
    with fleetd(tmp_path, fleet({"a": service})) as daemon:
        daemon.start()
        ready(daemon, "a")
        assert order(daemon, "restart", "a").status == 200
        outputs = [daemon.log(), daemon.get("/health").body.decode()]
        for path in ("status", "processes/a", "config", "dump", "story/a", "metrics", "logs/a", "events?follow=0"):
            outputs.append(daemon.control("GET", f"/v1/{path}").body.decode())
        for words in (("status", "a"), ("dump",), ("diff",), ("status", "-o", "yaml"), ("story", "a")):
            outputs.append(ctl(daemon, *words).stdout)
        done = subprocess.run(
            [sys.executable, "-m", "fleetd", "render", str(daemon.config)],
            cwd=ROOT, capture_output=True, text=True, timeout=30, check=True,
        )  # fmt: skip
        outputs.append(done.stdout + done.stderr)
        outputs.append(subprocess.run(["ps", "axww"], capture_output=True, text=True, check=True).stdout)
        assert canary not in "\n".join(outputs)
        for path in (tmp_path / "state").rglob("*"):
            if path.is_file():
                assert canary.encode() not in path.read_bytes(), path
        with sqlite3.connect(f"file:{next((tmp_path / 'state').glob('*.db'))}?mode=ro", uri=True) as database:
            assert canary not in "\n".join(database.iterdump())
        database.close()


def test_config_28_status_works_for_every_output_format(tmp_path: Path) -> None:
    with fleetd(tmp_path, fleet(BASE)) as daemon:
        daemon.start()
        pids(daemon)
        line = f"{sys.executable} -m fleetd.cli.fleetctl --socket {daemon.socket} status | head -n 1"
        done = subprocess.run(["sh", "-c", line], cwd=ROOT, capture_output=True, text=True, timeout=30, check=False)
        assert done.stdout
        assert done.stderr == ""
        for env in ({"NO_COLOR": "1"}, {"COLUMNS": "40"}, {"LANG": "C", "LC_ALL": "C"}, {"TERM": "dumb"}):
            done = ctl(daemon, "status", env=env)
            assert done.returncode == 0
            assert "\x1b" not in done.stdout
            assert "Traceback" not in done.stderr
        assert json.loads(ctl(daemon, "status", "-o", "json").stdout)["schema"] == "fleetctl/v1"
