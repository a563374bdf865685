"""cgroup v2 leaves: process sets that no process can leave by forking.

Invariants:
- Used only where a cgroup v2 tree is ours: delegated by systemd (user.delegate), or writable on a machine without systemd.
- Every operation may fail at any time; then other means find the set, and no caller sees an error.
- Moving a process costs about 10 ms in the kernel, so it happens after the spawn is reported.
- Counting OOM kills needs the memory controller, which is switched on only when nothing else lives in our own cgroup. systemd starts
  the next daemon in that very cgroup, and the kernel takes no process into one that hands controllers on: so not under systemd,
  unless the unit sets `DelegateSubgroup=fleetd.daemon` (systemd 254).
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from fleetd.host.filenames import escape

DAEMON_LEAF = "fleetd.daemon"


def _write(path: Path, text: str) -> bool:
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        os.write(fd, text.encode())
    except OSError:
        return False
    finally:
        os.close(fd)
    return True


@dataclass(frozen=True, slots=True)
class Cgroup:
    """One leaf with one process set."""

    path: Path

    def enter(self, pid: int) -> bool:
        """Create the leaf and move the process; False, without a leaf, if rejected."""
        try:
            self.path.mkdir(exist_ok=True)
        except OSError:
            return False
        if _write(self.path / "cgroup.procs", str(pid)):
            return True
        self.remove()
        return False

    def pids(self) -> frozenset[int]:
        try:
            return frozenset(int(word) for word in (self.path / "cgroup.procs").read_text().split())
        except (OSError, ValueError):
            return frozenset()

    def kill(self) -> bool:
        """SIGKILL to all members at once (Linux 5.14)."""
        return _write(self.path / "cgroup.kill", "1")

    def oom_kills(self) -> int:
        try:
            for line in (self.path / "memory.events").read_text().splitlines():
                key, _, value = line.partition(" ")
                if key == "oom_kill":
                    return int(value)
        except (OSError, ValueError):
            pass
        return 0

    def remove(self) -> None:
        try:
            self.path.rmdir()
        except OSError:
            pass


@dataclass(frozen=True, slots=True)
class CgroupTree:
    """The folder in which this daemon may create leaves."""

    root: Path
    prefix: str

    def leaf(self, name: str, generation: int) -> Cgroup:
        """Name the leaf of one run of a process; `enter` makes it."""
        return Cgroup(self.root / f"{self.prefix}.{escape(name)[:150]}.{generation}")

    def purge(self) -> None:
        """Remove empty leaves of earlier daemons of this state folder."""
        for path in self.root.glob(f"{self.prefix}.*"):
            Cgroup(path).remove()


def _mount_point(mounts: str) -> Path | None:
    for line in mounts.splitlines():
        left, _, right = line.partition(" - ")
        if right.startswith("cgroup2 "):
            fields = left.split()
            if len(fields) > 4 and fields[3] == "/":
                return Path(fields[4].replace("\\040", " "))
    return None


def _delegated(folder: Path) -> bool:
    if not os.access(folder, os.W_OK) or not os.access(folder / "cgroup.procs", os.W_OK):
        return False
    if not Path("/run/systemd/system").exists():
        return True
    for attribute in ("user.delegate", "trusted.delegate"):
        try:
            if os.getxattr(folder, attribute) == b"1":
                return True
        except OSError:
            continue
    return False


def _enable_memory(folder: Path, own: Path, top: bool) -> None:
    try:
        if "memory" not in (folder / "cgroup.controllers").read_text().split():
            return
        if not top:
            if folder == own and Path("/run/systemd/system").exists():
                return
            others = {int(word) for word in (folder / "cgroup.procs").read_text().split()} - {os.getpid()}
            if others:
                return
            (folder / DAEMON_LEAF).mkdir(exist_ok=True)
            if not _write(folder / DAEMON_LEAF / "cgroup.procs", str(os.getpid())):
                return
    except (OSError, ValueError):
        return
    _write(folder / "cgroup.subtree_control", "+memory")


def detect(prefix: str) -> CgroupTree | None:
    """Return the usable cgroup tree, or None. `prefix` separates daemons."""
    if not hasattr(os, "getxattr"):
        return None
    try:
        mount = _mount_point(Path("/proc/self/mountinfo").read_text())
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return None
    own = next((line[3:] for line in lines if line.startswith("0::")), None)
    if mount is None or own is None or own.startswith("/.."):
        return None
    leaf = mount / own.lstrip("/")
    folder = leaf.parent if leaf.name == DAEMON_LEAF else leaf
    if not _delegated(folder):
        return None
    _enable_memory(folder, leaf, top=folder == mount)
    return CgroupTree(folder, prefix)
