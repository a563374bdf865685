"""What a reload, a plan and a second daemon see: one answer for all of them, and one daemon for one state."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.daemon.cases.rig import SLEEPER, fleet, ready
from tests.daemon.rig import ROOT, Fleetd, fleetd, until


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
