"""Logs: nothing lost, nothing cut, whatever the child writes and whatever happens to the disk."""

from __future__ import annotations

import asyncio
import errno
import gzip
import json
import os
import random
import re
import resource
import subprocess
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from fleetd.host.logs import pump as pump_module
from fleetd.host.logs import rotate as rotate_module
from fleetd.host.logs.files import LogFiles, LogState
from fleetd.host.logs.follow import LogFollower
from fleetd.host.logs.pump import as_json_lines
from fleetd.host.logs.punch_hole import can_punch, punch
from fleetd.host.logs.rotate import bound_total, compress_archives, recover, rotate
from fleetd.host.logs.tail import Wanted, read_tail
from fleetd.host.logs.time_index import TimeIndex
from fleetd.host.types import LogPolicy
from tests.support.host import DEADLINE_S, POLITE, Exits, host_in, log_says, python, spawn
from tests.support.waiting import until_async as until

KIB, MIB = 1024, 1024 * 1024
SMALL = LogPolicy(max_size_bytes=64 * KIB, keep=3, compress=False)


def files_with(folder: Path, data: bytes) -> LogFiles:
    folder.mkdir(exist_ok=True)
    files = LogFiles(folder, "web")
    files.live.write_bytes(data)
    return files


def numbered(count: int, begin: int = 0) -> bytes:
    return b"".join(b"line %08d %s\n" % (number, b"x" * (number % 97)) for number in range(begin, begin + count))


def live_bytes(files: LogFiles) -> bytes:
    return files.live.read_bytes()[files.read_state().start :]


def everything(files: LogFiles) -> bytes:
    """Return all archives and the live part, oldest first."""
    parts = []
    for path in reversed(files.archives()):
        parts.append(gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes())
    return b"".join([*parts, live_bytes(files)])


@pytest.mark.parametrize("meanwhile", ["rotated", "packed"])
def test_archives_that_move_under_a_look_are_read_once_each(tmp_path: Path, meanwhile: str) -> None:
    def archived() -> LogFiles:
        files = files_with(tmp_path / "logs", numbered(3000))
        rotate(files, replace(SMALL, keep=20))
        assert len(files.archives()) > 1
        return files

    plain = archived()
    wanted = [line.text for line in read_tail(plain, Wanted(5000))]
    assert len(wanted) == 3000

    class Moving(LogFiles):
        moved = False

        def archives(self) -> list[Path]:
            paths = super().archives()
            if not Moving.moved:
                Moving.moved = True
                for path in reversed(paths):
                    number = int(path.name.rsplit(".", 1)[1])
                    if meanwhile == "rotated":
                        path.replace(plain.archive(number + 1))
                    else:
                        plain.archive(number, compressed=True).write_bytes(gzip.compress(path.read_bytes()))
                        path.unlink()
            return paths

    before = psutil.Process().num_fds()
    assert [line.text for line in read_tail(Moving(plain.folder, plain.name), Wanted(5000))] == wanted
    assert Moving.moved
    assert psutil.Process().num_fds() == before


LONG = [
    "A" * 70_000,
    "B" * 300_000,
    'é"\\\n' * 60_000,
    "\x1b[1m" * 30_000,
    "\\" * 290_001,
]


@pytest.mark.parametrize("line", LONG, ids=lambda line: f"{line[:2]!r} {len(line)}")
@pytest.mark.parametrize("place", ["live", "archive", "compressed"])
def test_a_long_line_of_the_pump_is_shown_as_text_with_its_time(tmp_path: Path, line: str, place: str) -> None:
    files = files_with(tmp_path / "logs", as_json_lines(["before", line, "after"], 1795442609.763))
    if place != "live":
        rotate(files, replace(SMALL, max_size_bytes=64 * MIB), force=True)
    if place == "compressed":
        compress_archives(files)
    before, long, after = read_tail(files, Wanted(10, since=1795442609.0))
    assert (before.text, after.text) == ("before", "after")
    assert {line.at for line in (before, long, after)} == {1795442609.763}
    assert long.text[:1000] == line[:1000]
    assert long.text[-1000:] == line[-1000:]
    assert re.search(r" … \d+ bytes … ", long.text)
    assert len(long.text.encode()) < 66_000
    assert '{"t":' not in long.text
    assert '"}' not in long.text
    assert [line.text for line in read_tail(files, Wanted(10, grep=re.compile("^" + re.escape(line[:3]))))] == [
        long.text
    ]


@pytest.mark.parametrize("line", LONG, ids=lambda line: f"{line[:2]!r} {len(line)}")
def test_follow_long_pump_line_gives_text_and_time(tmp_path: Path, line: str) -> None:
    files = files_with(tmp_path / "logs", b"")
    follower, shown = LogFollower(files, lambda: 0), []
    data = as_json_lines(["before", line, "after"], 1795442609.763)
    with files.live.open("ab", buffering=0) as log:
        for begin in range(0, len(data), 50_000):
            log.write(data[begin : begin + 50_000])
            shown += follower.step()
    follower.close()
    assert [shown[0].text, shown[-1].text, len(shown)] == ["before", "after", 3]
    assert {line.at for line in shown} == {1795442609.763}
    assert shown[1].text[:1000] == line[:1000]
    assert "bytes" in shown[1].text
    assert '{"t":' not in shown[1].text


# -- rotation --------------------------------------------------------------------------------------------------------


def test_rotation_moves_whole_lines_and_frees_them(tmp_path: Path) -> None:
    data = numbered(3000) + b"unfinished"
    files = files_with(tmp_path, data)
    inode, before = files.live.stat().st_ino, files.live.stat().st_blocks
    done = rotate(files, replace(SMALL, keep=10))
    assert done.problem is None
    assert done.archived >= 2
    assert everything(files) == data
    assert all(path.read_bytes().endswith(b"\n") and path.stat().st_size <= 64 * KIB for path in files.archives())
    assert files.live.stat().st_ino == inode
    assert files.live.stat().st_size == len(data)  # offsets stay; the disk is given back
    if can_punch(tmp_path):
        assert files.live.stat().st_blocks < before


def test_what_is_not_due_is_left_alone(tmp_path: Path) -> None:
    files = files_with(tmp_path, numbered(10))
    assert rotate(files, SMALL).archived == 0
    assert files.archives() == []
    assert rotate(LogFiles(tmp_path, "none"), SMALL) == rotate_module.Rotation()


def test_force_archives_the_whole_lines_that_are_there(tmp_path: Path) -> None:
    files = files_with(tmp_path, b"a\nb\nhalf")
    assert rotate(files, SMALL, force=True).archived == 1
    assert files.archive(1).read_bytes() == b"a\nb\n"
    assert live_bytes(files) == b"half"
    assert rotate(files, SMALL, force=True).archived == 0


def test_age_rotates(tmp_path: Path) -> None:
    files = files_with(tmp_path, b"a\n")
    files.write_state(LogState(files.live.stat().st_ino, 0, time.time() - 100))
    assert rotate(files, replace(SMALL, max_age_s=200)).archived == 0
    assert rotate(files, replace(SMALL, max_age_s=50)).archived == 1


def test_keep_is_kept(tmp_path: Path) -> None:
    files = files_with(tmp_path, b"")
    for number in range(6):
        with files.live.open("ab") as file:
            file.write(b"%d\n" % number)
        assert rotate(files, SMALL, force=True).archived == 1
    assert [path.read_bytes() for path in files.archives()] == [b"5\n", b"4\n", b"3\n"]
    files_with(tmp_path / "zero", b"a\n")
    assert rotate(LogFiles(tmp_path / "zero", "web"), replace(SMALL, keep=0), force=True).problem is None
    assert LogFiles(tmp_path / "zero", "web").archives() == []


def test_a_flood_is_bounded_at_once(tmp_path: Path) -> None:
    files = files_with(tmp_path, numbered(60_000))
    assert rotate(files, SMALL).problem is None
    kept = everything(files)
    assert len(kept) <= 5 * 64 * KIB
    assert numbered(60_000).endswith(kept)  # the newest lines, none missing in between
    assert kept.startswith(b"line ")


def test_a_line_of_100_mb_is_survived_with_little_memory(tmp_path: Path) -> None:
    files = files_with(tmp_path, b"first\n")
    block = b"y" * MIB
    with files.live.open("ab") as file:
        for _ in range(100):
            file.write(block)
        file.write(b"\nlast\n")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    tail = read_tail(files, Wanted(3))
    assert [len(line.text) > 60_000 for line in tail] == [False, True, False]
    assert tail[-1].text == "last"
    assert rotate(files, LogPolicy(max_size_bytes=50 * MIB, keep=2, compress=False)).problem is None
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * KIB < 64 * MIB
    assert live_bytes(files) == b"last\n"
    assert [path.stat().st_size for path in files.archives()] == [100 * MIB + 1, 6]


def test_an_endless_line_is_cut_at_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rotate_module, "_LEAST_UNBROKEN", 0)
    files = files_with(tmp_path, b"z" * (200 * KIB))
    assert rotate(files, SMALL).archived == 0  # it may still end
    with files.live.open("ab") as file:
        file.write(b"z" * (100 * KIB))
    assert rotate(files, SMALL).archived == 1
    assert everything(files) == b"z" * (300 * KIB)


STEPS = ["_copy", "write_state", "shift", "punch"]


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_a_crash_between_any_two_steps_loses_and_doubles_nothing(
    step: str, after: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = numbered(2000)
    files = files_with(tmp_path, data)
    owner = LogFiles if step == "write_state" else rotate_module
    real = getattr(owner, step)

    class Crash(BaseException):
        pass

    def crash(*args: object, **fields: object) -> None:
        if after:
            real(*args, **fields)
        raise Crash

    with monkeypatch.context() as patched:
        patched.setattr(owner, step, crash)
        with pytest.raises(Crash):
            rotate(files, replace(SMALL, keep=10))
    recover(files)
    assert everything(files) == data
    assert rotate(files, replace(SMALL, keep=10)).problem is None
    assert everything(files) == data
    assert not list(tmp_path.glob("*.pending"))


def test_a_full_disk_loses_no_live_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = numbered(2000)
    files = files_with(tmp_path, data)

    def full(_fd: int, target: Path, _start: int, _end: int) -> None:
        target.write_bytes(b"half of it")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(rotate_module, "_copy", full)
        done = rotate(files, replace(SMALL, keep=10))
    assert done.problem is not None
    assert "disk is full" in done.problem
    assert everything(files) == data
    assert not list(tmp_path.glob("*.pending"))
    assert rotate(files, replace(SMALL, keep=10)).problem is None
    assert everything(files) == data


def test_lines_lost_to_full_disk_are_reported_by_next_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def run() -> None:
        async with host_in(tmp_path) as host:
            with monkeypatch.context() as patched:
                patched.setattr(pump_module, "_write_whole", lambda _fd, _text, _before: False)
                first = await spawn(host, python("for n in range(5): print(n)"), logs=LogPolicy(capture="pipe"))
                await first.exited.wait()
                await host.sweep(first)
            again = await spawn(host, python("print('here')"), generation=2, logs=LogPolicy(capture="pipe"))
            await again.exited.wait()
            await host.sweep(again)
            lines = [line.text for line in await host.logs.tail("child", 10)]
            assert lines[:2] == ["--- 6 lines lost: the disk rejected them ---", "here"], (
                "five lines, and the mark of the end"
            )

    asyncio.run(run())


def test_a_really_full_disk(tmp_path: Path) -> None:
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = (
        os.geteuid() == 0
        and subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], capture_output=True, check=False
        ).returncode
        == 0
    )
    if not mounted:
        pytest.skip("only root can mount a small disk")
    try:
        data = numbered(100_000)[: 700 * KIB]
        files = files_with(folder, data)
        done = rotate(files, LogPolicy(max_size_bytes=600 * KIB, keep=2, compress=False))
        assert done.problem is not None
        assert "disk is full" in done.problem
        assert live_bytes(files) == data

        async def run() -> int | None:
            async with host_in(folder) as host:  # the log of a new child, on the full disk
                exits = Exits()
                handle = await spawn(
                    host,
                    python("import sys\nfor n in range(40000): print('z' * 60)\nsys.stdout.flush()"),
                    exits,
                    logs=LogPolicy(capture="pipe", max_size_bytes=600 * KIB),
                )
                ended = await exits.next()  # it continued although its output could not be kept
                await host.sweep(handle)
                return ended.code

        assert asyncio.run(run()) == 0
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_without_holes_the_file_is_emptied_or_left(tmp_path: Path) -> None:
    files = files_with(tmp_path, numbered(700))
    assert rotate(files, replace(SMALL, max_size_bytes=MIB), force=True, can_punch=False).archived == 1
    assert files.live.stat().st_size == 0
    assert everything(files) == numbered(700)
    files.live.write_bytes(b"whole\nhalf")
    done = rotate(files, SMALL, force=True, can_punch=False)
    assert done.archived == 0
    assert done.problem is not None
    assert live_bytes(files) == b"whole\nhalf"


def test_compression_keeps_order_and_content(tmp_path: Path) -> None:
    data = numbered(4000)
    files = files_with(tmp_path, data)
    rotate(files, replace(SMALL, keep=10))
    assert compress_archives(files) is None
    assert {path.suffix for path in files.archives()} == {".gz"}
    assert everything(files) == data
    with files.live.open("ab") as file:
        file.write(numbered(2000, 4000))
    rotate(files, replace(SMALL, keep=10))
    assert everything(files) == numbered(6000)
    assert [line.text for line in read_tail(files, Wanted(5500))] == numbered(6000).decode().splitlines()[500:]


@pytest.mark.parametrize("mode", [0o640, 0o600])
def test_an_archive_may_be_read_by_whom_the_log_may_be_read(tmp_path: Path, mode: int) -> None:
    files = files_with(tmp_path / "logs", numbered(1000))
    files.live.chmod(mode)
    old = os.umask(0o022)
    try:
        assert rotate(files, SMALL, force=True).archived
        assert {path.stat().st_mode & 0o777 for path in files.archives()} == {mode}
        assert compress_archives(files) is None
    finally:
        os.umask(old)
    assert {path.suffix for path in files.archives()} == {".gz"}
    assert {path.stat().st_mode & 0o777 for path in files.archives()} == {mode}


def test_the_total_is_bounded_by_deleting_the_oldest(tmp_path: Path) -> None:
    for age, name in enumerate(("a", "b", "c")):
        files = LogFiles(tmp_path, name)
        files.live.write_bytes(b"live\n")
        for number in (1, 2):
            path = files.archive(number, compressed=number == 2)
            path.write_bytes(b"x" * 100 * KIB)
            os.utime(path, (1000 - age * 10 - number, 1000 - age * 10 - number))
    assert bound_total(tmp_path, 350 * KIB) == 3
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == ["a.log", "a.log.1", "a.log.2.gz", "b.log", "b.log.1", "c.log"]


def test_state_of_another_file_counts_for_nothing(tmp_path: Path) -> None:
    files = files_with(tmp_path, b"hello\n")
    for text in ("", "{", "[]", '{"inode": 1, "start": 3, "since": 0, "pending": ""}', '{"inode": "x"}', "\0" * 100):
        files.state_path.write_text(text)
        assert files.read_state() == LogState()
    assert [line.text for line in read_tail(files, Wanted())] == ["hello"]


# -- reading ---------------------------------------------------------------------------------------------------------


def test_tail_over_blocks_archives_and_holes(tmp_path: Path) -> None:
    lines = numbered(5000)
    files = files_with(tmp_path, lines + b"open end")
    rotate(files, replace(SMALL, keep=20))
    whole = [*lines.decode().splitlines(), "open end"]
    for count in (0, 1, 2, 500, 3000, 5001, 9000):
        assert [line.text for line in read_tail(files, Wanted(count))] == whole[-count:] if count else True
    found = read_tail(files, Wanted(5, grep=re.compile(r"line 0000001\d")))
    assert [line.text[:13] for line in found] == [f"line 000000{n}" for n in range(15, 20)]


@pytest.mark.parametrize("seed", range(8))
def test_tail_of_garbage_never_breaks(seed: int, tmp_path: Path) -> None:
    chance = random.Random(seed)
    data = bytes(chance.choice((0, 10, 13, 255, 0x80, 65, 123, 34)) for _ in range(chance.randrange(1, 200_000)))
    files = files_with(tmp_path, data + b'\n{"t": "x"}\n{"t":1e999,"line":[]}\n' + b'{"t":' * 9000)
    assert rotate(files, SMALL).problem is None
    assert all(isinstance(line.text, str) for line in read_tail(files, Wanted(1000)))


def test_tail_of_empty_or_missing_log_is_empty(tmp_path: Path) -> None:
    assert read_tail(LogFiles(tmp_path, "none"), Wanted()) == []
    assert read_tail(files_with(tmp_path, b""), Wanted()) == []
    assert [line.text for line in read_tail(files_with(tmp_path, b"\n\n"), Wanted())] == ["", ""]


def test_a_hole_frees_and_reads_as_nothing(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_bytes(b"a" * 100_000)
    if not can_punch(tmp_path):
        pytest.skip("this file system has no holes")
    fd = os.open(path, os.O_RDWR)
    punch(fd, 0, 70_000)
    os.close(fd)
    assert path.read_bytes() == b"\0" * 70_000 + b"a" * 30_000
    assert path.stat().st_blocks * 512 <= 40_000


NASTY = st.text(alphabet=st.sampled_from("\",\\'{}[]:ab\t\0ü€😀\r"), max_size=12)


@example([","], 0.0)
@example(['",'], 0.0)
@example([",", "a", ",", '","'], 0.0)
@given(st.lists(NASTY | st.text(max_size=20), min_size=1, max_size=8), st.floats(0, 4e9))
def test_json_lines_contain_the_output(lines: list[str], at: float) -> None:
    clean = [line.encode("utf-8", "replace").decode() for line in lines]
    objects = [json.loads(row) for row in as_json_lines(clean, at).split(b"\n")[:-1]]
    assert [entry["line"] for entry in objects] == clean
    assert all(abs(entry["t"] - at) < 0.001 for entry in objects)


# -- with real children ----------------------------------------------------------------------------------------------

WRITER = """
import sys
count, pad = int(sys.argv[1]), "x" * int(sys.argv[2])
for number in range(count):
    print(number, pad)
sys.stdout.flush()
"""


@pytest.mark.parametrize("capture", ["file", "pipe"])
def test_200_000_lines_under_rotation(capture: str, tmp_path: Path) -> None:
    policy = LogPolicy(max_size_bytes=MIB, keep=100, compress=False, capture=capture)
    count = 200_000

    async def run() -> None:
        async with host_in(tmp_path) as host:
            exits = Exits()
            handle = await spawn(host, python(WRITER, str(count), "40"), exits, logs=policy)
            while not exits.seen:
                await host.logs.rotate("child") if capture == "file" else await asyncio.sleep(0.05)
            await host.sweep(handle)
            await host.logs.rotate("child")

    asyncio.run(run())
    files = LogFiles(tmp_path / "logs", "child")
    assert len(files.archives()) > 3
    lines = everything(files).splitlines()
    if capture == "pipe":
        lines = [json.loads(line)["line"].encode() for line in lines]
    assert lines[-1].startswith(b"--- exited code=0 ")
    assert len(lines) == count + 1
    assert all(
        line.split(b" ", 1)[0] == b"%d" % number and len(line.split(b" ")[1]) == 40
        for number, line in enumerate(lines[:-1])
    )


@pytest.mark.parametrize("capture", ["file", "pipe"])
def test_the_end_is_complete_a_hundred_times(capture: str, tmp_path: Path) -> None:
    source = (
        "import os\nos.write(1, b''.join(b'%d\\n' % n for n in range(2000)))\nos.write(2, b'no newline')\nos._exit(3)"
    )
    expected = [*map(str, range(2000)), "no newline"]

    async def one(host: object, number: int) -> None:
        exits = Exits()
        handle = await spawn(host, python(source), exits, name=f"w{number}", logs=LogPolicy(capture=capture))  # type: ignore[arg-type]
        await exits.next()
        lines = [line.text for line in await host.logs.run_tail(handle, 5000)]  # type: ignore[attr-defined]
        assert lines == expected
        await host.sweep(handle)  # type: ignore[attr-defined]

    async def run() -> None:
        async with host_in(tmp_path) as host:
            for batch in range(0, 100, 10):
                await asyncio.gather(*(one(host, number) for number in range(batch, batch + 10)))

    asyncio.run(run())


def test_a_flood_of_300_mb_costs_the_daemon_nothing(tmp_path: Path) -> None:
    source = "import os\nblock = (b'f' * 99 + b'\\n') * 10486\nfor _ in range(286): os.write(1, block)"

    async def run() -> tuple[float, int]:
        async with host_in(tmp_path) as host:
            exits = Exits()
            before, cpu = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
            handle = await spawn(host, python(source), exits, logs=LogPolicy(compress=False, keep=2))
            assert (await exits.next()).code == 0
            cost = time.process_time() - cpu
            await host.sweep(handle)
            await host.logs.rotate("child")
            return cost, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * KIB

    cost_s, memory_bytes = asyncio.run(run())
    assert memory_bytes < 32 * MIB
    assert cost_s < 3.0  # only rotation; the bytes themselves never pass through here
    total = sum(path.stat().st_blocks * 512 for path in (tmp_path / "logs").iterdir())
    assert total < 220 * MIB


def test_housekeeping_rotates_by_itself(tmp_path: Path) -> None:
    async def run() -> None:
        async with host_in(tmp_path) as host:
            handle = await spawn(
                host,
                python("import time\nwhile True:\n    print('x' * 1000, flush=True)\n    time.sleep(0.0005)"),
                logs=LogPolicy(max_size_bytes=32 * KIB, keep=2, compress=True),
            )
            files = host.logs.files("child")
            await until(
                lambda: len(files.archives()) == 2 and any(p.suffix == ".gz" for p in files.archives()), "two archives"
            )
            await host.stop(handle, POLITE)

    asyncio.run(run())


def test_offsets_outlive_the_daemon(tmp_path: Path) -> None:
    data = numbered(3000)

    async def one(begin: int) -> None:
        async with host_in(tmp_path) as host:
            exits = Exits()
            argv = ("/bin/cat", str(tmp_path / f"part{begin}"))
            handle = await spawn(host, argv, exits, logs=replace(SMALL, keep=50), generation=begin + 1)
            await exits.next()
            await host.sweep(handle)
            await host.logs.rotate("child")

    for part in range(3):
        (tmp_path / f"part{part}").write_bytes(numbered(1000, part * 1000))
        asyncio.run(one(part))
    kept = everything(LogFiles(tmp_path / "logs", "child"))
    assert b"".join(line + b"\n" for line in kept.splitlines() if not line.startswith(b"---")) == data


@pytest.mark.parametrize("capture", ["file", "pipe"])
def test_follow_sees_every_line_once_across_rotations(capture: str, tmp_path: Path) -> None:
    count = 20_000
    source = (
        "import sys, time\nfor n in range(int(sys.argv[1])):\n    print(n, 'x' * 40)\n"
        "    if n % 500 == 0: sys.stdout.flush(); time.sleep(0.01)"
    )
    policy = LogPolicy(max_size_bytes=200 * KIB, keep=50, compress=False, capture=capture)

    async def run() -> list[str]:
        async with host_in(tmp_path) as host:
            exits = Exits()
            handle = await spawn(host, python(source, str(count)), exits, logs=policy)
            await log_says(host, handle, "0 ")
            before, stream = await host.logs.follow("child", lines=10**6)
            texts = [line.text for line in before]
            async with asyncio.timeout(60):
                async for lines in stream:
                    texts += [line.text for line in lines]
                    if texts and texts[-1].startswith("--- exited"):
                        break
            await stream.aclose()
            await host.sweep(handle)
            return texts

    texts = asyncio.run(run())
    assert [text.split()[0] for text in texts[:-1]] == [str(number) for number in range(count)]


def test_follow_waits_for_a_log_that_is_not_there_yet(tmp_path: Path) -> None:
    async def run() -> None:
        async with host_in(tmp_path) as host:
            before, stream = await host.logs.follow("child")
            assert before == []
            handle = await spawn(host, ("/bin/sh", "-c", "echo hello; sleep 600"))
            async with asyncio.timeout(DEADLINE_S):
                assert [line.text for line in await anext(stream)] == ["hello"]
            await stream.aclose()
            await host.stop(handle, POLITE)

    asyncio.run(run())


def test_since_for_lines_without_times(tmp_path: Path) -> None:
    index = TimeIndex()
    for at, size in ((10.0, 0), (11.0, 100), (12.0, 100), (13.0, 250)):
        index.sample(at, size)
    assert [index.offset_at(since) for since in (9.0, 10.5, 11.0, 12.5, 20.0)] == [None, 0, 100, 100, 250]


def test_time_index_is_bounded_and_keeps_new_lines() -> None:
    index = TimeIndex()
    for second in range(100_000):
        for part in (0.0, 0.1, 0.2):  # deaths in quick succession
            index.sample(second + part, second * 10 + int(part * 10))
    assert len(index._at) == len(index._size) <= 2048
    for since in (99_999.0, 99_500.0, 90_000.0):
        offset = index.offset_at(since)
        assert offset is not None
        assert offset <= since * 10, "a line newer than that is before the offset"
        assert since * 10 - offset <= 20 + (100_000 - since) * 10 / 50, "the further back, the coarser"


def test_run_tail_shows_one_run_only(tmp_path: Path) -> None:
    async def run() -> None:
        async with host_in(tmp_path) as host:
            for generation in (1, 2):
                for capture in ("file", "pipe"):
                    exits = Exits()
                    handle = await spawn(
                        host, ("/bin/echo", f"run {generation}"), exits, name=capture, generation=generation,
                        logs=LogPolicy(capture=capture),
                    )  # fmt: skip
                    await exits.next()
                    assert [line.text for line in await host.logs.run_tail(handle)] == [f"run {generation}"]
                    await host.sweep(handle)

    asyncio.run(run())


@pytest.mark.parametrize("capture", ["file", "pipe"])
def test_run_tail_ends_at_the_exit_of_the_leader(tmp_path: Path, capture: str) -> None:
    """A helper of vLLM warns of leaked semaphores after its leader has exited with the reason."""
    go = tmp_path / "go"

    async def run() -> None:
        async with host_in(tmp_path) as host:
            exits = Exits()
            late = f"(while [ ! -e {go} ]; do sleep 0.01; done; echo late) &"
            command = ("/bin/sh", "-c", f"{late} echo the reason; exit 1")
            handle = await spawn(host, command, exits, name="a", logs=LogPolicy(capture=capture))
            await exits.next()
            await host.logs.run_tail(handle)  # the mark is written
            go.touch()
            await until(lambda: "late" in (tmp_path / "logs" / "a.log").read_text())
            assert [line.text for line in await host.logs.run_tail(handle)] == ["the reason"]
            await host.sweep(handle)

    asyncio.run(run())
