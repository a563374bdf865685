"""Look at many things at once, each within a limit, whatever hangs.

Invariants:
- A look runs in a daemon thread: one that never returns, such as a read of a dead network share, does not hold the program.
- An exception of a look is its result, like any other value that is missing.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from typing import Any


def together(looks: Mapping[str, Callable[[], Any]], limit_s: float) -> dict[str, Any]:
    """Return the results by name, those that were there in time; the value of a failed look is its exception."""
    found: dict[str, Any] = {}

    def body(name: str, look: Callable[[], Any]) -> None:
        try:
            result = look()
        except Exception as error:  # noqa: BLE001 (the caller decides what a failed look means)
            result = error
        found[name] = result

    threads = [
        threading.Thread(target=body, args=(name, look), name=f"look-{name}", daemon=True)
        for name, look in looks.items()
    ]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + limit_s
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
    return dict(found)
