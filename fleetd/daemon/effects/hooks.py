"""Run hooks: short programs before a start and after a stop.

Invariants:
- At most one hook per process and kind runs. It is cancelled when the start it leads to is no longer wanted.
- A pre_start hook that fails or is cancelled prevents the start; the result of post_stop changes nothing.
- The last output line of a hook is reported as an event of its process.
"""

from __future__ import annotations

import asyncio
import time

from fleetd.control.event_codes import EventCode
from fleetd.core.data.events import Event
from fleetd.daemon.context import DaemonContext
from fleetd.daemon.effects.containers import Commands
from fleetd.errors import HostError
from fleetd.resolver.launch_plan import LaunchPlan

LIMIT_S = 60.0


class Hooks:
    """The running hooks by process. `commands` runs short programs: the host."""

    def __init__(self, context: DaemonContext, commands: Commands) -> None:
        self._context = context
        self._commands = commands
        self._before: dict[str, asyncio.Task[str | None]] = {}
        self._after: dict[str, asyncio.Task[str | None]] = {}

    async def pre_start(self, plan: LaunchPlan) -> None:
        """Run the hook. Raises HostError when it fails, or when a stop came before it."""
        if plan.pre_start and self._unwanted(plan.name):  # `cancel_unwanted` will not be called again
            raise HostError("its pre_start hook failed: a stop came first")
        await self._run(self._before, plan, plan.pre_start, "pre_start")

    async def post_stop(self, plan: LaunchPlan) -> None:
        """Run the hook. Raises HostError when it fails."""
        await self._run(self._after, plan, plan.post_stop, "post_stop")

    def cancel_unwanted(self, _: Event) -> None:
        """Cancel the pre_start hooks of processes that are no longer to start."""
        for name, task in list(self._before.items()):
            if self._unwanted(name):
                task.cancel()

    def cancel_pre_start(self) -> None:
        """Cancel every pre_start hook."""
        for task in self._before.values():
            task.cancel()

    def cancel_post_stop(self, name: str) -> None:
        """Cancel the post_stop hook of a process whose stop is forced."""
        task = self._after.get(name)
        if task is not None:
            task.cancel()

    def _unwanted(self, name: str) -> bool:
        process = self._context.queries.process(name)
        return process is None or not self._context.queries.is_wanted(process)

    async def _run(
        self, running: dict[str, asyncio.Task[str | None]], plan: LaunchPlan, argv: tuple[str, ...], which: str
    ) -> None:
        if not argv:
            return
        title = f"{which} of {plan.name}"
        task = running[plan.name] = self._context.tasks.start(self._failure(plan, argv, which), title)
        try:
            await asyncio.wait({task})
        finally:
            if running.get(plan.name) is task:
                del running[plan.name]
        failure = "a stop cancelled it" if task.cancelled() else task.result()
        if failure is not None:
            raise HostError(f"its {which} hook failed: {failure}")

    async def _failure(self, plan: LaunchPlan, argv: tuple[str, ...], which: str) -> str | None:
        """Return the reason of a failure; None when the hook succeeded."""
        env = self._context.config.environment(plan)
        began = time.monotonic()
        try:
            ok, output = await self._commands.run(argv, env, plan.execution.cwd, LIMIT_S)
        except HostError as error:
            return error.sentence
        last = (output.strip().splitlines()[-1:] or ["it printed nothing"])[0][:300]
        if not ok:
            return last
        text = f"its {which} hook succeeded after {time.monotonic() - began:.1f} s: {last}"
        self._context.reporter.events.report("process", plan.name, EventCode.HOOK, text)
        return None
