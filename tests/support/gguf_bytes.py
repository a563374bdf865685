"""Write valid and invalid GGUF bytes by hand, for tests of the reader."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any

U8, I8, U16, I16, U32, I32, F32, BOOL, STRING, ARRAY, U64, I64, F64 = range(13)
_CODES = {U8: "B", I8: "b", U16: "H", I16: "h", U32: "I", I32: "i", F32: "f", BOOL: "?", U64: "Q", I64: "q", F64: "d"}


def text(value: str | bytes) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw)) + raw


def scalar(kind: int, value: Any) -> bytes:
    return text(value) if kind == STRING else struct.pack("<" + _CODES[kind], value)


def pair(key: str, kind: int, value: Any) -> bytes:
    return text(key) + struct.pack("<I", kind) + scalar(kind, value)


def array(key: str, kind: int, values: Sequence[Any], count: int | None = None) -> bytes:
    head = text(key) + struct.pack("<IIQ", ARRAY, kind, len(values) if count is None else count)
    return head + b"".join(scalar(kind, value) for value in values)


def tensor(name: str, dims: Sequence[int], kind: int, offset: int) -> bytes:
    return text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


def header(
    pairs: Sequence[bytes] = (),
    tensors: Sequence[bytes] = (),
    *,
    magic: bytes = b"GGUF",
    version: int = 3,
    keys: int | None = None,
) -> bytes:
    count = len(pairs) if keys is None else keys
    return magic + struct.pack("<IQQ", version, len(tensors), count) + b"".join(pairs) + b"".join(tensors)


def model(pairs: Sequence[bytes] = (), tensors: Sequence[bytes] = (), data: int = 0) -> bytes:
    """Return a whole file: the header, padded, and `data` bytes of weights."""
    head = header(pairs, tensors)
    return head + bytes(-len(head) % 32 + data)


def llama(**more: int) -> list[bytes]:
    """Return the keys of a small llama; `more` adds or replaces whole numbers below `llama.`."""
    numbers = {
        "block_count": 2, "context_length": 4096, "embedding_length": 64, "feed_forward_length": 128,
        "attention.head_count": 4, "attention.head_count_kv": 2,
    } | {name.replace("__", "."): value for name, value in more.items()}  # fmt: skip
    keys = [pair("general.architecture", STRING, "llama")]
    return keys + [pair(f"llama.{name}", U32, value) for name, value in numbers.items()]
