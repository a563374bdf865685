"""The control socket: never reachable for another user, not even while it is created.

Invariants:
- The daemon holds the host's lock before it binds, so a file at the path is left over, unless a program answers there.
- The socket is bound under another name with mode 0600, then renamed into place: no client sees it half ready.
- Folder 0700, socket 0600, and the peer's credentials are checked as well: the mode alone is not trusted.
"""

from __future__ import annotations

import os
import socket
import stat
import struct
import sys
from pathlib import Path

from fleetd.control.port import Caller
from fleetd.errors import HostError

NAME = "fleetd.sock"
PATH_MAX_BYTES = 103 if sys.platform == "darwin" else 107
TEMPORARY_SUFFIX = ".n"
_SOL_LOCAL, _LOCAL_PEERCRED, _LOCAL_PEERPID = 0, 0x001, 0x002


def bind(path: Path) -> socket.socket:
    """Return a listening socket, mode 0600 in a 0700 folder. Raises HostError.

    The caller must hold the host's lock.
    """
    temporary = path.with_name(path.name + TEMPORARY_SUFFIX)
    problem = length_problem(path)
    if problem is not None:
        raise HostError(f"T{problem[1:]}.", hint="Set paths.run in fleet.yaml to a shorter folder.", recoverable=False)
    try:
        _prepare_folder(path.parent)
        _check_free(path)
        temporary.unlink(missing_ok=True)
        return _bind_and_rename(path, temporary)
    except OSError as error:
        raise HostError(
            f"The control socket {path} cannot be created: {error.strerror or error}.",
            hint="Check that paths.run in fleet.yaml is your own folder on a local disk.",
        ) from error


def length_problem(path: Path) -> str | None:
    """Return why a path is too long for a socket; None if it is not."""
    length, most = len(os.fsencode(path)), PATH_MAX_BYTES - len(TEMPORARY_SUFFIX)
    if length <= most:
        return None
    return (
        f"the control socket's path is too long for this system: {path} has {length} bytes, at most {most} are possible"
    )


def _bind_and_rename(path: Path, temporary: Path) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        listener.setblocking(False)
        listener.bind(str(temporary))
        temporary.chmod(0o600)  # inside a 0700 folder: no other user could reach it before
        listener.listen(128)
        temporary.rename(path)
    except BaseException:
        listener.close()
        temporary.unlink(missing_ok=True)
        raise
    return listener


def _prepare_folder(folder: Path) -> None:
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = folder.stat()
    if found.st_uid != os.geteuid():
        raise HostError(
            f"The folder of the control socket, {folder}, belongs to user {found.st_uid}, not to you ({os.geteuid()}).",
            hint="Set paths.run in fleet.yaml to a folder of your own.",
            recoverable=False,
        )
    if stat.S_IMODE(found.st_mode) & 0o077:
        folder.chmod(0o700)


def _check_free(path: Path) -> None:
    """Raise HostError unless the path is free or a dead socket."""
    try:
        found = path.lstat()
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(found.st_mode):
        raise HostError(
            f"{path} exists and is not a socket; fleetd does not replace it.",
            hint="Move it away, or set paths.run in fleet.yaml to another folder.",
            recoverable=False,
        )
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(0.5)
        try:
            probe.connect(str(path))
        except OSError:
            return
    raise HostError(
        f"Another program answers on {path}.",
        hint="Stop it, or set paths.run in fleet.yaml to another folder.",
        recoverable=False,
    )


def release(path: Path, identity: tuple[int, int]) -> None:
    """Remove the socket file if it still has this (device, inode)."""
    try:
        found = path.lstat()
        if (found.st_dev, found.st_ino) == identity:
            path.unlink()
    except OSError:
        pass  # already removed, or another user's: nothing depends on it


def peer(connection: socket.socket) -> Caller:
    """Return the process that connected; uid None if the system does not say."""
    try:
        if hasattr(socket, "SO_PEERCRED"):
            size = struct.calcsize("3i")
            pid, uid, _ = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size))
            return Caller(uid=uid, pid=pid)
        if sys.platform == "darwin":
            # struct xucred: version, uid, number of groups, groups
            _, uid = struct.unpack("=II", connection.getsockopt(_SOL_LOCAL, _LOCAL_PEERCRED, 76)[:8])
            (pid,) = struct.unpack("=i", connection.getsockopt(_SOL_LOCAL, _LOCAL_PEERPID, 4))
            return Caller(uid=uid, pid=pid)
    except OSError:
        pass  # the peer is already gone: it stays unknown, and unknown is rejected
    return Caller()
