"""A daemon that is killed at any moment loses no line that it had read from a pipe, and writes none twice."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from fleetd.host.logs.fifo import open_pair
from fleetd.host.logs.files import LogFiles
from fleetd.host.logs.spool import READ, Spool, open_spool

# A daemon's pump on one pipe, until it is killed, or until nothing more comes.
PUMP = """
    import sys, time
    from pathlib import Path
    from fleetd.host.logs.fifo import reopen
    from fleetd.host.logs.files import LogFiles
    from fleetd.host.logs.pump import Pump, Stream
    from fleetd.host.types import LogPolicy

    folder, protected, last = Path(sys.argv[1]), sys.argv[2] == "True", sys.argv[3] == "True"
    pump = Pump(lambda *_: None)
    policy = LogPolicy(max_size_bytes=200_000, keep=1000, compress=False, capture="pipe")
    stream = Stream(reopen(folder / "pipe"), LogFiles(folder, "a"), policy, folder / "a.spool" if protected else None)
    pump.add(stream).result()
    print("up", flush=True)
    if last:
        sys.stdin.read()
        pump.finish(stream).result()
    else:
        time.sleep(600)
"""


@pytest.fixture
def ends(tmp_path: Path) -> Iterator[tuple[int, int, int]]:
    """The two ends of a pipe, and a log."""
    source, end = os.pipe()
    log = os.open(tmp_path / "log", os.O_RDWR | os.O_CREAT | os.O_APPEND)
    yield source, end, log
    for fd in (source, end, log):
        os.close(fd)


@pytest.mark.parametrize(
    "killed", ["in the read", "after the read", "in the write", "after the write", "when all is noted"]
)
def test_what_a_killed_daemon_had_in_hand_is_written_once(
    killed: str, ends: tuple[int, int, int], tmp_path: Path
) -> None:
    source, end, log = ends
    os.write(log, b"before\n")
    first = Spool(tmp_path / "spool")
    assert first.recover(log) == b""
    os.write(end, b"one\ntwo\nhal")
    if killed == "in the read":
        notes = iter([first._note])  # the first says that a read begins; there is no second
        first._note = lambda **more: next(notes)(**more)  # type: ignore[method-assign]
        with pytest.raises(StopIteration):
            first.read(source)
    else:
        assert first.read(source) == b"one\ntwo\nhal"
    if "write" in killed or "noted" in killed:
        size = os.fstat(log).st_size
        first.writing(os.fstat(log).st_ino, size, size + 8, 3)
        os.write(log, b"one\ntw" if killed == "in the write" else b"one\ntwo\n")
    if killed == "when all is noted":
        first.written(3, 0)
    second = Spool(tmp_path / "spool")  # of the next daemon: the first is never closed
    left = second.recover(log)
    assert left == (b"hal" if "after the write" in killed or "noted" in killed else b"one\ntwo\nhal")
    assert (tmp_path / "log").read_bytes() == b"before\n" + (b"" if len(left) > 3 else b"one\ntwo\n")
    os.write(end, b"f\n")
    assert second.read(source) == b"f\n"
    assert Spool(tmp_path / "spool").recover(log) == left + b"f\n"


def test_lost_lines_are_known_to_the_next_daemon(ends: tuple[int, int, int], tmp_path: Path) -> None:
    source, end, log = ends
    first = Spool(tmp_path / "spool")
    first.recover(log)
    os.write(end, b"one\n")
    first.read(source)
    first.written(0, 7)
    second = Spool(tmp_path / "spool")
    assert second.recover(log) == b""
    assert second.lost == 7


def test_spool_many_reads_fit_and_too_long_rest_is_dropped(ends: tuple[int, int, int], tmp_path: Path) -> None:
    source, end, log = ends
    one = Spool(tmp_path / "spool")
    one.recover(log)
    rest = b""
    for number in range(200):
        block = b"%d" % number + b"x" * 20_000
        os.write(end, block)
        assert one.read(source) == block
        rest = block if number % 10 == 9 else rest + block
        one.written(len(rest), 0)
        expected = rest if len(rest) <= READ else b""
        assert Spool(tmp_path / "spool").recover(log) == expected


def test_spool_without_room_or_with_garbage_starts_empty(ends: tuple[int, int, int], tmp_path: Path) -> None:
    _, _, log = ends
    assert open_spool(None) is None
    assert open_spool(tmp_path / "missing" / "spool") is None
    Spool(tmp_path / "spool").close()
    size = (tmp_path / "spool").stat().st_size
    (tmp_path / "spool").write_bytes(random.Random(1).randbytes(size))
    assert Spool(tmp_path / "spool").recover(log) == b""
    (tmp_path / "spool").write_bytes(b"short")
    assert Spool(tmp_path / "spool").recover(log) == b""


def after_kills(folder: Path, *, protected: bool) -> list[int]:
    """Kill a daemon's pump repeatedly under a writing child; return logged numbers."""
    chance, stop = random.Random(5), threading.Event()
    reader, end = open_pair(folder / "pipe")
    written = 0

    def talk() -> None:
        nonlocal written
        while not stop.is_set():
            block = b"".join(b"%08d %s\n" % (written + number, b"z" * (written % 97)) for number in range(1, 31))
            os.write(end, block)
            written += 30
            time.sleep(0.001)

    talking = threading.Thread(target=talk)
    talking.start()
    script = textwrap.dedent(PUMP)
    for last in [False] * 25 + [True]:
        with subprocess.Popen(
            [sys.executable, "-c", script, str(folder), str(protected), str(last)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        ) as daemon:
            assert daemon.stdout is not None
            assert daemon.stdout.readline() == b"up\n"
            if not last:
                time.sleep(chance.uniform(0, 0.05))
                daemon.send_signal(signal.SIGKILL)
            else:
                stop.set()
                talking.join()  # while somebody reads: the pipe may be full
                daemon.communicate(timeout=60)
    os.close(reader)
    os.close(end)
    files = LogFiles(folder, "a")
    paths = [*reversed(files.archives()), files.live]
    lines = [json.loads(line)["line"] for path in paths for line in path.read_bytes().splitlines()]
    assert all(line.endswith("z" * ((int(line[:8]) - 1) // 30 * 30 % 97)) for line in lines), "a line is cut"
    assert written == max(int(line[:8]) for line in lines)
    return [int(line[:8]) for line in lines]


def test_pump_killed_repeatedly_writes_every_line_once(tmp_path: Path) -> None:
    numbers = after_kills(tmp_path, protected=True)
    assert numbers == list(range(1, len(numbers) + 1))
