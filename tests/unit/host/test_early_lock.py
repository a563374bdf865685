"""The run folder is guessed before fleet.yaml is loaded, and never wrongly."""

from __future__ import annotations

from pathlib import Path

import pytest

from fleetd.host.early_lock import guess_run_folder, take
from fleetd.host.lock import DaemonLocks

CONFIG = Path("/etc/fleetd/fleet.yaml")


@pytest.mark.parametrize(
    ("text", "folder"),
    [
        ("version: 1\n", "/root/.fleetd/run"),
        ("paths: {run: /run/a, state: /s}\n", "/run/a"),
        ("paths: {state: /s, run: '/run/a'}", "/run/a"),
        ("paths:\n  state: /s\n  run: /run/a  # here\nmodels: {}\n", "/run/a"),
        ("paths: # mine\n\n  run: ~/r\n", "/root/r"),
        ("paths:\n  run: run\n", "/etc/fleetd/run"),
        ("paths: {state: /s}\n", "/root/.fleetd/run"),
        ("services:\n  a: {env: {run: /x}}\n", "/root/.fleetd/run"),
        ("paths: {run: '${RUN}'}\n", None),
        ("paths: &p\n  run: /run/a\n", None),
        ("paths:\n  run:\n    /run/a\n", None),
        ('{"paths": {"run": "/run/a"}}', None),
        ("include: [other.yaml]\n", None),
    ],
)
def test_guess_is_right_or_none(text: str, folder: str | None) -> None:
    found = guess_run_folder(text, CONFIG, "/root")
    assert found == (None if folder is None else Path(folder))


def test_early_lock_becomes_the_lock_of_its_folder(tmp_path: Path) -> None:
    config = tmp_path / "fleet.yaml"
    config.write_text("paths: {run: ./run}\n")
    early = take(config, {"HOME": str(tmp_path)})
    assert early is not None
    assert take(config, {"HOME": str(tmp_path)}) is None, "it is held"
    locks = DaemonLocks.acquire(tmp_path / "run", tmp_path / "state", early)
    assert locks.locks[0] is early
    locks.release()


def test_early_lock_of_another_folder_is_released(tmp_path: Path) -> None:
    config = tmp_path / "fleet.yaml"
    config.write_text("paths: {run: ./run}\n")
    early = take(config, {"HOME": str(tmp_path)})
    locks = DaemonLocks.acquire(tmp_path / "other", tmp_path / "state", early)
    again = take(config, {"HOME": str(tmp_path)})
    assert again is not None
    again.release()
    locks.release()


@pytest.mark.parametrize("content", [b"\xff\xfe", b"paths: {run: /proc/nothing/here}\n"])
def test_unusable_file_or_folder_is_no_error(tmp_path: Path, content: bytes) -> None:
    config = tmp_path / "fleet.yaml"
    config.write_bytes(content)
    assert take(config, {"HOME": str(tmp_path)}) is None
    assert take(tmp_path / "none.yaml", {}) is None
