"""Keeping the daemon itself small: a supervisor should not be seen in the list of what uses memory.

The rules of this file
- Nothing here changes what the daemon does; a system without glibc loses nothing but the saving.
- `thrifty` comes before the first thread, `settled` once after the start.
"""

from __future__ import annotations

import ctypes
import gc
import sys

_M_ARENA_MAX = -8  # glibc's malloc.h


def thrifty() -> None:
    """Let all threads share one heap: by default glibc gives each its own, and keeps what they freed."""
    library = _glibc()
    if library is not None:
        library.mallopt(_M_ARENA_MAX, 1)


def settled() -> None:
    """Give back what only the start needed, and spare the collector the objects that live for ever."""
    gc.collect()
    gc.freeze()
    give_back()


def give_back() -> None:
    """Return freed memory to the system: after a change of fleet.yaml, that of the assembly before. Blocks a few milliseconds."""
    library = _glibc()
    if library is not None:
        library.malloc_trim(0)


def without_rich() -> None:
    """Keep structlog from loading rich, which it does whenever it can; only its console renderer has use for it."""
    sys.modules.setdefault("rich", None)  # type: ignore[arg-type]


def with_rich() -> None:
    """Make rich importable again."""
    if sys.modules.get("rich", ...) is None:
        del sys.modules["rich"]


def _glibc() -> ctypes.CDLL | None:
    if not sys.platform.startswith("linux"):
        return None
    library = ctypes.CDLL(None)
    return library if hasattr(library, "malloc_trim") and hasattr(library, "mallopt") else None
