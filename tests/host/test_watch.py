"""Saved files and changed trees."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from fleetd.host import inotify
from fleetd.host.watch import FileWatch, TreeWatch, folders_to_watch
from tests.host.support import until


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
            await asyncio.sleep(0.15)
            save(path, text)
            await until(lambda text=text: texts and texts[-1] == text, f"{text} seen")
        assert all(files == [path] for files in seen)
        await watch.close()

    asyncio.run(run())


def test_the_same_content_again_is_no_change(tmp_path: Path) -> None:
    path = tmp_path / "fleet.yaml"
    path.write_text("same")

    async def run() -> None:
        seen: list[list[Path]] = []
        watch = FileWatch([path], seen.append, debounce_s=0.02)
        await asyncio.sleep(0.1)
        by_rename(path, "same")
        await asyncio.sleep(0.3)
        assert seen == []
        by_rename(path, "new")
        await until(lambda: seen)
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
        await asyncio.sleep(0.15)
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
        await asyncio.sleep(0.15)
        path.parent.mkdir()
        await asyncio.sleep(0.1)
        path.write_text("x")
        await until(lambda: seen == [[path]])
        path.unlink()
        await until(lambda: len(seen) == 2)
        await watch.close()

    asyncio.run(run())


def test_a_burst_in_a_tree_is_one_change_and_ignored_names_are_none(tmp_path: Path) -> None:
    tree = tmp_path / "dist"
    tree.mkdir()

    async def run() -> None:
        seen: list[list[Path]] = []
        watch = TreeWatch([tree], seen.append, ignore=["*.map", "cache/*"], debounce_s=0.2)
        await asyncio.sleep(0.2)
        for number in range(30):
            (tree / f"{number}.js").write_text("x")
            await asyncio.sleep(0.005)
        (tree / "new").mkdir()
        await until(lambda: {tree / "0.js", tree / "29.js"} <= {path for paths in seen for path in paths})
        burst = len(seen)
        assert burst <= 5  # one, unless the machine paused in the middle
        (tree / "a.map").write_text("x")
        (tree / ".a.swp").write_text("x")
        (tree / "node_modules").mkdir()
        await asyncio.sleep(0.6)
        assert len(seen) == burst
        (tree / "new" / "deep.js").write_text("x")  # a folder that is new itself
        await until(lambda: len(seen) > burst)
        await watch.close()

    asyncio.run(run())


def test_a_tree_that_comes_and_goes(tmp_path: Path) -> None:
    tree = tmp_path / "dist"

    async def run() -> None:
        seen: list[list[Path]] = []
        watch = TreeWatch([tree, tmp_path / "file.txt"], seen.append, debounce_s=0.05)
        await asyncio.sleep(0.15)
        tree.mkdir()
        await until(lambda: seen == [[tree]])
        await asyncio.sleep(0.15)
        (tree / "a.js").write_text("x")
        await until(lambda: len(seen) == 2)
        (tmp_path / "file.txt").write_text("x")
        await until(lambda: len(seen) >= 3)
        (tmp_path / "stranger.txt").write_text("x")
        (tree / "a.js").unlink()
        tree.rmdir()
        await until(lambda: seen[-1] == [tree])
        assert not any(path.name == "stranger.txt" for paths in seen for path in paths)
        await watch.close()

    asyncio.run(run())


@pytest.mark.skipif(not inotify.AVAILABLE, reason="only Linux has inotify")
def test_folders_cost_no_thread_and_a_vanished_one_no_error(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    found: set[Path] = set()

    async def body() -> None:
        loop = asyncio.get_running_loop()
        watch = inotify.FolderWatch(loop, [folder, tmp_path / "absent"], found.update)
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
