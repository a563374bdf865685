"""An external drive with real mounts and a real daemon: missing at the start, pulled, swapped, returned."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench.tiny_gguf import write
from tests.support.daemon import FAKE, Fleetd, fleetd
from tests.support.ports import free_port
from tests.support.waiting import until


def _can_mount() -> bool:
    if os.geteuid() != 0 or shutil.which("mkfs.ext4") is None:
        return False
    return subprocess.run(["unshare", "--mount", "true"], capture_output=True, check=False).returncode == 0


pytestmark = pytest.mark.skipif(not _can_mount(), reason="needs root, mkfs.ext4 and mounts")
real_ollama = pytest.mark.skipif(shutil.which("ollama") is None, reason="no program named ollama on PATH")


class Drive:
    """An ext4 image on a loop device; `fill` writes a user's files to it."""

    def __init__(self, image: Path, point: Path) -> None:
        self.image, self.point = image, point
        with image.open("wb") as file:
            file.truncate(24 << 20)
        subprocess.run(["mkfs.ext4", "-q", str(image)], check=True)
        point.mkdir(exist_ok=True)

    def plug(self) -> None:
        subprocess.run(["mount", "-o", "loop", str(self.image), str(self.point)], check=True)

    def pull(self) -> None:
        """Detach the drive as a pulled cable does, with files open."""
        subprocess.run(["umount", "-l", str(self.point)], check=True)

    def fill(self) -> None:
        self.plug()
        (self.point / "ollama").mkdir()
        write(self.point / "tiny model.gguf", layers=1, embedding=64)
        self.pull()


@pytest.fixture
def point(tmp_path: Path) -> Iterator[Path]:
    """A mount point below /mnt, which the daemon treats as a removable drive."""
    point = Path("/mnt") / f"BOWIE-{os.getpid()}-{tmp_path.name[-12:]}"
    yield point
    while subprocess.run(["umount", "-l", str(point)], capture_output=True, check=False).returncode == 0:
        pass
    if point.is_dir():
        shutil.rmtree(point)


def fake_ollama(*flags: str) -> str:
    return json.dumps([sys.executable, "-I", str(FAKE), "--api", "ollama", *flags])


def both(point: Path, command: str) -> str:
    """An Ollama with its store on the drive, and a service that requires the drive."""
    return f"""
    instances:
      ollama:
        engine: ollama
        {command}
        port: {free_port()}
        device: host
        options: {{models_dir: {point}/ollama}}
    models:
      m: {{instance: ollama, memory: 1MiB, from: "{point}/tiny model.gguf", modelfile: {{parameters: {{num_ctx: 256}}}}}}
    services:
      keeper: {{command: [sleep, "1000"], requires: [{point}]}}
      other: {{command: [sleep, "1000"]}}
    """


def blocked_and_back(daemon: Fleetd, drive: Drive, point: Path) -> None:
    """Follow one drive from missing to mounted, pulled and returned."""
    daemon.start()
    for name in ("ollama", "keeper"):
        row = daemon.until_state(name, "BLOCKED")
        assert f"the volume {point} is not mounted" in row["reason"]
        assert row["restarts"] == 0
    daemon.until_state("other", "READY")
    answer = daemon.chat("m")
    assert (answer.status, answer.code) == (503, "model_blocked")
    assert str(point) in answer.json["error"]["message"]
    assert list(point.iterdir()) == []
    drive.plug()
    daemon.until_state("ollama", "READY")
    daemon.until_state("keeper", "READY")
    assert daemon.chat("m").status == 200
    drive.pull()
    for name in ("ollama", "keeper"):
        row = daemon.until_state(name, "BLOCKED")
        assert f"the volume {point} is not mounted" in row["reason"]
    answer = daemon.chat("m")
    assert (answer.status, answer.code) == (503, "model_blocked")
    assert list(point.iterdir()) == [], "something was made in the mount point"
    drive.plug()
    daemon.until_state("ollama", "READY")
    until(lambda: daemon.chat("m").status == 200, "the model answers again")
    assert daemon.process_row("ollama")["last_exit"] is None or daemon.process_row("ollama")["state"] == "READY"
    assert daemon.process_row("other")["generation"] == 1


def test_drive_missing_at_start_pulled_and_back(tmp_path: Path, point: Path) -> None:
    drive = Drive(tmp_path / "drive.img", point)
    drive.fill()
    with fleetd(tmp_path, both(point, f"command: {fake_ollama()}")) as daemon:
        blocked_and_back(daemon, drive, point)


@real_ollama
def test_drive_pulled_and_back_with_real_ollama(tmp_path: Path, point: Path) -> None:
    drive = Drive(tmp_path / "drive.img", point)
    drive.fill()
    with fleetd(tmp_path, both(point, "")) as daemon:
        blocked_and_back(daemon, drive, point)


def test_other_drive_of_same_name_is_refused_until_accepted(tmp_path: Path, point: Path) -> None:
    first, second = Drive(tmp_path / "1.img", point), Drive(tmp_path / "2.img", point)
    first.fill()
    second.fill()
    first.plug()
    with fleetd(tmp_path, both(point, f"command: {fake_ollama()}")) as daemon:
        daemon.start()
        daemon.until_state("ollama", "READY")
        first.pull()
        daemon.until_state("ollama", "BLOCKED")
        second.plug()
        until(
            lambda: f"another volume is mounted at {point}" in daemon.process_row("ollama")["reason"],
            "the other drive is refused",
        )
        assert daemon.process_row("ollama")["state"] == "BLOCKED"
        second.pull()
        first.plug()
        daemon.until_state("ollama", "READY")
        assert daemon.stop() == 0
        first.pull()
        second.plug()
        daemon.start()  # the volume's identity survives a restart of the daemon
        assert "another volume is mounted" in daemon.until_state("ollama", "BLOCKED")["reason"]
        shown = daemon.control("GET", "/v1/volumes").json["volumes"]
        assert [(row["path"], sorted(row["needed_by"])) for row in shown] == [(str(point), ["keeper", "m", "ollama"])]
        assert daemon.control("POST", "/v1/volumes/accept", {"path": str(point)}).status == 200
        daemon.until_state("ollama", "READY")


def test_model_on_a_pulled_drive_is_blocked_alone(tmp_path: Path, point: Path) -> None:
    drive = Drive(tmp_path / "drive.img", point)
    drive.fill()
    (tmp_path / "store").mkdir()
    fleet = f"""
    instances:
      ollama:
        engine: ollama
        command: {fake_ollama("--models", "near")}
        port: {free_port()}
        options: {{models_dir: {tmp_path}/store}}
    models:
      near: {{instance: ollama, memory: 1MiB}}
      far: {{instance: ollama, memory: 1MiB, preload: true, from: "{point}/tiny model.gguf"}}
    """
    with fleetd(tmp_path, fleet) as daemon:
        daemon.start()
        daemon.until_state("ollama", "READY")
        assert daemon.chat("near").status == 200
        answer = daemon.chat("far")
        assert (answer.status, answer.code) == (503, "model_blocked")
        assert f"models.far.from: {point}/tiny model.gguf (the volume {point} is not mounted)" in str(answer.json)
        drive.plug()
        until(lambda: daemon.model_row("far")["state"] == "LOADED", "the model is made and preloaded")
        drive.pull()
        until(lambda: daemon.chat("far").status == 503, "the model is blocked again")
        assert daemon.model_row("far")["reason"].startswith("missing: ")
        assert daemon.chat("near").status == 200
        assert daemon.process_row("ollama")["generation"] == 1
        drive.plug()
        until(lambda: daemon.model_row("far")["state"] == "LOADED", "the model is back")
