"""Poll conditions with a deadline, and look up processes."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

DEADLINE_S = 30.0
PERIOD_S = 0.01
_HAS_PROC = Path(f"/proc/self/task/{threading.get_native_id()}/children").is_file()  # Linux; other systems use psutil


def until(
    condition: Callable[[], Any], what: str, deadline_s: float = DEADLINE_S, *, period_s: float = PERIOD_S
) -> Any:
    """Return the first truthy result of `condition`. Fails with `what` after the deadline."""
    end = time.monotonic() + deadline_s
    while not (found := condition()):
        if time.monotonic() > end:
            raise AssertionError(f"not within {deadline_s:g} s: {what}")
        time.sleep(period_s)
    return found


async def until_async(condition: Callable[[], Any], what: str = "the condition", deadline_s: float = DEADLINE_S) -> Any:
    """Do the same without blocking the event loop."""
    end = time.monotonic() + deadline_s
    while not (found := condition()):
        if time.monotonic() > end:
            raise AssertionError(f"not within {deadline_s:g} s: {what}")
        await asyncio.sleep(PERIOD_S / 2)
    return found


def alive(pid: int) -> bool:
    """Return whether a process runs; a zombie does not."""
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.Error:
        return False


def descendants(pid: int) -> set[int]:
    """Return the PIDs of all children and their children, zombies included."""
    if not _HAS_PROC:
        return {child.pid for child in psutil.Process(pid).children(recursive=True)}
    found: set[int] = set()
    with suppress(OSError):
        for task in os.listdir(f"/proc/{pid}/task"):  # noqa: PTH208 - runs twice per test
            with suppress(OSError), open(f"/proc/{pid}/task/{task}/children") as file:  # noqa: PTH123
                for child in map(int, file.read().split()):
                    found |= {child, *descendants(child)}
    return found
