"""Included files, env files and the state lock: reload, plan and `status` agree; one daemon per state folder."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.support.daemon import ROOT, Fleetd, fake, fleetd
from tests.support.fleet_files import SLEEPER, crash, ctl, fleet, ready, sh, until_logged
from tests.support.ports import free_port
from tests.support.waiting import until

INCLUDED = "services: {%s: {command: [sleep, '1000']}}\n"


def running(daemon: Fleetd) -> set[str]:
    return {row["name"] for row in daemon.status()["processes"] if row["state"] == "READY"}


def test_included_files_apply_when_added_and_removed(tmp_path: Path) -> None:
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
        until(lambda: daemon.status()["daemon"]["config_error"], "an invalid one is reported")
        (folder / "c.yaml").write_text(INCLUDED % "c")
        until(lambda: running(daemon) == {"own", "b", "c"}, "and applied when it is mended")
        assert ready(daemon, "own") == pid


SAYS = sh('echo "B is $${B:-nothing}"; exec sleep 1000')


def test_missing_env_file_blocks_its_process_until_it_exists(tmp_path: Path) -> None:
    volume = tmp_path / "vol"
    volume.mkdir()
    (volume / ".env").write_text("B=1\n")
    services = {
        "other": {"command": SLEEPER},
        "onvol": {"command": SAYS, "requires": ["./vol"], "env_file": "./vol/.env", "env": {"C": "c"}},
        "early": {"command": SAYS, "env_file": "early.env"},
    }
    with fleetd(tmp_path, fleet(services)) as daemon:
        daemon.start()
        pid = ready(daemon, "other")
        ready(daemon, "onvol")
        assert "services.early.env_file: " in daemon.until_state("early", "BLOCKED")["reason"]
        volume.rename(tmp_path / "vol.off")
        daemon.until_state("onvol", "BLOCKED")
        daemon.write(fleet({**services, "more": {"command": SLEEPER}}))
        ready(daemon, "more")
        assert ctl(daemon, "reload").returncode == 0
        assert f"services.onvol.env_file: {volume}/.env (" in daemon.until_state("onvol", "BLOCKED")["reason"]
        crash(daemon)
        daemon.start()
        assert ready(daemon, "other") == pid
        daemon.until_state("onvol", "BLOCKED")
        (tmp_path / "vol.off" / ".env").write_text("nonsense\n")
        (tmp_path / "vol.off").rename(volume)
        until(
            lambda: "(line 1: expected NAME=value)" in daemon.process_row("onvol")["reason"], "the mistake is reported"
        )
        (volume / ".env").write_text("B=2\n")
        (tmp_path / "early.env").write_text("B=3\n")
        pids = {name: ready(daemon, name) for name in ("onvol", "early")}
        until_logged(daemon, "onvol", "B is 2")
        until_logged(daemon, "early", "B is 3")
        assert ctl(daemon, "diff").returncode == 0
        assert ctl(daemon, "reload").returncode == 0
        crash(daemon)
        daemon.start()
        assert {name: ready(daemon, name) for name in pids} == pids
        assert ready(daemon, "other") == pid
        assert "B is nothing" not in daemon.log_of("onvol") + daemon.log_of("early")


def test_late_env_file_contradicting_options_blocks(tmp_path: Path) -> None:
    file, place = tmp_path / "late.env", f"env_file: {tmp_path}/late.env ("
    entry = {
        "engine": "ollama", "command": json.loads(fake("--models", "m=1000", api="ollama")), "port": free_port(),
        "env_file": "late.env", "options": {"num_parallel": 4},
    }  # fmt: skip
    with fleetd(tmp_path, fleet(instances={"o": entry})) as daemon:
        daemon.start()
        assert place in daemon.until_state("o", "BLOCKED")["reason"]
        file.write_text("OLLAMA_NUM_PARALLEL=9\n")
        problem = "instances.o.env.OLLAMA_NUM_PARALLEL: options.num_parallel sets it already"
        until(lambda: problem in daemon.process_row("o")["reason"], "the contradiction is reported")
        assert daemon.process_row("o")["state"] == "BLOCKED"
        assert problem in ctl(daemon, "reload").stderr
        file.write_text("OLLAMA_DEBUG=1\n")
        ready(daemon, "o")
        assert ctl(daemon, "reload").returncode == 0


def test_removed_requirement_no_longer_blocks(tmp_path: Path) -> None:
    with fleetd(tmp_path, fleet({"a": {"command": SLEEPER, "requires": ["./gone"]}})) as daemon:
        daemon.start()
        daemon.until_state("a", "BLOCKED")
        daemon.write(fleet({"a": {"command": SLEEPER}}))
        ready(daemon, "a")


def test_saved_env_file_is_planned_and_restarts_once(tmp_path: Path) -> None:
    file = tmp_path / "b.env"
    file.write_text("B=3\n")
    services = {"benv": {"command": SAYS, "env_file": "b.env"}, "other": {"command": SLEEPER}}
    with fleetd(tmp_path, fleet(services)) as daemon:
        daemon.start()
        pids = {name: ready(daemon, name) for name in services}
        until_logged(daemon, "benv", "B is 3")
        for content, command in (("B=4", ("apply", "-y", "--wait")), ("B=5", ("reload",))):
            file.write_text(content + "\n")
            results = [ctl(daemon, *words) for words in (("diff",), ("apply", "--dry-run"), command)]
            assert [done.returncode for done in results] == [1, 0, 0]
            for done in results:
                assert done.stdout.startswith("~ service benv (restart)\n    env.B: "), done.stdout
            until_logged(daemon, "benv", content.replace("=", " is "))
            ready(daemon, "benv")
            assert ctl(daemon, "diff").returncode == 0
        assert daemon.process_row("benv")["generation"] == 3
        file.write_text("B=6\n")
        os.utime(daemon.config)
        until_logged(daemon, "benv", "B is 6")
        assert ready(daemon, "other") == pids["other"]


def test_pending_daemon_restart_is_reported_until_done(tmp_path: Path) -> None:
    with fleetd(tmp_path, fleet({"a": {"command": SLEEPER}})) as daemon:
        daemon.start()
        ready(daemon, "a")
        old = daemon.config.read_text()
        port = free_port()
        daemon.config.write_text(old.replace(f"127.0.0.1:{daemon.port}", f"127.0.0.1:{port}"))
        until(lambda: daemon.status()["daemon"]["restart_needed"] == ["gateway.listen"], "it is applied")
        done = ctl(daemon, "diff")
        assert done.returncode == 1
        assert done.stdout.splitlines()[:2] == [
            "~ fleet fleet (needs a restart of the daemon)",
            f"    gateway.listen: 127.0.0.1:{daemon.port} → 127.0.0.1:{port} (needs a restart of the daemon)",
        ]
        assert "gateway.listen" in ctl(daemon, "reload").stdout
        assert "needs a restart of the daemon" in ctl(daemon, "status").stdout
        daemon.config.write_text(old)
        until(lambda: not daemon.status()["daemon"]["restart_needed"], "an edit takes it back")
        assert ctl(daemon, "diff").returncode == 0
        daemon.config.write_text(old.replace("state: ./state", "state: ./elsewhere"))
        until(lambda: daemon.status()["daemon"]["restart_needed"] == ["paths.state"], "folders too")
        assert daemon.control("POST", "/v1/reexec", {}).code == "restart_needed"
        daemon.stop()
        daemon.start()
        assert daemon.status()["daemon"]["restart_needed"] == []
        assert ctl(daemon, "diff").returncode == 0


def test_mistakes_in_standard_input_name_standard_input(tmp_path: Path) -> None:
    with fleetd(tmp_path, fleet({"a": {"command": SLEEPER}})) as daemon:
        daemon.start()
        errors = []
        for text in ("", "services: {b: {comand: x}}\n", "services: {b: {command: x}}\ninclude: [inc.yaml]\n"):
            (tmp_path / "inc.yaml").write_text("services: {b: {command: y}}\n")
            done = ctl(daemon, "diff", "-", stdin=text)
            assert done.returncode == 2
            errors.append(done.stderr)
        assert "-: is empty" in errors[0] or "-:1:1: is empty" in errors[0]
        assert "-:1:16: services.b.comand" in errors[1]
        assert "first at -:1:12" in errors[2]
        assert not any("plan.yaml" in text or f"{daemon.config}" in text for text in errors)


def test_invalid_file_is_watched_until_it_is_fixed(tmp_path: Path) -> None:
    (tmp_path / "parts").mkdir()
    part, env = tmp_path / "parts" / "part.yaml", tmp_path / "b.env"
    part.write_text("nonsense\n")
    env.write_text("nonsense\n")
    with fleetd(tmp_path, fleet({"a": {"command": SLEEPER}})) as daemon:
        daemon.start()

        def error() -> str:
            return daemon.status()["daemon"]["config_error"] or ""

        services = {"a": {"command": SLEEPER}, "benv": {"command": SAYS, "env_file": "b.env"}}
        daemon.write(fleet(services, include=["parts/part.yaml"]))
        until(lambda: "part.yaml" in error(), "the included file is reported")
        part.write_text(INCLUDED % "p")
        until(lambda: "b.env:1:" in error(), "then the env file")
        env.write_text("B=1\n")
        until_logged(daemon, "benv", "B is 1")
        until(lambda: running(daemon) == {"a", "benv", "p"}, "all of it runs")
        daemon.write(fleet(services, include=["parts/part.yaml", "parts/missing.yaml", "parts/other.yaml"]))
        until(lambda: "there is no file 'parts/missing.yaml'" in error(), "a missing file is reported")
        (tmp_path / "parts" / "other.yaml").write_text(INCLUDED % "p")
        (tmp_path / "parts" / "missing.yaml").write_text(INCLUDED % "q")
        until(lambda: "other.yaml" in error(), "then the second of two of one name")
        part.write_text(INCLUDED % "r")
        until(lambda: running(daemon) == {"a", "benv", "p", "q", "r"}, "and it is mended by an edit of the first")


def run_second(first: Fleetd, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run a second daemon on the first one's state until it exits."""
    second = fleetd(folder, "")
    text = second.config.read_text().replace("state: ./state", f"state: {first.folder / 'state'}")
    second.config.write_text(text)
    command = [sys.executable, "-m", "fleetd", "run", "--config", str(second.config)]
    with second:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=30, check=False)


def test_state_lock_survives_a_reexec(tmp_path: Path) -> None:
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
