"""Capture by pipe: one thread reads the output of children and writes it as JSON lines with times.

Invariants:
- A line is `{"t": seconds since 1970, "line": "…"}`. Lines read together share a time. Bytes that are no UTF-8 are replaced.
- The thread waits only for its pipes and the disk. Lines that a full disk rejects are dropped and counted, so that the child
  continues; once the disk accepts lines again, one line reports how many were lost.
- Read bytes are kept in a mapped file until they are written (`spool.py`): a killed daemon loses and doubles no line.
- Memory is bounded: 256 KiB per read, and a line is cut into pieces of 1 MiB.
- The pump is the only writer of these files: it rotates by rename, between two lines. A deleted file is
  created again.
"""

from __future__ import annotations

import errno
import os
import queue
import selectors
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path

import orjson

from fleetd.host.logs.files import LogFiles, LogState
from fleetd.host.logs.rotate import _LOCKS, drop_surplus, shift
from fleetd.host.logs.spool import READ, Spool, open_spool
from fleetd.host.types import LogPolicy

_LONGEST_LINE = 1024 * 1024
_PIPE_BYTES = 1024 * 1024
_F_SETPIPE_SZ = 1031
_LOOK_S = 0.5


@dataclass(slots=True, eq=False)
class Stream:
    """The pipe and file of one run. Only the pump's thread uses it once it is added."""

    fd: int
    files: LogFiles
    policy: LogPolicy
    spool_path: Path | None = None
    spool: Spool | None = None
    out: int = -1
    size: int = 0
    since: float = 0.0
    rest: bytes = b""
    lost: int = 0
    open: bool = True
    inode: int = 0
    looked: float = 0.0  # monotonic: when the file was last seen in its place


class Pump:
    """The thread and its streams; calls `on_rotated(files, policy)` after a rotation."""

    def __init__(self, on_rotated: Callable[[LogFiles, LogPolicy], None]) -> None:
        self._on_rotated = on_rotated
        self._selector = selectors.DefaultSelector()
        self._wake_read, self._wake_write = os.pipe()
        os.set_blocking(self._wake_read, False)
        os.set_blocking(self._wake_write, False)
        self._selector.register(self._wake_read, selectors.EVENT_READ, None)
        self._orders: queue.SimpleQueue[tuple[Callable[[], None], Future[None]]] = queue.SimpleQueue()
        self._streams: set[Stream] = set()
        self._untold: dict[
            Path, int
        ] = {}  # lines that the disk rejected at the end of a run; the next run's log reports them
        self._running = True
        self._thread = threading.Thread(target=self._run, name="fleetd-pump", daemon=True)
        self._thread.start()

    # -- called from the loop --------------------------------------------------------------------------------------

    def add(self, stream: Stream) -> Future[None]:
        """Start to read a pipe."""
        return self._order(lambda: self._add(stream))

    def mark(self, stream: Stream, text: str) -> Future[None]:
        """Write all of the pipe, an unfinished line too, and then one more line."""
        return self._order(lambda: self._mark(stream, text))

    def finish(self, stream: Stream) -> Future[None]:
        """Write the rest of the pipe and close it."""
        return self._order(lambda: self._finish(stream))

    def release(self, stream: Stream) -> Future[None]:
        """Write the rest and release the pipe without closing it, for an execv."""
        return self._order(lambda: self._release(stream))

    def close(self) -> None:
        """Finish every stream and stop the thread."""

        def stop() -> None:
            for stream in list(self._streams):
                self._finish(stream)
            self._running = False

        self._order(stop)
        self._thread.join()
        self._selector.close()
        os.close(self._wake_read)
        os.close(self._wake_write)

    def _order(self, call: Callable[[], None]) -> Future[None]:
        done: Future[None] = Future()
        self._orders.put((call, done))
        try:
            os.write(self._wake_write, b"x")
        except BlockingIOError:
            pass
        return done

    # -- in the thread ---------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while self._running:
            for key, _ in self._selector.select():
                if key.data is None:
                    self._obey()
                elif isinstance(key.data, Stream) and key.data.open:
                    self._read(key.data)

    def _obey(self) -> None:
        try:
            os.read(self._wake_read, 4096)
        except BlockingIOError:
            pass
        while True:
            try:
                call, done = self._orders.get_nowait()
            except queue.Empty:
                return
            try:
                call()
            except (OSError, ValueError, KeyError) as error:
                done.set_exception(error)
            else:
                done.set_result(None)

    def _add(self, stream: Stream) -> None:
        os.set_blocking(stream.fd, False)
        _widen(stream.fd)
        stream.lost += self._untold.pop(stream.files.live, 0)
        self._open(stream)
        self._streams.add(stream)
        self._selector.register(stream.fd, selectors.EVENT_READ, stream)
        stream.spool = open_spool(stream.spool_path)
        if stream.spool is not None and stream.out >= 0:
            left = stream.spool.recover(stream.out)
            stream.size = min(stream.size, os.fstat(stream.out).st_size)
            stream.lost += stream.spool.lost
            self._take(stream, left)

    def _open(self, stream: Stream) -> None:
        try:
            stream.files.folder.mkdir(parents=True, exist_ok=True)
            flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC
            stream.out = os.open(stream.files.live, flags, 0o640)
            status = os.fstat(stream.out)
            stream.inode, stream.looked = status.st_ino, time.monotonic()
            state = stream.files.read_state()
            if state.inode != status.st_ino:
                state = LogState(status.st_ino, 0, time.time())
                stream.files.write_state(state, durable=False)
            stream.size, stream.since = status.st_size - state.start, state.since
        except OSError:
            if stream.out >= 0:
                stream.size, stream.since = os.fstat(stream.out).st_size, time.time()

    def _read(self, stream: Stream) -> bool:
        """Read once; False when there is nothing more."""
        try:
            data = os.read(stream.fd, READ) if stream.spool is None else stream.spool.read(stream.fd)
        except BlockingIOError:
            return False
        except OSError:
            data = b""
        if not data:
            self._flush_rest(stream)
            self._unregister(stream)
            return False
        self._take(stream, data)
        return True

    def _take(self, stream: Stream, data: bytes) -> None:
        now = time.time()
        whole, newline, rest = (stream.rest + data).rpartition(b"\n")
        lines = whole.decode("utf-8", "replace").split("\n") if newline else []
        while len(rest) >= _LONGEST_LINE:
            lines.append(rest[:_LONGEST_LINE].decode("utf-8", "replace"))
            rest = rest[_LONGEST_LINE:]
        stream.rest = rest
        if lines:
            self._write(stream, lines, now)
        elif stream.spool is not None:
            stream.spool.written(len(rest), stream.lost)

    def _flush_rest(self, stream: Stream) -> None:
        if stream.rest:
            rest, stream.rest = stream.rest, b""
            self._write(stream, [rest.decode("utf-8", "replace")], time.time())

    def _write(self, stream: Stream, lines: list[str], now: float) -> None:
        if stream.lost:
            lines = [_loss(stream), *lines]
        text = as_json_lines(lines, now)
        counted = len(lines) - (1 if stream.lost else 0)
        self._find_again(stream)
        if stream.out < 0:
            self._open(stream)
        written = stream.out >= 0 and self._append(stream, text)
        stream.lost = 0 if written else stream.lost + counted
        if stream.spool is not None:
            stream.spool.written(len(stream.rest), stream.lost)
        if not written:
            return
        stream.size += len(text)
        old = stream.policy.max_age_s is not None and now - stream.since >= stream.policy.max_age_s
        if stream.size >= stream.policy.max_size_bytes or old:
            self._rotate(stream)

    def _append(self, stream: Stream, text: bytes) -> bool:
        before = os.fstat(stream.out).st_size
        if stream.spool is not None:
            stream.spool.writing(stream.inode, before, before + len(text), len(stream.rest))
        return _write_whole(stream.out, text, before)

    def _find_again(self, stream: Stream) -> None:
        """Close a deleted or moved file: new lines go into a new one."""
        now = time.monotonic()
        if stream.out < 0 or now - stream.looked < _LOOK_S:
            return
        stream.looked = now
        try:
            there = os.stat(stream.files.live).st_ino == stream.inode  # noqa: PTH116 - some microseconds, many times
        except OSError:
            there = False
        if not there:
            os.close(stream.out)
            stream.out = -1

    def _rotate(self, stream: Stream) -> None:
        files, policy = stream.files, stream.policy
        try:
            with _LOCKS[files.live]:
                drop_surplus(files, policy.keep - 1)
                if policy.keep > 0:
                    shift(files, files.live)
                else:
                    files.live.unlink()
        except OSError:
            return
        os.close(stream.out)
        stream.out = -1
        self._open(stream)
        self._on_rotated(files, policy)

    def _drain(self, stream: Stream) -> None:
        deadline = time.monotonic() + 1.0  # a descendant that writes without end must not hold up the others
        while stream.open and time.monotonic() < deadline and self._read(stream):
            pass

    def _mark(self, stream: Stream, text: str) -> None:
        self._drain(stream)
        self._flush_rest(stream)
        self._write(stream, [text], time.time())

    def _finish(self, stream: Stream) -> None:
        self._drain(stream)
        self._flush_rest(stream)
        self._unregister(stream)
        if stream.fd >= 0:
            os.close(stream.fd)
            stream.fd = -1
        self._close_out(stream)

    def _release(self, stream: Stream) -> None:
        self._drain(stream)
        self._flush_rest(stream)
        self._unregister(stream)
        self._close_out(stream)

    def _close_out(self, stream: Stream) -> None:
        if stream.lost and stream.out >= 0 and self._append(stream, as_json_lines([_loss(stream)], time.time())):
            stream.lost = 0
        if stream.lost:
            self._untold[stream.files.live] = self._untold.get(stream.files.live, 0) + stream.lost
            stream.lost = 0
        if stream.out >= 0:
            os.close(stream.out)
            stream.out = -1
        if stream.spool is not None:
            stream.spool.written(0, 0)
            stream.spool.close()
            stream.spool = None
        self._streams.discard(stream)

    def _unregister(self, stream: Stream) -> None:
        if stream.open:
            stream.open = False
            if stream in self._streams:
                self._selector.unregister(stream.fd)


def _loss(stream: Stream) -> str:
    return f"--- {stream.lost} lines lost: the disk rejected them ---"


def as_json_lines(lines: list[str], at: float) -> bytes:
    """Return one JSON object per line, all with the same time."""
    head = b'{"t":%.3f,"line":' % at
    return b"".join([head + orjson.dumps(line) + b"}\n" for line in lines])


def _write_whole(fd: int, text: bytes, before: int) -> bool:
    """Write all or nothing after `before` bytes; False if the disk rejects it."""
    view = memoryview(text)
    try:
        while view:
            view = view[os.write(fd, view) :]
    except OSError as error:
        if error.errno == errno.EINTR:
            return False
        try:
            os.ftruncate(fd, before)
        except OSError:
            pass
        return False
    return True


def _widen(fd: int) -> None:
    """Enlarge the pipe, so that a busy daemon does not delay the child (Linux)."""
    import fcntl

    try:
        fcntl.fcntl(fd, _F_SETPIPE_SZ, _PIPE_BYTES)
    except OSError:
        pass
