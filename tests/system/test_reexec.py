"""Re-execution at any moment: nothing runs twice, no accepted order or event is lost."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from fleetd.cli.client import EXIT_UNREACHABLE, RETURN_S
from tests.support.daemon import Fleetd, fleetd
from tests.support.fleet_files import QUICK, SLEEPER, crash, ctl, fleet, order, ready, sh
from tests.support.waiting import until

STUBBORN = {"command": sh('trap "" TERM; while :; do sleep 0.05; done'), "stop": {"timeout": "500ms"}}
PREPARED = {"command": SLEEPER, "hooks": {"pre_start": ["sleep", "0.3"]}}
ORDERLY = {"command": SLEEPER, "stop": {"command": ["sleep", "0.4"], "timeout": "1s"}}  # the signal stops nothing


def ups(daemon: Fleetd) -> int:
    return daemon.log().count("fleetd is up")


def reexecute(daemon: Fleetd) -> None:
    before = ups(daemon)
    assert daemon.control("POST", "/v1/reexec", {}).status == 202
    until(lambda: ups(daemon) > before, "the new program is up")


def instances(daemon: Fleetd) -> dict[str, set[int]]:
    """Return the generations that run now, by name."""
    found: dict[str, set[int]] = {}
    for process in daemon.children():
        with suppress(psutil.Error):
            name, _, generation = process.environ().get("FLEETD_INSTANCE", "").rpartition(":")
            if name:
                found.setdefault(name, set()).add(int(generation))
    return found


@contextmanager
def meanwhile(call: Callable[[], Any]) -> Iterator[None]:
    """Run a call in its own thread and ignore its result."""

    def run() -> None:
        with suppress(OSError):
            call()

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        thread.join()


def fresh(daemon: Fleetd, before: Mapping[str, int]) -> bool:
    rows = {row["name"]: row for row in daemon.status()["processes"]}
    return all(rows[name]["state"] == "READY" and rows[name]["pid"] != pid for name, pid in before.items())


@pytest.mark.parametrize("moment_s", [0.0, 0.05, 0.15, 0.3, 0.45, 0.5, 0.55, 0.6, 0.8])
def test_reexec_during_a_restart_restarts_once(tmp_path: Path, moment_s: float) -> None:
    services = {"stubborn": STUBBORN, "prepared": PREPARED, "orderly": ORDERLY}
    with fleetd(tmp_path, fleet(services)) as daemon:
        daemon.start()
        before = {name: ready(daemon, name) for name in services}
        body = {"names": list(services)}
        with meanwhile(lambda: daemon.control("POST", "/v1/processes/restart", {**body, "wait": moment_s != 0.3})):
            time.sleep(moment_s)
            reexecute(daemon)
        until(lambda: fresh(daemon, before), f"all were restarted; the log:\n{daemon.log()[-3000:]}")
        rows = {row["name"]: row["generation"] for row in daemon.status()["processes"]}
        assert instances(daemon) == {name: {generation} for name, generation in rows.items()}
        assert daemon.stop() == 0
        assert instances(daemon) == {}


@pytest.mark.parametrize("moment_s", [0.1, 0.4, 0.6])
def test_reexec_during_an_apply_applies_once(tmp_path: Path, moment_s: float) -> None:
    services = {"stubborn": STUBBORN, "prepared": PREPARED}
    with fleetd(tmp_path, fleet(services, watch=False)) as daemon:
        daemon.start()
        before = {name: ready(daemon, name) for name in services}
        changed = {name: {**one, "env": {"NEW": "1"}} for name, one in services.items()}
        daemon.write(fleet(changed, watch=False))
        with meanwhile(lambda: daemon.control("POST", "/v1/apply", {"wait": True})):
            time.sleep(moment_s)
            reexecute(daemon)
        until(lambda: fresh(daemon, before), f"all were restarted; the log:\n{daemon.log()[-3000:]}")
        assert {name: len(found) for name, found in instances(daemon).items()} == {"stubborn": 1, "prepared": 1}
        assert daemon.stop() == 0
        assert instances(daemon) == {}


def test_reexec_keeps_an_accepted_restart(tmp_path: Path) -> None:
    with fleetd(tmp_path, fleet({"orderly": ORDERLY, "stubborn": STUBBORN})) as daemon:
        daemon.start()
        before = {name: ready(daemon, name) for name in ("orderly", "stubborn")}
        for name in before:
            assert order(daemon, "restart", name, wait=False).status == 202
        until(lambda: daemon.process_row("orderly")["state"] == "STOPPING", "the stop has begun")
        reexecute(daemon)
        until(lambda: fresh(daemon, before), "both were restarted")


def test_reexec_continues_with_the_applied_file(tmp_path: Path) -> None:
    with fleetd(tmp_path, fleet({"a": {"command": SLEEPER}})) as daemon:
        daemon.start()
        pid = ready(daemon, "a")
        first = daemon.config.read_text("utf-8")
        daemon.write(fleet({"a": {"command": SLEEPER}, "b": {"command": SLEEPER}}))
        other = daemon.config.rename(tmp_path / "n.yaml")
        daemon.config.write_text(first, "utf-8")
        assert daemon.control("POST", "/v1/apply", {"path": str(other), "wait": True}).status == 200
        pids = {"a": pid, "b": ready(daemon, "b")}
        for _ in range(2):
            reexecute(daemon)
            assert daemon.status()["daemon"]["config"] == str(other)
            assert {name: ready(daemon, name) for name in pids} == pids
        assert psutil.Process(daemon.pid).cmdline()[-2:] == ["--config", str(other)]
        crash(daemon)
        daemon.start()  # from its command line: the first file
        assert [row["name"] for row in daemon.status()["processes"]] == ["a"]


@pytest.mark.parametrize("capture", ["file", "pipe"])
def test_death_during_reexec_counts_and_keeps_its_code(tmp_path: Path, capture: str) -> None:
    """The death counts once with its exit code, whichever program sees it."""
    wait = sh("while [ ! -e go ]; do sleep 0.01; done; rm go; exit 7")
    with fleetd(tmp_path, fleet({"a": {"command": wait, "restart": QUICK, "logs": {"capture": capture}}})) as daemon:
        daemon.start()
        for count, moment_s in enumerate((0.0, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4), 1):
            pid = ready(daemon, "a")
            before = ups(daemon)
            assert daemon.control("POST", "/v1/reexec", {}).status == 202
            time.sleep(moment_s)
            (tmp_path / "go").touch()
            until(lambda before=before: ups(daemon) > before, "the new program is up")
            until(
                lambda pid=pid: daemon.process_row("a")["pid"] not in (None, pid),
                f"it was started again: {daemon.log()[-3000:]}",
            )
            row = daemon.until_state("a", "READY")
            assert (row["restarts"], row["last_exit"]["code"]) == (count, 7), moment_s
            assert len(instances(daemon)["a"]) == 1


@pytest.mark.parametrize("how", ["reexec", "crash"])
def test_past_events_are_shown_by_the_next_daemon(tmp_path: Path, how: str) -> None:
    with fleetd(tmp_path, fleet({"a": {"command": SLEEPER, "restart": QUICK}})) as daemon:
        daemon.start()
        os.kill(ready(daemon, "a"), signal.SIGKILL)
        until(lambda: daemon.process_row("a")["restarts"] == 1, "it was started again")
        ready(daemon, "a")
        if how == "reexec":
            reexecute(daemon)
        else:
            crash(daemon)
            daemon.start()
        ready(daemon, "a")
        for words in (("events",), ("story", "a"), ("status", "a")):
            shown = ctl(daemon, *words)
            assert shown.returncode == 0
            assert "SIGKILL" in shown.stdout, words
        events = daemon.control("GET", "/v1/processes/a").json["events"]
        numbers = [event["seq"] for event in events]
        assert numbers == sorted(set(numbers))
        assert daemon.process_row("a")["last_exit"]["signal"] == "SIGKILL"


def test_fleetctl_works_during_a_reexec(tmp_path: Path) -> None:
    with fleetd(tmp_path, fleet({"a": {"command": SLEEPER}})) as daemon:
        daemon.start()
        ready(daemon, "a")
        before = ups(daemon)
        with meanwhile(lambda: ctl(daemon, "daemon-reexec")):
            while ups(daemon) == before:
                began = time.monotonic()
                shown = ctl(daemon, "ps")
                # fleetctl waits RETURN_S for a daemon that holds its lock; on a busy machine its imports take longer
                patient = shown.returncode == EXIT_UNREACHABLE and time.monotonic() - began >= RETURN_S
                assert shown.returncode == 0 or patient, shown.stderr


@pytest.mark.parametrize("moment_s", [0.0, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4])
def test_sigterm_during_reexec_stops_the_daemon(tmp_path: Path, moment_s: float) -> None:
    with fleetd(tmp_path, fleet({"a": {"command": SLEEPER}})) as daemon:
        daemon.start()
        ready(daemon, "a")
        assert daemon.control("POST", "/v1/reexec", {}).status == 202
        time.sleep(moment_s)
        assert daemon.stop() == 0
        until(lambda: not daemon.children(), "nothing is left")


@pytest.mark.parametrize("moment_s", [0.05, 0.15, 0.25, 0.35, 0.45])
def test_sigterm_during_the_start_leaves_nothing(tmp_path: Path, moment_s: float) -> None:
    services = {name: {"command": SLEEPER} for name in "abcdef"}
    with fleetd(tmp_path, fleet(services)) as daemon:
        daemon.start(wait=False)
        time.sleep(moment_s)
        daemon.stop()
        until(lambda: not daemon.children(), "nothing is left")


@pytest.mark.parametrize("moment_s", [0.05, 0.15, 0.25, 0.35])
def test_sighup_during_reexec_reloads(tmp_path: Path, moment_s: float) -> None:
    services = {"a": {"command": SLEEPER}}
    with fleetd(tmp_path, fleet(services, watch=False)) as daemon:
        daemon.start()
        pid = ready(daemon, "a")
        before = ups(daemon)
        assert daemon.control("POST", "/v1/reexec", {}).status == 202
        time.sleep(moment_s)
        daemon.write(fleet({**services, "b": {"command": SLEEPER}}, watch=False))
        daemon.signal(signal.SIGHUP)
        until(lambda: ups(daemon) > before, "the new program is up")
        ready(daemon, "b")
        assert ready(daemon, "a") == pid
