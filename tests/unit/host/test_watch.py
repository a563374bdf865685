"""Saved files and changed trees."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from fleetd.host.watch import inotify
from fleetd.host.watch.watcher import FileWatch, TreeWatch, WatchPattern, folders_to_watch
from tests.support.waiting import until_async as until


def in_place(path: Path, text: str) -> None:
    path.write_text(text)


def by_rename(path: Path, text: str) -> None:
    fresh = path.with_name(".fleet.yaml.tmp123")
    fresh.write_text(text)
    fresh.replace(path)


def with_backup(path: Path, text: str) -> None:  # vim with backupcopy=no
    path.rename(path.with_name(path.name + "~"))
    path.write_text(text)
    path.with_name(path.name + "~").unlink()


def remove_and_write(path: Path, text: str) -> None:
    path.unlink()
    path.write_text(text)


def truncate_twice(path: Path, text: str) -> None:
    path.write_text("")
    path.write_text(text)


@pytest.mark.parametrize("save", [in_place, by_rename, with_backup, remove_and_write, truncate_twice])
def test_every_way_of_saving_is_seen_twice_in_a_row(save: Callable[[Path, str], None], tmp_path: Path) -> None:
    path = tmp_path / "fleet.yaml"
    path.write_text("one")

    async def run() -> None:
        seen: list[list[Path]] = []
        texts: list[str] = []
        watch = FileWatch([path], lambda files: (seen.append(files), texts.append(path.read_text())), debounce_s=0.03)
        for text in ("two", "three"):
            save(path, text)
            await until(lambda text=text: texts and texts[-1] == text, f"{text} seen")
        assert all(files == [path] for files in seen)
        await watch.close()

    asyncio.run(run())


def test_only_saved_files_are_reported_and_touch_counts(tmp_path: Path) -> None:
    path, other = tmp_path / "fleet.yaml", tmp_path / "other.yaml"
    for file in (path, other):
        file.write_text("same")

    async def run() -> None:
        seen: list[list[Path]] = []
        watch = FileWatch([path, other], seen.append, debounce_s=0.02)
        (tmp_path / "third.yaml").write_text("next to them")
        by_rename(other, "new")
        await until(lambda: seen)
        assert seen == [[other]]
        os.utime(path)
        await until(lambda: len(seen) == 2)
        assert seen[1] == [path]
        await watch.close()

    asyncio.run(run())


def test_what_a_pattern_matches_comes_goes_and_is_swapped(tmp_path: Path) -> None:
    """Folders are moved away and back and swapped, as deployments do."""
    read = tmp_path / "inc" / "a.yaml"
    read.parent.mkdir()
    read.write_text("a")

    async def run() -> None:
        seen: list[Path] = []
        patterns = [WatchPattern(tmp_path, "inc/*.yaml"), WatchPattern(tmp_path, "later/*/x.yaml")]
        watch = FileWatch([read], seen.extend, patterns=patterns, debounce_s=0.02)

        async def reported(*paths: Path) -> None:
            await until(lambda: set(paths) <= set(seen), str(paths), 2)  # sooner than the slow look
            seen.clear()

        new = tmp_path / "inc" / "new.yaml"
        new.write_text("n")
        await reported(new)
        new.write_text("mended")
        await reported(new)
        watch.update([read, new], patterns)
        (tmp_path / "inc").rename(tmp_path / "away")
        await reported(read, new)
        watch.update([], patterns)
        (tmp_path / "away").rename(tmp_path / "inc")
        await reported(read, new)
        watch.update([read, new], patterns)
        (tmp_path / "other").mkdir()
        (tmp_path / "other" / "b.yaml").write_text("b")
        (tmp_path / "inc").rename(tmp_path / "away")
        (tmp_path / "other").rename(tmp_path / "inc")
        await reported(read, new, tmp_path / "inc" / "b.yaml")
        (tmp_path / "inc" / "c.yaml").write_text("in the folder that took the name")
        await reported(tmp_path / "inc" / "c.yaml")
        (tmp_path / "later" / "1").mkdir(parents=True)
        (tmp_path / "later" / "1" / "x.yaml").write_text("x")
        await reported(tmp_path / "later" / "1" / "x.yaml")
        await watch.close()

    asyncio.run(run())


def test_a_swapped_symbolic_link_is_seen(tmp_path: Path) -> None:
    for name in ("v1", "v2"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "fleet.yaml").write_text(name)
    (tmp_path / "data").symlink_to("v1")
    (tmp_path / "etc").mkdir()
    path = tmp_path / "etc" / "fleet.yaml"
    path.symlink_to("../data/fleet.yaml")
    assert {tmp_path, tmp_path / "etc", tmp_path / "v1"} <= folders_to_watch([path])

    async def run() -> None:
        seen: list[list[Path]] = []
        watch = FileWatch([path], seen.append, debounce_s=0.03)
        (tmp_path / "fresh").symlink_to("v2")
        (tmp_path / "fresh").replace(tmp_path / "data")
        await until(lambda: seen == [[path]])
        (tmp_path / "v2" / "fleet.yaml").write_text("v2 edited")  # and what the new target says later
        await until(lambda: len(seen) == 2)
        await watch.close()

    asyncio.run(run())


def test_a_file_in_a_folder_that_comes_later(tmp_path: Path) -> None:
    path = tmp_path / "models.d" / "a.yaml"

    async def run() -> None:
        seen: list[list[Path]] = []
        watch = FileWatch([], seen.append, debounce_s=0.03)
        watch.update([path])
        path.parent.mkdir()
        path.write_text("x")
        await until(lambda: seen == [[path]])
        path.unlink()
        await until(lambda: len(seen) == 2)
        await watch.close()

    asyncio.run(run())


async def until_watched(tree: Path, seen: list[list[Path]]) -> None:
    """Return once changes in a tree are reported: the start is not reported."""
    before, written = len(seen), 0.0

    def reported() -> bool:
        nonlocal written
        if time.monotonic() > written + 1:  # with a pause: constant changes are never reported
            (tree / "first.txt").write_text(str(written))
            written = time.monotonic()
        return len(seen) > before

    await until(reported, "the tree is watched")


def all_paths(seen: list[list[Path]]) -> set[Path]:
    return {path for paths in seen for path in paths}


def test_burst_in_tree_is_one_change_without_ignored_names(tmp_path: Path) -> None:
    tree = tmp_path / "dist"
    tree.mkdir()

    async def run() -> None:
        seen: list[list[Path]] = []
        watch = TreeWatch([tree], seen.append, ignore=["*.map", "cache/*"], never=[tree / "state"], debounce_s=0.2)
        await until_watched(tree, seen)
        before = len(seen)
        for number in range(30):
            (tree / f"{number}.js").write_text("x")
            await asyncio.sleep(0)
        (tree / "new").mkdir()
        await until(lambda: {tree / "0.js", tree / "29.js", tree / "new"} <= all_paths(seen))
        assert len(seen) - before <= 5  # one, unless the machine paused in the middle
        (tree / "a.map").write_text("x")
        (tree / ".a.swp").write_text("x")
        (tree / "node_modules").mkdir()
        (tree / "state").mkdir()
        (tree / "state" / "fleetd.db").write_text("x")
        (tree / "new" / "deep.js").write_text("x")  # a folder that is new itself
        await until(lambda: tree / "new" / "deep.js" in all_paths(seen))
        (tree / "last.js").write_text("x")
        await until(lambda: tree / "last.js" in all_paths(seen))
        assert not all_paths(seen) & {
            tree / "a.map",
            tree / ".a.swp",
            tree / "node_modules",
            tree / "state",
            tree / "state" / "fleetd.db",
        }
        await watch.close()

    asyncio.run(run())


def test_what_is_ignored_and_never_rests_keeps_no_change_waiting(tmp_path: Path) -> None:
    tree = tmp_path / "app"
    (tree / "logs").mkdir(parents=True)

    async def chatter() -> None:
        while True:
            (tree / "logs" / "out.log").write_text(str(time.monotonic()))
            (tmp_path / "other.log").write_text(str(time.monotonic()))
            await asyncio.sleep(0.01)

    async def run() -> None:
        seen: list[list[Path]] = []
        watch = TreeWatch([tree, tmp_path / ".env"], seen.append, ignore=["logs"], debounce_s=0.3)
        talking = asyncio.ensure_future(chatter())
        await until_watched(tree, seen)
        (tree / "a.js").write_text("x")
        await until(lambda: tree / "a.js" in all_paths(seen), "a.js reported", 15)
        (tmp_path / ".env").write_text("x")
        await until(lambda: tmp_path / ".env" in all_paths(seen), ".env reported", 15)
        assert all_paths(seen) <= {tree / "first.txt", tree / "a.js", tmp_path / ".env"}
        talking.cancel()
        await watch.close()

    asyncio.run(run())


def test_a_tree_that_comes_and_goes(tmp_path: Path) -> None:
    tree = tmp_path / "dist"

    async def run() -> None:
        seen: list[list[Path]] = []
        watch = TreeWatch([tree, tmp_path / "file.txt"], seen.append, debounce_s=0.05)
        await asyncio.sleep(0)  # it has looked what is there
        tree.mkdir()
        await until(lambda: seen == [[tree]])
        await until_watched(tree, seen)
        (tmp_path / "file.txt").write_text("x")
        await until(lambda: tmp_path / "file.txt" in all_paths(seen))
        (tmp_path / "stranger.txt").write_text("x")
        (tree / "first.txt").unlink()
        tree.rmdir()
        await until(lambda: seen[-1] == [tree])
        assert tmp_path / "stranger.txt" not in all_paths(seen)
        await watch.close()

    asyncio.run(run())


@pytest.mark.skipif(not inotify.AVAILABLE, reason="only Linux has inotify")
def test_folders_cost_no_thread_and_a_vanished_one_no_error(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    found: set[Path] = set()

    async def body() -> None:
        loop = asyncio.get_running_loop()
        watch = inotify.FolderWatch(loop, [folder, tmp_path / "missing"], found.update)
        before = threading.active_count()
        (folder / "new").write_text("x")
        (folder / "new").rename(folder / "other")
        await until(lambda: {folder / "new", folder / "other"} <= found)
        (folder / "other").unlink()
        folder.rmdir()
        await until(lambda: folder in found)
        assert threading.active_count() == before
        watch.close()
        watch.close()
        with pytest.raises(OSError, match="No such file"):
            inotify.FolderWatch(loop, [folder], found.update)

    asyncio.run(asyncio.wait_for(body(), 20))
