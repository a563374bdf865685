"""The channel that a Node program expects of its parent: `process.send('ready')`, `process.on('message')`.

Invariants:
- A socket pair; the child's end is named by NODE_CHANNEL_FD; messages are JSON, one per line.
- A child that never reads or writes it costs nothing. A line longer than 1 MiB closes the channel.
"""

from __future__ import annotations

import asyncio
import json
import socket

_LONGEST = 1024 * 1024
_REMEMBERED = 64


def channel_env(fd: int) -> dict[str, str]:
    """Return what tells Node about the channel."""
    return {"NODE_CHANNEL_FD": str(fd), "NODE_CHANNEL_SERIALIZATION_MODE": "json"}


class NodeChannel:
    """Our end of the channel of one process."""

    def __init__(self, loop: asyncio.AbstractEventLoop, end: socket.socket) -> None:
        self._loop, self._socket = loop, end
        self._pending = b""
        self._open = True
        self.received: set[str] = set()  # the text messages of the child
        self.adopted = False  # earlier messages of the child are unknown
        end.setblocking(False)
        loop.add_reader(end.fileno(), self._readable)

    @property
    def open(self) -> bool:
        return self._open

    def fileno(self) -> int:
        return self._socket.fileno()

    def _readable(self) -> None:
        try:
            data = self._socket.recv(65536)
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            data = b""
        if not data:
            self.close()
            return
        lines = (self._pending + data).split(b"\n")
        self._pending = lines.pop()
        for line in lines:
            self._take(line)
        if len(self._pending) > _LONGEST:
            self.close()

    def _take(self, line: bytes) -> None:
        try:
            message = json.loads(line)
        except (ValueError, RecursionError):
            return
        if isinstance(message, str) and len(self.received) < _REMEMBERED:
            self.received.add(message)

    def send(self, message: object) -> bool:
        """Send one message; False when the child has closed its end or does not read it."""
        if not self._open:
            return False
        try:
            self._socket.send(json.dumps(message).encode() + b"\n")
        except OSError:
            return False
        return True

    def close(self) -> None:
        if self._open:
            self._open = False
            self._loop.remove_reader(self._socket.fileno())
            self._socket.close()

    def detach(self) -> int:
        """Give up the descriptor for a re-execution, which opens the channel again."""
        self._open = False
        self._loop.remove_reader(self._socket.fileno())
        return self._socket.detach()  # the number stays open; only this object lets go of it
