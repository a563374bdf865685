"""Clients that leave at the same moment reach the fleet as one event."""

from __future__ import annotations

import asyncio
import itertools
from typing import Any, cast

from fleetd.core.data.commands import Grant
from fleetd.core.data.events import Event, RequestArrived, RequestCancelled, RequestFinished
from fleetd.daemon.api.gateway import DaemonFleetPort


class Context:
    """The parts of a DaemonContext that a departure needs; keeps what is dispatched."""

    def __init__(self) -> None:
        self.queries = self.config = self.reporter = None
        self.events: list[Event] = []
        self.left = asyncio.Event()

    def dispatch(self, event: Event) -> None:
        self.events.append(event)
        if isinstance(event, RequestCancelled):
            self.left.set()


class Ready:
    def report(self) -> tuple[bool, list[str]]:
        return True, []


def test_departures_of_one_moment_are_one_event() -> None:
    context = Context()

    async def scenario() -> None:
        port = DaemonFleetPort(cast("Any", context), cast("Any", None), itertools.count(1), cast("Any", Ready()))
        ids = [port.admit("m", lambda _: None, lambda _: None) for _ in range(512)]
        for request_id in ids:
            port.cancel(request_id)
            port.cancel(request_id)  # a second time it is gone already
        port.granted(Grant(ids[0], "m", "p", 1))  # its slot is given back at once
        async with asyncio.timeout(5):
            await context.left.wait()

    asyncio.run(scenario())
    arrived = [event for event in context.events if isinstance(event, RequestArrived)]
    left = [event for event in context.events if isinstance(event, RequestCancelled)]
    assert len(arrived) == 512
    assert [len((event.request_id, *event.others)) for event in left] == [512]
    assert [event for event in context.events if isinstance(event, RequestFinished)] == [RequestFinished(1)]
