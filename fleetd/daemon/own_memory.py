"""Keep the memory of the daemon small.

Invariants:
- Nothing here changes what the daemon does; without glibc only the saving is lost.
- `use_one_heap` runs before the first thread, `freeze` once after the start.
"""

from __future__ import annotations

import ctypes
import gc
import sys

_M_ARENA_MAX = -8  # glibc's malloc.h


def use_one_heap() -> None:
    """Let all threads share one heap: by default glibc keeps one for each of them."""
    library = _glibc()
    if library is not None:
        library.mallopt(_M_ARENA_MAX, 1)


def freeze() -> None:
    """Free memory of the start, and exclude long-lived objects from collection."""
    gc.collect()
    gc.freeze()
    trim()


def trim() -> None:
    """Return freed memory to the system. Blocks a few milliseconds."""
    library = _glibc()
    if library is not None:
        library.malloc_trim(0)


def without_rich() -> None:
    """Keep structlog from importing rich: only its console renderer needs it."""
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
