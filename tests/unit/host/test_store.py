"""Durable state: it comes back, and what is broken is set aside."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import sqlite3
import subprocess
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from fleetd.core.data.specs import ExitKind, ExitReport, Remembered
from fleetd.errors import HostError
from fleetd.host import state_store as store_module
from fleetd.host.state_store import StateStore
from tests.support.waiting import until_async as until


@asynccontextmanager
async def opened(folder: Path) -> AsyncIterator[StateStore]:
    store = StateStore(folder)
    await store.open()
    try:
        yield store
    finally:
        await store.close()


def test_everything_comes_back(tmp_path: Path) -> None:
    last = ExitReport(None, "SIGSEGV", kind=ExitKind.CRASH, reason="it crashed")
    kept = Remembered(
        stopped=True, restarts=3, deaths=2, died_s=(1.5, 2.5), slow=True, failed="gave up", generation=9, again=True,
        last_exit=last, last_exit_s=4.5,
    )  # fmt: skip

    began = time.time()

    async def write() -> None:
        async with opened(tmp_path) as store:
            store.remember("a/ü", Remembered(restarts=1))
            store.remember("a/ü", kept)
            store.remember("gone", kept)
            store.forget("gone")
            store.learn("hash", "coder", {"gpu0": 5, "host": 1})
            store.learn("hash", "coder", {"gpu0": 7})
            store.record("exit", "web", {"code": 1})
            store.record("start", "api", {"pid": 5})
            store.put("port:web", 4711)

    async def read() -> None:
        async with opened(tmp_path) as store:
            assert store.remembered == {"a/ü": kept}
            assert await store.learned() == {"hash": {"gpu0": 7}}
            entry, _ = found = await store.last_of_each(1, 100)
            assert (entry.kind, entry.data) == ("exit", {"code": 1})
            assert [one.subject for one in found] == ["web", "api"]
            assert began <= entry.at <= time.time()
            assert await store.get("port:web") == 4711
            assert await store.get("port:none", 5) == 5
            assert store.problem is None
            assert store.quarantined == []

    asyncio.run(write())
    asyncio.run(read())


BROKEN_JSON = [
    b"",
    b"{",
    b"[]",
    b'{"version": 2, "processes": {}}',
    b'{"version": 1, "processes": {"a": 5}}',
    b"\xff\0",
    b"[" * 100_000,
]


@pytest.mark.parametrize("data", BROKEN_JSON)
def test_a_broken_file_is_set_aside(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "remembered.json").write_bytes(data)

    async def run() -> None:
        async with opened(tmp_path) as store:
            assert store.remembered == {}
            (aside,) = store.quarantined
            assert aside.read_bytes() == data
            store.remember("x", Remembered())
        assert json.loads((tmp_path / "remembered.json").read_text())["processes"].keys() == {"x"}

    asyncio.run(run())


def test_fields_of_a_later_version_are_ignored(tmp_path: Path) -> None:
    (tmp_path / "remembered.json").write_text('{"version": 1, "processes": {"a": {"stopped": true, "mood": "good"}}}')

    async def run() -> None:
        async with opened(tmp_path) as store:
            assert store.remembered == {"a": Remembered(stopped=True)}

    asyncio.run(run())


@pytest.mark.parametrize(
    "data", [b"no database at all, but quite some text " * 100, b"SQLite format 3\0" + b"\xff" * 5000]
)
def test_a_broken_database_is_set_aside(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "fleetd.db").write_bytes(data)

    async def run() -> None:
        async with opened(tmp_path) as store:
            assert any(path.name.startswith("fleetd.db.corrupt-") for path in store.quarantined)
            store.put("a", 1)
            assert await store.get("a") == 1

    asyncio.run(run())


def test_a_database_that_breaks_while_open(tmp_path: Path) -> None:
    async def run() -> None:
        async with opened(tmp_path) as store:
            for number in range(500):
                store.record("x", "y", {"text": "z" * 500, "n": number})
            await store.flush()
        data = bytearray((tmp_path / "fleetd.db").read_bytes())
        data[4096 * 3 :] = os.urandom(len(data) - 4096 * 3)
        (tmp_path / "fleetd.db").write_bytes(data)
        async with opened(tmp_path) as store:
            store.put("a", 1)
            assert await store.get("a") == 1
            assert store.quarantined

    asyncio.run(run())


def test_last_events_of_each_subject_survive_a_noisy_subject(tmp_path: Path) -> None:
    async def run() -> None:
        async with opened(tmp_path) as store:
            assert await store.last_of_each(3, 10) == []
            store.record("process", "quiet", {"n": -1})
            for number in range(500):
                store.record("process", "loud", {"n": number})
            found = await store.last_of_each(3, 10)
            assert [(entry.subject, entry.data["n"]) for entry in found] == [
                ("quiet", -1), ("loud", 497), ("loud", 498), ("loud", 499),
            ]  # fmt: skip
            assert len(await store.last_of_each(300, 10)) == 10

    asyncio.run(run())


def test_history_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_module, "_HISTORY_MAX", 50)
    monkeypatch.setattr(store_module, "_PRUNE_EVERY", 10)

    async def run() -> None:
        async with opened(tmp_path) as store:
            for number in range(500):
                store.record("x", "y", {"n": number})
            found = await store.last_of_each(1000, 1000)
            assert len(found) <= 60
            assert found[-1].data == {"n": 499}

    asyncio.run(run())


def test_a_writer_never_waits_and_never_piles_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_module, "_PENDING_MAX", 100)

    async def run() -> None:
        async with opened(tmp_path) as store:
            blocker = sqlite3.connect(tmp_path / "fleetd.db", isolation_level=None)
            blocker.execute("BEGIN IMMEDIATE")
            for number in range(500):
                store.record("x", "y", {"n": number})
            assert store.dropped >= 400
            blocker.execute("ROLLBACK")
            blocker.close()
            await store.flush()
            assert len(await store.last_of_each(1000, 1000)) >= 90

    asyncio.run(run())


def fill(path: Path) -> None:
    """Write until the disk is full."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT)
    try:
        while True:
            os.write(fd, b"x" * 4096)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
    finally:
        os.close(fd)


def test_a_full_disk_is_a_problem_that_passes(tmp_path: Path) -> None:
    folder = tmp_path / "small"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True, check=False).returncode != 0:
        pytest.skip("only root can mount a small disk")
    try:

        async def run() -> None:
            async with opened(folder) as store:
                store.put("before", 1)
                await store.flush()
                filler = folder / "filler"
                fill(filler)
                for number in range(200):
                    store.record("x", "y", {"text": "z" * 2000, "n": number})
                store.remember("a", Remembered(stopped=True))
                await store.flush()
                assert store.problem is not None
                assert store.remembered["a"].stopped
                filler.unlink()
                store.put("after", 2)
                store.remember("a", Remembered(stopped=True, restarts=1))
                await store.flush()
                assert await store.get("after") == 2
                assert await store.get("before") == 1
                assert store.problem is None

        asyncio.run(run())
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_what_a_disk_refused_is_written_once_it_takes_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full, kept = [True], tmp_path / "remembered.json"
    really = store_module.write_atomically

    def write(path: Path, data: bytes, *, durable: bool) -> None:
        if full[0]:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        really(path, data, durable=durable)

    monkeypatch.setattr(store_module, "write_atomically", write)
    monkeypatch.setattr(store_module, "_AGAIN_S", 0.02)

    async def run() -> None:
        async with opened(tmp_path) as store:
            store.remember("a", Remembered(stopped=True))
            assert "No space left on device" in (await store.kept() or "")
            full[0] = False
            await until(lambda: kept.exists() and store.problem is None, "it is written")
            assert await store.kept() is None
        assert json.loads(kept.read_bytes())["processes"]["a"]["stopped"]

    asyncio.run(run())


def test_a_state_folder_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")

    async def run() -> None:
        store = StateStore(tmp_path / "file" / "state")
        with pytest.raises(HostError, match="state folder"):
            await store.open()
        await store.close()

    asyncio.run(run())
