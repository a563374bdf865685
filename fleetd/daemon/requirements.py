"""What processes require to be there: looked at before anything starts, and again and again while the daemon runs.

The rules of this file
- All paths of the fleet are looked at together, in one thread, every two seconds; a look that hangs is given up after a few
  seconds, and what was not answered counts as absent.
- Only a changed answer is an event.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from fleetd.core.events import Event, RequirementsChanged
from fleetd.daemon.launches import LaunchPlan
from fleetd.host.volumes import Volumes

PERIOD_S = 2.0
_LIMIT_S = 3.0


class Requirements:
    """The last answer for every process that requires something."""

    def __init__(self, dispatch: Callable[[Event], None], plans: Callable[[], Mapping[str, LaunchPlan]]) -> None:
        self._dispatch = dispatch
        self._plans = plans
        self._volumes = Volumes()
        self.missing: dict[str, tuple[str, ...]] = {}

    async def look(self, plans: Mapping[str, LaunchPlan]) -> dict[str, tuple[str, ...]]:
        """Return, for every process of `plans` that requires anything, what is absent now."""
        paths = {Path(path) for plan in plans.values() for path in plan.requires}
        absent = await self._absent(paths)
        return {
            name: tuple(absent[Path(path)] for path in plan.requires if Path(path) in absent)
            for name, plan in plans.items()
            if plan.requires
        }

    async def _absent(self, paths: set[Path]) -> dict[Path, str]:
        if not paths:
            return {}
        try:
            async with asyncio.timeout(_LIMIT_S):
                return await asyncio.to_thread(self._look_at, paths)
        except TimeoutError:  # one of them hangs: ask each by itself
            found: dict[Path, str] = {}
            for path in paths:
                missing, _ = await self._volumes.missing([path])
                if missing:
                    found[path] = missing[0]
            return found

    def _look_at(self, paths: Iterable[Path]) -> dict[Path, str]:
        answers = ((path, self._volumes.look(path)[0]) for path in paths)
        return {path: reason for path, reason in answers if reason is not None}

    def accept(self, missing: Mapping[str, tuple[str, ...]]) -> None:
        """Take an answer that the fleet was told already."""
        self.missing = dict(missing)

    async def run(self) -> None:
        """Look for ever."""
        while True:
            await asyncio.sleep(PERIOD_S)
            now = await self.look(self._plans())
            for name, missing in now.items():
                if self.missing.get(name, ()) != missing:
                    self._dispatch(RequirementsChanged(name, missing))
            self.missing = now
