"""Binding the control socket: modes, left-over files, other users."""

from __future__ import annotations

import os
import socket as sockets
import stat
from pathlib import Path

import pytest

from fleetd.control import socket
from fleetd.errors import HostError


@pytest.fixture
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("s") / "run" / "f.sock"


def test_bind_sets_private_modes(place: Path) -> None:
    old = os.umask(0)
    try:
        with socket.bind(place):
            assert stat.S_IMODE(place.parent.stat().st_mode) == 0o700
            assert stat.S_IMODE(place.stat().st_mode) == 0o600
            assert [entry.name for entry in place.parent.iterdir()] == ["f.sock"]
    finally:
        os.umask(old)


def test_bind_closes_an_open_folder(place: Path) -> None:
    place.parent.mkdir(mode=0o755)
    with socket.bind(place):
        assert stat.S_IMODE(place.parent.stat().st_mode) == 0o700


def test_bind_replaces_dead_socket(place: Path) -> None:
    socket.bind(place).close()
    assert place.exists()
    with socket.bind(place), sockets.socket(sockets.AF_UNIX) as client:
        client.connect(str(place))


def test_bind_live_socket_raises(place: Path) -> None:
    with socket.bind(place) as first:
        with pytest.raises(HostError, match="answers on"):
            socket.bind(place)
        with sockets.socket(sockets.AF_UNIX) as client:
            client.connect(str(place))
            first.accept()[0].close()


@pytest.mark.parametrize("kind", ["file", "folder", "link"])
def test_bind_other_file_is_kept_and_raises(place: Path, kind: str) -> None:
    place.parent.mkdir(mode=0o700)
    if kind == "file":
        place.write_text("mine")
    elif kind == "folder":
        place.mkdir()
    else:
        place.symlink_to("/etc/passwd")
    with pytest.raises(HostError, match="is not a socket"):
        socket.bind(place)
    assert os.path.lexists(place)


def test_bind_too_long_path_raises(tmp_path: Path) -> None:
    with pytest.raises(HostError, match="too long") as caught:
        socket.bind(tmp_path / ("x" * 120) / "f.sock")
    assert "paths.run" in (caught.value.hint or "")


def test_bind_longest_path_works(tmp_path_factory: pytest.TempPathFactory) -> None:
    base = tmp_path_factory.mktemp("s")
    room = socket.PATH_MAX_BYTES - len(os.fsencode(base)) - len("//f.sock") - 1 - len(socket.TEMPORARY_SUFFIX)
    socket.bind(base / ("d" * (room + 1)) / "f.sock").close()


def test_bind_folder_of_other_user_raises(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place.parent.mkdir(mode=0o700)
    owner = place.parent.stat().st_uid
    monkeypatch.setattr(os, "geteuid", lambda: owner + 1)
    with pytest.raises(HostError, match="belongs to user"):
        socket.bind(place)


def test_bind_file_in_place_of_folder_raises(place: Path) -> None:
    place.parent.write_text("")
    with pytest.raises(HostError, match="cannot be created"):
        socket.bind(place)


def test_release_keeps_socket_of_successor(place: Path) -> None:
    socket.bind(place).close()
    found = place.lstat()
    place.unlink()
    socket.release(place, (found.st_dev, found.st_ino + 1))
    with socket.bind(place):
        socket.release(place, (found.st_dev, place.lstat().st_ino + 1))
        assert place.exists()
        socket.release(place, (place.lstat().st_dev, place.lstat().st_ino))
        assert not place.exists()


def test_peer_returns_uid_and_pid() -> None:
    one, other = sockets.socketpair(sockets.AF_UNIX)
    with one, other:
        assert socket.peer(one).uid == os.geteuid()
        assert socket.peer(one).pid == os.getpid()
