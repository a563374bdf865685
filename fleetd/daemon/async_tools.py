"""Tasks with an owner, and waiting for a change of the fleet's state.

Invariants:
- A task of the daemon is kept alive while it runs, its failure is reported, and it is cancelled when its owner closes.
- A wait finishes with its predicate, its timeout or its caller; it never delays the fleet.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


class Tasks:
    """The tasks of one owner. `fault(name, error)` receives unexpected exceptions.

    An exception out of a task is a bug: a task turns the failures that it expects into events.
    """

    def __init__(self, fault: Callable[[str, BaseException], None]) -> None:
        self._fault = fault
        self._running: set[asyncio.Task[Any]] = set()

    def start(self, coroutine: Coroutine[Any, Any, T], name: str) -> asyncio.Task[T]:
        """Start a task and keep a reference until it is done: the loop's is weak."""
        task = asyncio.get_running_loop().create_task(coroutine, name=name)
        self._running.add(task)
        task.add_done_callback(self._done)
        return task

    def _done(self, task: asyncio.Task[Any]) -> None:
        self._running.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._fault(task.get_name(), error)

    async def close(self, grace_s: float = 0.0) -> None:
        """Wait up to `grace_s` for running tasks, then cancel the rest."""
        current = asyncio.current_task()
        running = {task for task in self._running if task is not current}
        if running and grace_s > 0:
            await asyncio.wait(running, timeout=grace_s)
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)


class ChangeSignal:
    """Wakes waiters after every step of the fleet to check their predicate."""

    def __init__(self) -> None:
        self._waiters: set[asyncio.Future[None]] = set()

    def notify(self) -> None:
        """Wake every waiter."""
        if self._waiters:
            waiters, self._waiters = self._waiters, set()
            for waiter in waiters:
                if not waiter.done():
                    waiter.set_result(None)

    async def wait_for(self, predicate: Callable[[], T | None], timeout_s: float) -> T | None:
        """Return the first result of `predicate` that is not None; None after `timeout_s`."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout_s
        while True:
            result = predicate()
            if result is not None:
                return result
            left_s = deadline - loop.time()
            if left_s <= 0:
                return None
            waiter: asyncio.Future[None] = loop.create_future()
            self._waiters.add(waiter)
            try:
                await asyncio.wait_for(waiter, left_s)
            except TimeoutError:
                return predicate()
            finally:
                self._waiters.discard(waiter)
