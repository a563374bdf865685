"""Rotate without losing or cutting a line, while the child keeps writing into its own file.

Invariants:
- Whole lines are copied to an archive and synced, the new beginning is noted on disk, the archive takes its place, and only
  then is the copied part freed. A crash between any two steps neither loses nor doubles a line (`recover`).
- A full disk ends a rotation before anything was freed. Memory is one block, however long the lines are.
- A line longer than four times max_size (at least 128 MiB) is the one thing that is cut.
- Where the file system cannot free the head of a file, the file is copied and emptied when nothing new came meanwhile: a
  line written in that very instant may be lost, and `problem` says so.
"""

from __future__ import annotations

import errno
import gzip
import os
import shutil
import stat
import threading
import time
from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO

from fleetd.host.logs.files import LogFiles, LogState
from fleetd.host.logs.punch_hole import punch
from fleetd.host.types import LogPolicy

_BLOCK = 1024 * 1024
_LEAST_UNBROKEN = 128 * 1024 * 1024

# One lock per live file, held while archives are renamed or replaced by compressed ones.
_LOCKS: defaultdict[Path, threading.Lock] = defaultdict(threading.Lock)


@dataclass(frozen=True, slots=True)
class Rotation:
    """The result of one check. `problem` is a sentence when a rotation failed."""

    archived: int = 0
    problem: str | None = None


def last_line_end(fd: int, start: int, end: int) -> int:
    """Return the offset after the last newline in [start, end); `start` if none."""
    position = end
    while position > start:
        size = min(_BLOCK, position - start)
        position -= size
        found = os.pread(fd, size, position).rfind(b"\n")
        if found >= 0:
            return position + found + 1
    return start


def next_line_end(fd: int, start: int, end: int) -> int:
    """Return the offset after the first newline in [start, end); `end` if none."""
    position = start
    while position < end:
        block = os.pread(fd, min(_BLOCK, end - position), position)
        if not block:
            return end
        found = block.find(b"\n")
        if found >= 0:
            return position + found + 1
        position += len(block)
    return end


def current_state(files: LogFiles) -> LogState:
    """Return the state of the live file; a file without one begins at 0, now."""
    state = files.read_state()
    status = files.live.stat()
    if state.inode != status.st_ino or state.start > status.st_size:
        return LogState(status.st_ino, 0, time.time())
    return state


def due(size: int, state: LogState, policy: LogPolicy) -> bool:
    """Return whether the live part is too large or too old."""
    live = size - state.start
    old = policy.max_age_s is not None and live > 0 and time.time() - state.since >= policy.max_age_s
    return live >= policy.max_size_bytes or old


def rotate(files: LogFiles, policy: LogPolicy, *, force: bool = False, can_punch: bool = True) -> Rotation:
    """Archive the due part of a live file. Blocks. Never raises for disk errors."""
    archived = 0
    try:
        fd = os.open(files.live, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return Rotation()
    except OSError as error:
        return Rotation(problem=f"{files.live}: {error.strerror}")
    try:
        with _LOCKS[files.live]:
            state = current_state(files)
            while True:
                size = os.fstat(fd).st_size
                state = _skip_doomed(fd, files, state, size, policy)
                if not (due(size, state, policy) or (force and archived == 0)):
                    return Rotation(archived)
                cut = _segment_end(fd, state.start, size, policy)
                if cut <= state.start:
                    return Rotation(archived)
                state = _archive(fd, files, state, cut, policy, can_punch=can_punch)
                archived += 1
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        text = "the disk is full, the log is kept as it is" if full else str(error.strerror)
        return Rotation(archived, f"{files.live} could not be rotated: {text}")
    finally:
        os.close(fd)


def _skip_doomed(fd: int, files: LogFiles, state: LogState, size: int, policy: LogPolicy) -> LogState:
    """After a flood, free at once the lines that would be archived only to be deleted."""
    keep_bytes = (policy.keep + 1) * policy.max_size_bytes
    if size - state.start <= keep_bytes:
        return state
    cut = next_line_end(fd, size - keep_bytes, size)
    if cut == size:  # one line longer than all that is kept: it is not cut, and not dropped
        return state
    moved = replace(state, start=cut)
    files.write_state(moved)
    punch(fd, 0, cut)
    return moved


def _segment_end(fd: int, start: int, size: int, policy: LogPolicy) -> int:
    """Return the end of the next archive: a line's end within max_size, if any."""
    limit = min(size, start + max(1, policy.max_size_bytes))
    cut = last_line_end(fd, start, limit)
    if cut > start:
        return cut
    if limit < size:
        cut = next_line_end(fd, limit, size)
        if cut < size or last_line_end(fd, size - 1, size) == size:
            return cut
    unbroken = max(4 * policy.max_size_bytes, _LEAST_UNBROKEN)
    return size if size - start > unbroken else start


def _archive(fd: int, files: LogFiles, state: LogState, cut: int, policy: LogPolicy, *, can_punch: bool) -> LogState:
    pending = files.folder / f"{files.live.name}.pending"
    drop_surplus(files, policy.keep - 1)
    if policy.keep > 0:
        try:
            _copy(fd, pending, state.start, cut)
        except OSError:
            pending.unlink(missing_ok=True)
            raise
    if not can_punch:
        return _empty(fd, files, state, cut, pending, policy)
    moved = LogState(state.inode, cut, time.time(), pending.name if policy.keep > 0 else "")
    files.write_state(moved)
    if policy.keep > 0:
        shift(files, pending)
    punch(fd, 0, cut)
    moved = replace(moved, pending="")
    files.write_state(moved, durable=False)
    return moved


def _empty(fd: int, files: LogFiles, state: LogState, cut: int, pending: Path, policy: LogPolicy) -> LogState:
    """Empty a file without hole punching if it did not grow; else retry later."""
    if os.fstat(fd).st_size != cut:
        pending.unlink(missing_ok=True)
        raise OSError(errno.EAGAIN, "it grows faster than it can be emptied (use capture: pipe on this file system)")
    os.ftruncate(fd, 0)
    if policy.keep > 0:
        shift(files, pending)
    moved = LogState(state.inode, 0, time.time())
    files.write_state(moved)
    return moved


def _copy(fd: int, target: Path, start: int, end: int) -> None:
    """Copy a range into a new file with the log's mode and sync it."""
    out = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        _same_mode(fd, out)
        position = start
        while position < end:
            block = os.pread(fd, min(_BLOCK, end - position), position)
            if not block:
                raise OSError(errno.EIO, "the file became shorter while it was read")
            view = memoryview(block)
            while view:
                view = view[os.write(out, view) :]
            position += len(block)
        os.fsync(out)
    finally:
        os.close(out)


def drop_surplus(files: LogFiles, keep: int) -> None:
    """Delete the oldest archives until `keep` are left."""
    for path in files.archives()[max(0, keep) :]:
        path.unlink(missing_ok=True)


def shift(files: LogFiles, newest: Path) -> None:
    """Move every archive one number up and put `newest` at 1."""
    for path in reversed(files.archives()):
        packed = path.suffix == ".gz"
        number = int(path.name.removesuffix(".gz").rsplit(".", 1)[1])
        path.replace(files.archive(number + 1, compressed=packed))
    newest.replace(files.archive(1))


def recover(files: LogFiles, *, can_punch: bool = True) -> None:
    """Finish an interrupted rotation, at any step, with every line exactly once."""
    leftover = files.folder / f"{files.live.name}.pending"
    try:
        state = files.read_state()
        with _LOCKS[files.live]:
            if leftover.exists():
                if state.pending == leftover.name:
                    shift(files, leftover)
                else:
                    leftover.unlink()
            if state.pending:
                files.write_state(replace(state, pending=""))
        if state.start and can_punch:
            fd = os.open(files.live, os.O_RDWR | os.O_CLOEXEC)
            try:
                punch(fd, 0, min(state.start, os.fstat(fd).st_size))
            finally:
                os.close(fd)
    except OSError:
        return


def compress_archives(files: LogFiles) -> str | None:
    """Compress every plain archive; return a problem, after which it stays plain."""
    for path in files.archives():
        if path.suffix == ".gz":
            continue
        packed = path.with_name(f".{path.name}.packing")
        try:
            with path.open("rb") as source:
                inode = os.fstat(source.fileno()).st_ino
                _pack(source, packed)
            with _LOCKS[files.live]:
                _put_in_place(files, inode, packed)
        except OSError as error:
            return f"{path} could not be compressed: {error.strerror}"
        finally:
            packed.unlink(missing_ok=True)
    return None


def _pack(source: IO[bytes], packed: Path) -> None:
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
    with os.fdopen(os.open(packed, flags, 0o600), "wb") as out:
        _same_mode(source.fileno(), out.fileno())
        with gzip.open(out, "wb", compresslevel=3) as target:
            shutil.copyfileobj(source, target, _BLOCK)


def _same_mode(source: int, target: int) -> None:
    os.fchmod(target, stat.S_IMODE(os.fstat(source).st_mode))


def _put_in_place(files: LogFiles, inode: int, packed: Path) -> None:
    """Replace the archive with this inode, under its present number."""
    for path in files.archives():
        status = path.stat()
        if status.st_ino == inode:
            os.utime(packed, (status.st_atime, status.st_mtime))
            packed.replace(path.with_name(path.name + ".gz"))
            path.unlink()
            return


def bound_total(folder: Path, total_bytes: int) -> int:
    """Delete the oldest archives until all logs fit the bound; return the count."""
    archives: list[tuple[float, int, Path]] = []
    used = 0
    for path in folder.iterdir():
        try:
            status = path.stat()
        except OSError:
            continue
        used += status.st_blocks * 512
        stem = path.name.removesuffix(".gz").rsplit(".", 1)
        if len(stem) == 2 and stem[1].isdigit() and stem[0].endswith(".log"):
            archives.append((status.st_mtime, status.st_blocks * 512, path))
    gone = 0
    for _, size, path in sorted(archives):
        if used <= total_bytes:
            break
        path.unlink(missing_ok=True)
        used -= size
        gone += 1
    return gone
