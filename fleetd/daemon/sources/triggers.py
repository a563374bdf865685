"""What comes from outside by itself: saved files, changed sources, clocks.

The rules of this file
- One watch for the configuration's own files, and for those that have to be mended before it is one; one per process that has
  `watch`; one task per `schedule`.
- What did not change keeps its watch over a change of the configuration.
- A changed file starts again what gave up, ended or waits for its next try; a schedule only what runs, its replicas one after
  the other.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from datetime import UTC, datetime, tzinfo
from pathlib import Path
from typing import TYPE_CHECKING

from fleetd.control.event_codes import EventCode
from fleetd.core.data.events import RestartDue
from fleetd.daemon.sources.flapping import COUNT, QUIET_S, WINDOW_S, FlapGuard
from fleetd.resolver.launch_plan import LaunchPlan, Schedule, WatchPlan
from fleetd.resolver.resolved import Assembly

if TYPE_CHECKING:
    from fleetd.daemon.wiring import Daemon
    from fleetd.host.watch.watcher import FileWatch, TreeWatch

FLAPPING = f"its files changed more than {COUNT} times within {WINDOW_S:g} s: it restarts when they were quiet for {QUIET_S:g} s"


class Outside:
    """The watches and clocks of a running daemon."""

    def __init__(self, daemon: Daemon, saved: Callable[[], None]) -> None:
        self._daemon = daemon
        self._saved = saved
        self._files: FileWatch | None = None
        self._trees: dict[str, tuple[WatchPlan, TreeWatch]] = {}
        self._quiet: dict[str, asyncio.TimerHandle] = {}  # restarts that wait until their files are quiet
        self._clocks: dict[str, tuple[Schedule, asyncio.Task[None]]] = {}
        self._closing: set[asyncio.Task[None]] = set()

    def follow(self, assembly: Assembly) -> None:
        """Watch what this assembly asks for, and no more."""
        self._follow_files(assembly)
        for name in [name for name, (plan, _) in self._trees.items() if _plan(assembly, name, "watch") != plan]:
            self._drop_tree(name)
        for name in [
            name for name, (schedule, _) in self._clocks.items() if _plan(assembly, name, "schedule") != schedule
        ]:
            self._clocks.pop(name)[1].cancel()
        for name, plan in assembly.plans.items():
            if plan.watch is not None and name not in self._trees:
                self._trees[name] = (plan.watch, self._tree(plan, plan.watch))
            if plan.schedule is not None and name not in self._clocks:
                task = self._daemon.background.start(self._clock(name, plan.schedule), f"schedule of {name}")
                self._clocks[name] = (plan.schedule, task)

    def _follow_files(self, assembly: Assembly) -> None:
        wanted = assembly.watch
        if not wanted:
            if self._files is not None:
                self._later(self._files.close())
                self._files = None
            return
        from fleetd.host.watch.watcher import FileWatch, WatchPattern

        files = [*assembly.files, *self._daemon.configuration.to_mend]
        patterns = [WatchPattern(folder, text) for folder, text in assembly.patterns]
        if self._files is not None:
            self._files.update(files, patterns)
            return
        self._files = FileWatch(files, lambda _: self._saved(), patterns=patterns)

    def _tree(self, plan: LaunchPlan, watch: WatchPlan) -> TreeWatch:
        from fleetd.host.watch.watcher import TreeWatch

        guard = FlapGuard()
        loop = asyncio.get_running_loop()

        def restart(names: str) -> None:
            self._quiet.pop(plan.name, None)
            self._daemon.dispatch(RestartDue(plan.name, f"changed: {names}", revive=True))

        def changed(paths: list[Path]) -> None:
            names = ", ".join(path.name for path in paths[:3]) + (" …" if len(paths) > 3 else "")
            waiting = self._quiet.pop(plan.name, None)
            if waiting is not None:
                waiting.cancel()
            elif guard.passes(loop.time()):
                restart(names)
                return
            else:
                self._daemon.event_log.report("process", plan.name, EventCode.WATCH_PAUSED, FLAPPING)
            self._quiet[plan.name] = loop.call_later(QUIET_S, restart, names)

        ours = self._daemon.configuration.assembly.paths  # what fleetd writes itself is nobody's source
        never = (ours.state, ours.run, ours.logs)
        return TreeWatch(watch.paths, changed, ignore=watch.ignore, never=never, debounce_s=watch.debounce_s)

    def _drop_tree(self, name: str) -> None:
        _, watch = self._trees.pop(name)
        waiting = self._quiet.pop(name, None)
        if waiting is not None:
            waiting.cancel()
        self._later(watch.close())

    async def _clock(self, name: str, schedule: Schedule) -> None:
        from fleetd.daemon.sources.cron import Timetable

        timetable = Timetable(schedule.cron, time_zone(schedule.timezone), datetime.now(UTC))
        while True:
            await asyncio.sleep(timetable.wait_s(datetime.now(UTC)))
            if timetable.look(datetime.now(UTC)):
                self._daemon.dispatch(RestartDue(name, f"schedule {schedule.cron}", in_turn=True))

    def _later(self, work: object) -> None:
        task = asyncio.ensure_future(work)  # type: ignore[call-overload]
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)

    async def close(self) -> None:
        """Let go of everything."""
        if self._files is not None:
            await self._files.close()
            self._files = None
        for name in list(self._trees):
            self._drop_tree(name)
        for _, task in self._clocks.values():
            task.cancel()
        self._clocks.clear()
        await asyncio.gather(*self._closing, return_exceptions=True)


def _plan(assembly: Assembly, name: str, what: str) -> object:
    plan = assembly.plans.get(name)
    return getattr(plan, what) if plan is not None else None


def time_zone(name: str | None) -> tzinfo:
    """Return a time zone by name. Raises KeyError for a name that the database does not have."""
    if name in (None, "UTC"):
        return UTC
    from zoneinfo import ZoneInfo

    return ZoneInfo(str(name))
