"""Where a granted request goes: the pool of its process, the model's name there, and the header lines that tell the client.

The rules of this file
- A place is made once per model and process and shared by all requests until the fleet hands out another seat.
"""

from __future__ import annotations

from fleetd.gateway.port import Seat
from fleetd.gateway.upstream import Pool

AT_ONCE = b"X-Fleet-Queue-Ms: 0\r\nX-Fleet-Load-Ms: 0\r\n"


class Place:
    """A model on a process, with all that requests for it have in common."""

    __slots__ = ("labels", "labels_at_once", "pool", "process", "served_name")

    def __init__(self, seat: Seat, pool: Pool) -> None:
        self.process = seat.process
        self.pool = pool
        self.served_name = seat.served_name
        names = tuple(_header_value(text) for text in (seat.model, seat.process))
        self.labels = b"X-Fleet-Model: %b\r\nX-Fleet-Instance: %b\r\n" % names
        self.labels_at_once = self.labels + AT_ONCE

    def labels_after(self, queued_s: float, load_s: float) -> bytes:
        """Return the header lines for a request that waited so long, of that for a load."""
        if not queued_s and not load_s:
            return self.labels_at_once
        return self.labels + b"X-Fleet-Queue-Ms: %d\r\nX-Fleet-Load-Ms: %d\r\n" % (
            int(queued_s * 1000),
            int(load_s * 1000),
        )


def labels_of_refusal(model: str | None, queued_s: float) -> bytes:
    """Return the header lines for a request that went nowhere; `model` None: there is no such one."""
    if model is None:
        return b""
    return b"X-Fleet-Model: %b\r\nX-Fleet-Queue-Ms: %d\r\n" % (_header_value(model), int(queued_s * 1000))


def _header_value(text: str) -> bytes:
    return "".join(c if c.isprintable() else "?" for c in text).encode()
