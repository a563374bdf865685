"""What a process requires to be there: files, folders, and the volumes that they are on.

The rules of this file
- A path on a removable or listed volume is there only while that volume is mounted: an empty mount point is not the volume.
- Looking may hang (a dead network share): each look has a thread and a limit, and what does not answer is missing.
- A volume is known by its file system's UUID, else by its device number; another volume of the same name is noticed.
"""

from __future__ import annotations

import asyncio
import os
import sys
import threading
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

_LOOK_LIMIT_S = 3.0
_BY_UUID = Path("/dev/disk/by-uuid")


def required_mount(path: Path, listed: Iterable[Path]) -> Path | None:
    """Return the mount point that must be mounted for this path to be meant; None: any folder will do.

    /Volumes/X (macOS), /media/USER/X and /run/media/USER/X (Linux desktops), and every mount point `listed` in fstab.
    """
    parts = path.parts
    for prefix, depth in ((("/", "Volumes"), 3), (("/", "media"), 4), (("/", "run", "media"), 5)):
        if parts[: len(prefix)] == prefix and len(parts) >= depth:
            return Path(*parts[:depth])
    above = [mount for mount in listed if mount != Path("/") and path.is_relative_to(mount)]
    return max(above, key=lambda mount: len(mount.parts), default=None)


def fstab_mounts(fstab: Path = Path("/etc/fstab")) -> list[Path]:
    """Return the mount points that the administrator listed."""
    try:
        lines = fstab.read_text(errors="replace").splitlines()
    except OSError:
        return []
    fields = (line.split() for line in lines if line.strip() and not line.lstrip().startswith("#"))
    return [Path(words[1].replace("\\040", " ")) for words in fields if len(words) > 1 and words[1].startswith("/")]


def volume_identity(path: Path) -> str:
    """Return the UUID of the file system that holds this path, else its device number. Raises OSError."""
    device = path.stat().st_dev
    try:
        for entry in _BY_UUID.iterdir():
            if entry.stat().st_rdev == device:
                return entry.name
    except OSError:
        pass
    return f"dev-{os.major(device)}:{os.minor(device)}"


class Volumes:
    """Answers what is missing of a list of required paths. `is_mount` and `identity` are seams for tests."""

    def __init__(
        self,
        *,
        listed: Sequence[Path] | None = None,
        is_mount: Callable[[Path], bool] = os.path.ismount,
        identity: Callable[[Path], str] = volume_identity,
    ) -> None:
        self._listed = fstab_mounts() if listed is None and sys.platform == "linux" else list(listed or [])
        self._is_mount, self._identity = is_mount, identity
        self._hanging: set[Path] = set()  # looks that never came back: not begun a second time

    def look(self, path: Path) -> tuple[str | None, str | None]:
        """Return (why it is missing or None, the identity of its volume or None). Blocks, perhaps for ever."""
        mount = required_mount(path, self._listed)
        try:
            if mount is not None and not self._is_mount(mount):
                return f"{path} (the volume {mount} is not mounted)", None
            path.stat()
            return None, self._identity(mount) if mount is not None else None
        except FileNotFoundError:
            return f"{path} (does not exist)", None
        except OSError as error:
            return f"{path} ({error.strerror or error})", None

    async def missing(self, paths: Sequence[Path]) -> tuple[tuple[str, ...], dict[Path, str]]:
        """Return (what is missing, identities of the volumes of the rest), within a few seconds whatever hangs."""
        answers = await asyncio.gather(*(self._limited(path) for path in paths))
        absent = tuple(reason for reason, _ in answers if reason is not None)
        known = {
            path: mark
            for path, (reason, mark) in zip(paths, answers, strict=True)
            if reason is None and mark is not None
        }
        return absent, known

    async def _limited(self, path: Path) -> tuple[str | None, str | None]:
        if path in self._hanging:
            return f"{path} (does not answer)", None
        self._hanging.add(path)
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[tuple[str | None, str | None]] = loop.create_future()

        def deliver(result: tuple[str | None, str | None]) -> None:
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
            return f"{path} (does not answer)", None


class RequirementWatch:
    """Calls `on_change(missing)` whenever the answer differs from the last, and at first; `on_swap(path)` when another volume
    has taken the place of the one that was there."""

    def __init__(
        self,
        paths: Sequence[Path],
        on_change: Callable[[tuple[str, ...]], None],
        *,
        on_swap: Callable[[Path], None] | None = None,
        period_s: float = 1.0,
        volumes: Volumes | None = None,
    ) -> None:
        self._paths, self._on_change, self._on_swap = list(paths), on_change, on_swap
        self._period_s, self._volumes = period_s, volumes or Volumes()
        self._known: dict[Path, str] = {}
        self._last: tuple[str, ...] | None = None
        self._task = asyncio.get_running_loop().create_task(self._run(), name="requirement-watch")

    async def close(self) -> None:
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    async def _run(self) -> None:
        while True:
            await self._look()
            await asyncio.sleep(self._period_s)

    async def _look(self) -> None:
        missing, marks = await self._volumes.missing(self._paths)
        swapped = [path for path, mark in marks.items() if self._known.get(path, mark) != mark]
        self._known.update(marks)
        if missing != self._last:
            self._last = missing
            self._on_change(missing)
        if self._on_swap is not None:
            for path in swapped:
                self._on_swap(path)
