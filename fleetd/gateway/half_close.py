"""Probe whether a client that sent its end of input is still connected.

A closed and a half-closed connection look the same until something is sent. The probe is an interim `100 Continue`, which
HTTP/1.1 lets a server send before an answer and every client skips. A client that closed its socket replies with a reset,
which the kernel keeps as a socket error; a half-closed one stays silent.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable

LOOK_DELAYS_S = (0.005, 0.02, 0.06)
PROBE_AGAIN_S = 5.0
PROBE = b"HTTP/1.1 100 Continue\r\n\r\n"


class HalfCloseProbe:
    """Probes one half-closed connection until `stop` is called or the client is gone."""

    def __init__(self, loop: asyncio.AbstractEventLoop, transport: asyncio.Transport, gone: Callable[[], None]) -> None:
        self._loop = loop
        self._transport = transport
        self._gone = gone
        self._timer: asyncio.TimerHandle | None = None
        self.looks = 0
        self._send()

    def _send(self) -> None:
        self._transport.write(PROBE)
        self._look_later(0)

    def _look_later(self, turn: int) -> None:
        delay_s = LOOK_DELAYS_S[turn] if turn < len(LOOK_DELAYS_S) else PROBE_AGAIN_S
        self._timer = self._loop.call_later(delay_s, self._look, turn)

    def _look(self, turn: int) -> None:
        self.looks += 1
        if self._transport.is_closing():
            return
        if self._was_reset():
            self._gone()
        elif turn < len(LOOK_DELAYS_S):
            self._look_later(turn + 1)
        else:
            self._send()

    def _was_reset(self) -> bool:
        try:
            return bool(self._transport.get_extra_info("socket").getsockopt(socket.SOL_SOCKET, socket.SO_ERROR))
        except OSError:
            return True

    def stop(self) -> None:
        """Stop probing: writing the answer shows from now on whether the client is gone."""
        if self._timer is not None:
            self._timer.cancel()
