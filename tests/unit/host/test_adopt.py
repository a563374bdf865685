"""A daemon that dies, by SIGKILL or by an execv, and the next one that takes over its processes."""

from __future__ import annotations

import asyncio
import ctypes
import json
import os
import signal
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from fleetd.errors import HostError
from fleetd.host.host import Host
from fleetd.host.process.handle import Records, decode_records, encode_records, parse_record
from fleetd.host.types import HandleRecord, LogPolicy
from tests.support.host import POLITE, Exits, host_in, log_says, paths_in, python, spawn
from tests.support.waiting import alive
from tests.support.waiting import until_async as until

REPOSITORY = Path(__file__).resolve().parents[3]

# A daemon of its own: spawns, says the pids, and waits to be killed.
DAEMON = """
    import asyncio, os, sys
    from pathlib import Path
    from fleetd.host.host import Host
    from fleetd.resolver.environment import inherited
    from fleetd.host.types import HostPaths, LogPolicy, Program, SpawnRequest

    async def main(folder, *argv):
        host = Host(HostPaths(folder / "state", folder / "run", folder / "logs"))
        await host.start()
        request = SpawnRequest("worker", 3, Program(argv, inherited(os.environ)), extra={"launch_hash": "abc"})
        handle = await host.spawn(request, lambda _: None)
        print(handle.pid, flush=True)
        await asyncio.sleep(600)

    asyncio.run(main(Path(sys.argv[1]), *sys.argv[2:]))
"""


def daemon_that_is_killed(folder: Path, argv: tuple[str, ...]) -> int:
    """Kill a daemon after its spawn; return the pid of the child that init adopts."""
    ctypes.CDLL(None).prctl(36, 0, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER off: an earlier test's host switched it on
    with subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(DAEMON), str(folder), *argv],
        stdout=subprocess.PIPE,
        cwd=REPOSITORY,
        text=True,
    ) as daemon:
        assert daemon.stdout is not None
        pid = int(daemon.stdout.readline())
        daemon.kill()
    return pid


def only_record(host: Host) -> HandleRecord:
    records, moved = host.load_records()
    assert moved == []
    (record,) = records
    return record


def test_after_a_crash_the_process_is_adopted_and_its_death_seen(tmp_path: Path) -> None:
    pid = daemon_that_is_killed(tmp_path, python("import time; print('up', flush=True); time.sleep(600)"))

    async def run() -> None:
        async with host_in(tmp_path) as host:
            exits = Exits()
            record = only_record(host)
            assert (record.name, record.generation, record.pid, record.extra) == (
                "worker",
                3,
                pid,
                {"launch_hash": "abc"},
            )
            handle = await host.adopt(record, exits)
            assert alive(pid)
            assert handle.uptime_s > 0
            await log_says(host, handle, "up")
            os.kill(pid, signal.SIGKILL)
            ended = await exits.next()
            assert (ended.generation, ended.code, ended.signal) == (3, None, None)
            assert await host.sweep(handle) == ()
            assert host.load_records() == ([], [])

    asyncio.run(run())


def test_stop_of_adopted_process_stops_its_descendants(tmp_path: Path) -> None:
    program = """
        import os, time
        if os.fork() == 0:
            os.setsid()
            if os.fork(): os._exit(0)
            print("worker", os.getpid(), flush=True); print("up", flush=True)
            time.sleep(600)
        time.sleep(600)
    """
    pid = daemon_that_is_killed(tmp_path, python(program))

    async def run() -> None:
        async with host_in(tmp_path) as host:
            host._cgroups = None
            record = replace(
                only_record(host), cgroup=None
            )  # the token alone must find the orphan, which is init's child now
            exits = Exits()
            handle = await host.adopt(record, exits)
            lines = await log_says(host, handle, "up")
            worker = next(int(line.split()[1]) for line in lines if line.startswith("worker"))
            assert await host.stop(handle, POLITE) == ()
            assert not alive(pid)
            assert not alive(worker)
            assert len(exits.seen) == 1

    asyncio.run(run())


def test_adopt_dead_leader_sweeps_its_orphans(tmp_path: Path) -> None:
    program = """
        import os, time
        if os.fork() == 0:
            print("worker", os.getpid(), flush=True); print("up", flush=True)
            time.sleep(600)
        time.sleep(600)
    """
    pid = daemon_that_is_killed(tmp_path, python(program))

    async def run() -> None:
        async with host_in(tmp_path) as host:
            record = only_record(host)
            (worker_line,) = await until(
                lambda: [line for line in Path(record.log_path).read_text().splitlines() if line.startswith("worker")]
            )
            worker = int(worker_line.split()[1])
            os.kill(pid, signal.SIGKILL)
            await until(lambda: not alive(pid))
            with pytest.raises(HostError, match=r"gone|dead"):
                await host.adopt(record, lambda _: None)
            assert alive(worker)
            assert await host.sweep_record(record) == ()
            assert not alive(worker)
            assert host.load_records() == ([], [])

    asyncio.run(run())


def doubtful(record: HandleRecord) -> dict[str, HandleRecord]:
    return {
        "another boot": replace(record, boot_id="another"),
        "a recycled pid": replace(record, start_ticks=record.start_ticks + 1),
        "no pid": replace(record, pid=None),
        "dead": replace(record, pid=2**22 - 7),
        "a stranger": replace(record, token="0" * 16, exe="/none", cgroup=None),
    }


@pytest.mark.parametrize("case", ["another boot", "a recycled pid", "no pid", "dead", "a stranger"])
def test_what_cannot_be_proven_is_neither_adopted_nor_killed(case: str, tmp_path: Path) -> None:
    async def run() -> None:
        async with host_in(tmp_path) as host:
            handle = await spawn(host, ("sleep", "600"))
            record = doubtful(handle.record)[case]
            with pytest.raises(HostError) as caught:
                await host.adopt(record, lambda _: None)
            assert "child" in str(caught.value)
            if case in ("another boot", "a stranger"):
                assert await host.sweep_record(record) == ()
            assert alive(handle.pid)

    asyncio.run(run())


def test_an_unconfirmed_start_is_found_by_its_token(tmp_path: Path) -> None:
    async def run() -> None:
        async with host_in(tmp_path) as host:
            handle = await spawn(host, ("sleep", "600"))
            assert await host.sweep_record(replace(handle.record, pid=None, start_ticks=0)) == ()
            await handle.exited.wait()
            assert not alive(handle.pid)

    asyncio.run(run())


def test_unconfirmed_start_output_is_in_its_log(tmp_path: Path) -> None:
    source = """
        import os, sys, time
        while not os.path.exists(sys.argv[1]): time.sleep(0.01)
        for number in range(100): print("line", number, flush=True)
        open(sys.argv[2], "w").close()
        time.sleep(600)
    """
    go, written = tmp_path / "go", tmp_path / "written"

    async def run() -> None:
        async with host_in(tmp_path) as host:
            argv = python(source, str(go), str(written))
            handle = await spawn(host, argv, logs=LogPolicy(capture="pipe"))
            (kept,) = await host.prepare_exec()  # no reader any more, as after a crash
            assert kept.pipe_fd is not None
            os.close(kept.pipe_fd)
            go.touch()
            await until(written.exists, "all is in the pipe")
            assert await host.sweep_record(replace(handle.record, pid=None, start_ticks=0)) == ()
            lines = [line.text for line in await host.logs.tail("child", 200) if line.text.startswith("line ")]
            assert lines == [f"line {number}" for number in range(100)]

    asyncio.run(run())


EXEC_DAEMON = """
    import asyncio, os, sys
    from pathlib import Path
    from fleetd.host.process.handle import decode_records, encode_records
    from fleetd.host.host import Host
    from fleetd.resolver.environment import inherited
    from fleetd.host.types import Execution, HostPaths, LogPolicy, Program, SpawnRequest, StopPolicy

    SOURCE = (
        "import os, sys, time\\nprint('before', flush=True)\\n"
        "while not os.path.exists(sys.argv[1]): time.sleep(0.01)\\n"
        "print('after', flush=True)\\nos._exit(42)"
    )

    async def main(folder, carried):
        host = Host(HostPaths(folder / "state", folder / "run", folder / "logs"))
        await host.start()
        ended = asyncio.get_running_loop().create_future()
        if carried is None:
            argv = (sys.executable, "-I", "-S", "-c", SOURCE, str(folder / "go"))
            program = Program(argv, inherited(os.environ), Execution(logs=LogPolicy(capture="pipe")))
            handle = await host.spawn(SpawnRequest("piped", 1, program), lambda _: None)
            while not any(line.text == "before" for line in await host.logs.tail("piped")):
                await asyncio.sleep(0.01)
            data = encode_records(await host.prepare_exec())
            await host.close()
            (folder / "carried").write_bytes(data)
            return True
        (record,) = decode_records((folder / "carried").read_bytes())
        assert record.pipe_fd is not None
        handle = await host.adopt(record, ended.set_result)
        (folder / "go").touch()
        seen = await asyncio.wait_for(ended, 20)
        await host.sweep(handle)
        lines = [line.text for line in await host.logs.tail("piped")]
        print(seen.code, "|".join(lines), flush=True)
        await host.close()
        return False

    carried = sys.argv[2] if len(sys.argv) > 2 else None
    if asyncio.run(main(Path(sys.argv[1]), carried)):
        os.execv(sys.executable, [sys.executable, os.environ["SELF"], sys.argv[1], "again"])
"""


def test_an_execv_keeps_children_pipes_and_exit_codes(tmp_path: Path) -> None:
    script = tmp_path / "daemon.py"
    script.write_text(textwrap.dedent(EXEC_DAEMON))
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "SELF": str(script), "PYTHONPATH": str(REPOSITORY)},
        cwd=REPOSITORY,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("42 before|after|--- exited code=42 "), done.stdout + done.stderr


def test_child_exit_during_execv_is_reported_with_code(tmp_path: Path) -> None:
    async def run() -> None:
        async with host_in(tmp_path) as first:
            handle = await spawn(first, ("/bin/sh", "-c", "read x < /proc/self/fd/9 2>/dev/null; sleep 0.05; exit 9"))
            data = encode_records(await first.prepare_exec())
            first._handles.clear()
            assert handle.watch is not None
            handle.watch.close()
        await until(lambda: psutil.Process(handle.pid).status() == psutil.STATUS_ZOMBIE, "a zombie")
        async with host_in(tmp_path) as second:
            exits = Exits()
            (record,) = decode_records(data)
            adopted = await second.adopt(record, exits)
            assert (await exits.next()).code == 9
            assert await second.sweep(adopted) == ()

    asyncio.run(run())


RECORD = HandleRecord("web", 1, "token", "boot", pid=123, start_ticks=5, argv=("a", "b"), extra={"x": 1})


def test_records_come_back_as_they_were(tmp_path: Path) -> None:
    records = Records(paths_in(tmp_path).handles)
    odd = replace(RECORD, name="../ü b\n")
    records.write(RECORD)
    records.write(odd)
    found, moved = records.load()
    assert sorted(found, key=lambda r: r.name) == sorted([RECORD, odd], key=lambda r: r.name)
    assert moved == []
    records.remove(replace(RECORD, token="older"))  # a run that was replaced meanwhile
    assert len(records.load()[0]) == 2
    records.remove(RECORD)
    assert records.load()[0] == [odd]


BROKEN = {
    "empty": b"",
    "torn": json.dumps({"version": 1, "name": "web"}).encode()[:-5],
    "another version": b'{"version": 99, "name": "web", "generation": 1, "token": "t", "boot_id": "b"}',
    "a list": b"[1, 2]",
    "pid of init": b'{"version": 1, "name": "web", "generation": 1, "token": "t", "boot_id": "b", "pid": 1}',
    "pid negative": b'{"version": 1, "name": "web", "generation": 1, "token": "t", "boot_id": "b", "pid": -1}',
    "pid a word": b'{"version": 1, "name": "web", "generation": 1, "token": "t", "boot_id": "b", "pid": "12"}',
    "no token": b'{"version": 1, "name": "web", "generation": 1, "boot_id": "b"}',
    "binary": bytes(range(256)),
    "deep": b"[" * 100_000,
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_records_are_set_aside(case: str, tmp_path: Path) -> None:
    folder = paths_in(tmp_path).handles
    folder.mkdir(parents=True)
    (folder / "web.json").write_bytes(BROKEN[case])
    Records(folder).write(replace(RECORD, name="good"))
    found, moved = Records(folder).load()
    assert [record.name for record in found] == ["good"]
    assert moved == [folder / "web.json.corrupt"]
    assert moved[0].read_bytes() == BROKEN[case]
    with pytest.raises(ValueError):
        parse_record(BROKEN[case])


def test_unwritable_folder_is_a_problem_not_an_error(tmp_path: Path) -> None:
    (tmp_path / "state").write_text("a file where the folder should be")
    records = Records(paths_in(tmp_path).handles)
    records.write(RECORD)
    assert records.problem is not None
    assert "web" in records.problem
    assert records.load() == ([], [])
