"""A view that is drawn again and again in place on a terminal, cut at the bottom, until q.

Invariants:
- The terminal is as before when the block ends, however it ends.
"""

from __future__ import annotations

import io
import os
import select
import shutil
import sys
from types import TracebackType
from typing import Self

from fleetd.cli.render import Screen


class FullScreen:
    """Collects what is written to a Screen, and shows it as one picture."""

    def __init__(self, screen: Screen) -> None:
        self._screen, self._out = screen, screen.out
        self._former: list[object] | None = None

    def __enter__(self) -> Self:
        self._screen.out = io.StringIO()
        self._out.write("\x1b[?1049h\x1b[?25l")
        if sys.stdin.isatty():
            import termios
            import tty

            self._former = termios.tcgetattr(sys.stdin)
            tty.setcbreak(sys.stdin)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._former is not None:
            import termios

            termios.tcsetattr(sys.stdin, termios.TCSADRAIN, self._former)  # type: ignore[arg-type]
        self._screen.out = self._out
        self._out.write("\x1b[?25h\x1b[?1049l")
        self._out.flush()

    def show(self) -> None:
        """Draw what was written since the last call; the next one has the terminal's size of then."""
        assert isinstance(self._screen.out, io.StringIO)
        size = shutil.get_terminal_size((80, 24))
        lines = self._screen.out.getvalue().splitlines()
        if len(lines) > size.lines - 1:
            hidden = len(lines) - size.lines + 2
            lines = [*lines[: size.lines - 2], f"{hidden} more lines; fleetctl status --failed shows only problems"]
        self._out.write("\x1b[H" + "".join(f"{line}\x1b[K\n" for line in lines) + "\x1b[J")
        self._out.flush()
        self._screen.out = io.StringIO()
        self._screen.columns = max(20, size.columns)

    def quits_within(self, seconds: float) -> bool:
        """Wait, and return whether q was typed meanwhile."""
        if self._former is None:
            select.select([], [], [], seconds)
            return False
        if not select.select([sys.stdin], [], [], seconds)[0]:
            return False
        return b"q" in os.read(sys.stdin.fileno(), 64)
