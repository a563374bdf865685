"""What a reload, a plan and a second daemon see: one answer for all of them, and one daemon for one state."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.daemon.cases.rig import SLEEPER, fleet, ready
from tests.daemon.rig import ROOT, Fleetd, fleetd, until

INCLUDED = "services: {%s: {command: [sleep, '1000']}}\n"


def running(daemon: Fleetd) -> set[str]:
    return {row["name"] for row in daemon.status()["processes"] if row["state"] == "READY"}


def test_files_that_a_pattern_includes_are_applied_when_they_come_go_and_come_back(tmp_path: Path) -> None:
    folder = tmp_path / "inc"
    folder.mkdir()
    (folder / "a.yaml").write_text(INCLUDED % "a")
    with fleetd(tmp_path, fleet({"own": {"command": SLEEPER}}, include=["inc/*.yaml"])) as daemon:
        daemon.start()
        pid = ready(daemon, "own")
        (folder / "new.yaml").write_text(INCLUDED % "new")
        until(lambda: running(daemon) == {"own", "a", "new"}, "a new file is applied")
        folder.rename(tmp_path / "away")
        until(lambda: running(daemon) == {"own"}, "a folder that left")
        (tmp_path / "away").rename(folder)
        until(lambda: running(daemon) == {"own", "a", "new"}, "and came back")
        (tmp_path / "other").mkdir()
        (tmp_path / "other" / "b.yaml").write_text(INCLUDED % "b")
        folder.rename(tmp_path / "away")
        (tmp_path / "other").rename(folder)
        until(lambda: running(daemon) == {"own", "b"}, "a swap of folders")
        (folder / "c.yaml").write_text("nonsense")
        until(lambda: daemon.status()["daemon"]["config_error"], "a bad one is told")
        (folder / "c.yaml").write_text(INCLUDED % "c")
        until(lambda: running(daemon) == {"own", "b", "c"}, "and applied when it is mended")
        assert ready(daemon, "own") == pid


def run_second(first: Fleetd, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run another daemon on the state of the first, with a run folder and a port of its own, to its end."""
    second = fleetd(folder, "")
    text = second.config.read_text().replace("state: ./state", f"state: {first.folder / 'state'}")
    second.config.write_text(text)
    command = [sys.executable, "-m", "fleetd", "run", "--config", str(second.config)]
    with second:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=30, check=False)


def test_one_state_has_one_daemon_over_a_re_execution_too(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    with fleetd(tmp_path, fleet({"a": {"command": SLEEPER}})) as daemon:
        daemon.start()
        pid = ready(daemon, "a")
        for times in (1, 2):
            done = run_second(daemon, tmp_path / "other")
            assert done.returncode == 1
            assert f"already running, pid {daemon.pid} (it holds {tmp_path}/state/fleetd.lock)" in done.stderr
            assert ready(daemon, "a") == pid
            if times == 1:
                assert daemon.control("POST", "/v1/reexec", {}).status == 202
                until(lambda: daemon.log().count("fleetd is up") == 2, "the new program is up")
