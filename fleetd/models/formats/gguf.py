"""Read headers of GGUF files: what a model is and how large, without loading it.

Invariants:
- Every byte is untrusted. Counts, lengths and offsets are checked against the file before they are used; nothing is
  allocated by a number that a file states. Every error is one `GgufError` sentence.
- Bounded: long arrays are skipped, never built; 150,000 tokens take some 50 ms and no memory.
"""

from __future__ import annotations

import os
import re
import struct
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from fleetd.errors import EngineError
from fleetd.models.formats.regular_file import opened

MAX_KEYS = 10_000
MAX_TENSORS = 200_000
MAX_NAME_BYTES = 65_535
MAX_KEPT_TEXT_BYTES = 65_536
MAX_KEPT_ITEMS = 4_096
MAX_TEXT_BYTES = 32 << 20  # all names and kept texts together
MAX_ITEMS = 200_000  # all kept numbers together
MAX_STRINGS = 4_000_000
MAX_SHARDS = 4_096
WINDOW_BYTES = 1 << 18
READABLE_VERSIONS = (2, 3)

# ggml type -> (values per block, bytes per block)
BLOCKS: dict[int, tuple[int, int]] = {
    0: (1, 4), 1: (1, 2), 2: (32, 18), 3: (32, 20), 6: (32, 22), 7: (32, 24), 8: (32, 34), 9: (32, 40), 10: (256, 84),
    11: (256, 110), 12: (256, 144), 13: (256, 176), 14: (256, 210), 15: (256, 292), 16: (256, 66), 17: (256, 74),
    18: (256, 98), 19: (256, 50), 20: (32, 18), 21: (256, 110), 22: (256, 82), 23: (256, 136), 24: (1, 1), 25: (1, 2),
    26: (1, 4), 27: (1, 8), 28: (1, 8), 29: (256, 56), 30: (1, 2), 34: (256, 54), 35: (256, 66), 39: (32, 17), 40: (64, 36),
    41: (128, 18),
}  # fmt: skip
_STRING, _ARRAY = 8, 9
# value type -> struct code, for types of a fixed size
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_SCALAR_BYTES = {kind: struct.calcsize("<" + code) for kind, code in _SCALARS.items()}
_U64 = struct.Struct("<Q")
_SHARD = re.compile(r"^(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf$")

Scalar = int | float | bool | str
Value = Scalar | tuple[Scalar, ...]


class GgufError(EngineError):
    """A file is not a readable GGUF model. Retry only after the file has changed."""

    recoverable = False


@dataclass(frozen=True, slots=True)
class Tensor:
    """One row of the tensor table.

    `size_bytes` is exact for known types, else the distance to the next tensor.
    """

    name: str
    dims: tuple[int, ...]
    type: int
    offset: int
    size_bytes: int


@dataclass(frozen=True)
class Header:
    """A header.

    `keys` holds scalars, short texts and arrays up to 4096 numbers; `lengths` the length of every array.
    """

    path: str
    version: int
    file_bytes: int
    data_offset: int
    keys: Mapping[str, Value] = field(default_factory=dict)
    lengths: Mapping[str, int] = field(default_factory=dict)
    tensors: tuple[Tensor, ...] = ()

    @property
    def architecture(self) -> str:
        value = self.keys.get("general.architecture")
        return value if isinstance(value, str) else ""

    @cached_property
    def weight_bytes(self) -> int:
        """Bytes of all tensors of this file."""
        return sum(tensor.size_bytes for tensor in self.tensors)

    def numbers(self, key: str) -> tuple[int, ...]:
        """Return the numbers of `{architecture}.key`, one for a scalar; empty if missing."""
        value = self.keys.get(f"{self.architecture}.{key}", ())
        values = value if isinstance(value, tuple) else (value,)
        return tuple(int(item) for item in values if isinstance(item, int | float) and _is_exact(item))

    def number(self, key: str) -> int | None:
        """Return the number of `{architecture}.key`; None if missing or per layer."""
        values = self.numbers(key)
        return values[0] if len(values) == 1 else None

    @property
    def vocabulary(self) -> int:
        return self.lengths.get("tokenizer.ggml.tokens", 0) or self.number("vocab_size") or 0


def _is_exact(item: float) -> bool:
    return item == item and abs(item) < 2**53


def shards(path: Path) -> tuple[str, ...]:
    """Return every file of a model, by its name alone.

    `x-00001-of-00003.gguf` means three files, any other name itself.
    """
    match = _SHARD.match(path.name)
    count = int(match["count"]) if match else 0
    if match is None or not 1 <= count <= MAX_SHARDS:
        return (str(path),)
    return tuple(
        str(path.with_name(f"{match['stem']}-{number:05}-of-{count:05}.gguf")) for number in range(1, count + 1)
    )


# Recent headers, since one file is read several times while a fleet is checked: path → stat fields, header.
_KNOWN: dict[str, tuple[tuple[int, int, int, int], Header]] = {}
KNOWN_MAX = 32
_KNOWN_LOCK = threading.Lock()


def read(path: Path) -> Header:
    """Return the header of a file, cached while it is unchanged. Raises GgufError."""
    with opened(path, GgufError) as (handle, status):
        mark = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
        known = _KNOWN.get(str(path))
        if known is None or known[0] != mark:
            known = (mark, _HeaderReader(handle, str(path), status.st_size).header())
            with _KNOWN_LOCK:
                if len(_KNOWN) >= KNOWN_MAX:
                    del _KNOWN[next(iter(_KNOWN))]
                _KNOWN[str(path)] = known
        return known[1]


def read_all(paths: Sequence[Path]) -> tuple[Header, ...]:
    """Return the headers of all parts of a model. Raises GgufError, also if they mix."""
    headers = tuple(read(path) for path in paths)
    for number, header in enumerate(headers):
        stated = header.keys.get("split.no", number)
        if len(headers) > 1 and stated != number:
            raise GgufError(
                f"{header.path} states that it is part {stated} of its model (from 0), its name says {number}"
            )
    return headers


class _HeaderReader:
    """A cursor over a file: a window of bytes that moves forward and skips data."""

    def __init__(self, handle: int, path: str, size: int) -> None:
        self.handle, self.path, self.size = handle, path, size
        self.start = 0  # file offset of the window
        self.window = b""
        self.at = 0  # position in the window; may be beyond its end after a jump
        self.strings_left, self.text_left, self.items_left = MAX_STRINGS, MAX_TEXT_BYTES, MAX_ITEMS

    def wrong(self, what: str) -> GgufError:
        return GgufError(f"{self.path} is not a usable GGUF file: {what}")

    @property
    def offset(self) -> int:
        return self.start + self.at

    def need(self, count: int) -> None:
        """Fill the window with at least `count` bytes from `at` on."""
        if self.at + count <= len(self.window):
            return
        offset = self.offset
        if offset + count > self.size:
            raise self.wrong(f"it ends after {self.size} bytes, in the middle of its header")
        self.start, self.at = offset, 0
        self.window = os.pread(self.handle, max(count, WINDOW_BYTES), offset)
        if len(self.window) < count:
            raise self.wrong("it became shorter while it was read")

    def jump(self, count: int) -> None:
        if count > self.size - self.offset:
            raise self.wrong(f"it states {count} bytes where only {self.size - self.offset} are left")
        self.at += count

    def number(self, code: str, size: int) -> int:
        self.need(size)
        (value,) = struct.unpack_from("<" + code, self.window, self.at)
        self.at += size
        return int(value)

    def text(self, limit: int) -> str:
        """Return a string of at most `limit` bytes."""
        length = self.number("Q", 8)
        if length > limit or length > self.text_left:
            raise self.wrong(f"it has a name of {length} bytes")
        self.text_left -= length
        self.need(length)
        raw = self.window[self.at : self.at + length]
        self.at += length
        return raw.decode("utf-8", "replace")

    # -- the parts of a header ------------------------------------------------------------------------------------------

    def header(self) -> Header:
        version = self.version()
        tensor_count, key_count = self.number("Q", 8), self.number("Q", 8)
        if key_count > MAX_KEYS or tensor_count > MAX_TENSORS:
            raise self.wrong(f"it states {key_count} keys and {tensor_count} tensors")
        keys: dict[str, Value] = {}
        lengths: dict[str, int] = {}
        for _ in range(key_count):
            self.pair(keys, lengths)
        rows = [self.row() for _ in range(tensor_count)]
        alignment = keys.get("general.alignment", 32)
        if not isinstance(alignment, int) or not 1 <= alignment <= 1 << 20 or alignment & (alignment - 1):
            raise self.wrong(f"it states an alignment of {alignment!r}")
        data = -(-self.offset // alignment) * alignment
        tensors = self.tensors(rows, data)
        return Header(self.path, version, self.size, data, keys, lengths, tensors)

    def version(self) -> int:
        if self.size < 24:
            raise self.wrong(f"it has only {self.size} bytes")
        self.need(8)
        if self.window[:4] != b"GGUF":
            raise self.wrong(f"it starts with {self.window[:4]!r}")
        self.at = 4
        version = self.number("I", 4)
        if version & 0xFFFF == 0 and version:
            raise self.wrong("it is for big-endian machines; convert it with gguf_convert_endian of llama.cpp")
        if version not in READABLE_VERSIONS:
            age = "older than llama.cpp reads" if version < READABLE_VERSIONS[0] else "newer than this program knows"
            raise self.wrong(f"format version {version} is {age}")
        return version

    def pair(self, keys: dict[str, Value], lengths: dict[str, int]) -> None:
        key = self.text(MAX_NAME_BYTES)
        kind = self.number("I", 4)
        if kind in _SCALARS:
            self.need(_SCALAR_BYTES[kind])
            (keys[key],) = struct.unpack_from("<" + _SCALARS[kind], self.window, self.at)
            self.at += _SCALAR_BYTES[kind]
        elif kind == _STRING:
            length = self.number("Q", 8)
            if length > min(MAX_KEPT_TEXT_BYTES, self.text_left):
                self.jump(length)
                return
            self.text_left -= length
            self.need(length)
            keys[key] = self.window[self.at : self.at + length].decode("utf-8", "replace")
            self.at += length
        elif kind == _ARRAY:
            self.array(key, keys, lengths)
        else:
            raise self.wrong(f"the key {key[:80]!r} has the unknown type {kind}")

    def array(self, key: str, keys: dict[str, Value], lengths: dict[str, int]) -> None:
        kind, count = self.number("I", 4), self.number("Q", 8)
        lengths[key] = count
        if kind == _STRING:
            self.skip_strings(count)
        elif kind in _SCALARS:
            size = count * _SCALAR_BYTES[kind]
            if count <= min(MAX_KEPT_ITEMS, self.items_left):
                self.items_left -= count
                self.need(size)
                keys[key] = struct.unpack_from(f"<{count}{_SCALARS[kind]}", self.window, self.at)
            self.jump(size)
        elif kind == _ARRAY:
            raise self.wrong(f"the key {key[:80]!r} is an array of arrays")
        else:
            raise self.wrong(f"the key {key[:80]!r} is an array of the unknown type {kind}")

    def skip_strings(self, count: int) -> None:
        """Skip `count` strings: the one loop that runs once per token of a vocabulary."""
        if count > self.strings_left or count * 8 > self.size - self.offset:
            raise self.wrong(f"it states {count} texts where {max(0, self.size - self.offset)} bytes are left")
        self.strings_left -= count
        unpack = _U64.unpack_from
        while count:
            self.need(8)
            window, at, last = self.window, self.at, len(self.window) - 8
            while count and at <= last:
                at += 8 + unpack(window, at)[0]
                count -= 1
            self.at = at
            if self.offset > self.size:
                raise self.wrong("it has a text that ends after the file")

    def row(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self.text(MAX_NAME_BYTES)
        dimensions = self.number("I", 4)
        if not 1 <= dimensions <= 4:
            raise self.wrong(f"the tensor {name[:80]!r} has {dimensions} dimensions")
        dims = tuple(self.number("Q", 8) for _ in range(dimensions))
        return name, dims, self.number("I", 4), self.number("Q", 8)

    def tensors(self, rows: list[tuple[str, tuple[int, ...], int, int]], data: int) -> tuple[Tensor, ...]:
        if not rows:  # only a vocabulary
            return ()
        room = self.size - data
        if room < 0:
            raise self.wrong(f"it ends after {self.size} bytes, before its tensors")
        starts = sorted({offset for *_, offset in rows})
        following = dict(zip(starts, [*starts[1:], room], strict=True))
        found = []
        for name, dims, kind, offset in rows:
            values = 1
            for dim in dims:
                values *= dim
            if kind in BLOCKS:
                per_block, block_bytes = BLOCKS[kind]
                size = -(-values // per_block) * block_bytes
            else:
                size = max(0, following[offset] - offset)
            if offset + size > room:
                raise self.wrong(
                    f"the tensor {name[:80]!r} ends at byte {data + offset + size}, the file at {self.size}: "
                    "it is cut off or still being written"
                )
            found.append(Tensor(name, dims, kind, offset, size))
        return tuple(found)
