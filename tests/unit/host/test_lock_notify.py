"""The lock of a run folder, and the talk with systemd."""

from __future__ import annotations

import os
import re
import socket
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fleetd.errors import HostError
from fleetd.host.lock import DaemonLock, DaemonLocks, prepare_private_folder
from fleetd.host.notify import Notifier

REPOSITORY = Path(__file__).resolve().parents[3]
HOLD = """
import sys, time
from pathlib import Path
from fleetd.host.lock import DaemonLock
lock = DaemonLock.acquire(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(600)
"""


def test_lock_second_daemon_gets_name_of_holder(tmp_path: Path) -> None:
    run = tmp_path / "run"
    with subprocess.Popen([sys.executable, "-c", HOLD, str(run)], stdout=subprocess.PIPE, cwd=REPOSITORY) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(HostError, match=rf"already running, pid {holder.pid} "):
            DaemonLock.acquire(run)
        assert (run / "fleetd.lock").read_text() == f"{holder.pid}\n"  # the loser leaves the file alone
        holder.kill()
    DaemonLock.acquire(run).release()  # a killed daemon holds nothing


def test_the_lock_lives_on_over_an_execv(tmp_path: Path) -> None:
    run = tmp_path / "run"
    lock = DaemonLock.acquire(run)
    fd = lock.keep_over_exec()
    assert os.get_inheritable(fd)
    again = DaemonLock.inherit(run, os.dup(fd))
    lock.release()
    with pytest.raises(HostError, match="already running"):
        DaemonLock.acquire(run)
    again.release()
    with (tmp_path / "other").open("w") as other, pytest.raises(HostError, match="is not the lock"):
        DaemonLock.inherit(run, other.fileno())


def test_the_state_is_locked_too_and_a_refusal_leaves_no_lock(tmp_path: Path) -> None:
    state = tmp_path / "state"
    held = DaemonLocks.acquire(tmp_path / "run", state)
    with pytest.raises(HostError, match=rf"already running, pid {os.getpid()} \(it holds {state}/fleetd.lock\)"):
        DaemonLocks.acquire(tmp_path / "other", state)
    DaemonLock.acquire(tmp_path / "other").release()
    again = DaemonLocks.inherit(tmp_path / "run", state, [os.dup(fd) for fd in held.keep_over_exec()])
    held.release()
    with pytest.raises(HostError, match="already running"):
        DaemonLocks.acquire(tmp_path / "other", state)
    again.release()
    DaemonLocks.acquire(tmp_path / "one", tmp_path / "one").release()  # one folder for both has one lock


def test_removed_lock_file_does_not_let_two_daemons_in(tmp_path: Path) -> None:
    run = tmp_path / "run"
    first = DaemonLock.acquire(run)
    (run / "fleetd.lock").unlink()
    second = DaemonLock.acquire(run)  # fleetd cannot prevent that a user deletes the file, but its own lock holds
    with pytest.raises(HostError, match="already running"):
        DaemonLock.acquire(run)
    first.release()
    with pytest.raises(HostError, match="already running"):
        DaemonLock.acquire(run)
    second.release()


def test_the_run_folder_is_ours_alone(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "run"
    prepare_private_folder(folder)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    folder.chmod(0o777)
    prepare_private_folder(folder)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    (tmp_path / "link").symlink_to(folder)
    with pytest.raises(HostError, match="symbolic link"):
        prepare_private_folder(tmp_path / "link")
    (tmp_path / "file").write_text("")
    with pytest.raises(HostError, match="not a directory"):
        prepare_private_folder(tmp_path / "file")
    with pytest.raises(HostError, match="cannot be created"):
        prepare_private_folder(tmp_path / "file" / "run")


def test_a_folder_of_somebody_else_is_refused(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can give a folder away")
    folder = tmp_path / "run"
    folder.mkdir()
    os.chown(folder, 12345, 12345)
    with pytest.raises(HostError, match="belongs to user id 12345"):
        DaemonLock.acquire(folder)


def test_a_lock_that_is_a_link_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir(mode=0o700)
    (tmp_path / "victim").write_text("precious")
    (tmp_path / "run" / "fleetd.lock").symlink_to(tmp_path / "victim")
    with pytest.raises(HostError, match="cannot be opened"):
        DaemonLock.acquire(tmp_path / "run")
    assert (tmp_path / "victim").read_text() == "precious"


@pytest.mark.parametrize("abstract", [False, True])
def test_what_systemd_hears(abstract: bool, tmp_path: Path) -> None:
    name = f"@fleetd-test-{os.getpid()}" if abstract else str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind("\0" + name[1:] if abstract else name)
        systemd.settimeout(5)
        environ = {"NOTIFY_SOCKET": name, "WATCHDOG_USEC": "30000000", "WATCHDOG_PID": str(os.getpid()), "PATH": "/bin"}
        notifier = Notifier(environ)
        assert environ == {"PATH": "/bin"}  # never seen by a child
        assert notifier.environment["NOTIFY_SOCKET"] == name
        assert notifier.enabled
        assert notifier.watchdog_interval_s == 15.0
        notifier.ready("all up\nREADY=0")
        assert systemd.recv(1000) == b"READY=1\nSTATUS=all up READY=0"
        notifier.reloading()
        match = re.fullmatch(rb"RELOADING=1\nMONOTONIC_USEC=(\d+)", systemd.recv(1000))
        assert match is not None
        assert abs(int(match[1]) / 1e6 - time.clock_gettime(time.CLOCK_MONOTONIC)) < 5
        notifier.stopping()
        notifier.watchdog()
        notifier.extend(2.5)
        notifier.status("draining")
        notifier.status("  ")
        expected = [b"STOPPING=1", b"WATCHDOG=1", b"EXTEND_TIMEOUT_USEC=2500000", b"STATUS=draining"]
        assert [systemd.recv(1000) for _ in range(4)] == expected
        notifier.close()


@pytest.mark.parametrize("environ", [{}, {"NOTIFY_SOCKET": "/none/at/all"}, {"NOTIFY_SOCKET": "relative"}])
def test_without_systemd_nothing_happens(environ: dict[str, str]) -> None:
    notifier = Notifier(environ)
    notifier.ready()
    notifier.watchdog()
    assert notifier.watchdog_interval_s is None
    notifier.close()


@pytest.mark.parametrize(("usec", "pid"), [("x", None), ("0", None), ("1000000", "1"), ("-5", None)])
def test_a_watchdog_that_is_not_for_us(usec: str, pid: str | None) -> None:
    environ = {"NOTIFY_SOCKET": "@x", "WATCHDOG_USEC": usec} | ({"WATCHDOG_PID": pid} if pid else {})
    assert Notifier(environ).watchdog_interval_s is None
