"""What every part of one gateway shares: the fleet, limits, checks, counters and the clock."""

from __future__ import annotations

import asyncio
import os
import re
from concurrent.futures import ThreadPoolExecutor

from fleetd.gateway.checks import RequestChecks
from fleetd.gateway.headers import Heads
from fleetd.gateway.options import GatewayOptions
from fleetd.gateway.port import FleetPort

_VALID_ID = re.compile(rb"[A-Za-z0-9._-]{1,128}")


class GatewayContext:
    """The state that connections, exchanges and pools share.

    Construct it on the running loop.

    `clock` is the loop's time at the last tick, in seconds: precise enough for every timeout, and free to read.
    """

    __slots__ = (
        "_id_format",
        "buffered_bytes",
        "checks",
        "clock",
        "closed",
        "draining",
        "fleet",
        "heads",
        "loop",
        "options",
        "requests",
        "threads",
    )

    def __init__(self, fleet: FleetPort, options: GatewayOptions) -> None:
        self.fleet = fleet
        self.options = options
        self.checks = RequestChecks(options)
        self.heads = Heads()
        self.threads = ThreadPoolExecutor(2, thread_name_prefix="gateway-body")
        self.loop = asyncio.get_running_loop()
        self.clock = self.loop.time()
        self.draining = False  # requests in progress go on, nothing new starts
        self.closed = False
        self.buffered_bytes = 0  # of the large request bodies of all connections
        self.requests = 0
        self._id_format = b"X-Request-Id: %b-%%x\r\n" % os.urandom(6).hex().encode()

    def id_line(self, client_id: bytes) -> bytes:
        """Return the header line with a request's id: the client's if valid, else new."""
        count = self.requests = self.requests + 1
        if client_id and _VALID_ID.fullmatch(client_id):
            return b"X-Request-Id: %b\r\n" % client_id
        return self._id_format % count
