"""Waiting for the fleet to be somewhere: a predicate over its state, asked again after everything that may have changed it.

The rules of this file
- Nothing polls: the loop tells after each step that was more than a warm request.
- A wait ends with its predicate, its timeout, or its caller; it never holds the fleet up.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


class Changes:
    """Told of changes; waiters ask again."""

    def __init__(self) -> None:
        self._waiters: set[asyncio.Future[None]] = set()

    def happened(self) -> None:
        """Something may have changed: let every waiter look."""
        if self._waiters:
            waiters, self._waiters = self._waiters, set()
            for waiter in waiters:
                if not waiter.done():
                    waiter.set_result(None)

    async def wait_for(self, look: Callable[[], T | None], timeout_s: float) -> T | None:
        """Return the first answer of `look` that is not None; None when `timeout_s` is over."""
        loop = asyncio.get_running_loop()
        end = loop.time() + timeout_s
        while True:
            answer = look()
            if answer is not None:
                return answer
            left = end - loop.time()
            if left <= 0:
                return None
            waiter: asyncio.Future[None] = loop.create_future()
            self._waiters.add(waiter)
            try:
                await asyncio.wait_for(waiter, left)
            except TimeoutError:
                return look()
            finally:
                self._waiters.discard(waiter)
