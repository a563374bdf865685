"""A guard against programs that change the very files for which they are restarted, and against builds that never end.

The rules of this file
- Pure: now is an argument, monotonic seconds.
- `COUNT` restarts within `WINDOW_S` are let through; after them a change waits until its files were quiet for `QUIET_S`.
"""

from __future__ import annotations

from collections import deque

COUNT = 10
WINDOW_S = 60.0
QUIET_S = 10.0


class FlapGuard:
    """The restarts of one process by its watched files."""

    def __init__(self, count: int = COUNT, window_s: float = WINDOW_S) -> None:
        self._times: deque[float] = deque(maxlen=count)
        self._window_s = window_s

    def passes(self, now: float) -> bool:
        """Return whether a restart may happen now, and count it."""
        if len(self._times) == self._times.maxlen and now - self._times[0] < self._window_s:
            return False
        self._times.append(now)
        return True
