"""External triggers: config changes, watched trees, cron schedules.

Invariants:
- One watch serves the files of the configuration and those that have to be fixed before it is valid; one watch serves
  each process with `watch`; one task serves each `schedule`.
- A watch or schedule that a new configuration does not change is kept.
- A changed file also starts processes that are FAILED, EXITED or in BACKOFF; a schedule restarts only running processes,
  the replicas of a name one after the other.
- `FLAP_COUNT` restarts within `FLAP_WINDOW_S` pass; a further change waits until the files are quiet for `QUIET_S`.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Coroutine
from datetime import UTC, datetime, tzinfo
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fleetd.control.event_codes import EventCode
from fleetd.core.data.events import RestartDue
from fleetd.daemon.async_tools import Tasks
from fleetd.daemon.context import DaemonContext
from fleetd.resolver.launch_plan import LaunchPlan, Schedule, WatchPlan
from fleetd.resolver.resolved import ResolvedFleet

if TYPE_CHECKING:
    from fleetd.host.watch.watcher import FileWatch, TreeWatch

FLAP_COUNT = 10
FLAP_WINDOW_S = 60.0
QUIET_S = 10.0
FLAPPING = (
    f"its files changed more than {FLAP_COUNT} times within {FLAP_WINDOW_S:g} s: "
    f"it restarts once they are unchanged for {QUIET_S:g} s"
)


class FlapGuard:
    """Limits restarts by watched files, which the process itself may change."""

    def __init__(self, count: int = FLAP_COUNT, window_s: float = FLAP_WINDOW_S) -> None:
        self._times: deque[float] = deque(maxlen=count)
        self._window_s = window_s

    def passes(self, now: float) -> bool:
        """Return whether a restart may happen at `now` (monotonic seconds), and count it."""
        if len(self._times) == self._times.maxlen and now - self._times[0] < self._window_s:
            return False
        self._times.append(now)
        return True


class Triggers:
    """Watches and schedules of the configuration; a save calls `saved`."""

    def __init__(self, context: DaemonContext, background: Tasks, saved: Callable[[], None]) -> None:
        self._context = context
        self._background = background
        self._saved = saved
        self._files: FileWatch | None = None
        self._trees: dict[str, tuple[WatchPlan, TreeWatch]] = {}
        self._delayed: dict[str, asyncio.TimerHandle] = {}  # restarts that wait until their files are quiet
        self._clocks: dict[str, tuple[Schedule, asyncio.Task[None]]] = {}
        self._closing: set[asyncio.Task[None]] = set()

    def follow(self, resolved: ResolvedFleet) -> None:
        """Watch what a configuration asks for, and no more."""
        self._follow_files(resolved)
        watches = {name: plan.watch for name, plan in resolved.plans.items() if plan.watch is not None}
        schedules = {name: plan.schedule for name, plan in resolved.plans.items() if plan.schedule is not None}
        for name in [name for name, (watch, _) in self._trees.items() if watches.get(name) != watch]:
            self._drop_tree(name)
        for name in [name for name, (schedule, _) in self._clocks.items() if schedules.get(name) != schedule]:
            self._clocks.pop(name)[1].cancel()
        for name, watch in watches.items():
            if name not in self._trees:
                self._trees[name] = (watch, self._tree(resolved.plans[name], watch))
        for name, schedule in schedules.items():
            if name not in self._clocks:
                task = self._background.start(self._clock(name, schedule), f"schedule of {name}")
                self._clocks[name] = (schedule, task)

    def _follow_files(self, resolved: ResolvedFleet) -> None:
        if not resolved.watch:
            if self._files is not None:
                self._close_later(self._files.close())
                self._files = None
            return
        from fleetd.host.watch.watcher import FileWatch, WatchPattern

        files = [*resolved.files, *self._context.config.files_to_fix]
        patterns = [WatchPattern(folder, text) for folder, text in resolved.patterns]
        if self._files is not None:
            self._files.update(files, patterns)
            return
        self._files = FileWatch(files, lambda _: self._saved(), patterns=patterns)

    def _tree(self, plan: LaunchPlan, watch: WatchPlan) -> TreeWatch:
        from fleetd.host.watch.watcher import TreeWatch

        guard = FlapGuard()
        loop = asyncio.get_running_loop()

        def restart(names: str) -> None:
            self._delayed.pop(plan.name, None)
            self._context.dispatch(RestartDue(plan.name, f"changed: {names}", revive=True))

        def changed(paths: list[Path]) -> None:
            names = ", ".join(path.name for path in paths[:3]) + (" …" if len(paths) > 3 else "")
            delayed = self._delayed.pop(plan.name, None)
            if delayed is not None:
                delayed.cancel()
            elif guard.passes(loop.time()):
                restart(names)
                return
            else:
                self._context.reporter.events.report("process", plan.name, EventCode.WATCH_PAUSED, FLAPPING)
            self._delayed[plan.name] = loop.call_later(QUIET_S, restart, names)

        ours = self._context.config.resolved.paths  # fleetd's own writes trigger nothing
        never = (ours.state, ours.run, ours.logs)
        return TreeWatch(watch.paths, changed, ignore=watch.ignore, never=never, debounce_s=watch.debounce_s)

    def _drop_tree(self, name: str) -> None:
        _, watch = self._trees.pop(name)
        delayed = self._delayed.pop(name, None)
        if delayed is not None:
            delayed.cancel()
        self._close_later(watch.close())

    async def _clock(self, name: str, schedule: Schedule) -> None:
        from fleetd.daemon.sources.cron import CronSchedule

        cron = CronSchedule(schedule.cron, time_zone(schedule.timezone), datetime.now(UTC))
        while True:
            await asyncio.sleep(cron.wait_s(datetime.now(UTC)))
            if cron.is_due(datetime.now(UTC)):
                self._context.dispatch(RestartDue(name, f"schedule {schedule.cron}", in_turn=True))

    def _close_later(self, closing: Coroutine[Any, Any, None]) -> None:
        task = self._context.tasks.start(closing, "close a watch")
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)

    async def close(self) -> None:
        """Stop every watch and schedule."""
        if self._files is not None:
            await self._files.close()
            self._files = None
        for name in list(self._trees):
            self._drop_tree(name)
        for _, task in self._clocks.values():
            task.cancel()
        self._clocks.clear()
        await asyncio.gather(*self._closing, return_exceptions=True)


def time_zone(name: str | None) -> tzinfo:
    """Return a time zone by name. Raises KeyError for an unknown one."""
    if name in (None, "UTC"):
        return UTC
    from zoneinfo import ZoneInfo

    return ZoneInfo(str(name))
