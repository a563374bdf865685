"""Identify a model file: a fingerprint in milliseconds, and the full SHA-256 when it is needed.

Invariants:
- The fingerprint is a digest of the size and evenly spread blocks, head and tail included: a file that was touched, moved or
  copied keeps its fingerprint, one with other weights does not.
- Records are small JSON files, replaced by rename; a damaged one counts as empty.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

BLOCK_BYTES = 64 * 1024
BLOCKS = 32
PIECE_BYTES = 4 * 1024 * 1024


_KNOWN: dict[Path, tuple[Any, str]] = {}
_KNOWN_MAX = 20_000


def known_fingerprint(path: Path) -> str:
    """Return `fingerprint`, cached while the file is unchanged. Raises OSError."""
    now = stamp(path)
    known = _KNOWN.get(path)
    if known is None or known[0] != now:
        if len(_KNOWN) >= _KNOWN_MAX:
            _KNOWN.clear()
        known = _KNOWN[path] = (now, fingerprint(path))
    return known[1]


def fingerprint(path: Path) -> str:
    """Return 64 hex digits that identify the content of a file. Raises OSError."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        digest.update(str(size).encode())
        last = max(0, size - BLOCK_BYTES)
        for block in range(BLOCKS):
            file.seek(last * block // (BLOCKS - 1))
            digest.update(file.read(BLOCK_BYTES))
            if not last:
                break
    return digest.hexdigest()


def sha256(path: Path, progress: Callable[[int, int], None] | None = None) -> str:
    """Return the SHA-256 of the whole file as 64 hex digits. Raises OSError."""
    digest = hashlib.sha256()
    done = 0
    with path.open("rb") as file:
        total = os.fstat(file.fileno()).st_size
        while piece := file.read(PIECE_BYTES):
            digest.update(piece)
            done += len(piece)
            if progress is not None:
                progress(done, total)
    return digest.hexdigest()


def stamp(path: Path) -> list[int]:
    """Return [size, mtime in ns, inode], equal for an unchanged file. Raises OSError."""
    stat = path.stat()
    return [stat.st_size, stat.st_mtime_ns, stat.st_ino]


def read_record(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file; empty if it is missing or damaged."""
    try:
        data = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return data if isinstance(data, dict) else {}


def write_record(path: Path, record: dict[str, Any]) -> None:
    """Replace a JSON file by rename, so that it is never half written. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.name + ".")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(record, file, indent=1, sort_keys=True)
            file.flush()
            os.fsync(file.fileno())
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
