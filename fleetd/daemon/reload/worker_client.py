"""Read fleet.yaml in a worker process: the daemon's side.

Invariants:
- A crash, an endless read and an invalid answer of the worker are a HostError, and the worker is killed.
- Messages are sent, received and decoded in a thread: thousands of models must not delay requests.
- After a reading the worker stays idle for a few seconds: an apply follows a plan, and one save another.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

from fleetd.daemon.reload.messages import Places, Reading, ReadInputs, pack, unpack
from fleetd.daemon.reload.prefetch import LIMIT_S, ask_to_read, begin_reading
from fleetd.errors import ConfigError, HostError
from fleetd.host.process.worker import WorkerGone, WorkerProcess
from fleetd.resolver.resolved import FleetPaths

LINGER_S = 10.0

T = TypeVar("T")


class FileReading:
    """A reading of one file. Its end stops the worker or passes it to `keep`."""

    def __init__(self, companion: WorkerProcess, keep: Callable[[WorkerProcess], None] | None = None) -> None:
        self._companion = companion
        self._keep = keep
        self._deadline = time.monotonic() + LIMIT_S
        self._busy: asyncio.Future[Any] | None = None
        self._reusable = False

    async def places(self, ask: Callable[[], None] | None = None) -> FleetPaths:
        """Return the folders of the fleet, after `ask` where the file is not yet sent.

        Raises ConfigError with the file's own problems, HostError.
        """

        def body() -> Places:
            if ask is not None:
                ask()
            return self._received(Places)

        return (await self._thread(body)).paths

    async def finish(self, given: ReadInputs) -> Reading:
        """Return the result. Raises ConfigError with every problem, HostError."""

        def body() -> Reading:
            self._companion.send(pack(given), self._deadline)
            return self._received(Reading)

        reading = await self._thread(body)
        self._reusable = True
        return reading

    def _received(self, kind: type[T]) -> T:
        return unpack(self._companion.receive(self._deadline), kind)

    async def _thread(self, call: Callable[[], T]) -> T:
        self._busy = busy = asyncio.get_running_loop().run_in_executor(None, call)
        try:
            return await asyncio.shield(busy)
        except ConfigError:
            self._reusable = True
            raise
        except HostError as error:
            raise _unread(error) from error

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._reusable and self._keep is not None:
            self._keep(self._companion)
            return
        busy = self._busy
        if busy is not None and not busy.done():
            self._companion.kill()
            await asyncio.wait({busy})
            if not busy.cancelled():
                busy.exception()  # retrieved, so that asyncio does not log it
        elif error is not None:
            self._companion.kill()
        await asyncio.to_thread(self._companion.close)


def _unread(error: HostError) -> HostError:
    return HostError(f"the configuration could not be read: {error}", recoverable=True)


class WorkerClient:
    """Read files, each in an idle worker or a new one. Close it after use."""

    def __init__(self) -> None:
        self._idle: WorkerProcess | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._stopping: set[asyncio.Future[None]] = set()
        self._closed = False

    async def read(self, path: Path, given: ReadInputs) -> Reading:
        """Read a file. Raises ConfigError with every problem, HostError."""
        idle = self._take()
        if idle is not None:
            try:
                return await self._read(idle, lambda: ask_to_read(idle, path), given)
            except HostError as error:
                if not isinstance(error.__cause__, WorkerGone):
                    raise  # otherwise the idle worker had exited: a new one reads the file
        try:
            companion = await asyncio.to_thread(begin_reading, path)
        except HostError as error:
            raise _unread(error) from error
        return await self._read(companion, None, given)

    async def _read(self, companion: WorkerProcess, ask: Callable[[], None] | None, given: ReadInputs) -> Reading:
        async with FileReading(companion, self._keep) as reading:
            await reading.places(ask)
            return await reading.finish(given)

    def _take(self) -> WorkerProcess | None:
        companion, self._idle = self._idle, None
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if companion is not None and not companion.alive():
            self._stop(companion)
            return None
        return companion

    def _keep(self, companion: WorkerProcess) -> None:
        if self._idle is not None or self._closed:
            self._stop(companion)
            return
        self._idle = companion
        self._timer = asyncio.get_running_loop().call_later(LINGER_S, self._stop_idle)

    def _stop_idle(self) -> None:
        companion = self._take()
        if companion is not None:
            self._stop(companion)

    def _stop(self, companion: WorkerProcess) -> None:
        stopping = asyncio.get_running_loop().run_in_executor(None, companion.close)
        self._stopping.add(stopping)
        stopping.add_done_callback(self._stopping.discard)

    async def close(self) -> None:
        """Stop the idle worker and wait for it."""
        self._closed = True
        self._stop_idle()
        await asyncio.gather(*self._stopping, return_exceptions=True)
