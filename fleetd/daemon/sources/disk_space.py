"""Watch the free space of the log and state folders, and report a shortage where people look.

Invariants:
- A folder that does not answer delays nothing: it is asked in a thread, one question at a time.
- Only a change is an event and a log line; the current problems are in `status` and `/ready`.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Mapping
from pathlib import Path

from fleetd.control.event_codes import EventCode
from fleetd.daemon.api.status import DaemonState
from fleetd.daemon.context import Reporter
from fleetd.units import show_size

PERIOD_S = 1.0
_LOW_BYTES = 16 * 1024**2
_LOW_SHARE = 0.02


def shortage(what: str, key: str, folder: Path, found: os.statvfs_result) -> str | None:
    """Return the problem of a folder as one sentence with the cure; None while there is room."""
    total, free = found.f_blocks * found.f_frsize, found.f_bavail * found.f_frsize
    cure = f"delete files there, or set {key} in fleet.yaml to another folder"
    if found.f_files and not found.f_favail:
        return f"the {what} folder {folder} has no free inodes ({cure})"
    if total and free < min(_LOW_BYTES, total * _LOW_SHARE):
        how = "is full" if free < found.f_frsize else "is nearly full"
        return f"the {what} folder {folder} {how}: {show_size(free)} free of {show_size(total)} ({cure})"
    return None


class DiskSpace:
    """Keeps `DaemonState.disk_problems` current."""

    def __init__(
        self,
        folders: Mapping[str, Path],
        state: DaemonState,
        reporter: Reporter,
        statvfs: Callable[[Path], os.statvfs_result] = os.statvfs,
    ) -> None:
        """`folders`: `log` or `state` → its folder."""
        self._folders, self._state, self._reporter, self._statvfs = folders, state, reporter, statvfs

    async def run(self) -> None:
        """Look for ever."""
        while True:
            self.report(await asyncio.to_thread(self.look))
            await asyncio.sleep(PERIOD_S)

    def look(self) -> dict[str, str]:
        """Return the problems now, by folder. A folder that cannot be asked has none of this kind."""
        problems: dict[str, str] = {}
        for what, folder in self._folders.items():
            try:
                found = self._statvfs(folder)
            except OSError:
                continue
            problem = shortage(what, "paths.logs" if what == "log" else "paths.state", folder, found)
            if problem is not None:
                problems[what] = problem
        return problems

    def report(self, problems: Mapping[str, str]) -> None:
        """Publish the problems; log and report those that are new, and those that are over."""
        before = self._state.disk_problems
        for what, problem in problems.items():
            if what not in before:
                self._reporter.log.warning("disk space", reason=problem)
                self._reporter.events.report("daemon", None, EventCode.WARNING, problem)
        for what in before.keys() - problems.keys():
            text = f"the {what} folder has room again"
            self._reporter.log.info("disk space", reason=text)
            self._reporter.events.report("daemon", None, EventCode.WARNING, text)
        self._state.disk_problems = dict(problems)
