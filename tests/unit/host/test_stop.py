"""Stops and sweeps of real process trees that do everything to stay alive."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from pathlib import Path

import pytest

from fleetd.host.host import Host
from fleetd.host.process.handle import ProcessHandle
from fleetd.host.system.ports import is_free
from fleetd.host.types import StopPolicy
from tests.support.host import POLITE, Exits, host_in, log_says, pids_in, python, spawn
from tests.support.ports import free_port
from tests.support.waiting import alive
from tests.support.waiting import until_async as until

QUICK = StopPolicy(timeout_s=0.3)

# Each program prints `worker PID` for every process it leaves behind, and then `up`.
STAY = "signal.signal(signal.SIGTERM, signal.SIG_IGN)"
SETSID_CHILD = """
    import os, sys, time
    if os.fork() == 0:
        os.setsid()
        print("worker", os.getpid(), flush=True)
        print("up", flush=True)
        time.sleep(600)
    time.sleep(600)
"""
DOUBLE_FORK = """
    import os, time
    pid = os.fork()
    if pid == 0:
        os.setsid()
        if os.fork() == 0:
            os.setsid()
            print("worker", os.getpid(), flush=True)
            print("up", flush=True)
            time.sleep(600)
        os._exit(0)
    os.waitpid(pid, 0)
    time.sleep(600)
"""
STUBBORN_FAMILY = """
    import os, signal, time
    signal.signal(signal.SIGTERM, signal.SIG_IGN); signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    for number in range(3):
        if os.fork() == 0:
            if number: os.setsid()
            if number == 2 and os.fork(): os._exit(0)
            print("worker", os.getpid(), flush=True)
            while True: time.sleep(600)
    time.sleep(0.1)
    print("up", flush=True)
    while True: time.sleep(600)
"""
BARE_ENVIRONMENT = """
    import os, time
    pid = os.fork()
    if pid == 0:
        os.setsid()
        if os.fork() == 0:
            os.execve("/bin/sh", ["sh", "-c", "echo worker $$; echo up; exec sleep 600"], {"PATH": os.environ["PATH"]})
        os._exit(0)
    os.waitpid(pid, 0)
    time.sleep(600)
"""


async def up(host: Host, handle: ProcessHandle) -> list[int]:
    lines = await log_says(host, handle, "up")
    return pids_in(lines, "worker")


@pytest.mark.parametrize(
    "program", [SETSID_CHILD, DOUBLE_FORK, STUBBORN_FAMILY], ids=["setsid", "double fork", "stubborn"]
)
@pytest.mark.parametrize("cgroups", [True, False], ids=["cgroup", "no cgroup"])
def test_nobody_is_left(program: str, cgroups: bool, tmp_path: Path) -> None:
    async def run() -> None:
        async with host_in(tmp_path) as host:
            if not cgroups:
                host._cgroups = None
            exits = Exits()
            handle = await spawn(host, python(program), exits)
            workers = await up(host, handle)
            assert workers
            assert all(alive(pid) for pid in workers)
            assert await host.stop(handle, QUICK) == ()
            assert not any(alive(pid) for pid in [*workers, handle.pid])
            assert len(exits.seen) == 1

    asyncio.run(run())


def test_process_without_token_is_found_in_its_cgroup(tmp_path: Path) -> None:
    async def run() -> None:
        async with host_in(tmp_path) as host:
            if host._cgroups is None:
                pytest.skip("no cgroup v2 tree is ours on this machine")
            # In its cgroup before it forks: the leader waits until it was moved.
            wait = "import time\nwhile 'fleetd-' not in open('/proc/self/cgroup').read(): time.sleep(0.005)\n"
            import textwrap

            handle = await spawn(host, python(wait + textwrap.dedent(BARE_ENVIRONMENT)))
            (worker,) = await up(host, handle)
            assert await host.stop(handle, QUICK) == ()
            assert not alive(worker)

    asyncio.run(run())


def test_a_well_behaved_child_is_gone_in_milliseconds(tmp_path: Path) -> None:
    async def run() -> list[float]:
        took = []
        async with host_in(tmp_path) as host:
            for generation in range(1, 8):
                handle = await spawn(host, ("sleep", "600"), generation=generation)
                began = time.perf_counter()
                assert await host.stop(handle, POLITE) == ()
                took.append(time.perf_counter() - began)
        return took

    assert min(asyncio.run(run())) < 0.06  # typically 4 ms; the best of several, as the machine may be busy


def test_a_sweep_of_nothing_takes_milliseconds(tmp_path: Path) -> None:
    async def run() -> list[float]:
        took = []
        async with host_in(tmp_path) as host:
            for generation in range(1, 8):
                exits = Exits()
                handle = await spawn(host, ("/bin/true",), exits, generation=generation)
                await exits.next()
                began = time.perf_counter()
                assert await host.sweep(handle) == ()
                took.append(time.perf_counter() - began)
        return took

    assert min(asyncio.run(run())) < 0.03


LEADER_DIES = """
    import os, socket, sys, time
    s = socket.socket(); s.bind(("127.0.0.1", int(sys.argv[1]))); s.listen()
    if os.fork() == 0:
        print("worker", os.getpid(), flush=True); print("up", flush=True)
        if sys.argv[2] == "deaf":
            import signal
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        while True: time.sleep(600)
    while True: time.sleep(600)
"""


@pytest.mark.parametrize("manner", ["polite", "deaf"])
def test_leader_killed_alone_leaves_worker_with_port_and_stdout(manner: str, tmp_path: Path) -> None:
    port = free_port()

    async def run() -> None:
        async with host_in(tmp_path) as host:
            exits = Exits()
            handle = await spawn(host, python(LEADER_DIES, str(port), manner), exits, port=port)
            (worker,) = await up(host, handle)
            os.kill(handle.pid, signal.SIGKILL)
            ended = await exits.next()
            assert (ended.code, ended.signal) == (None, "SIGKILL")
            assert alive(worker)
            assert not is_free("127.0.0.1", port)
            assert await host.sweep(handle) == ()
            assert not alive(worker)
            assert is_free("127.0.0.1", port)
            assert not list(host.paths.handles.glob("*.json"))

    asyncio.run(run())


def test_orphans_are_asked_before_they_are_killed(tmp_path: Path) -> None:
    program = """
        import os, signal, time
        if os.fork() == 0:
            def bye(*_): print("cleaned up", flush=True); os._exit(0)
            signal.signal(signal.SIGTERM, bye)
            print("up", flush=True)
            while True: time.sleep(600)
        time.sleep(600)
    """

    async def run() -> None:
        async with host_in(tmp_path) as host:
            handle = await spawn(host, python(program))
            await up(host, handle)
            assert await host.stop(handle, POLITE) == ()  # the leader dies at once and leaves the child to us
            await log_says(host, handle, "cleaned up")

    asyncio.run(run())


@pytest.mark.parametrize("who", ["leader", "worker"])
def test_frozen_processes_die_too(who: str, tmp_path: Path) -> None:
    async def run() -> None:
        async with host_in(tmp_path) as host:
            handle = await spawn(host, python(SETSID_CHILD))
            (worker,) = await up(host, handle)
            os.kill(handle.pid if who == "leader" else worker, signal.SIGSTOP)
            assert await host.stop(handle, StopPolicy(timeout_s=5)) == ()
            assert not alive(worker)
            assert not alive(handle.pid)

    asyncio.run(run())


DEAF = """
    import signal, time
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    print("up", flush=True)
    while True: time.sleep(600)
"""


def test_grace_is_given_in_full_and_then_ends(tmp_path: Path) -> None:
    async def run() -> None:
        async with host_in(tmp_path) as host:
            exits = Exits()
            handle = await spawn(host, python(DEAF), exits)
            await up(host, handle)
            began = time.monotonic()
            assert await host.stop(handle, StopPolicy(timeout_s=0.5)) == ()
            assert 0.5 <= time.monotonic() - began < 5
            assert exits.seen[0].signal == "SIGKILL"
            assert not exits.seen[0].oom

    asyncio.run(run())


def test_force_skips_the_grace(tmp_path: Path) -> None:
    async def run() -> None:
        async with host_in(tmp_path) as host:
            handle = await spawn(host, python(DEAF))
            await up(host, handle)
            began = time.monotonic()
            assert await host.stop(handle, StopPolicy(timeout_s=60), force=True) == ()
            assert time.monotonic() - began < 10

    asyncio.run(run())


def test_a_second_stop_escalates_the_first(tmp_path: Path) -> None:
    async def run() -> None:
        async with host_in(tmp_path) as host:
            handle = await spawn(host, python(DEAF))
            await up(host, handle)
            began = time.monotonic()
            first = asyncio.ensure_future(host.stop(handle, StopPolicy(timeout_s=60)))
            done, _ = await asyncio.wait({first}, timeout=0.1)
            assert not done
            assert await host.stop(handle, StopPolicy(timeout_s=60)) == ()
            assert await first == ()
            assert time.monotonic() - began < 10

    asyncio.run(run())


def test_a_cancelled_stop_goes_on(tmp_path: Path) -> None:
    async def run() -> None:
        async with host_in(tmp_path) as host:
            exits = Exits()
            handle = await spawn(host, ("sleep", "600"), exits)
            task = asyncio.ensure_future(host.stop(handle, POLITE))
            await asyncio.sleep(0)
            task.cancel()
            await exits.next()
            assert await host.sweep(handle) == ()

    asyncio.run(run())


@pytest.mark.parametrize(("kill", "survives"), [("set", False), ("group", True), ("leader", True)])
def test_kill_scopes(kill: str, survives: bool, tmp_path: Path) -> None:
    async def run() -> None:
        async with host_in(tmp_path) as host:
            handle = await spawn(host, python(SETSID_CHILD))
            (worker,) = await up(host, handle)
            assert await host.stop(handle, StopPolicy(timeout_s=5, kill=kill)) == ()
            assert not alive(handle.pid)
            assert alive(worker) is survives
            if survives:
                os.kill(worker, signal.SIGKILL)
                await until(lambda: not alive(worker))

    asyncio.run(run())


def test_the_stop_signal_is_a_choice(tmp_path: Path) -> None:
    program = """
        import signal, sys, time
        signal.signal(signal.SIGINT, lambda *_: sys.exit(3)); signal.signal(signal.SIGTERM, signal.SIG_IGN)
        print("up", flush=True)
        time.sleep(600)
    """

    async def run() -> None:
        async with host_in(tmp_path) as host:
            exits = Exits()
            handle = await spawn(host, python(program), exits)
            await up(host, handle)
            assert await host.stop(handle, StopPolicy(signal="INT", timeout_s=10)) == ()
            assert exits.seen[0].code == 3

    asyncio.run(run())


@pytest.mark.parametrize(
    ("command", "exit_signal"),
    [
        (("/bin/sh", "-c", "kill -USR1 $MAINPID"), "SIGUSR1"),
        (("/bin/false",), "SIGTERM"),
        (("/none/at/all",), "SIGTERM"),
    ],
    ids=["works", "fails", "missing"],
)
def test_a_stop_command_and_its_fall_back(command: tuple[str, ...], exit_signal: str, tmp_path: Path) -> None:
    async def run() -> None:
        async with host_in(tmp_path) as host:
            exits = Exits()
            handle = await spawn(host, ("sleep", "600"), exits)
            assert await host.stop(handle, StopPolicy(command=command)) == ()
            assert exits.seen[0].signal == exit_signal

    asyncio.run(run())


def test_a_stop_command_that_hangs_does_not_hang_the_stop(tmp_path: Path) -> None:
    async def run() -> None:
        async with host_in(tmp_path) as host:
            handle = await spawn(host, ("sleep", "600"))
            began = time.monotonic()
            assert await host.stop(handle, StopPolicy(command=("sleep", "600"), timeout_s=0.3)) == ()
            assert time.monotonic() - began < 8

    asyncio.run(run())


def test_a_family_that_forks_all_the_time_is_caught(tmp_path: Path) -> None:
    program = """
        import os, signal, time
        signal.signal(signal.SIGTERM, signal.SIG_IGN); signal.signal(signal.SIGCHLD, signal.SIG_IGN)
        print("up", flush=True)
        end = time.time() + 60
        while time.time() < end:
            if os.fork() == 0:
                os.setsid()
                time.sleep(0.05)
                if os.fork(): os._exit(0)
                time.sleep(0.2); os._exit(0)
            time.sleep(0.01)
    """

    async def run() -> None:
        async with host_in(tmp_path) as host:
            handle = await spawn(host, python(program))
            await up(host, handle)
            token = f"FLEETD_SPAWN={handle.lineage.token}".encode()
            assert await host.stop(handle, StopPolicy(timeout_s=0.2)) == ()
            table = host.table.snapshot()
            left = [pid for pid, row in table.items() if not row.dead and token in (host.table.environment(pid) or b"")]
            assert left == []

    asyncio.run(run())


def test_other_processes_are_left_alone(tmp_path: Path) -> None:
    async def run() -> None:
        async with host_in(tmp_path) as host:
            one = await spawn(host, ("sleep", "600"), name="same")
            async with host_in(
                tmp_path / "other"
            ) as stranger:  # another daemon with a process of the same name and generation
                two = await spawn(stranger, ("sleep", "600"), name="same")
                assert await host.stop(one, POLITE, force=True) == ()
                assert alive(two.pid)

    asyncio.run(run())
