"""Was it the kernel's out-of-memory killer? A count of its kills, compared around a death.

Invariants:
- The count is the machine's; a SIGKILL that we did not send, with a kill counted in the last seconds, is taken for one.
"""

from __future__ import annotations

import time
from collections import deque
from pathlib import Path

_LOOK_BACK_S = 4.0


def oom_kills() -> int:
    """Return the kernel's count of OOM kills since boot; 0 if unknown."""
    try:
        for line in Path("/proc/vmstat").read_text().splitlines():
            if line.startswith("oom_kill "):
                return int(line.split()[1])
    except (OSError, ValueError):
        pass
    return 0


class OomWatch:
    """Keeps the counts of the last seconds."""

    def __init__(self) -> None:
        self._samples: deque[tuple[float, int]] = deque([(time.monotonic(), oom_kills())], maxlen=16)

    def sample(self) -> None:
        self._samples.append((time.monotonic(), oom_kills()))

    def recent(self) -> bool:
        """Say whether the kernel killed for memory in the last seconds."""
        now, count = time.monotonic(), oom_kills()
        before = self._samples[0][1]
        for at, value in self._samples:
            if now - at >= _LOOK_BACK_S:
                before = value
        return count > before
