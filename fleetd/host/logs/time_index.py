"""The times of a log whose lines have none: how long it was, and when."""

from __future__ import annotations

from array import array


class TimeIndex:
    """The length of a file-captured log over time: its lines have no times.

    Precise to about a second, or to a hundredth of the age. A sample takes 16 bytes; their number is bounded.
    """

    _MOST = 2048
    _SPACING_S = 0.5
    _FINENESS = 100

    def __init__(self) -> None:
        self._at = array("d")
        self._size = array("q")

    def sample(self, at: float, size: int) -> bool:
        """Note a length; return whether it changed. Quick deaths share one sample."""
        if self._at and self._size[-1] == size:
            return False
        if self._at and 0 <= at - self._at[-1] < self._SPACING_S:
            return True
        if len(self._at) >= self._MOST:
            self._thin(at)
        self._at.append(at)
        self._size.append(size)
        return True

    def _thin(self, now: float) -> None:
        """Keep one sample per interval, with longer intervals for older samples."""
        kept: list[int] = []
        for index, at in enumerate(self._at):
            if not kept or at - self._at[kept[-1]] >= (now - at) / self._FINENESS:
                kept.append(index)
        kept = kept[-self._MOST * 15 // 16 :]
        self._at = array("d", (self._at[index] for index in kept))
        self._size = array("q", (self._size[index] for index in kept))

    def offset_at(self, since: float) -> int | None:
        """Return an offset with only older lines before it; None if that is unknown."""
        best = None
        for at, size in zip(self._at, self._size, strict=True):
            if at > since:
                break
            best = size
        return best
