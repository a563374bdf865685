"""Read the last lines of a log, from its end.

Invariants:
- Blocks are read backwards until enough lines are there; a hole (what rotation freed) is skipped, archives come next.
- Archives are those of one moment, whatever a rotation does meanwhile.
- Memory is bounded: a line longer than 64 KiB keeps its first and last 32 KiB, and the whole answer stops at 16 MiB.
  A line of the pump that was cut is still one: its time and its text are shown, never its JSON.
- Bytes that are no UTF-8 become U+FFFD; nothing in a log can break a reader.
"""

from __future__ import annotations

import gzip
import json
import os
import re
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

from fleetd.host.logs.files import LogFiles

_BLOCK = 64 * 1024
_LONGEST_LINE = 64 * 1024
_LARGEST_ANSWER = 16 * 1024 * 1024
_MOST_LOOKED_AT = 512 * 1024 * 1024
_MOST_ARCHIVES, _TRIES = 256, 20
_PUMPED = re.compile(rb'\{"t":([0-9]+(?:\.[0-9]+)?),"line":"')
_ESCAPE = re.compile(r"\\(?:u([0-9A-Fa-f]{4})|(.))")
_ESCAPED = {"n": "\n", "t": "\t", "r": "\r", "b": "\b", "f": "\f"}


@dataclass(frozen=True, slots=True)
class LogEntry:
    """A line without its end. `at` is its wall-clock time, known for pipe capture."""

    text: str
    at: float | None = None


def parse_line(data: bytes) -> LogEntry:
    """Read one line of a log; lines of the pump are JSON objects with `t` and `line`."""
    if data.startswith(b'{"t":'):
        try:
            content = json.loads(data)
            return LogEntry(_bounded(str(content["line"])), float(content["t"]))
        except (ValueError, KeyError, TypeError, RecursionError):
            cut = _cut_line(data) if len(data) >= _LONGEST_LINE else None
            if cut is not None:
                return cut
    return LogEntry(shorten(data).decode("utf-8", "replace"))


def _cut_line(data: bytes) -> LogEntry | None:
    """Read a truncated line of the pump, perhaps cut in an escape; None: not one."""
    head = _PUMPED.match(data)
    if head is None:
        return None
    text = data[head.end() :].removesuffix(b'"}').decode("utf-8", "replace")
    return LogEntry(_bounded(_ESCAPE.sub(_unescaped, text)), float(head[1]))


def _unescaped(escape: re.Match[str]) -> str:
    return chr(int(escape[1], 16)) if escape[1] else _ESCAPED.get(escape[2], escape[2])


def _bounded(text: str) -> str:
    return text if len(text) <= _LONGEST_LINE else shorten(text.encode("utf-8", "replace")).decode("utf-8", "replace")


def shorten(data: bytes, missing: int = 0) -> bytes:
    """Return at most 64 KiB of a line: both ends, and the number of bytes between."""
    data = data.rstrip(b"\r").lstrip(b"\0")
    if len(data) <= _LONGEST_LINE:
        return data
    half = _LONGEST_LINE // 2
    return data[:half] + f" … {len(data) - 2 * half + missing} bytes … ".encode() + data[-half:]


def _lines_backwards(fd: int, start: int, end: int) -> Iterator[bytes]:
    """Yield the lines of [start, end) in reverse order, long ones shortened."""
    tail, dropped = b"", 0
    position = end
    first = True
    while position > start:
        size = min(_BLOCK, position - start)
        position -= size
        block = os.pread(fd, size, position)
        pieces = block.split(b"\n")
        pieces[-1] += tail
        tail = pieces[0]
        for piece in reversed(pieces[1:]):
            if not (first and piece == b""):
                yield shorten(piece, dropped)
            first, dropped = False, 0
        if len(tail) > 2 * _LONGEST_LINE:
            dropped += len(tail) - 2 * _LONGEST_LINE
            tail = tail[:_LONGEST_LINE] + tail[-_LONGEST_LINE:]
        if not block:
            return
    if end > start:  # the first line, which may be empty
        yield shorten(tail, dropped)


@dataclass(frozen=True, slots=True)
class Wanted:
    """The requested lines. `begin` and `until` are offsets of the live file, or None.

    `since` is wall clock: lines with a time of their own are compared with it, archives by when they were closed.
    """

    lines: int = 50
    begin: int | None = None
    until: int | None = None
    since: float | None = None
    grep: re.Pattern[str] | None = None


def read_tail(files: LogFiles, wanted: Wanted) -> list[LogEntry]:
    """Return the selected last lines, oldest first, from live file and archives."""
    found: list[LogEntry] = []
    total, looked = 0, 0
    for raw in _all_backwards(files, wanted):
        looked += len(raw)
        if len(found) >= wanted.lines or looked > _MOST_LOOKED_AT:
            break
        line = parse_line(raw)
        if wanted.since is not None and line.at is not None and line.at < wanted.since:
            break
        if wanted.grep is not None and not wanted.grep.search(line.text):
            continue
        total += len(raw)
        if total > _LARGEST_ANSWER:
            break
        found.append(line)
    found.reverse()
    return found


def _all_backwards(files: LogFiles, wanted: Wanted) -> Iterator[bytes]:
    start = max(files.read_state().start, wanted.begin or 0)
    try:
        fd = os.open(files.live, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        fd = -1
    if fd >= 0:
        try:
            size = os.fstat(fd).st_size
            yield from _lines_backwards(fd, start, size if wanted.until is None else min(size, wanted.until))
        except OSError:
            pass
        finally:
            os.close(fd)
    if wanted.begin is not None:
        return
    with ExitStack() as stack:
        for path, fd in _open_archives(files, stack):
            if wanted.since is not None and os.fstat(fd).st_mtime < wanted.since:
                return
            yield from _archive_backwards(fd, path.suffix == ".gz")


def _open_archives(files: LogFiles, stack: ExitStack) -> list[tuple[Path, int]]:
    """Open the archives of one moment, youngest first: a rotation renames them."""
    found: list[tuple[Path, int]] = []
    opened = stack.enter_context(ExitStack())
    for _ in range(_TRIES):
        opened.close()
        found = []
        with suppress(FileNotFoundError):
            for path in files.archives()[:_MOST_ARCHIVES]:
                with suppress(PermissionError):
                    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
                    opened.callback(os.close, fd)
                    found.append((path, fd))
            if all(os.fstat(fd).st_ino == path.stat().st_ino for path, fd in found):
                break
    return found


def _archive_backwards(fd: int, packed: bool) -> Iterator[bytes]:
    """Yield an archive's lines in reverse; of a compressed one the last 50 000."""
    try:
        if not packed:
            yield from _lines_backwards(fd, 0, os.fstat(fd).st_size)
            return
        from collections import deque

        kept: deque[bytes] = deque(maxlen=50_000)
        size = 0
        with open(fd, "rb", closefd=False) as raw, gzip.open(raw, "rb") as file:
            for line in _lines_forward(file):
                kept.append(line)
                size += len(line) + 1
                while size > _LARGEST_ANSWER and kept:
                    size -= len(kept.popleft()) + 1
        yield from reversed(kept)
    except (OSError, EOFError):
        return


def _lines_forward(file: gzip.GzipFile) -> Iterator[bytes]:
    """Yield the lines of a file in order, long ones shortened."""
    while piece := file.readline(_LONGEST_LINE):
        line, dropped = piece, 0
        while not piece.endswith(b"\n") and (piece := file.readline(_LONGEST_LINE)):
            line += piece
            if len(line) > 3 * _LONGEST_LINE:
                dropped += len(line) - 2 * _LONGEST_LINE
                line = line[:_LONGEST_LINE] + line[-_LONGEST_LINE:]
        yield shorten(line.rstrip(b"\n"), dropped)
