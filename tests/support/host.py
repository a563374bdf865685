"""What the host's tests share: a host on a temporary folder, children written in Python, and waiting for a condition."""

from __future__ import annotations

import asyncio
import os
import sys
import textwrap
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from fleetd.host.host import Host
from fleetd.host.process.handle import ProcessHandle
from fleetd.host.types import Execution, HostPaths, Program, RawExit, SpawnRequest, StopPolicy
from fleetd.resolver.environment import inherited

DEADLINE_S = 20.0
POLITE = StopPolicy(timeout_s=10.0)


def python(source: str, *args: str) -> tuple[str, ...]:
    """Return the command line of a child written in Python, with little start-up."""
    return (sys.executable, "-I", "-S", "-c", textwrap.dedent(source), *args)


def paths_in(folder: Path) -> HostPaths:
    return HostPaths(state=folder / "state", run=folder / "run", logs=folder / "logs")


@asynccontextmanager
async def host_in(folder: Path, **options: Any) -> AsyncIterator[Host]:
    """A started host. What a test leaves running in it is killed at the end."""
    host = Host(paths_in(folder), **options)
    await host.start()
    try:
        yield host
    finally:
        for handle in list(host._handles.values()):
            await host.stop(handle, POLITE, force=True)
        await host.close()


class Exits:
    """Collects deaths and lets a test wait for the next one."""

    def __init__(self) -> None:
        self.seen: list[RawExit] = []
        self.times: list[float] = []
        self._news = asyncio.Event()

    def __call__(self, ended: RawExit) -> None:
        self.seen.append(ended)
        self.times.append(time.monotonic())
        self._news.set()

    async def next(self) -> RawExit:
        async with asyncio.timeout(DEADLINE_S):
            while not self.seen:
                self._news.clear()
                await self._news.wait()
        return self.seen[-1]


async def spawn(host: Host, argv: tuple[str, ...], on_exit: Any = None, /, **fields: Any) -> ProcessHandle:
    env = fields.pop("env", inherited(os.environ))
    settings = {name: fields.pop(name) for name in Execution.__dataclass_fields__ if name in fields}
    program = Program(argv, env, Execution(**settings))
    request = SpawnRequest(fields.pop("name", "child"), fields.pop("generation", 1), program, **fields)
    return await host.spawn(request, on_exit or (lambda _: None))


async def log_says(host: Host, handle: ProcessHandle, text: str) -> list[str]:
    """Wait until the child's log has a line with this text; return its lines."""
    deadline = time.monotonic() + DEADLINE_S
    while True:
        lines = [line.text for line in await host.logs.tail(handle.name, 1000)]
        if any(text in line for line in lines):
            return lines
        assert time.monotonic() < deadline, f"{text!r} never came; the log has {lines[-20:]}"
        await asyncio.sleep(0.005)


def pids_in(lines: list[str], word: str) -> list[int]:
    """Return the numbers that follow a word in log lines: `worker 123`."""
    return [int(line.split()[1]) for line in lines if line.startswith(word + " ")]


OWN_PID = os.getpid()
