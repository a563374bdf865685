"""A short-lived child program, reached over two pipes, for work that must not grow the daemon.

Invariants:
- Nothing is imported that the interpreter has not loaded anyway: a companion is begun before the daemon's own modules are.
- Messages are frames: eight bytes of length, then the content. Everything blocks, up to its deadline: use it in a thread.
- It has a process group of its own, so that a Ctrl-C of the terminal is the daemon's alone; it stays in our session, which tells
  the reaper of orphans that its status is collected here.
"""

from __future__ import annotations

import os
import select
import signal
import sys
import time

from fleetd.errors import HostError

_HEAD_BYTES = 8
_LARGEST_BYTES = 1 << 32
_CHUNK_BYTES = 1 << 20
_END_S = 5.0


def spawn(module: str, stdin: int, stdout: int) -> int:
    """Start `module.main()` with these descriptors and return its pid. Raises OSError."""
    program = f"import sys; sys.path[:] = {sys.path!r}; from {module} import main; main()"
    return os.posix_spawn(
        sys.executable,
        [sys.executable, "-P", "-c", program],
        os.environ,
        file_actions=[(os.POSIX_SPAWN_DUP2, stdin, 0), (os.POSIX_SPAWN_DUP2, stdout, 1)],
        setpgroup=0,
        setsigmask=(),
    )


class WorkerGone(HostError):
    """It ended, or closed its pipe, before it had answered."""


class WorkerProcess:
    """`module.main()` in a child with the daemon's interpreter, path and environment.

    `began` is the wall-clock time of its start.
    """

    def __init__(self, module: str) -> None:
        """Start it; returns within a millisecond or two. Raises HostError."""
        theirs_in, self._writer = os.pipe()
        self._reader, theirs_out = os.pipe()
        try:
            self.pid = spawn(module, theirs_in, theirs_out)
        except OSError as error:
            os.close(self._writer)
            os.close(self._reader)
            raise HostError(f"{sys.executable} cannot be started: {error.strerror}") from error
        finally:
            os.close(theirs_in)
            os.close(theirs_out)
        os.set_blocking(self._writer, False)
        os.set_blocking(self._reader, False)
        self.began = time.time()
        self._status: int | None = None
        self._closed = False

    def send(self, content: bytes, end: float) -> None:
        """Send one message before the monotonic time `end`. Raises HostError."""
        left = memoryview(len(content).to_bytes(_HEAD_BYTES, "big") + content)
        while left:
            self._wait(self._writer, select.POLLOUT, end)
            try:
                left = left[os.write(self._writer, left[:_CHUNK_BYTES]) :]
            except BlockingIOError:
                continue
            except OSError:
                raise self._gone() from None

    def receive(self, end: float) -> bytes:
        """Return the next message before the monotonic time `end`. Raises HostError."""
        size = int.from_bytes(self._read(_HEAD_BYTES, end), "big")
        if size > _LARGEST_BYTES:
            raise HostError("the worker process sent an invalid response")
        return bytes(self._read(size, end))

    def _read(self, size: int, end: float) -> bytearray:
        found = bytearray()
        while len(found) < size:
            self._wait(self._reader, select.POLLIN, end)
            try:
                data = os.read(self._reader, min(_CHUNK_BYTES, size - len(found)))
            except BlockingIOError:
                continue
            if not data:
                raise self._gone()
            found += data
        return found

    def _wait(self, fd: int, event: int, end: float) -> None:
        poll = select.poll()
        poll.register(fd, event)
        if not poll.poll(max(0.0, end - time.monotonic()) * 1000):
            raise HostError("the worker process did not respond in time and was killed")

    def _gone(self) -> WorkerGone:
        """Return what to say of a companion that closed its pipe."""
        self._collect()
        status = self._status
        if status is None:
            how = "closed its pipe"
        elif status < 0:
            how = f"was killed by {signal.Signals(-status).name}"
        else:
            how = f"exited with code {status}"
        return WorkerGone(f"the worker process {how} before it responded")

    def alive(self) -> bool:
        """Return whether it still runs."""
        if self._status is None:
            self._collect(0.0)
        return self._status is None

    def kill(self) -> None:
        """End it now. From any thread; what waits for it returns."""
        if self._status is None:
            try:
                os.kill(self.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass

    def close(self) -> None:
        """Wait for its exit, or kill it. No other call may be in progress."""
        if self._closed:
            return
        self._closed = True
        os.close(self._writer)
        os.close(self._reader)
        self._collect()
        if self._status is None:
            self.kill()
            self._collect()

    def _collect(self, patience_s: float = _END_S) -> None:
        end = time.monotonic() + patience_s
        while self._status is None:
            try:
                pid, status = os.waitpid(self.pid, os.WNOHANG)
            except ChildProcessError:
                self._status = 0
                return
            if pid:
                self._status = os.waitstatus_to_exitcode(status)
                return
            if time.monotonic() >= end:
                return
            time.sleep(0.001)
