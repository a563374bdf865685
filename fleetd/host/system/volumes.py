"""What a process requires to be there: files, folders, and the volumes that they are on.

Invariants:
- A path on a removable, listed or known volume is there only while that volume is mounted: an empty mount point is not the
  volume, and what somebody wrote into the mount point is not it either.
- Looking may hang (a dead network share): each look has a thread and a limit, and what does not answer is missing.
- A volume is known by its file system's UUID; another one under the same name is refused until a person accepts it.
"""

from __future__ import annotations

import asyncio
import os
import sys
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fleetd.host.system.mounts import Mounts

_LOOK_LIMIT_S = 3.0
SILENT = "does not answer"


@dataclass(frozen=True, slots=True)
class Look:
    """The state of a path: `missing` is "PATH (why)" or None; `mount` its volume."""

    missing: str | None = None
    mount: Path | None = None
    identity: str | None = None

    @property
    def certain(self) -> bool:
        """False when the path did not answer: it may be there."""
        return self.missing is None or not self.missing.endswith(f"({SILENT})")


def removable(path: Path) -> tuple[Path, ...]:
    """Return customary mount points above a path, outermost first; may be empty.

    /Volumes/X (macOS), /media/X and /media/USER/X, /run/media/USER/X (Linux desktops), /mnt and /mnt/X (by hand).
    """
    parts = path.parts
    for prefix, depths in (
        (("/", "Volumes"), (3,)),
        (("/", "media"), (3, 4)),
        (("/", "run", "media"), (4, 5)),
        (("/", "mnt"), (2, 3)),
    ):
        if parts[: len(prefix)] == prefix:
            return tuple(Path(*parts[:depth]) for depth in depths if len(parts) >= depth)
    return ()


def fstab_mounts(fstab: Path = Path("/etc/fstab")) -> list[Path]:
    """Return the mount points that the administrator listed."""
    try:
        lines = fstab.read_text(errors="replace").splitlines()
    except OSError:
        return []
    fields = (line.split() for line in lines if line.strip() and not line.lstrip().startswith("#"))
    return [Path(words[1].replace("\\040", " ")) for words in fields if len(words) > 1 and words[1].startswith("/")]


class Volumes:
    """Finds missing paths. Tests pass their own `mounts` and `listed`.

    `known` holds the volumes that were seen: mount point to identity ("" where it has none). It is changed by looking, and by
    `forget`; the caller keeps it.
    """

    def __init__(
        self,
        *,
        listed: Sequence[Path] | None = None,
        mounts: Callable[[], Mounts] = Mounts,
        known: Mapping[str, str] | None = None,
    ) -> None:
        self._listed = fstab_mounts() if listed is None and sys.platform == "linux" else list(listed or [])
        self._mounts = mounts
        self.known: dict[str, str] = dict(known or {})
        self._hanging: set[Path] = set()  # looks that never came back: not begun a second time

    def look(self, path: Path, mounts: Mounts | None = None) -> Look:
        """Look at one path. Blocks, perhaps for ever."""
        problem: OSError | None = None
        try:
            path.stat()  # first, since it makes an automount point mount
        except OSError as error:
            problem = error
        table = mounts or self._mounts()
        real = Path(os.path.realpath(path))
        mount, needed = self._mount_of(real, table)
        if mount is not None and needed and not table.is_mount(mount):
            return Look(f"{path} (the volume {mount} is not mounted)", mount)
        if isinstance(problem, FileNotFoundError):
            return Look(f"{path} (does not exist)", mount)
        if problem is not None:
            return Look(f"{path} ({problem.strerror or problem})", mount)
        if mount is None or not table.is_mount(mount):
            return Look()
        try:
            return self._compared(path, mount, table.identity(mount))
        except OSError as error:
            return Look(f"{path} ({error.strerror or error})", mount)

    def _mount_of(self, real: Path, table: Mounts) -> tuple[Path | None, bool]:
        """Return the mount point, and whether the path requires a mount there."""
        stated = [Path(one) for one in self.known] + self._listed
        above = [mount for mount in stated if mount != Path("/") and real.is_relative_to(mount)]
        customary = removable(real)
        mounted = [mount for mount in customary if table.is_mount(mount)]
        deepest = max([*above, *mounted], key=lambda mount: len(mount.parts), default=None)
        if deepest is not None:
            return deepest, True
        if not customary:
            return None, False
        expected = customary[-1]
        if expected.parts[1] == "mnt" or (len(expected.parts) < 4 and expected.parts[1] == "media"):
            return expected, _is_bare(expected)
        return expected, True

    def _compared(self, path: Path, mount: Path, identity: str | None) -> Look:
        before = self.known.get(str(mount))
        if identity and before and before != identity:
            problem = f"another volume is mounted at {mount}: {identity}, not {before}; if it is the right one now, "
            return Look(f"{path} ({problem}accept it with: fleetctl volumes accept {mount})", mount, identity)
        if before is None or (identity and not before):
            self.known[str(mount)] = identity or ""
        return Look(None, mount, identity)

    def forget(self, mount: str) -> bool:
        """Accept any volume that is mounted there next; False if none was known."""
        return self.known.pop(mount, None) is not None

    def look_at_all(self, paths: Iterable[Path]) -> dict[Path, Look]:
        """Look at many paths, with one look at the mounts. Blocks."""
        table = self._mounts()
        return {path: self.look(path, table) for path in paths}

    def table(self) -> object:
        """Return a value that changes with every mount and unmount; None if unknown."""
        points = self._mounts().points
        return dict(points) or None

    async def limited(self, path: Path) -> Look:
        """Look at one path within a few seconds, whatever hangs."""
        if path in self._hanging:
            return Look(f"{path} ({SILENT})")
        self._hanging.add(path)
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[Look] = loop.create_future()

        def deliver(result: Look) -> None:
            if not answer.done():
                answer.set_result(result)

        def body() -> None:
            result = self.look(path)
            self._hanging.discard(path)
            try:
                loop.call_soon_threadsafe(deliver, result)
            except RuntimeError:  # the loop has ended meanwhile
                return

        threading.Thread(target=body, name="fleetd-look", daemon=True).start()
        try:
            async with asyncio.timeout(_LOOK_LIMIT_S):
                return await answer
        except TimeoutError:
            return Look(f"{path} ({SILENT})")


def _is_bare(folder: Path) -> bool:
    """Return whether a folder is empty or missing: an unused mount point."""
    try:
        with os.scandir(folder) as entries:
            return next(entries, None) is None
    except OSError:
        return True
