"""Tasks that belong to someone: kept alive while they run, told of when they fail, gone when the daemon ends.

The rules of this file
- No task is started anywhere in the daemon but through a TaskGroup of this kind: the loop keeps only weak references.
- A task that ends with an exception is a bug: what can be expected to fail is turned into an event inside the task.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


class Tasks:
    """The tasks of one owner. `fault(name, error)` is told of exceptions that nobody expected."""

    def __init__(self, fault: Callable[[str, BaseException], None]) -> None:
        self._fault = fault
        self._running: set[asyncio.Task[Any]] = set()

    def __len__(self) -> int:
        return len(self._running)

    def start(self, coroutine: Coroutine[Any, Any, T], name: str) -> asyncio.Task[T]:
        """Start a task and keep it until it ends."""
        task = asyncio.get_running_loop().create_task(coroutine, name=name)
        self._running.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._running.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._fault(task.get_name(), error)

    async def close(self, grace_s: float = 0.0) -> None:
        """Wait up to `grace_s` for what runs, then cancel the rest and wait for it."""
        current = asyncio.current_task()
        running = {task for task in self._running if task is not current}
        if running and grace_s > 0:
            await asyncio.wait(running, timeout=grace_s)
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
