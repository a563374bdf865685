"""Cases 17, 22, 39 and Supervisor 18: output arrives complete, once and in order; full disks."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tests.support.daemon import ROOT, fleetd
from tests.support.fleet_files import QUICK, all_lines, ctl, fleet, order, piped_lines, python, ready, sh, until_logged
from tests.support.waiting import until

WRITER = "import time\nfor n in range({count}): print('line', n, 'x' * (n % 97))\n{end}"


def line_numbers(lines: list[str]) -> list[int]:
    """Return the numbers of the writer's lines; a cut line fails the test."""
    found = []
    for line in lines:
        if line.startswith("line "):
            _, number, rest = line.split(" ", 2)
            assert rest == "x" * (int(number) % 97), line
            found.append(int(number))
        else:
            assert line.startswith("---"), line
    return found


@pytest.mark.parametrize("capture", ["file", "pipe"])
def test_case_22_rotations_cut_and_lose_no_line(tmp_path: Path, capture: str) -> None:
    count = 60_000
    logs = {"capture": capture, "max_size": "256KiB", "keep": 200, "compress": False}
    code = WRITER.format(count=count, end="time.sleep(1000)")
    with fleetd(tmp_path, fleet({"a": {"command": python(code), "logs": logs}})) as daemon:
        daemon.start()
        ready(daemon, "a")
        read = piped_lines if capture == "pipe" else all_lines
        until(lambda: len(list((tmp_path / "logs").glob("a.log.*"))) > 4, "it rotates")
        # not line by line: a line that is being written may be read in part
        until(lambda: f"line {count - 1} " in "\n".join(all_lines(tmp_path, "a")[-3:]), "all is written")
        assert order(daemon, "stop", "a").status == 200
        assert line_numbers(read(tmp_path, "a")) == list(range(count))


@pytest.mark.parametrize("capture", ["file", "pipe"])
def test_case_22_log_tail_is_complete_at_every_exit(tmp_path: Path, capture: str) -> None:
    """100 runs that write and exit at once; the last line has no newline."""
    code = "import os\nfor n in range(300): print('line', n, 'x' * (n % 97))\nos.write(1, b'the end')"
    restart = {"backoff": {"initial": "1ms", "max": "1ms"}, "crash_loop": {"count": 100, "window": "1h"}}
    with fleetd(
        tmp_path, fleet({"a": {"command": python(code), "logs": {"capture": capture}, "restart": restart}})
    ) as daemon:
        daemon.start()
        until(lambda: daemon.process_row("a")["state"] == "FAILED", "a hundred runs", 60)
        lines = piped_lines(tmp_path, "a") if capture == "pipe" else all_lines(tmp_path, "a")
        assert line_numbers([line for line in lines if line != "the end"]) == list(range(300)) * 100
        assert lines.count("the end") == 100
        assert sum(line.startswith("--- exited code=0") for line in lines) == 100


def test_case_22_deleted_log_is_recreated_by_the_next_run(tmp_path: Path) -> None:
    with fleetd(tmp_path, fleet({"a": {"command": sh("echo hello; exec sleep 1000"), "restart": QUICK}})) as daemon:
        daemon.start()
        pid = ready(daemon, "a")
        until_logged(daemon, "a", "hello")
        (tmp_path / "logs" / "a.log").unlink()
        assert ctl(daemon, "logs", "a").returncode == 0
        os.kill(pid, signal.SIGKILL)
        until_logged(daemon, "a", "hello")
        (tmp_path / "logs").rename(tmp_path / "gone")
        assert order(daemon, "restart", "a").status == 200
        until_logged(daemon, "a", "hello")


def test_case_22_deleted_piped_log_is_recreated(tmp_path: Path) -> None:
    code = "while true; do echo tick; sleep 0.02; done"
    services = {"a": {"command": sh(code), "logs": {"capture": "pipe", "max_size": "4KiB"}}}
    with fleetd(tmp_path, fleet(services)) as daemon:
        daemon.start()
        ready(daemon, "a")
        until_logged(daemon, "a", "tick")
        (tmp_path / "logs" / "a.log").unlink()
        until(lambda: "tick" in daemon.log_of("a"), "it is created again")


@pytest.mark.parametrize("capture", ["file", "pipe"])
def test_case_17_binary_output_is_harmless(tmp_path: Path, capture: str) -> None:
    raw = "\\xff\\xfe\\x00 nul \\x1b[31mred\\x1b[0m \\xf0\\x9f\\x98\\x80 gr\\xc3\\xb6\\xc3\\x9fe\\nend\\n"
    code = f"import os, time\nos.write(1, b'{raw}')\ntime.sleep(1000)"
    with fleetd(tmp_path, fleet({"a": {"command": python(code), "logs": {"capture": capture}}})) as daemon:
        daemon.start()
        ready(daemon, "a")
        until_logged(daemon, "a", "end")
        answer = daemon.control("GET", "/v1/logs/a").json["lines"]
        assert any("größe" in line["line"] for line in answer)
        for words in (("logs", "a"), ("logs", "a", "-o", "json"), ("status", "a")):
            done = ctl(daemon, *words, env={"LANG": "C", "LC_ALL": "C", "PYTHONIOENCODING": "ascii"})
            assert done.returncode == 0, done.stderr
            assert "Traceback" not in done.stderr


def test_case_17_closed_reader_stops_the_follower_quietly(tmp_path: Path) -> None:
    with fleetd(tmp_path, fleet({"a": {"command": sh("while true; do echo tick; sleep 0.01; done")}})) as daemon:
        daemon.start()
        ready(daemon, "a")
        until_logged(daemon, "a", "tick")
        line = f"{sys.executable} -m fleetd.cli.fleetctl --socket {daemon.socket} logs -f a | head -n 3"
        done = subprocess.run(["sh", "-c", line], cwd=ROOT, capture_output=True, text=True, timeout=30, check=False)
        assert done.stdout.count("tick") == 3
        assert "Traceback" not in done.stderr
        assert "Error" not in done.stderr


def test_case_17_program_can_reopen_its_own_output(tmp_path: Path) -> None:
    for capture in ("file", "pipe"):
        folder = tmp_path / capture
        folder.mkdir()
        services = {
            "a": {
                "command": sh("echo first > /dev/stdout; echo second >> /dev/stderr; exec sleep 1000"),
                "logs": {"capture": capture},
            }
        }
        with fleetd(folder, fleet(services)) as daemon:
            daemon.start()
            ready(daemon, "a")
            text = until_logged(daemon, "a", "second")
            assert "first" in text or capture == "file"  # reopened without O_APPEND it may be overwritten


def end_of(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - 200))
            return file.read()
    except FileNotFoundError:  # not there yet, or between the two halves of a rotation
        return b""


def test_supervisor_18_flood_and_endless_line_keep_memory_small(tmp_path: Path) -> None:
    flood = python(
        "import os, time\nblock = b'y' * 99 + b'\\n'\nfor n in range(1500): os.write(1, block * 1000)\n"
        "print('done'); time.sleep(1000)"
    )
    endless = python(
        "import os, time\nfor n in range(40): os.write(1, b'z' * (1 << 20))\nprint()\nprint('done')\ntime.sleep(1000)"
    )
    services = {
        f"{name}-{capture}": {
            "command": command,
            "logs": {"capture": capture, "max_size": "8MiB", "keep": 1, "compress": False},
        }
        for name, command in (("flood", flood), ("endless", endless))
        for capture in ("file", "pipe")
    }
    with fleetd(tmp_path, fleet(services)) as daemon:
        daemon.start()
        before = daemon.status()["daemon"]["rss_bytes"]
        most = before
        for name in services:
            path = tmp_path / "logs" / f"{name}.log"

            def done(path: Path = path) -> bool:
                nonlocal most
                most = max(most, daemon.status()["daemon"]["rss_bytes"])
                return b"done" in end_of(path) + end_of(
                    path.with_name(f"{path.name}.1")
                )  # the line may have filled the file

            until(done, f"{name} has written all", 60)
        assert most - before < 120 << 20
        assert daemon.status()["daemon"]["pid"] == daemon.pid


def test_case_39_full_disk_neither_blocks_nor_grows_and_recovers(tmp_path: Path) -> None:
    """A limit on file size of the daemon replaces the full disk."""
    code = (
        "import os, time\nn = 0\nwhile True:\n    print('line', n, 'x' * 1000); n += 1\n"
        "    with open('beat.part', 'w') as file: file.write(str(n))\n    os.replace('beat.part', 'beat'); time.sleep(0.0005)"
    )
    with fleetd(tmp_path, fleet({"a": {"command": python(code), "logs": {"capture": "pipe"}}})) as daemon:
        daemon.start()
        ready(daemon, "a")
        beat = tmp_path / "beat"
        until(beat.exists, "it writes")
        process = psutil.Process(daemon.pid)
        high = process.rlimit(resource.RLIMIT_FSIZE)
        log = tmp_path / "logs" / "a.log"
        limit = log.stat().st_size + 1_000_000  # a busy machine may set it late, and a larger file would stay larger
        process.rlimit(resource.RLIMIT_FSIZE, (limit, high[1]))
        until(lambda: log.stat().st_size > limit - 10_000, "the disk is full")
        seen = int(beat.read_text())
        until(lambda: int(beat.read_text()) > seen + 3000, "the program goes on although nothing can be written", 60)
        assert daemon.status()["daemon"]["rss_bytes"] < 250 << 20
        assert log.stat().st_size <= limit
        process.rlimit(resource.RLIMIT_FSIZE, high)
        text = until_logged(daemon, "a", "lines lost: the disk rejected them")
        for line in text.splitlines()[:-1]:
            json.loads(line)
        assert "Traceback" not in daemon.log()


def test_case_39_unwritable_state_stops_no_process(tmp_path: Path) -> None:
    with fleetd(tmp_path, fleet({"a": {"command": sh("exec sleep 1000"), "restart": QUICK}})) as daemon:
        daemon.start()
        pid = ready(daemon, "a")
        handles = tmp_path / "state" / "handles"
        for old in handles.iterdir():
            old.unlink()
        handles.rmdir()
        handles.write_text("in the way")
        os.kill(pid, signal.SIGKILL)
        until(lambda: daemon.process_row("a")["generation"] == 2, "it starts again")
        assert ready(daemon, "a") != pid
        assert order(daemon, "stop", "a").status == 200
        assert "Traceback" not in daemon.log()


def test_case_17_json_lines_are_complete_documents(tmp_path: Path) -> None:
    with fleetd(tmp_path, fleet({"a": {"command": sh("echo '{\"x\": 1}'; exec sleep 1000")}})) as daemon:
        daemon.start()
        ready(daemon, "a")
        until_logged(daemon, "a", "x")
        done = ctl(daemon, "logs", "a", "-o", "json")
        assert done.returncode == 0
        for line in done.stdout.splitlines():
            json.loads(line)
