"""One daemon per run folder and per state folder, and a private run folder.

Invariants:
- A lock is a flock held for the daemon's whole life, over an execv too. The kernel releases it when the process exits.
- Both folders are locked: two daemons with one state would adopt and kill each other's processes.
- The run folder belongs to the daemon's user, has mode 0700 and is no symbolic link: it contains the control socket.
"""

from __future__ import annotations

import fcntl
import os
import stat
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from fleetd.errors import HostError

LOCK_NAME = "fleetd.lock"


def prepare_private_folder(folder: Path) -> None:
    """Create or check a folder that only this user can enter. Raises HostError."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = folder.lstat()
    except FileExistsError:
        raise HostError(f"{folder} exists and is not a directory", recoverable=False) from None
    except OSError as error:
        raise HostError(f"the folder {folder} cannot be created: {error.strerror}", recoverable=False) from error
    if stat.S_ISLNK(found.st_mode):
        raise HostError(f"{folder} is a symbolic link; a private folder must be a real one", recoverable=False)
    if not stat.S_ISDIR(found.st_mode):
        raise HostError(f"{folder} exists and is not a directory", recoverable=False)
    if found.st_uid != os.geteuid():
        raise HostError(
            f"{folder} belongs to user id {found.st_uid}, not to the user of fleetd ({os.geteuid()})", recoverable=False
        )
    if found.st_mode & 0o077:
        try:
            folder.chmod(0o700)
        except OSError as error:
            raise HostError(
                f"{folder} is accessible to other users and its mode cannot be changed: {error.strerror}",
                recoverable=False,
            ) from error


class DaemonLock:
    """A held lock, created by `acquire`, or by `inherit` after an execv."""

    def __init__(self, path: Path, fd: int) -> None:
        self.path, self._fd = path, fd

    @classmethod
    def acquire(cls, folder: Path, prepare: Callable[[Path], None] = prepare_private_folder) -> DaemonLock:
        """Lock a folder for this process. Raises HostError naming the daemon that has it."""
        prepare(folder)
        path = folder / LOCK_NAME
        while True:
            try:
                fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            except OSError as error:
                raise HostError(f"the lock {path} cannot be opened: {error.strerror}", recoverable=False) from error
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                holder = _read_pid(fd)
                os.close(fd)
                who = f"pid {holder}" if holder is not None else "pid unknown"
                raise HostError(
                    f"fleetd is already running, {who} (it holds {path})",
                    hint="`fleetctl status` shows its file, `fleetctl shutdown` stops it; "
                    "a second fleet needs its own paths.run and paths.state",
                    recoverable=False,
                ) from None
            except OSError as error:
                os.close(fd)
                raise HostError(f"the lock {path} cannot be taken: {error.strerror}", recoverable=False) from error
            if _same_file(fd, path):
                break
            os.close(fd)  # removed or replaced between open and lock: try again on the new file
        os.ftruncate(fd, 0)
        os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
        return cls(path, fd)

    @classmethod
    def inherit(cls, folder: Path, fd: int) -> DaemonLock:
        """Take over a lock after an execv. Raises HostError if `fd` is not the lock."""
        path = folder / LOCK_NAME
        if not _same_file(fd, path):
            raise HostError(f"descriptor {fd} is not the lock {path}", recoverable=False)
        os.set_inheritable(fd, False)
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return cls(path, fd)

    def is_of(self, folder: Path) -> bool:
        """Return whether this is the lock of a folder."""
        return _same_file(self._fd, folder / LOCK_NAME)

    def keep_over_exec(self) -> int:
        """Keep the lock over an execv and return its descriptor for `inherit`."""
        os.set_inheritable(self._fd, True)
        return self._fd

    def release(self) -> None:
        """Release the lock, but keep its file: two daemons could lock two files otherwise."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


@dataclass(frozen=True, slots=True)
class DaemonLocks:
    """The locks of the run folder and the state folder; one lock if these are one."""

    locks: tuple[DaemonLock, ...]

    @classmethod
    def acquire(cls, run: Path, state: Path, early: DaemonLock | None = None) -> DaemonLocks:
        """Lock both folders, or neither. Raises HostError naming the daemon that has one.

        `early` is a lock that this start took already; it is released if it is another folder's.
        """
        held: list[DaemonLock] = []
        try:
            if early is not None and not early.is_of(run):
                early.release()
                early = None
            held.append(early or DaemonLock.acquire(run))
            held.extend(_of_state(run, state))
        except HostError:
            cls(tuple(held)).release()
            raise
        return cls(tuple(held))

    @classmethod
    def inherit(cls, run: Path, state: Path, fds: Sequence[int]) -> DaemonLocks:
        """Take over the locks after an execv; lock what an older program did not.
        Raises HostError when a descriptor is not its lock."""
        held = [DaemonLock.inherit(folder, fd) for folder, fd in zip((run, state), fds, strict=False)]
        return cls((*held, *(_of_state(run, state) if len(held) == 1 else ())))

    def keep_over_exec(self) -> list[int]:
        """Keep the locks over an execv and return their descriptors for `inherit`."""
        return [lock.keep_over_exec() for lock in self.locks]

    def release(self) -> None:
        """Release the state's lock, then the run's, for which the next daemon waits."""
        for lock in reversed(self.locks):
            lock.release()


def _of_state(run: Path, state: Path) -> list[DaemonLock]:
    return [DaemonLock.acquire(state, _make)] if run.resolve() != state.resolve() else []


def _make(folder: Path) -> None:
    """Create the state folder; its owner may choose the user and use a symbolic link."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise HostError(f"the folder {folder} cannot be created: {error.strerror}", recoverable=False) from error


def _read_pid(fd: int) -> int | None:
    try:
        return int(os.pread(fd, 32, 0).strip() or b"x")
    except (OSError, ValueError):
        return None


def _same_file(fd: int, path: Path) -> bool:
    try:
        ours, theirs = os.fstat(fd), path.stat()
    except OSError:
        return False
    return (ours.st_dev, ours.st_ino) == (theirs.st_dev, theirs.st_ino)
