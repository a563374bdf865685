"""A re-execution at any moment: nothing runs twice, nothing that was accepted is forgotten, nothing that happened is lost."""

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

from tests.daemon.cases.rig import QUICK, SLEEPER, crash, ctl, fleet, order, ready, sh
from tests.daemon.rig import Fleetd, alive, fleetd, until

STUBBORN = {"command": sh('trap "" TERM; while :; do sleep 0.05; done'), "stop": {"timeout": "500ms"}}
PREPARED = {"command": SLEEPER, "hooks": {"pre_start": ["sleep", "0.3"]}}
ORDERLY = {"command": SLEEPER, "stop": {"command": ["sleep", "0.4"]}}


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
def beside(call: Callable[[], Any]) -> Iterator[None]:
    """Run a call in a thread of its own; what becomes of it does not matter."""

    def run() -> None:
        with suppress(OSError):
            call()

    thread = threading.Thread(target=run)
    thread.start()
    yield
    thread.join()


def fresh(daemon: Fleetd, before: Mapping[str, int]) -> bool:
    rows = {row["name"]: row for row in daemon.status()["processes"]}
    return all(rows[name]["state"] == "READY" and rows[name]["pid"] != pid for name, pid in before.items())


@pytest.mark.parametrize("moment_s", [0.0, 0.05, 0.15, 0.3, 0.45, 0.5, 0.55, 0.6, 0.8])
def test_a_restart_under_way_happens_once(tmp_path: Path, moment_s: float) -> None:
    services = {"stubborn": STUBBORN, "prepared": PREPARED, "orderly": ORDERLY}
    with fleetd(tmp_path, fleet(services)) as daemon:
        daemon.start()
        before = {name: ready(daemon, name) for name in services}
        body = {"names": list(services)}
        with beside(lambda: daemon.control("POST", "/v1/processes/restart", {**body, "wait": moment_s != 0.3})):
            time.sleep(moment_s)
            reexecute(daemon)
        until(lambda: fresh(daemon, before), f"all were started anew; the log:\n{daemon.log()[-3000:]}")
        rows = {row["name"]: row["generation"] for row in daemon.status()["processes"]}
        assert instances(daemon) == {name: {generation} for name, generation in rows.items()}
        assert daemon.stop() == 0
        assert instances(daemon) == {}


@pytest.mark.parametrize("moment_s", [0.1, 0.4, 0.6])
def test_an_apply_under_way_happens_once(tmp_path: Path, moment_s: float) -> None:
    services = {"stubborn": STUBBORN, "prepared": PREPARED}
    with fleetd(tmp_path, fleet(services, watch=False)) as daemon:
        daemon.start()
        before = {name: ready(daemon, name) for name in services}
        changed = {name: {**one, "env": {"NEW": "1"}} for name, one in services.items()}
        daemon.write(fleet(changed, watch=False))
        with beside(lambda: daemon.control("POST", "/v1/apply", {"wait": True})):
            time.sleep(moment_s)
            reexecute(daemon)
        until(lambda: fresh(daemon, before), f"all were started anew; the log:\n{daemon.log()[-3000:]}")
        assert {name: len(found) for name, found in instances(daemon).items()} == {"stubborn": 1, "prepared": 1}
        assert daemon.stop() == 0
        assert instances(daemon) == {}
