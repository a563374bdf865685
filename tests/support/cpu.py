"""CPU budgets that allow for a busy machine: the same work takes more CPU time if others share its caches."""

from __future__ import annotations

import time

_QUIET_S = 0.012  # of the work below, on a quiet core of a server of 2020


def slowdown() -> float:
    """Return how much slower than a quiet core this one is now, at least 1.

    The fastest of five runs counts: a collection of the test's garbage makes single runs up to 30 times slower.
    """
    return max(1.0, min(_work_s() for _ in range(5)) / _QUIET_S)


def _work_s() -> float:
    """Return the CPU time of allocating many small objects, as the loaders of configurations do."""
    start = time.process_time()
    rows = [{"number": number, "name": str(number)} for number in range(40_000)]
    assert len({row["name"] for row in rows}) == len(rows)
    return time.process_time() - start
