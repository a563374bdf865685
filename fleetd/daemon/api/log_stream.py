"""Read and follow the logs of processes for `fleetctl logs` and the status screens.

Invariants:
- Several logs are read one after the other and followed together.
- A reader that disconnects closes every follower. A log that does not exist yet is empty; the loss of a log that was
  deleted while its process writes is reported.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

from fleetd.control.wire import OWN_STREAM, LogLine, rfc3339
from fleetd.host.logs.registry import LogRegistry
from fleetd.host.logs.tail import LogEntry, Wanted, read_tail
from fleetd.host.process.table import ProcessTable, command_of

_AT_ONCE = 1000


class LogSource:
    """Logs of the host, and the process table for the tree of a process set."""

    def __init__(self, book: LogRegistry, table: ProcessTable) -> None:
        self.book = book
        self._table = table

    def path(self, name: str) -> str:
        """Return the live file of a log."""
        return str(self.book.files(name).live)

    def last(self, name: str, count: int) -> list[tuple[str | None, str]]:
        """Return (UTC or None, text) of the last lines, in about a millisecond."""
        try:
            found = read_tail(self.book.files(name), Wanted(count))
        except OSError:
            return []
        return [(rfc3339(line.at) if line.at is not None else None, line.text) for line in found]

    def tree(self, pids: Sequence[int]) -> list[dict[str, Any]]:
        """Return the living members of a process set."""
        entries = [entry for pid in pids if (entry := self._table.entry(pid)) is not None]
        return [
            {"pid": one.pid, "ppid": one.ppid, "command": command_of(one.pid), "rss_bytes": one.rss_bytes}
            for one in entries
        ]


async def read_logs(
    source: LogSource,
    names: Sequence[str],
    lines: int,
    since_s: float | None,
    grep: re.Pattern[str] | None,
    follow: bool,
) -> AsyncIterator[LogLine]:
    """Yield the last lines of each log, then, with `follow`, new ones."""
    since = time.time() - since_s if since_s is not None else None
    if not follow:
        for name in names:
            for line in await source.book.tail(name, lines, since=since, grep=grep):
                yield _wire(name, line)
            if (lost := await source.book.lost(name)) is not None:
                yield _note(name, lost)
        return
    queue: asyncio.Queue[LogLine] = asyncio.Queue(_AT_ONCE)

    async def pump(name: str) -> None:
        before, coming = await source.book.follow(name, lines, since=since)
        try:
            for line in before:
                if grep is None or grep.search(line.text):
                    await queue.put(_wire(name, line))
            if (lost := await source.book.lost(name)) is not None:
                await queue.put(_note(name, lost))
            async for several in coming:
                for line in several:
                    if grep is None or grep.search(line.text):
                        await queue.put(_wire(name, line))
        finally:
            await coming.aclose()

    pumps = [asyncio.get_running_loop().create_task(pump(name), name=f"follow {name}") for name in names]
    try:
        while True:
            yield await queue.get()
    finally:
        for task in pumps:
            task.cancel()
        await asyncio.gather(*pumps, return_exceptions=True)


def _note(name: str, sentence: str) -> LogLine:
    return {"name": name, "at": None, "line": sentence, "stream": OWN_STREAM}


def _wire(name: str, line: LogEntry) -> LogLine:
    return {"name": name, "at": rfc3339(line.at) if line.at is not None else None, "line": line.text, "stream": None}
