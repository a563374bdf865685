"""The config worker: what it returns, what never loads in the daemon, and what happens when it fails."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from fleetd.config.load import load
from fleetd.daemon.reload import worker_client
from fleetd.daemon.reload.messages import Places, Reading, ReadInputs, pack, unpack
from fleetd.daemon.reload.prefetch import begin_reading
from fleetd.daemon.reload.worker import read
from fleetd.daemon.reload.worker_client import FileReading, WorkerClient
from fleetd.errors import ConfigError, HostError
from fleetd.host.process.worker import WorkerGone, WorkerProcess
from fleetd.resolver.resolved import Surroundings
from tests.support.daemon import fake, fleetd
from tests.support.waiting import until
from tests.support.warm_start import is_config_worker

SLEEPERS = "services:\n" + "".join(f"  s{number}: {{command: [sleep, '1000']}}\n" for number in range(3))
NOW = ReadInputs(Surroundings(), frozenset(), "box")


def written(folder: Path, text: str) -> Path:
    path = folder / "fleet.yaml"
    path.write_text(f"version: 1\n{text}", "utf-8")
    return path


OwnReaders = Callable[[], list[psutil.Process]]


def readers(pid: int) -> list[psutil.Process]:
    found = []
    for child in psutil.Process(pid).children():
        with suppress(psutil.NoSuchProcess):  # or a zombie, which psutil reports as alive
            if is_config_worker(child):
                found.append(child)
    return found


@pytest.fixture
def own_readers() -> OwnReaders:
    """Return only the workers of this test, none that an earlier test left."""
    strays = readers(os.getpid())
    return lambda: [child for child in readers(os.getpid()) if child not in strays]


async def read_once(path: Path) -> Reading:
    async with FileReading(begin_reading(path)) as reading:
        await reading.places()
        return await reading.finish(NOW)


# -- values -------------------------------------------------------------------------------------------------------------


def test_worker_result_equals_an_in_process_build(tmp_path: Path) -> None:
    text = SLEEPERS + "models: {m: {engine: llamacpp, memory: 1GiB, options: {model: ./m.gguf}}}\n"
    path = written(tmp_path, text + "instances: {p: {engine: process, command: [x], options: {concurrency: 3}}}\n")
    there = asyncio.run(read_once(path))
    here = read(load(path, os.environ), NOW)
    assert there.resolved.spec == here.resolved.spec
    assert there.resolved.files == here.resolved.files
    assert there.shown == here.shown
    for name, plan in here.resolved.plans.items():
        other = there.resolved.plans[name]
        assert (other.launch, other.launch_hash(), other.engine) == (plan.launch, plan.launch_hash(), plan.engine)
    assert there.resolved.plans["m"].context.options == here.resolved.plans["m"].context.options
    options = there.resolved.plans["p"].context.options
    assert type(options).__name__ == "SimpleNamespace", "its engine needs only the values"
    assert (options.concurrency, options.health) == (3, None)  # type: ignore[attr-defined]


def test_worker_reports_every_problem_with_its_place(tmp_path: Path) -> None:
    path = written(tmp_path, "services:\n  a: {command: x, env_file: .}\n  b: {command: x, env_file: ..}\n")
    with pytest.raises(ConfigError) as found:
        asyncio.run(read_once(path))
    assert [problem.line for problem in found.value.problems] == [3, 4]


@pytest.mark.parametrize("message", [b"", b"nonsense", pack("a text"), b"\x80\x05."])
def test_invalid_worker_response_is_one_clear_error(message: bytes) -> None:
    with pytest.raises(HostError, match="invalid response"):
        unpack(message, Places)


# -- the process --------------------------------------------------------------------------------------------------------


def test_worker_is_reused_and_exits_on_close(tmp_path: Path, own_readers: OwnReaders) -> None:
    path = written(tmp_path, SLEEPERS)

    async def body() -> None:
        several = WorkerClient()
        first = await several.read(path, NOW)
        (child,) = own_readers()
        with pytest.raises(ConfigError):
            await several.read(written(tmp_path, "nonsense: 1\n"), NOW)
        assert own_readers() == [child], "a refusal is an answer like any other"
        written(tmp_path, SLEEPERS.replace("s1:", "other:"))
        after = await several.read(path, ReadInputs(Surroundings(), frozenset(), "box", first.kept))
        assert [(edit.action, edit.name) for edit in after.edits] == [("add", "other"), ("remove", "s1")]
        assert own_readers() == [child]
        await several.close()
        assert not own_readers()

    asyncio.run(body())


def test_killed_idle_worker_is_replaced(tmp_path: Path, own_readers: OwnReaders) -> None:
    path = written(tmp_path, SLEEPERS)

    async def body() -> None:
        several = WorkerClient()
        await several.read(path, NOW)
        (child,) = own_readers()
        child.kill()
        assert len((await several.read(path, NOW)).resolved.plans) == 3
        await several.close()

    asyncio.run(body())


def test_two_reads_at_once_do_not_wait_for_each_other(tmp_path: Path, own_readers: OwnReaders) -> None:
    path = written(tmp_path, SLEEPERS)

    async def body() -> list[Reading]:
        several = WorkerClient()
        found = await asyncio.gather(*(several.read(path, NOW) for _ in range(2)))
        await several.close()
        return list(found)

    assert [len(one.resolved.plans) for one in asyncio.run(body())] == [3, 3]
    assert not own_readers()


def test_worker_death_while_reading_is_one_clear_error(tmp_path: Path) -> None:
    companion = begin_reading(written(tmp_path, SLEEPERS))

    async def body() -> None:
        async with FileReading(companion) as reading:
            await reading.places()
            os.kill(companion.pid, signal.SIGSTOP)
            threading.Timer(0.05, os.kill, (companion.pid, signal.SIGKILL)).start()
            await reading.finish(NOW)

    with pytest.raises(HostError, match=r"could not be read: .* killed by SIGKILL") as found:
        asyncio.run(body())
    assert found.value.recoverable


def test_worker_that_never_answers_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_client, "LIMIT_S", 0.2)
    path = tmp_path / "pipe.yaml"
    os.mkfifo(path)  # opening a FIFO for reading blocks until there is a writer
    companion = begin_reading(path)
    os.kill(companion.pid, signal.SIGSTOP)

    async def body() -> None:
        async with FileReading(companion) as reading:
            await reading.places()

    with pytest.raises(HostError, match="did not respond in time"):
        asyncio.run(body())
    assert not psutil.pid_exists(companion.pid)


def test_leaving_early_kills_the_worker(tmp_path: Path) -> None:
    companion = begin_reading(written(tmp_path, SLEEPERS))
    os.kill(companion.pid, signal.SIGSTOP)

    async def body() -> None:
        async with FileReading(companion) as reading, asyncio.timeout(0.1):
            await reading.places()

    with pytest.raises(TimeoutError):
        asyncio.run(body())
    assert not psutil.pid_exists(companion.pid)


def test_worker_output_without_frames_is_rejected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "babbler.py").write_text("def main():\n    print('hello, I am not a reader at all')\n")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    companion = WorkerProcess("babbler")
    with pytest.raises(HostError, match="invalid response"):
        companion.receive(time.monotonic() + 30)
    companion.close()


# -- in a daemon --------------------------------------------------------------------------------------------------------


def test_services_only_daemon_loads_no_pydantic_or_yaml(tmp_path: Path) -> None:
    with fleetd(tmp_path, SLEEPERS) as daemon:
        daemon.start(cold=True)
        daemon.until_state("s1", "READY")
        daemon.write(SLEEPERS.replace("s1:", "other:"))
        until(lambda: "other" in {row["name"] for row in daemon.status()["processes"]}, "the saved file is applied")
        assert daemon.control("GET", "/v1/config").json["config"]["services"].keys() == {"s0", "other", "s2"}
        maps = Path(f"/proc/{daemon.pid}/maps").read_text()
        assert "uvloop" in maps
        assert "pydantic_core" not in maps
        assert "_yaml" not in maps


def test_worker_killed_before_a_request_names_its_purpose(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def begin(path: Path) -> WorkerProcess:
        raise WorkerGone("the worker process was killed by SIGKILL before it responded")

    monkeypatch.setattr(worker_client, "begin_reading", begin)

    async def body() -> None:
        with pytest.raises(
            HostError, match="the configuration could not be read: the worker process was killed by SIGKILL"
        ):
            await WorkerClient().read(written(tmp_path, SLEEPERS), NOW)

    asyncio.run(body())


def test_killed_read_changes_nothing_and_the_next_works(tmp_path: Path) -> None:
    fleet = f"models: {{m: {{engine: process, command: {fake('--model', 'm')}, memory: 1MiB}}}}\n"
    with fleetd(tmp_path, "watch: false\n" + fleet) as daemon:
        daemon.start()
        stop = threading.Event()

        def kill_readers() -> None:
            while not stop.is_set():
                with suppress(psutil.NoSuchProcess):
                    for child in readers(daemon.pid):
                        child.kill()
                time.sleep(0.001)

        killer = threading.Thread(target=kill_readers)
        killer.start()
        try:
            answer = daemon.control("POST", "/v1/reload", {})
        finally:
            stop.set()
            killer.join()
        assert answer.status >= 500
        assert "could not be read" in answer.json["error"]["message"]
        assert daemon.chat("m").status == 200
        assert daemon.control("POST", "/v1/reload", {}).status == 200
