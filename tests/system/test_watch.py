"""Case 12: watched files, and fleet.yaml saved in every way that editors and deployments save it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.daemon import Fleetd, fleetd
from tests.support.fleet_files import QUICK, SLEEPER, fleet, order, ready, sh
from tests.support.waiting import alive, until


def watching(folder: Path, **more: object) -> dict[str, object]:
    (folder / "src").mkdir(exist_ok=True)
    return {
        "command": SLEEPER,
        "restart": QUICK,
        "watch": {"paths": ["src"], "ignore": ["*.map"], "debounce": "150ms"},
        **more,
    }


def generation(daemon: Fleetd) -> int:
    return int(daemon.process_row("a")["generation"])


def renewed(daemon: Fleetd, before: int) -> int:
    """Return the generation after a finished restart."""
    until(lambda: generation(daemon) > before and daemon.process_row("a")["state"] == "READY", "it restarts")
    return generation(daemon)


def test_case_12_burst_is_one_restart_two_edits_are_two(tmp_path: Path) -> None:
    with fleetd(tmp_path, fleet({"a": watching(tmp_path)})) as daemon:
        daemon.start()
        ready(daemon, "a")
        for number in range(40):
            (tmp_path / "src" / f"{number}.py").write_text("x")
        assert renewed(daemon, 1) == 2
        assert "changed: " in json.dumps(daemon.control("GET", "/v1/story/a").json)
        (tmp_path / "src" / "1.py").write_text("y")
        assert renewed(daemon, 2) == 3
        assert daemon.process_row("a")["restarts"] == 2


def test_case_12_ignored_files_and_stopped_services_stay(tmp_path: Path) -> None:
    with fleetd(tmp_path, fleet({"a": watching(tmp_path)})) as daemon:
        daemon.start()
        ready(daemon, "a")
        (tmp_path / "src" / "bundle.map").write_text("x")
        (tmp_path / "src" / ".file.py.swp").write_text("x")
        (tmp_path / "src" / "node_modules").mkdir()
        (tmp_path / "src" / "node_modules" / "x.js").write_text("x")
        (tmp_path / "src" / "seen.py").write_text("x")
        assert renewed(daemon, 1) == 2, "one restart, for the one file that counts"
        assert order(daemon, "stop", "a").status == 200
        (tmp_path / "src" / "seen.py").write_text("y")
        (tmp_path / "other").touch()
        daemon.write(fleet({"a": watching(tmp_path), "b": watching(tmp_path)}))
        ready(daemon, "b")
        (tmp_path / "src" / "seen.py").write_text("z")
        until(lambda: daemon.process_row("b")["generation"] == 2, "the change is seen")
        assert daemon.process_row("a")["state"] == "STOPPED"


def test_case_12_renames_new_and_late_folders_are_seen(tmp_path: Path) -> None:
    service = watching(tmp_path)
    service["watch"] = {"paths": ["src", "later"], "debounce": "100ms"}
    with fleetd(tmp_path, fleet({"a": service})) as daemon:
        daemon.start()
        ready(daemon, "a")
        (tmp_path / "new.py").write_text("x")
        (tmp_path / "new.py").replace(tmp_path / "src" / "main.py")
        found = renewed(daemon, 1)
        (tmp_path / "src" / "deep").mkdir()
        found = renewed(daemon, found)
        (tmp_path / "src" / "deep" / "er.py").write_text("x")
        found = renewed(daemon, found)
        (tmp_path / "later").mkdir()
        found = renewed(daemon, found)
        (tmp_path / "later" / "file").write_text("x")
        renewed(daemon, found)


def test_case_12_program_changing_its_own_files_is_held_back(tmp_path: Path) -> None:
    code = "sleep 0.1; echo $$ > src/touched; exec sleep 1000"
    service = watching(tmp_path, command=sh(code))
    service["watch"] = {"paths": ["src"], "debounce": "20ms"}
    with fleetd(tmp_path, fleet({"a": service})) as daemon:
        daemon.start()
        until(
            lambda: "restarts once they are unchanged" in json.dumps(daemon.control("GET", "/v1/story/a").json),
            "it is reported",
        )
        assert generation(daemon) == 11


def test_case_12_change_restarts_a_failed_process(tmp_path: Path) -> None:
    code = "grep -q good src/state && exec sleep 1000; exit 1"
    restart = {"backoff": {"initial": "10ms", "max": "10ms"}, "crash_loop": {"count": 2}}
    service = watching(tmp_path, command=sh(code), restart=restart)
    (tmp_path / "src" / "state").write_text("bad")
    with fleetd(tmp_path, fleet({"a": service})) as daemon:
        daemon.start()
        daemon.until_state("a", "FAILED")
        (tmp_path / "src" / "state").write_text("good")
        ready(daemon, "a")


def in_place(config: Path, text: str) -> None:
    config.write_text(text)


def by_rename(config: Path, text: str) -> None:
    part = config.with_name(".part")
    part.write_text(text)
    part.replace(config)


def like_vim(config: Path, text: str) -> None:
    """Move the old file to a backup, write the new one, delete the backup."""
    backup = config.with_name("fleet.yaml~")
    config.replace(backup)
    config.write_text(text)
    backup.unlink()


def removed_first(config: Path, text: str) -> None:
    config.unlink()
    config.write_text(text)


def in_pieces(config: Path, text: str) -> None:
    with config.open("w") as file:
        for start in range(0, len(text), 20):
            file.write(text[start : start + 20])
            file.flush()
            os.fsync(file.fileno())


@pytest.mark.parametrize("save", [in_place, by_rename, like_vim, removed_first, in_pieces])
def test_case_34_every_way_to_save_is_noticed(tmp_path: Path, save: Callable[[Path, str], None]) -> None:
    services = {"a": {"command": SLEEPER}}
    with fleetd(tmp_path, fleet(services)) as daemon:
        daemon.start()
        pid = ready(daemon, "a")
        head = daemon.config.read_text()
        for name in ("b", "c"):
            save(
                daemon.config,
                head + f"# and {name}\n" + ""
                if name == "x"
                else head.replace('"a"', f'"{name}": {{"command": ["sleep", "1000"]}}, "a"'),
            )
            until(lambda: {row["name"] for row in daemon.status()["processes"]} == {"a", name}, f"{name} is there")  # noqa: B023
            ready(daemon, name)
        assert daemon.process_row("a")["pid"] == pid
        assert daemon.status()["daemon"]["config_error"] is None


def test_case_34_swapped_link_counts_as_a_save(tmp_path: Path) -> None:
    """Change the folder behind a link, as configuration maps and release folders do."""
    services = {"a": {"command": SLEEPER}}
    with fleetd(tmp_path, fleet(services)) as daemon:
        text = daemon.config.read_text()
        for number, content in ((1, text), (2, text.replace('"a"', '"b": {"command": ["sleep", "1000"]}, "a"'))):
            (tmp_path / f"release{number}").mkdir()
            (tmp_path / f"release{number}" / "fleet.yaml").write_text(content.replace("./", f"{tmp_path}/"))
        (tmp_path / "current").symlink_to("release1")
        daemon.config.unlink()
        daemon.config.symlink_to("current/fleet.yaml")
        daemon.start()
        pid = ready(daemon, "a")
        (tmp_path / "next").symlink_to("release2")
        (tmp_path / "next").replace(tmp_path / "current")
        until(lambda: len(daemon.status()["processes"]) == 2, "the other release is applied")
        ready(daemon, "b")
        assert daemon.process_row("a")["pid"] == pid


def test_case_34_burst_of_saves_applies_the_last_one(tmp_path: Path) -> None:
    with fleetd(tmp_path, fleet({"a": {"command": SLEEPER}})) as daemon:
        daemon.start()
        pid = ready(daemon, "a")
        for number in range(60):
            daemon.write(fleet({"a": {"command": SLEEPER}, f"b{number}": {"command": SLEEPER}}))
        until(lambda: {row["name"] for row in daemon.status()["processes"]} == {"a", "b59"}, "the last one counts")
        assert ready(daemon, "a") == pid
        assert alive(ready(daemon, "b59"))


def test_case_34_save_during_the_start_is_not_missed(tmp_path: Path) -> None:
    with fleetd(tmp_path, fleet({"a": {"command": SLEEPER}})) as daemon:
        daemon.start(wait=False)
        until(lambda: (daemon.run / "fleetd.lock").exists(), "it has begun")
        daemon.write(fleet({"a": {"command": SLEEPER}, "b": {"command": SLEEPER}}))
        until(daemon.is_up, "it is up")
        ready(daemon, "b")
