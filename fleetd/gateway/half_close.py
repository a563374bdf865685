"""Is a client that sent its end of input still there? Closed and half-closed look the same until something is sent.

The rules of this file
- The question is an interim `100 Continue`, which HTTP/1.1 lets a server send before an answer, and every client skips. A
  client that closed its socket answers with a reset, which the kernel keeps as an error of ours; a half-closed one is silent.
- It is asked at once, looked at three times within a tenth of a second, and asked again every few seconds.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable

LOOK_DELAYS_S = (0.005, 0.02, 0.06)
ASK_AGAIN_S = 5.0
QUESTION = b"HTTP/1.1 100 Continue\r\n\r\n"


class Departure:
    """Watches one half-closed connection until `stop`, or until `gone` was called."""

    def __init__(self, loop: asyncio.AbstractEventLoop, transport: asyncio.Transport, gone: Callable[[], None]) -> None:
        self._loop = loop
        self._transport = transport
        self._gone = gone
        self._timer: asyncio.TimerHandle | None = None
        self.looks = 0
        self._ask()

    def _ask(self) -> None:
        self._transport.write(QUESTION)
        self._look_later(0)

    def _look_later(self, turn: int) -> None:
        delay_s = LOOK_DELAYS_S[turn] if turn < len(LOOK_DELAYS_S) else ASK_AGAIN_S
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
            self._ask()

    def _was_reset(self) -> bool:
        try:
            return bool(self._transport.get_extra_info("socket").getsockopt(socket.SOL_SOCKET, socket.SO_ERROR))
        except OSError:
            return True

    def stop(self) -> None:
        """The answer begins: from now on writing to the client tells."""
        if self._timer is not None:
            self._timer.cancel()
