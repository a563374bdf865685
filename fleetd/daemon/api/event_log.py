"""The event log: one stream of FleetEvents for `fleetctl events`, `fleetctl story` and the status screens.

Invariants:
- Events without a consequence and requests served from memory do not appear.
- Memory is bounded: a fixed number of events in all, and per name.
- Every event is also kept on disk; the next daemon continues its sequence numbers.
- A reader that does not read loses its oldest events; it never delays the daemon.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

from fleetd.control.event_codes import EventCode
from fleetd.control.wire import FleetEvent, rfc3339
from fleetd.core.queries import FleetQueries
from fleetd.daemon.api.event_text import EventLine, lines_of

_IN_ALL = 5000
_PER_NAME = 100
_PER_READER = 2000
_RECENT = 100


class EventLog:
    """The stream: `publish_new` adds journal entries, `report` others; `keep` stores."""

    def __init__(self, keep: Callable[[str, str, FleetEvent], None]) -> None:
        self.seq = 0
        self._serial = 0  # of the last published journal entry
        self._all: deque[FleetEvent] = deque(maxlen=_IN_ALL)
        self._by_name: dict[str, deque[FleetEvent]] = {}
        self._readers: set[_EventReader] = set()
        self._keep = keep

    def restore(self, past: Sequence[FleetEvent]) -> None:
        """Start with the events of earlier daemons, oldest first."""
        for event in past:
            if "event" in event:  # an older version wrote events without a code
                self._enter(event)
            self.seq = max(self.seq, event["seq"])

    def publish_new(self, queries: FleetQueries) -> None:
        """Publish the journal entries since the last call."""
        for entry in queries.journal_after(self._serial):
            self._serial = entry.serial
            for line in lines_of(entry):
                self._add(line)

    def report(self, kind: str, name: str | None, code: EventCode, reason: str, **data: Any) -> None:
        """Add an event that is not in the core's journal."""
        self._add(EventLine(kind, name, code, reason, data=data))

    def _add(self, line: EventLine) -> None:
        self.seq += 1
        event: FleetEvent = {
            "seq": self.seq,
            "at": rfc3339(time.time()),
            "kind": line.kind,
            "name": line.name,
            "event": str(line.code),
            "reason": line.reason,
        }
        if line.state is not None:
            event["before"], event["state"] = line.before, line.state
        if line.data:
            event["data"] = dict(line.data)
        self._enter(event)
        self._keep(line.kind, line.name or "", event)
        for reader in self._readers:
            reader.put(event)

    def _enter(self, event: FleetEvent) -> None:
        name = event["name"]
        self._all.append(event)
        if name is not None:
            self._by_name.setdefault(name, deque(maxlen=_PER_NAME)).append(event)

    def of(self, name: str, count: int = _PER_NAME) -> list[FleetEvent]:
        """Return the last events about one name, oldest first."""
        return list(self._by_name.get(name, ()))[-count:]

    def forget(self, names: Sequence[str]) -> None:
        """Drop the events about names that left the fleet."""
        for name in names:
            self._by_name.pop(name, None)

    def recent(self, since: float | None, after: int | None) -> list[FleetEvent]:
        """Return events after a time or sequence number, or the last hundred."""
        if after is not None:
            return [event for event in self._all if event["seq"] > after]
        if since is not None:
            limit = rfc3339(since)
            return [event for event in self._all if event["at"] >= limit]
        return list(self._all)[-_RECENT:]

    async def follow(self, since: float | None, after: int | None, go_on: bool) -> AsyncIterator[FleetEvent]:
        """Yield recent events, then new ones until the reader leaves."""
        reader = _EventReader()
        if go_on:
            self._readers.add(reader)
        try:
            for event in self.recent(since, after):
                yield event
            while go_on:
                yield await reader.get()
        finally:
            self._readers.discard(reader)


class _EventReader:
    """The bounded queue of one reader."""

    def __init__(self) -> None:
        self._queue: deque[FleetEvent] = deque(maxlen=_PER_READER)
        self._arrived = asyncio.Event()

    def put(self, event: FleetEvent) -> None:
        self._queue.append(event)
        self._arrived.set()

    async def get(self) -> FleetEvent:
        while not self._queue:
            self._arrived.clear()
            await self._arrived.wait()
        return self._queue.popleft()
