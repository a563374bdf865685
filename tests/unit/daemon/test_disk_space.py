"""A full log or state folder is named, with the cure."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from fleetd.daemon.api.status import DaemonState
from fleetd.daemon.sources.disk_space import DiskSpace, shortage

K = 1024


def room(free: int, total: int, inodes: int = 100) -> os.statvfs_result:
    found = SimpleNamespace(
        f_frsize=K, f_bsize=K, f_blocks=total // K, f_bavail=free // K, f_files=100, f_favail=inodes
    )
    return cast("os.statvfs_result", found)


@pytest.mark.parametrize(
    ("found", "words"),
    [
        (room(0, 300 * K), "is full: 0 B free of 300.0 KiB"),
        (room(4 * K, 300 * K), "is nearly full: 4.0 KiB free"),
        (room(8 * K * K, 100 * K**3), "is nearly full: 8.0 MiB free of 100.00 GiB"),
        (room(100 * K**3, 200 * K**3, inodes=0), "has no free inodes"),
        (room(20 * K * K, 100 * K**3), None),
        (room(100 * K, 300 * K), None),
    ],
)
def test_shortage_names_folder_bytes_and_cure(found: os.statvfs_result, words: str | None) -> None:
    text = shortage("log", "paths.logs", Path("/logs"), found)
    assert (text is None) == (words is None)
    if text is not None and words is not None:
        assert words in text
        assert "/logs" in text
        assert "paths.logs" in text


class Told:
    """A reporter that keeps what it is given."""

    def __init__(self) -> None:
        self.events, self.log = self, self
        self.texts: list[str] = []

    def report(self, _kind: str, _name: str | None, _code: object, text: str) -> None:
        self.texts.append(text)

    def warning(self, _event: str, **_more: object) -> None: ...

    info = warning


def test_shortage_is_reported_once_and_when_it_is_over(tmp_path: Path) -> None:
    free = [0]
    told, state = Told(), DaemonState()
    watch = DiskSpace({"log": tmp_path}, state, cast("Any", told), lambda _: room(free[0], 300 * K))
    watch.report(watch.look())
    watch.report(watch.look())
    assert len(told.texts) == 1
    assert list(state.disk_problems.values()) == told.texts
    free[0] = 200 * K
    watch.report(watch.look())
    assert told.texts[1:] == ["the log folder has room again"]
    assert state.disk_problems == {}


def test_folder_that_cannot_be_asked_is_no_shortage(tmp_path: Path) -> None:
    def fail(_: Path) -> os.statvfs_result:
        raise OSError(5, "I/O error")

    assert DiskSpace({"log": tmp_path}, DaemonState(), cast("Any", Told()), fail).look() == {}
