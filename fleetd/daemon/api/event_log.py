"""What happened, as people read it: one stream of FleetEvents for `events`, `story` and the status screens.

The rules of this file
- An event of the fleet that led to nothing is not told; a request that was served from memory is not either.
- Memory is bounded: some thousands of events in all, the last ones for each name.
- What is told is kept on disk too; the next daemon goes on from it, and with its numbers.
- Readers have a queue each; one that does not read loses the oldest, never the daemon's time.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Collection, Iterator, Sequence
from typing import Any

from fleetd.control.wire import FleetEvent, rfc3339
from fleetd.core.data import commands as c
from fleetd.core.data import events as e
from fleetd.core.data.journal import Entry
from fleetd.core.data.specs import describe_exit
from fleetd.core.data.state import Residency
from fleetd.core.queries import FleetQueries

_IN_ALL = 5000
_PER_NAME = 100
_PER_READER = 2000
_RECENT = 100
_MOVE = re.compile(r"^(?P<before>[A-Z]+) -> (?P<state>[A-Z]+)(?: on (?P<place>\S+))?: (?P<reason>.*)$", re.DOTALL)
_QUIET_COMMANDS = (c.Grant, c.StartProbe, c.StopProbes, c.Persist)
_QUIET_EVENTS = (
    e.Tick,
    e.ProbeResult,
    e.RequestArrived,
    e.RequestFinished,
    e.RequestCancelled,
    e.MemorySampled,
    e.SpecChanged,
    e.LoadProgress,
    e.ModelRequirementsChanged,  # its note says more
)

_RESIDENCIES = frozenset(Residency)
_ABOUT_MODELS = frozenset({
    "Load", "Unload", "LearnFootprint", "ReadAhead", "Loaded", "LoadFailed", "Unloaded", "UnloadFailed", "LoadAsked",
    "UnloadAsked", "PinAsked", "Sleep", "Wake", "LookAsleep",
})  # fmt: skip


class Feed:
    """The stream. `publish` takes journal entries, `say` anything else worth telling."""

    def __init__(self, keep: Callable[[str, str, FleetEvent], None] = lambda *_: None) -> None:
        """`keep(kind, name, event)` stores each new event."""
        self.seq = 0
        self._serial = 0  # of the last published journal entry
        self._keep = keep
        self._all: deque[FleetEvent] = deque(maxlen=_IN_ALL)
        self._by_name: dict[str, deque[FleetEvent]] = {}
        self._readers: set[_Reader] = set()

    def know(self, past: Sequence[FleetEvent]) -> None:
        """Begin with what earlier daemons told, oldest first."""
        for event in past:
            self._enter(event)
            self.seq = max(self.seq, event["seq"])

    def publish_new(self, queries: FleetQueries) -> None:
        """Publish the journal entries since the last call."""
        for entry in queries.journal_after(self._serial):
            self._serial = entry.serial
            self.publish(entry, queries.process_names())

    def publish(self, entry: Entry, processes: Collection[str]) -> None:
        """Tell one entry of the journal. `processes` are the names that are processes; other names are models."""
        for what, name, reason, extra in tell(entry):
            self._add(kind_of(what, name, extra, processes), name, what, reason, extra)

    def say(self, kind: str, name: str | None, what: str, reason: str, **data: Any) -> None:
        """Tell something that no command of the core stands for."""
        self._add(kind, name, what, reason, {"data": data} if data else {})

    def _add(self, kind: str, name: str | None, what: str, reason: str, extra: dict[str, Any]) -> None:
        self.seq += 1
        event: FleetEvent = {
            "seq": self.seq,
            "at": rfc3339(time.time()),
            "kind": kind,
            "name": name,
            "what": what,
            "reason": reason,
        }
        event.update(extra)  # type: ignore[typeddict-item]
        self._enter(event)
        self._keep(kind, name or "", event)
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
        """Drop what is kept for names that left the fleet."""
        for name in names:
            self._by_name.pop(name, None)

    def recent(self, since: float | None, after: int | None) -> list[FleetEvent]:
        """Return events newer than `since` (Unix seconds), or after a sequence number, or the last hundred."""
        if after is not None:
            return [event for event in self._all if event["seq"] > after]
        if since is not None:
            limit = rfc3339(since)
            return [event for event in self._all if event["at"] >= limit]
        return list(self._all)[-_RECENT:]

    async def follow(self, since: float | None, after: int | None, go_on: bool) -> AsyncIterator[FleetEvent]:
        """Yield recent events, then new ones for as long as the reader stays."""
        reader = _Reader()
        if go_on:
            self._readers.add(reader)
        try:
            for event in self.recent(since, after):
                yield event
            while go_on:
                yield await reader.get()
        finally:
            self._readers.discard(reader)


class _Reader:
    def __init__(self) -> None:
        self._queue: deque[FleetEvent] = deque(maxlen=_PER_READER)
        self._news = asyncio.Event()

    def put(self, event: FleetEvent) -> None:
        self._queue.append(event)
        self._news.set()

    async def get(self) -> FleetEvent:
        while not self._queue:
            self._news.clear()
            await self._news.wait()
        return self._queue.popleft()


def kind_of(what: str, name: str | None, extra: dict[str, Any], processes: Collection[str]) -> str:
    """Say what an event is about: a model and the process that it is may have one name."""
    if name is None:
        return "daemon"
    if "state" in extra:
        return "model" if {extra["before"], extra["state"]} <= _RESIDENCIES else "process"
    return "model" if what in _ABOUT_MODELS or name not in processes else "process"


def tell(entry: Entry) -> Iterator[tuple[str, str | None, str, dict[str, Any]]]:
    """Yield (what, name, reason, further keys) for everything in an entry that a person wants to know."""
    yield from _told_event(entry.event)
    for note in entry.notes:
        subject, _, text = note.partition(": ")
        match = _MOVE.match(text)
        if match is None:
            yield "note", subject, text, {}
            continue
        extra: dict[str, Any] = {"before": match["before"], "state": match["state"]}
        if match["place"]:
            extra["data"] = {"process": match["place"]}
        yield "state", subject, match["reason"], extra
    for command in entry.commands:
        if not isinstance(command, _QUIET_COMMANDS):
            name = getattr(command, "model", None) or getattr(command, "name", None)
            yield type(command).__name__, name, getattr(command, "reason", ""), {}


def _told_event(event: e.Event) -> Iterator[tuple[str, str | None, str, dict[str, Any]]]:
    if isinstance(event, _QUIET_EVENTS):
        return
    name = getattr(event, "model", None) or getattr(event, "name", None) or getattr(event, "process", None)
    what = type(event).__name__
    if isinstance(event, e.Exited):
        report = event.report
        data = {"code": report.code, "signal": report.signal, "oom": report.oom, "log": list(report.log_tail[-10:])}
        yield what, name, describe_exit(report), {"data": data}
    elif isinstance(event, e.SpawnFailed | e.LoadFailed | e.UnloadFailed):
        yield what, name, event.message, {}
    elif isinstance(event, e.Spawned | e.Adopted):
        yield what, name, f"pid {event.pid}, generation {event.generation}", {}
    elif isinstance(event, e.RestartDue):
        yield what, name, event.reason, {}
    elif isinstance(event, e.StartProgress):
        yield what, name, event.phase, {}
    elif isinstance(event, e.SetEmpty):
        if event.survivors:
            yield what, name, f"cannot be killed: {', '.join(map(str, event.survivors))}", {}
    elif what.endswith("Asked"):
        yield what, name, "asked by an operator", {}
