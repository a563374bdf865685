"""Follow the log of a start: report its phases, and keep what the next start can use.

Invariants:
- A log is followed from the spawn until the process is ready or dead; a new phase is an event and extends the deadline.
- Learned values are stored by the model's footprint hash, as its memory is, and given to the next start only: they never
  restart a running process. A start that fails with them drops them.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import replace

from fleetd.core.data.events import StartProgress
from fleetd.core.data.state import ProcessState
from fleetd.daemon.context import DaemonContext
from fleetd.daemon.effects.run import Run, with_launch
from fleetd.engines.container import pull_phase
from fleetd.host.logs.registry import LogRegistry
from fleetd.host.process.handle import ProcessHandle
from fleetd.host.state_store import StateStore
from fleetd.resolver.launch_plan import LaunchPlan

PREFIX = "start:"
PERIOD_S = 0.3
_KEPT_LINES = 4000


class StartupLogs:
    """Follow the logs of starting processes; `facts` are earlier daemons' values."""

    def __init__(
        self, context: DaemonContext, logs: LogRegistry, store: StateStore, facts: Mapping[str, object]
    ) -> None:
        self._context = context
        self._queries = context.queries
        self._logs = logs
        self._store = store
        self._learned: dict[str, dict[str, int]] = {}  # by footprint hash
        for key, value in facts.items():
            if isinstance(value, dict) and value and all(isinstance(one, int) for one in value.values()):
                self._learned[key.removeprefix(PREFIX)] = value

    def with_learned(self, plan: LaunchPlan) -> LaunchPlan:
        """Return the plan with values of earlier starts. Raises EngineError."""
        known = self._learned.get(self._key(plan))
        if not known or plan.missing_program is not None or plan.engine.startup is None:
            return plan
        return with_launch(replace(plan, context=replace(plan.context, learned=known), kept_hash=plan.launch_hash()))

    def follow(self, run: Run, handle: ProcessHandle) -> None:
        """Follow the log of a start, if the engine reports phases or learns from it."""
        if run.plan.engine.startup is not None or run.plan.contained is not None:
            self._context.tasks.start(self._follow(run, handle), f"start of {run.name}")

    async def _follow(self, run: Run, handle: ProcessHandle) -> None:
        new_lines = self._logs.reader(handle).new_lines
        lines: list[str] = []
        phase = ""
        while True:
            starting = self._starting(run)
            for line in await new_lines():
                lines.append(line)
                found = self._phase(run.plan, line)
                if found is not None and found != phase and starting:
                    phase = found
                    self._context.dispatch(StartProgress(run.name, run.generation, phase))
            del lines[:-_KEPT_LINES]
            if not starting:
                break
            await asyncio.sleep(PERIOD_S)
        self._learn(run, lines)

    def _phase(self, plan: LaunchPlan, line: str) -> str | None:
        startup = plan.engine.startup
        found = startup.phase(line) if startup is not None else None
        return found or (pull_phase(line) if plan.contained is not None else None)

    def _starting(self, run: Run) -> bool:
        process = self._queries.process(run.name)
        if process is None or process.generation != run.generation or run.dead:
            return False
        return process.state is ProcessState.STARTING

    def _learn(self, run: Run, lines: list[str]) -> None:
        startup = run.plan.engine.startup
        key = self._key(run.plan)
        if startup is None or not key:
            return
        process = self._queries.process(run.name)
        served = process is not None and process.generation == run.generation and process.ready_s is not None
        if not served:
            if run.plan.context.learned and self._learned.pop(key, None) is not None:
                self._store.put(PREFIX + key, {})
                self._context.reporter.warn(
                    run.name, "discarded the values that an earlier start learned: this start failed with them"
                )
            return
        found = dict(startup.learned(run.plan.context, lines))
        if found and not run.plan.context.learned and found != self._learned.get(key):
            self._learned[key] = found
            self._store.put(PREFIX + key, found)
            values = ", ".join(f"{name} {value}" for name, value in found.items())
            self._context.reporter.warn(run.name, f"learned at its start, used for the next one: {values}")

    def _key(self, plan: LaunchPlan) -> str:
        model = plan.own_model
        spec = self._context.config.model_specs.get(model.name) if model is not None else None
        return spec.footprint_hash if spec is not None else ""
