"""Read Hugging Face model folders: the size of the weights from safetensors headers, and config.json.

Invariants:
- Every byte is untrusted, as in `gguf.py`: lengths are checked before anything is read by them.
- Only the files in the index count; `original/` and a second, consolidated copy of the weights do not.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fleetd.errors import EngineError
from fleetd.models.formats.regular_file import opened

MAX_HEADER_BYTES = 100 << 20  # the format's own bound
MAX_CONFIG_BYTES = 16 << 20
MAX_FILES = 2_000


class SafetensorsError(EngineError):
    """A folder or file is not a readable safetensors model."""

    recoverable = False


@dataclass(frozen=True, slots=True)
class ModelFolder:
    """A model folder: weight bytes, files, and the configuration of the text model."""

    path: str
    weight_bytes: int
    files: tuple[str, ...]
    config: Mapping[str, Any]

    def number(self, *names: str) -> int | None:
        """Return the first of these keys that is a positive whole number."""
        for name in names:
            value = self.config.get(name)
            if isinstance(value, int) and not isinstance(value, bool) and 0 < value < 2**40:
                return value
        return None


def tensor_bytes(path: Path) -> int:
    """Return the bytes of all tensors of a file. Raises SafetensorsError."""
    size, (prefix, header) = _head(path)
    if not isinstance(header, dict):
        raise SafetensorsError(f"{path} is not a usable safetensors file: its header is not a JSON object")
    total, room = 0, size - prefix
    for name, row in header.items():
        if name == "__metadata__":
            continue
        span = row.get("data_offsets") if isinstance(row, dict) else None
        begin, end = span if isinstance(span, list) and len(span) == 2 else (None, None)
        if type(begin) is not int or type(end) is not int or not 0 <= begin <= end:
            raise SafetensorsError(f"{path} is not a usable safetensors file: the tensor {name[:80]!r} has no offsets")
        if end > room:
            raise SafetensorsError(
                f"{path}: the tensor {name[:80]!r} ends at byte {prefix + end}, the file at {size}: "
                "it is cut off or still being written"
            )
        total += end - begin
    return min(total, room)


def _head(path: Path) -> tuple[int, tuple[int, Any]]:
    """Return the file's size, the length of its head, and the parsed head."""
    with opened(path, SafetensorsError) as (handle, status):
        size = status.st_size
        raw = os.pread(handle, 8, 0)
        length = int.from_bytes(raw, "little")
        if len(raw) < 8 or length > min(MAX_HEADER_BYTES, size - 8):
            raise SafetensorsError(f"{path} is not a usable safetensors file: a header of {length} bytes in {size}")
        body = os.pread(handle, length, 8)
    return size, (8 + length, _json(path, body))


def _json(path: Path, body: bytes) -> Any:
    try:
        return json.loads(body)
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deep" if isinstance(error, RecursionError) else str(error)
        raise SafetensorsError(f"{path} is not usable JSON: {reason[:200]}") from None


def read_json(path: Path) -> Mapping[str, Any]:
    """Return a JSON object of at most 16 MiB. Raises SafetensorsError."""
    with opened(path, SafetensorsError) as (handle, status):
        if status.st_size > MAX_CONFIG_BYTES:
            raise SafetensorsError(f"{path} has {status.st_size} bytes, too many for a configuration")
        body = os.pread(handle, status.st_size, 0)
    value = _json(path, body)
    if not isinstance(value, dict):
        raise SafetensorsError(f"{path} is not a JSON object")
    return value


def read_folder(folder: Path) -> ModelFolder:
    """Return the contents of a model folder. Raises SafetensorsError."""
    if not folder.is_dir():
        raise SafetensorsError(f"{folder} is not a folder", recoverable=not folder.exists())
    config = read_json(folder / "config.json")
    text = config.get("text_config")
    merged = {**config, **text} if isinstance(text, dict) else config
    files = _files(folder)
    if not files:
        raise SafetensorsError(f"{folder} has no .safetensors files")
    total = sum(tensor_bytes(path) for path in files)
    return ModelFolder(str(folder), total, tuple(str(path) for path in files), merged)


def _files(folder: Path) -> list[Path]:
    """Return the weight files of the index, or of the folder without a merged copy."""
    index = folder / "model.safetensors.index.json"
    if index.exists():
        names = read_json(index).get("weight_map")
        if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
            raise SafetensorsError(f"{index} has no weight_map")
        wanted = sorted(set(names.values()))
        if any("/" in name or name.startswith(".") for name in wanted):
            raise SafetensorsError(f"{index} names files outside of its folder")
        found = [folder / name for name in wanted]
    else:
        found = sorted(folder.glob("*.safetensors"))
        plain = [path for path in found if not path.name.startswith("consolidated")]
        found = plain or found
    if len(found) > MAX_FILES:
        raise SafetensorsError(f"{folder} names {len(found)} weight files")
    return found
