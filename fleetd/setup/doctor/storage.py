"""Checks of files: the three folders, their space and rights, the fleet.yaml, and what processes require.

Pure: every check reads facts alone.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator

from fleetd.setup.doctor.facts import Facts, FolderFact
from fleetd.setup.doctor.findings import Finding, failed, passed, warned
from fleetd.units import counted, listed, show_size

MIB = 1 << 20
FULL_BYTES, LOW_BYTES = 64 * MIB, 1024 * MIB
FULL_INODES, LOW_INODES, LOW_SHARE = 100, 10_000, 0.02
SOCKET_PATH_MAX = 103  # sun_path of macOS holds 104 bytes, Linux 108


def config(facts: Facts) -> Iterator[Finding]:
    """Judge the fleet.yaml itself."""
    found = facts.config
    if found.path is None:
        yield warned("config", "no fleet.yaml was found", "fleetctl init")
        return
    path = shlex.quote(found.path)
    if found.unread is not None:
        yield failed("config", f"{found.path}: {found.unread}", f"ls -l {path}")
    elif found.problems:
        first = found.problems[0].splitlines()[0]
        yield failed("config", f"{counted(len(found.problems), 'problem')}: {first}", f"fleetd check {path}")
    elif found.warnings:
        first = found.warnings[0].splitlines()[0]
        yield warned("config", f"{counted(len(found.warnings), 'warning')}: {first}", f"fleetd check {path}")
    else:
        yield passed("config", f"{found.path} passes the check")
    if found.exposed is not None:
        others = shlex.quote(found.exposed)
        text = f"other users may write {found.exposed}: they decide which programs run"
        say = failed if facts.uid == 0 else warned
        yield say("config.rights", text, f"chmod go-w {others}")
    if not found.loopback and found.insecure:
        yield warned(
            "gateway.open",
            f"everybody who reaches {found.listen} may use the models (insecure: true)",
            "set gateway.listen: 127.0.0.1:8484 and put a proxy with authentication in front",
        )


def folders(facts: Facts) -> Iterator[Finding]:
    """Judge who may use the folders of the daemon."""
    for folder in facts.folders:
        problem = _unusable(folder, facts.uid)
        if problem is not None:
            yield failed(f"rights.{folder.role}", *problem)
        elif folder.mode & 0o022 and folder.exists:
            text = f"other users may write {folder.path}"
            yield warned(f"rights.{folder.role}", text, f"chmod go-w {shlex.quote(folder.path)}")
        else:
            yield passed(f"rights.{folder.role}", f"{folder.path}{'' if folder.exists else ' (not there yet)'}")
    run = next((folder for folder in facts.folders if folder.role == "run"), None)
    if run is not None and len(f"{run.path}/fleetd.sock".encode()) > SOCKET_PATH_MAX:
        text = f"{run.path}/fleetd.sock is longer than a socket's path may be ({SOCKET_PATH_MAX} bytes)"
        yield failed("socket", text, "set paths.run: to a shorter folder, such as ~/.fleetd/run")


def _unusable(folder: FolderFact, uid: int) -> tuple[str, str] | None:
    """Return why the daemon cannot use a folder, and the command that mends it."""
    path = shlex.quote(folder.path)
    if folder.existing is None:
        return (
            f"{folder.path} does not answer: a network share or drive that hangs",
            f"set paths.{folder.role}: to a local folder",
        )
    if not folder.is_folder:
        return (
            f"{folder.existing} is not a folder",
            f"mv {shlex.quote(folder.existing)} {shlex.quote(folder.existing)}.old",
        )
    if folder.role == "run" and folder.is_link:
        return (
            f"{folder.path} is a symbolic link: the run folder must be a real one",
            f"rm {path} && mkdir -m 700 {path}",
        )
    if folder.exists and folder.owner != uid and folder.role == "run":
        return f"{folder.path} belongs to user id {folder.owner}, not to {uid}", f"sudo chown -R {uid} {path}"
    if not folder.writable:
        where = shlex.quote(folder.existing)
        if folder.exists and folder.owner == uid:
            return (
                f"{folder.path} cannot be written (its mode, or a read-only file system)",
                f"chmod u+rwx {path}; mount | grep -w ro",
            )
        return f"{folder.existing} cannot be written by user id {uid}", f"sudo chown {uid} {where}"
    return None


def space(facts: Facts) -> Iterator[Finding]:
    """Judge bytes and inodes of the volumes of the folders."""
    for folder in facts.folders:
        if folder.free_bytes is None:
            continue
        path = shlex.quote(folder.existing or folder.path)
        free, total = folder.free_bytes, folder.total_bytes or 0
        text = f"{show_size(free)} free of {show_size(total)} for {folder.path}"
        fix = (
            f"du -xh --max-depth=2 {path} | sort -h | tail"
            if facts.platform == "linux"
            else f"du -xhd 2 {path} | sort -h | tail"
        )
        if free < FULL_BYTES:
            yield failed(f"disk.{folder.role}", text, fix)
        elif free < LOW_BYTES or (total and free < total * LOW_SHARE and free < 20 * LOW_BYTES):
            yield warned(f"disk.{folder.role}", text, fix)
        else:
            yield passed(f"disk.{folder.role}", text)
        yield from _inodes(folder)


def _inodes(folder: FolderFact) -> Iterator[Finding]:
    free, total = folder.free_inodes, folder.total_inodes
    if free is None or not total:  # btrfs and others count none
        return
    path = shlex.quote(folder.existing or folder.path)
    text = f"{free} of {total} inodes free for {folder.path}"
    fix = f"find {path} -xdev -printf '%h\\n' | sort | uniq -c | sort -n | tail"
    if free < FULL_INODES:
        yield failed(f"inodes.{folder.role}", text, fix)
    elif free < LOW_INODES and free < total * LOW_SHARE:
        yield warned(f"inodes.{folder.role}", text, fix)
    else:
        yield passed(f"inodes.{folder.role}", text)


def required_paths(facts: Facts) -> Iterator[Finding]:
    """Judge the files and volumes that processes require."""
    missing = [path for path in facts.paths if path.missing is not None]
    for path in missing:
        users = listed(path.processes)
        text = f"{path.missing}, required by {users}"
        if "volume" in (path.missing or ""):
            yield failed(
                "volumes",
                text,
                "diskutil list" if facts.platform == "darwin" else "lsblk -f   # and mount it; fleetd notices",
            )
        else:
            yield failed("files", text, f"ls -l {shlex.quote(path.path)}")
    if facts.paths and not missing:
        yield passed("files", f"{counted(len(facts.paths), 'required path')} present")
