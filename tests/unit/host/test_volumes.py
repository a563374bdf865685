"""Volumes: which one a path is on, whether it is there, and whether it is the same; on made-up tables and on real mounts."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from fleetd.host.system.mounts import Mount, Mounts, read_table
from fleetd.host.system.volumes import Look, Volumes, fstab_mounts, removable
from tests.support.waiting import until_async as until


def table(*points: str, kind: str = "tmpfs", source: str = "tmpfs") -> Mounts:
    return Mounts({Path(point): Mount(source, kind, "0:1") for point in points})


@pytest.mark.parametrize(
    ("path", "points"),
    [
        ("/Volumes/BOWIE/_MODELS/ollama", ["/Volumes/BOWIE"]),
        ("/Volumes", []),
        ("/media/ann/usb/x", ["/media/ann", "/media/ann/usb"]),
        ("/run/media/ann/usb/x", ["/run/media/ann", "/run/media/ann/usb"]),
        ("/mnt/disk/x", ["/mnt", "/mnt/disk"]),
        ("/srv/models/a.gguf", []),
        ("/mediation/x", []),
    ],
)
def test_where_the_volume_of_a_path_may_be_mounted(path: str, points: list[str]) -> None:
    assert removable(Path(path)) == tuple(Path(point) for point in points)


@pytest.mark.parametrize(
    ("path", "mounted", "expected"),
    [
        ("/Volumes/NOPE/a.gguf", [], "the volume /Volumes/NOPE is not mounted"),
        ("/media/nope-user/usb/a.gguf", [], "the volume /media/nope-user/usb is not mounted"),
        ("/run/media/nope-user/usb/a.gguf", [], "the volume /run/media/nope-user/usb is not mounted"),
        ("/mnt/nope/a.gguf", [], "the volume /mnt/nope is not mounted"),
        ("/mnt/nope/a.gguf", ["/mnt/nope"], "does not exist"),
        ("/media/nope/a.gguf", ["/media/nope"], "does not exist"),
        ("/srv/nope/a.gguf", [], "does not exist"),
    ],
)
def test_missing_path_is_reported_with_its_volume(path: str, mounted: list[str], expected: str) -> None:
    volumes = Volumes(listed=[], mounts=lambda: table(*mounted))
    assert volumes.look(Path(path)).missing == f"{path} ({expected})"


def test_an_automount_point_that_waits_is_not_the_volume() -> None:
    volumes = Volumes(listed=[Path("/")], mounts=lambda: table("/mnt/auto", kind="autofs"))
    assert "the volume /mnt/auto is not mounted" in str(volumes.look(Path("/mnt/auto/x")).missing)


def test_the_boot_volume_of_a_mac_is_a_link_and_counts_as_there(tmp_path: Path) -> None:
    link = tmp_path / "Macintosh HD"
    link.symlink_to("/")
    assert Volumes(listed=[], mounts=lambda: table("/")).look(link / "etc").missing is None


def test_a_volume_that_is_unplugged_replaced_and_plugged_in(tmp_path: Path) -> None:
    mount = tmp_path / "disk"
    wanted = mount / "models"
    wanted.mkdir(parents=True)
    world = {"points": [str(mount)], "source": "host:/a"}

    def mounts() -> Mounts:
        return table(*world["points"], kind="nfs4", source=str(world["source"]))

    volumes = Volumes(listed=[mount], mounts=mounts)
    assert volumes.look(wanted) == Look(None, mount, "nfs4 host:/a")
    world["points"] = []  # the folder below the mount point is still there: it is not the volume
    assert volumes.look(wanted).missing == f"{wanted} (the volume {mount} is not mounted)"
    world.update(points=[str(mount)], source="host:/b")
    assert "another volume is mounted at" in str(volumes.look(wanted).missing)
    assert "nfs4 host:/b, not nfs4 host:/a" in str(volumes.look(wanted).missing)
    world["source"] = "host:/a"
    assert volumes.look(wanted).missing is None
    world["source"] = "host:/b"
    assert volumes.forget(str(mount))
    assert volumes.look(wanted).missing is None
    wanted.rmdir()
    assert volumes.look(wanted).missing == f"{wanted} (does not exist)"


def test_known_volume_must_be_mounted_even_if_folder_has_files(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("x")
    known = {str(tmp_path): ""}
    look = Volumes(listed=[], mounts=table, known=known).look(tmp_path / "a")
    assert look.missing == f"{tmp_path / 'a'} (the volume {tmp_path} is not mounted)"
    assert Volumes(listed=[], mounts=table).look(tmp_path / "a").missing is None


def test_a_share_that_hangs_is_missing_and_asked_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fleetd.host.system.volumes._LOOK_LIMIT_S", 0.05)
    asked, release = [], threading.Event()

    def mounts() -> Mounts:
        asked.append(1)
        release.wait(30)
        return table(str(tmp_path))

    async def run() -> None:
        volumes = Volumes(listed=[tmp_path], mounts=mounts)
        for _ in range(3):
            look = await volumes.limited(tmp_path)
            assert look.missing == f"{tmp_path} (does not answer)"
            assert not look.certain
        assert len(asked) == 1
        release.set()
        await until(lambda: not volumes._hanging)
        assert (await volumes.limited(tmp_path)).missing is None

    asyncio.run(run())


def test_fstab(tmp_path: Path) -> None:
    listed = tmp_path / "fstab"
    listed.write_text(
        "# comment\nUUID=1 / ext4\n\nUUID=2 /srv/my\\040models ext4 defaults 0 0\nUUID=3 none swap sw\nbroken\n"
    )
    assert fstab_mounts(listed) == [Path("/"), Path("/srv/my models")]
    assert fstab_mounts(tmp_path / "none") == []


def test_mount_table_handles_spaces_and_stacked_mounts(tmp_path: Path) -> None:
    listed = tmp_path / "mountinfo"
    listed.write_text(
        "36 35 98:0 / /mnt/My\\040Disk rw,noatime master:1 - ext3 /dev/root rw\n"
        "37 35 0:40 / /mnt/x rw - tmpfs tmpfs rw\n38 37 8:1 / /mnt/x rw shared:2 master:3 - ext4 /dev/sda1 rw\nbroken\n"
    )
    found = read_table(listed)
    assert found[Path("/mnt/My Disk")] == Mount("/dev/root", "ext3", "98:0")
    assert found[Path("/mnt/x")].kind == "ext4"
    assert read_table(tmp_path / "none") == {}


# -- real mounts --------------------------------------------------------------------------------------------------------------


def _can_mount() -> bool:
    if os.name != "posix" or os.geteuid() != 0 or shutil.which("mkfs.ext4") is None:
        return False
    return subprocess.run(["unshare", "--mount", "true"], capture_output=True, check=False).returncode == 0


needs_mounts = pytest.mark.skipif(not _can_mount(), reason="needs root, mkfs.ext4 and mounts")


class Drive:
    """An image with an ext4 file system, that the test plugs in and pulls."""

    def __init__(self, image: Path, point: Path) -> None:
        self.image, self.point = image, point
        with image.open("wb") as file:
            file.truncate(16 << 20)
        subprocess.run(["mkfs.ext4", "-q", str(image)], check=True)
        point.mkdir(exist_ok=True)

    def plug(self) -> None:
        subprocess.run(["mount", "-o", "loop", str(self.image), str(self.point)], check=True)

    def pull(self) -> None:
        subprocess.run(["umount", "-l", str(self.point)], check=True)


@pytest.fixture
def point(tmp_path: Path) -> Iterator[Path]:
    point = tmp_path / "BOWIE"
    yield point
    while subprocess.run(["umount", "-l", str(point)], capture_output=True, check=False).returncode == 0:
        pass


@needs_mounts
def test_real_drive_differs_from_another_of_same_name(tmp_path: Path, point: Path) -> None:
    first, second = Drive(tmp_path / "1.img", point), Drive(tmp_path / "2.img", point)
    volumes = Volumes(listed=[point])
    assert volumes.look(point).missing == f"{point} (the volume {point} is not mounted)"
    first.plug()
    (point / "models").mkdir()
    look = volumes.look(point / "models")
    assert (look.missing, look.mount) == (None, point)
    assert look.identity
    first.pull()
    assert "is not mounted" in str(volumes.look(point / "models").missing)
    second.plug()
    (point / "models").mkdir()
    assert "another volume is mounted" in str(volumes.look(point / "models").missing)
    second.pull()
    first.plug()
    assert volumes.look(point / "models").missing is None


@needs_mounts
def test_bind_mount_is_a_mount_and_tmpfs_has_no_identity(tmp_path: Path, point: Path) -> None:
    (tmp_path / "there").mkdir()
    point.mkdir()
    volumes = Volumes(listed=[point])
    subprocess.run(["mount", "--bind", str(tmp_path / "there"), str(point)], check=True)
    assert volumes.look(point).missing is None
    subprocess.run(["umount", str(point)], check=True)
    assert volumes.look(point).missing is not None
    for _ in range(2):  # a new file system each time, and nothing to tell them apart by
        subprocess.run(["mount", "-t", "tmpfs", "tmpfs", str(point)], check=True)
        look = volumes.look(point)
        assert (look.missing, look.identity) == (None, None)
        subprocess.run(["umount", str(point)], check=True)
