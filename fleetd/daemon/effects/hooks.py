"""Hooks: short programs before a start and after an end.

The rules of this file
- One hook at a time per process. A hook ends by itself, by its limit, or because nobody wants its end any more.
- A pre_start hook that fails, or is broken off, means that nothing is started; what post_stop says changes nothing.
- What a hook said at last is told in the story of its process.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping

from fleetd.daemon.async_tools import Tasks
from fleetd.daemon.effects.machine import Machine
from fleetd.errors import HostError
from fleetd.resolver.launch_plan import LaunchPlan

LIMIT_S = 60.0


class Hooks:
    """The hooks that run now, by process; `tell(name, sentence)` hears of those that did their work, and
    `unwanted(name)` says whether nobody wants the start any more that a hook leads to."""

    def __init__(
        self,
        machine: Machine,
        tasks: Tasks,
        parent_env: Mapping[str, str],
        tell: Callable[[str, str], None],
        unwanted: Callable[[str], bool],
    ) -> None:
        self._machine, self._tasks, self._parent_env = machine, tasks, parent_env
        self._tell, self._unwanted = tell, unwanted
        self._before: dict[str, asyncio.Task[str | None]] = {}
        self._after: dict[str, asyncio.Task[str | None]] = {}

    async def pre_start(self, plan: LaunchPlan) -> None:
        """Run the hook to its end. Raises HostError when it fails, or when a stop came before it."""
        if plan.execution.pre_start and self._unwanted(plan.name):  # `break_off` was before, and will not come again
            raise HostError("its pre_start hook failed: a stop came first")
        await self._run(self._before, plan, plan.execution.pre_start, "pre_start")

    async def post_stop(self, plan: LaunchPlan) -> None:
        """Run the hook to its end. Raises HostError when it fails."""
        await self._run(self._after, plan, plan.execution.post_stop, "post_stop")

    def break_off(self) -> None:
        """End the pre_start hooks of processes that nobody wants to start any more."""
        for name, task in list(self._before.items()):
            if self._unwanted(name):
                task.cancel()

    def break_off_all(self) -> None:
        """End every pre_start hook: nothing is started any more."""
        for task in self._before.values():
            task.cancel()

    def hurry(self, name: str) -> None:
        """End the post_stop hook of a process: its stop was forced."""
        task = self._after.get(name)
        if task is not None:
            task.cancel()

    async def _run(
        self, running: dict[str, asyncio.Task[str | None]], plan: LaunchPlan, argv: tuple[str, ...], which: str
    ) -> None:
        if not argv:
            return
        task = running[plan.name] = self._tasks.start(self._failure(plan, argv, which), f"{which} of {plan.name}")
        try:
            await asyncio.wait({task})
        finally:
            if running.get(plan.name) is task:
                del running[plan.name]
        failure = "a stop broke it off" if task.cancelled() else task.result()
        if failure is not None:
            raise HostError(f"its {which} hook failed: {failure}")

    async def _failure(self, plan: LaunchPlan, argv: tuple[str, ...], which: str) -> str | None:
        """Return how a hook failed; None when it did not."""
        env = plan.environment(self._parent_env)
        began = time.monotonic()
        try:
            ok, output = await self._machine.run(argv, env, plan.execution.cwd, LIMIT_S)
        except HostError as error:
            return error.sentence
        last = (output.strip().splitlines()[-1:] or ["it said nothing"])[0][:300]
        if not ok:
            return last
        self._tell(plan.name, f"its {which} hook ended well after {time.monotonic() - began:.1f} s: {last}")
        return None
