"""What is mounted where, and which volume it is.

Invariants:
- On Linux the kernel's own table is read: bind mounts count, and a name with spaces or of any depth is distinguished.
- A volume is known by what is the same wherever it is plugged in: the file system's UUID, or a share's address. Where nothing
  of that kind can be read (tmpfs, FAT without udev), there is no identity, and any volume of that name will do.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import os
import re
import sys
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

_BY_UUID = Path("/dev/disk/by-uuid")
_TABLE = Path("/proc/self/mountinfo")
_OCTAL = re.compile(r"\\([0-7]{3})")
# f_fsid of these is made from the file system's own UUID; of others, from a device number that changes
_FSID_FROM_UUID = frozenset({"ext2", "ext3", "ext4", "btrfs", "f2fs", "erofs"})
_SHARES = frozenset(
    {"nfs", "nfs4", "cifs", "smb3", "9p", "virtiofs", "ceph", "glusterfs", "fuse.sshfs", "fuse.rclone", "afs"}
)


@dataclass(frozen=True, slots=True)
class Mount:
    """A line of the mount table: source, type and device numbers."""

    source: str
    kind: str
    device: str


class Mounts:
    """One look at the mount table. `points` is empty without one (macOS)."""

    def __init__(self, points: Mapping[Path, Mount] | None = None) -> None:
        self.points: Mapping[Path, Mount] = read_table() if points is None else points
        self._whole = points is not None or bool(self.points)

    def is_mount(self, path: Path) -> bool:
        """Return whether this path is a mount point; an idle automount is not."""
        if self._whole:
            found = self.points.get(path)
            return found is not None and found.kind != "autofs"
        return path.is_mount()

    def identity(self, mount: Path) -> str | None:
        """Return a stable id of the volume, or None. Blocks. Raises OSError."""
        found = self.points.get(mount)
        if found is None:
            return _macos_uuid(mount) if sys.platform == "darwin" else None
        if found.kind in _SHARES:
            return f"{found.kind} {found.source}"
        if found.source.startswith("/dev/"):
            known = _udev_uuid(mount)
            if known is not None:
                return known
        if found.kind in _FSID_FROM_UUID:
            fsid = os.statvfs(mount).f_fsid
            return f"{found.kind} {fsid:016x}" if fsid else None
        return None


def read_table(table: Path = _TABLE) -> dict[Path, Mount]:
    """Return the mount points; the last mount on a point is the visible one."""
    try:
        lines = table.read_text("utf-8", "surrogateescape").splitlines()
    except OSError:
        return {}
    found: dict[Path, Mount] = {}
    for line in lines:
        words = line.split(" ")
        try:
            rest = words[words.index("-", 6) + 1 :]
            found[Path(_plain(words[4]))] = Mount(_plain(rest[1]), rest[0], words[2])
        except (ValueError, IndexError):
            continue
    return found


def _plain(word: str) -> str:
    return _OCTAL.sub(lambda match: chr(int(match[1], 8)), word)


def _udev_uuid(mount: Path) -> str | None:
    device = mount.stat().st_dev
    try:
        return next((entry.name for entry in _BY_UUID.iterdir() if entry.stat().st_rdev == device), None)
    except OSError:
        return None


class _AttributeList(ctypes.Structure):
    _fields_ = [
        ("bitmapcount", ctypes.c_ushort),
        ("reserved", ctypes.c_uint16),
        ("commonattr", ctypes.c_uint32),
        ("volattr", ctypes.c_uint32),
        ("dirattr", ctypes.c_uint32),
        ("fileattr", ctypes.c_uint32),
        ("forkattr", ctypes.c_uint32),
    ]


def _macos_uuid(mount: Path) -> str | None:
    """Ask getattrlist(2) for ATTR_VOL_UUID; None without one (FAT, shares)."""
    library = ctypes.CDLL(ctypes.util.find_library("c"), use_errno=True)
    wanted = _AttributeList(5, 0, 0, 0x80000000 | 0x00040000, 0, 0, 0)
    answer = ctypes.create_string_buffer(4 + 16)
    failed = library.getattrlist(os.fsencode(mount), ctypes.byref(wanted), answer, len(answer), 0)
    if failed or int.from_bytes(answer.raw[:4], sys.byteorder) < len(answer):
        return None
    found = uuid.UUID(bytes=answer.raw[4:20])
    return str(found).upper() if found.int else None
