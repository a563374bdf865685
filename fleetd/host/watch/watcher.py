"""Noticing saved files, whatever way the editor saves them.

Invariants:
- Folders are watched, never inodes: a rename over the file, a swapped symbolic link and a new folder are all seen.
- What is reported is a saved file (configuration; a touch is a save) or a changed name in a tree (watch.paths), after a quiet
  moment. What a pattern matches is watched as what is named, and so are the folders in which more may come.
- Folders by themselves cost nothing while nothing happens (inotify, on Linux); trees are watched by watchfiles, in a thread.
- The kernel's word is checked by a slow look every few seconds, for file systems that say nothing (network, containers).
"""

from __future__ import annotations

import asyncio
import fnmatch
import glob
import hashlib
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fleetd.host.watch import inotify

if TYPE_CHECKING:
    from watchfiles import Change

_SLOW_LOOK_S = 5.0
_TREE_STEP_MS = 100  # the library looks this often whether something happened
_LARGEST = 16 * 1024 * 1024
IGNORED = (
    ".git",
    "node_modules",
    "__pycache__",
    ".venv",
    ".mypy_cache",
    "*.swp",
    "*.swx",
    "*~",
    ".#*",
    "#*#",
    "4913",
    "*.tmp",
)


def folders_to_watch(files: Iterable[Path]) -> frozenset[Path]:
    """Return the existing folders of these files, of their links and targets."""
    found: set[Path] = set()
    for file in files:
        place, hops = file.absolute(), 0
        while hops < 40:
            link = _first_link(place)
            if link is None:
                found.add(_existing(Path(os.path.normpath(place)).parent))  # safe: no link is left on it
                break
            folder, rest = link
            found.add(folder.parent)
            place, hops = folder.parent / folder.readlink() / rest, hops + 1
    return frozenset(found)


def _first_link(path: Path) -> tuple[Path, Path] | None:
    """Return the first symbolic link on a path and the rest; None without one."""
    current = Path(path.anchor)
    for number, part in enumerate(path.parts[1:], start=2):
        if part == "..":
            current = current.parent
            continue
        current /= part
        if current.is_symlink():
            return current, Path(*path.parts[number:])
    return None


def _existing(folder: Path) -> Path:
    while not folder.is_dir() and folder != folder.parent:
        folder = folder.parent
    return folder


def mark_of(file: Path) -> str:
    """Return a mark that changes with every save; missing files have a mark too."""
    try:
        with file.open("rb") as source:
            return f"{os.fstat(source.fileno()).st_mtime_ns} {hashlib.sha256(source.read(_LARGEST)).hexdigest()}"
    except OSError as error:
        return f"!{type(error).__name__}"


@dataclass(frozen=True, slots=True)
class WatchPattern:
    """A glob pattern, relative to a folder or absolute. It may match nothing."""

    folder: Path
    text: str

    def matches(self) -> list[Path]:
        return [self.folder / name for name in sorted(glob.glob(self.text, root_dir=self.folder))]  # noqa: PTH207

    def folders(self) -> set[Path]:
        """Return the existing folders in which a match may appear, at every level."""
        parts = Path(self.text).parts
        first = next((number for number, part in enumerate(parts) if glob.has_magic(part)), len(parts) - 1)
        levels = [WatchPattern(self.folder, str(Path(*parts[:end]))).matches() for end in range(first + 1, len(parts))]
        begin = self.folder.joinpath(*parts[:first])
        return {_existing(begin), *(one for level in levels for one in level if one.is_dir())}


class FileWatch:
    """Calls `on_change(files)` on the loop when files or matches of patterns change.

    A change is a save, a new file or a removal; `update` changes the list. A file that vanishes is reported only when it stays
    away: editors and deployments remove before they write.
    """

    def __init__(
        self,
        files: Iterable[Path],
        on_change: Callable[[list[Path]], None],
        *,
        patterns: Iterable[WatchPattern] = (),
        debounce_s: float = 0.1,
    ) -> None:
        self._on_change, self._debounce_s = on_change, debounce_s
        self._marks = {file: mark_of(file) for file in files}
        self._patterns = tuple(patterns)
        self._renewed = asyncio.Event()
        self._task = asyncio.get_running_loop().create_task(self._run(), name="file-watch")

    def update(self, files: Iterable[Path], patterns: Iterable[WatchPattern] = ()) -> None:
        """Watch these now. New files count as seen, but matches not among them do not."""
        self._patterns = tuple(patterns)
        matched = [match for match in self._matches() if match in self._marks]
        self._marks = {file: self._marks.get(file) or mark_of(file) for file in [*files, *matched]}
        self._renewed.set()

    def _matches(self) -> list[Path]:
        return [match for pattern in self._patterns for match in pattern.matches()]

    def _folders(self) -> dict[Path, tuple[int, int] | None]:
        """Return the folders to watch with their identities: names can be reused."""
        ways = [folder / "any" for pattern in self._patterns for folder in pattern.folders()]
        return {folder: _identity(folder) for folder in folders_to_watch([*self._marks, *ways])}

    async def close(self) -> None:
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    async def _run(self) -> None:
        while True:
            self._renewed.clear()
            await self._watch(self._folders())

    async def _watch(self, folders: dict[Path, tuple[int, int] | None]) -> None:
        """Watch one list of folders, until the list has to be another."""
        renewed = asyncio.ensure_future(self._renewed.wait())
        changes = _Changes(folders, recursive=False, debounce_s=self._debounce_s)
        try:
            while not self._renewed.is_set():
                await self._look()  # at once too: something may have been saved before the kernel was asked
                if self._folders() != folders:
                    return
                waiting = asyncio.ensure_future(changes.next())
                await asyncio.wait({waiting, renewed}, timeout=_SLOW_LOOK_S, return_when=asyncio.FIRST_COMPLETED)
                if not waiting.done():
                    waiting.cancel()
                    await asyncio.gather(waiting, return_exceptions=True)
        finally:
            renewed.cancel()
            await changes.close()

    async def _look(self) -> None:
        new = {match: "" for match in self._matches() if match not in self._marks}
        changed = [file for file, mark in {**self._marks, **new}.items() if mark_of(file) != mark]
        if not changed:
            return
        await asyncio.sleep(self._debounce_s)
        now = {file: mark_of(file) for file in changed}
        if any(mark.startswith("!") for mark in now.values()):  # half way through a save, or really gone
            await asyncio.sleep(max(0.25, 2 * self._debounce_s))
            now = {file: mark_of(file) for file in changed}
        here = {**dict.fromkeys(self._matches(), ""), **self._marks}  # the list may have been changed meanwhile
        differing = [file for file, mark in now.items() if file in here and here[file] != mark]
        for file in differing:
            self._marks[file] = now[file]
        if differing:
            self._on_change(differing)


def _identity(folder: Path) -> tuple[int, int] | None:
    try:
        found = folder.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino


class TreeWatch:
    """Calls `on_change(paths)` on the loop once changes are quiet for `debounce_s`.

    Paths that do not exist yet are waited for. `ignore` holds glob patterns, matched on names and on relative paths;
    `never` folders below which nothing counts.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        on_change: Callable[[list[Path]], None],
        *,
        ignore: Sequence[str] = (),
        never: Sequence[Path] = (),
        debounce_s: float = 0.5,
    ) -> None:
        self._never = [path.absolute() for path in never]
        self._paths = [path.absolute() for path in paths]
        self._ignore = (*IGNORED, *ignore)
        self._on_change, self._debounce_s = on_change, debounce_s
        self._task = asyncio.get_running_loop().create_task(self._run(), name="tree-watch")

    async def close(self) -> None:
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    def ignored(self, path: Path) -> bool:
        """Say whether a change of this path means nothing."""
        if any(path.is_relative_to(folder) for folder in self._never):
            return True
        for root in self._paths:
            if path == root:
                return False
            if path.is_relative_to(root):
                relative = path.relative_to(root)
                names = (*relative.parts, str(relative))
                return any(fnmatch.fnmatch(name, pattern) for name in names for pattern in self._ignore)
        return True

    def _matters(self, path: Path) -> bool:
        """Return whether a change may be relevant; ignored files must not delay others."""
        return not self.ignored(path) or any(root.is_relative_to(path) for root in self._paths)

    async def _run(self) -> None:
        while True:
            present = {path: path.exists() for path in self._paths}
            trees = frozenset(path for path, there in present.items() if there and path.is_dir())
            parents = frozenset(_existing(path.parent) for path in self._paths if path not in trees)
            if await self._watch(trees, parents, present):
                self._on_change([path for path in self._paths if path.exists() != present[path]])

    async def _watch(self, trees: frozenset[Path], parents: frozenset[Path], present: dict[Path, bool]) -> bool:
        """Report changes until a watched path comes or goes; True then."""
        sources = [
            _Changes(folders, recursive=recursive, debounce_s=self._debounce_s, matters=self._matters)
            for folders, recursive in ((trees, True), (parents, False))
            if folders
        ]
        waiting: dict[asyncio.Future[set[Path]], _Changes] = {}
        try:
            while True:
                for source in sources:
                    if source not in waiting.values():
                        waiting[asyncio.ensure_future(source.next())] = source
                done, _ = await asyncio.wait(waiting, timeout=_SLOW_LOOK_S, return_when=asyncio.FIRST_COMPLETED)
                changed: set[Path] = set()
                for future in done:
                    waiting.pop(future)
                    changed |= future.result()
                if any(path.exists() != there for path, there in present.items()):
                    await asyncio.sleep(self._debounce_s)
                    return any(path.exists() != there for path, there in present.items())
                wanted = sorted(path for path in changed if not self.ignored(path))
                if wanted:
                    self._on_change(wanted)
        finally:
            for future in waiting:
                future.cancel()
            await asyncio.gather(*waiting, return_exceptions=True)
            for source in sources:
                await source.close()


class _Changes:
    """Changed paths, collected until relevant ones are quiet for `debounce_s`."""

    def __init__(
        self,
        folders: Iterable[Path],
        *,
        recursive: bool,
        debounce_s: float,
        matters: Callable[[Path], bool] = lambda _path: True,
    ) -> None:
        self._matters = matters
        self._stop = asyncio.Event()
        self._found: set[Path] = set()
        self._news = asyncio.Event()
        self._quiet_s = debounce_s
        self._task: asyncio.Task[None] | None = None
        self._watch: inotify.FolderWatch | None = None
        loop = asyncio.get_running_loop()
        if recursive or not inotify.AVAILABLE:
            self._task = loop.create_task(self._read(list(folders), recursive))
            return
        try:
            self._watch = inotify.FolderWatch(loop, folders, self._note)
        except OSError:  # a folder that vanished, or no watches left: the slow look remains
            return

    def _note(self, paths: set[Path]) -> None:
        news = {path for path in paths if self._matters(path)}
        if news:
            self._found |= news
            self._news.set()

    async def _read(self, folders: list[Path], recursive: bool) -> None:
        from watchfiles import awatch

        try:
            async for changes in awatch(
                *folders,
                watch_filter=_everything,
                recursive=recursive,
                debounce=max(20, int(self._quiet_s * 1000)),
                step=_TREE_STEP_MS,
                stop_event=self._stop,
                ignore_permission_denied=True,
            ):
                self._note({Path(path) for _, path in changes})
        except (OSError, RuntimeError):  # a folder that vanished, or no watches left: the slow look remains
            return

    async def next(self) -> set[Path]:
        """Return what has changed, once there is something and it has been quiet."""
        await self._news.wait()
        while True:
            self._news.clear()
            try:
                async with asyncio.timeout(self._quiet_s):
                    await self._news.wait()
            except TimeoutError:
                break
        found, self._found = self._found, set()
        return found

    async def close(self) -> None:
        self._stop.set()
        if self._watch is not None:
            self._watch.close()
        if self._task is not None:
            await asyncio.gather(self._task, return_exceptions=True)


def _everything(_change: Change, _path: str) -> bool:
    return True
