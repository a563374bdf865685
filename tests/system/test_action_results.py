"""Results of actions: consistent rows, and a warning for what could not be saved."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.daemon import fleetd
from tests.support.fleet_files import QUICK, SLEEPER, crash, ctl, fleet, order, ready, sh
from tests.support.waiting import until


def test_result_row_reports_the_state_at_the_end_of_the_wait(tmp_path: Path) -> None:
    """A process that became ready and failed during the wait is reported as failed."""
    once = {
        "command": sh("test -e again || exec sleep 1000; touch up; while test ! -e fail; do sleep 0.01; done; exit 1"),
        "restart": {"policy": "never"},
    }
    slow = {
        "command": SLEEPER,
        "hooks": {"pre_start": sh("test ! -e again || { while test ! -e go_on; do sleep 0.01; done; }")},
    }
    with fleetd(tmp_path, fleet({"once": once, "slow": slow})).start() as daemon:
        ready(daemon, "once")
        ready(daemon, "slow")
        (tmp_path / "again").touch()
        body = json.dumps({"names": ["once", "slow"], "wait": True})
        command = [
            "curl",
            "-sS",
            "--unix-socket",
            str(daemon.socket),
            "-H",
            "Content-Type: application/json",
            "-d",
            body,
        ]
        with subprocess.Popen([*command, "http://f/v1/processes/restart"], stdout=subprocess.PIPE) as asking:
            until((tmp_path / "up").exists, "the first is up")
            daemon.until_state("once", "READY")
            (tmp_path / "fail").touch()
            daemon.until_state("once", "FAILED")
            (tmp_path / "go_on").touch()
            answer, _ = asking.communicate(timeout=30)
        rows = {row["name"]: row for row in json.loads(answer)["results"]}
        assert (rows["slow"]["result"], rows["slow"]["state"]) == ("ok", "READY")
        assert (rows["once"]["result"], rows["once"]["state"]) == ("failed", "FAILED")
        assert "exited with code 1" in rows["once"]["reason"]


@contextlib.contextmanager
def small_disk(folder: Path) -> Iterator[None]:
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True, check=False).returncode != 0:
        pytest.skip("only root can mount a small disk")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(folder: Path) -> None:
    """Fill the disk again: a deleted record frees space."""
    with (folder / "filler").open("ab", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(512))


def test_unsaved_stop_is_reported(tmp_path: Path) -> None:
    problem = f"could not be written: {os.strerror(errno.ENOSPC)}"
    with (
        small_disk(tmp_path / "state"),
        fleetd(tmp_path, fleet({"a": {"command": SLEEPER, "restart": QUICK}})) as daemon,
    ):
        daemon.start()
        ready(daemon, "a")
        fill(tmp_path / "state")
        done = ctl(daemon, "stop", "a")
        assert done.returncode == 0
        assert "warning: succeeded but could not be saved; it will be lost when the daemon restarts: " in done.stderr
        assert problem in done.stderr
        fill(tmp_path / "state")
        (row,) = json.loads(ctl(daemon, "-o", "json", "start", "a").stdout)["results"]
        assert row["result"] == "ok"
        assert problem in row["warning"]
        fill(tmp_path / "state")
        assert problem in order(daemon, "stop", "a").json["results"][0]["warning"]
        assert problem in ctl(daemon, "status").stdout
        assert problem in daemon.status()["daemon"]["store_problem"]
        (tmp_path / "state" / "filler").unlink()
        until(lambda: "remembered" not in (daemon.status()["daemon"]["store_problem"] or ""), "it is written")
        crash(daemon)
        daemon.start()
        assert daemon.until_state("a", "STOPPED")["desired"] == "down"
