"""Carry out Spawn, Stop and Sweep on the host, and report every exit with the last log lines.

Invariants:
- A run keeps the plan that started it; only the stop policy comes from the newest plan.
- Every command is answered by exactly one event, also after an unexpected error.
- A second Stop of one run shares the answer of the first; it can only end the grace period.
- Exited carries the log lines of that run, classified by its engine, and is dispatched before SetEmpty.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from functools import partial

from fleetd.control.event_codes import EventCode, code_of
from fleetd.core.data.commands import Spawn, Stop, Sweep
from fleetd.core.data.events import Adopted, Event, Exited, SetEmpty, Spawned, SpawnFailed
from fleetd.core.data.specs import describe_exit
from fleetd.daemon.context import DaemonContext
from fleetd.daemon.effects import containers
from fleetd.daemon.effects.hooks import Hooks
from fleetd.daemon.effects.run import Run, exit_report, with_launch
from fleetd.daemon.effects.startup_log import StartupLogs
from fleetd.daemon.sources.prerequisites import Prerequisites
from fleetd.engines.container import CANNOT_START
from fleetd.errors import EngineError, FleetError, HostError
from fleetd.host.host import Host
from fleetd.host.process.handle import ProcessHandle
from fleetd.host.types import HandleRecord, RawExit
from fleetd.resolver.launch_plan import LaunchPlan

_VERDICT_LINES = 400  # an engine of several processes writes the cause first, then a traceback for each of them
_TAIL_TIMEOUT_S = 2.0


class Processes:
    """The live runs by name."""

    def __init__(
        self, context: DaemonContext, host: Host, hooks: Hooks, prerequisites: Prerequisites, startup: StartupLogs
    ) -> None:
        self._context = context
        self._config = context.config
        self._dispatch = context.dispatch
        self._tasks = context.tasks
        self._host = host
        self._hooks = hooks
        self._prerequisites = prerequisites
        self._startup = startup
        self._leftover_containers: set[str] = set()  # names whose container may exist although its client failed
        self.runs: dict[str, Run] = {}
        self._emptying: set[asyncio.Task[None]] = set()
        self._resting = False

    def live(self) -> Iterator[Run]:
        """Yield the runs that have a process."""
        return (run for run in list(self.runs.values()) if run.handle is not None and not run.dead)

    def run_of(self, name: str, generation: int) -> Run | None:
        run = self.runs.get(name)
        return run if run is not None and run.generation == generation else None

    async def signal(self, name: str, signal: str) -> bool:
        """Signal a leader; False if it does not run. Raises HostError (unknown signal)."""
        run = self.runs.get(name)
        if run is None or run.handle is None or run.dead:
            return False
        return await self._host.signal(run.handle, signal)

    async def inner_pid(self, plan: LaunchPlan) -> int | None:
        """Return the pid of the first process in a container; None if not visible."""
        if plan.contained is None:
            return None
        return await containers.first_pid(self._host, plan.contained, self._config.environment(plan))

    # -- commands -----------------------------------------------------------------------------------------------------

    def spawn(self, command: Spawn) -> None:
        if self._resting:
            return
        plan = self._config.plans.get(command.name)
        if plan is None:
            self._dispatch(
                SpawnFailed(command.name, command.generation, "it is no longer in fleet.yaml", recoverable=False)
            )
            return
        self._host.logs.set_policy(command.name, plan.execution.logs)
        run = self.runs[command.name] = Run(command.name, command.generation, plan, command.restarts)
        run.starting = self._tasks.start(self._spawn(run), f"spawn {command.name}")

    def stop(self, command: Stop) -> None:
        self._begin_emptying(command, command.force, f"stop {command.name}")

    def sweep(self, command: Sweep) -> None:
        self._begin_emptying(command, None, f"sweep {command.name}")

    def _begin_emptying(self, command: Stop | Sweep, force: bool | None, title: str) -> None:
        task = self._tasks.start(self._empty(command.name, command.generation, force), title)
        self._emptying.add(task)
        task.add_done_callback(self._emptying.discard)

    async def rest(self, timeout_s: float) -> None:
        """Begin no start, cancel pre_start hooks, wait for pending starts and stops.

        A start that takes longer is not answered: the program that takes over handles it.
        """
        self._resting = True
        self._hooks.cancel_pre_start()
        loop = asyncio.get_running_loop()
        end = loop.time() + timeout_s
        while (tasks := self._in_progress()) and (left := end - loop.time()) > 0:
            await asyncio.wait(tasks, timeout=left, return_when=asyncio.FIRST_COMPLETED)

    def _in_progress(self) -> set[asyncio.Task[None]]:
        known = {task for run in self.runs.values() for task in (run.starting, run.reporting) if task is not None}
        return {task for task in known | self._emptying if not task.done()}

    # -- adoption -----------------------------------------------------------------------------------------------------

    async def adopt(self, plan: LaunchPlan, record: HandleRecord) -> Adopted:
        """Take over an earlier daemon's process. Raises HostError if unproven.

        Its exit is reported after `adopted`: until then the fleet does not know the run.
        """
        run = Run(record.name, record.generation, plan)
        run.handle = await self._host.adopt(record, partial(self._on_exit, run))
        run.adopting = True
        self.runs[run.name] = run
        return Adopted(run.name, run.generation, run.handle.pid, max(0.0, run.handle.uptime_s))

    def adopted(self) -> None:
        """Report the adopted runs that exited before the fleet knew them."""
        for run in list(self.runs.values()):
            if run.adopting:
                run.adopting = False
                if run.early_exit is not None:
                    self._on_exit(run, run.early_exit)

    # -- spawn --------------------------------------------------------------------------------------------------------

    async def _spawn(self, run: Run) -> None:
        try:
            await self._check_prerequisites(run.name)
            plan = with_launch(run.plan) if run.plan.missing_program is not None else run.plan
            plan = run.plan = self._startup.with_learned(plan)
            await self._remove_leftover_container(plan)
            await self._hooks.pre_start(plan)
            if self._resting:
                return
            request = plan.request(run.generation, self._config.parent_env, run.restarts)
            handle = await self._host.spawn(request, partial(self._on_exit, run))
        except (HostError, EngineError) as error:
            if self._resting and run.handle is None:
                return
            self._failed(run, error.sentence, error.recoverable and not isinstance(error, EngineError))
            return
        except Exception as error:  # noqa: BLE001 - a command without an answer would wedge the process
            self._failed(run, f"unexpected failure: {type(error).__name__}: {error}", True)
            return
        run.handle = handle
        self._dispatch(Spawned(run.name, run.generation, handle.pid))
        self._startup.follow(run, handle)
        if run.early_exit is not None:
            self._on_exit(run, run.early_exit)

    async def _check_prerequisites(self, name: str) -> None:
        """Raise HostError if one is missing: a server would create an empty folder."""
        missing = await self._prerequisites.fresh(name)
        if missing:
            raise HostError(f"missing: {', '.join(missing)}")

    def _failed(self, run: Run, message: str, recoverable: bool) -> None:
        if self.runs.get(run.name) is run:
            del self.runs[run.name]
        self._dispatch(SpawnFailed(run.name, run.generation, message, recoverable=recoverable))

    # -- exit ---------------------------------------------------------------------------------------------------------

    def _on_exit(self, run: Run, raw: RawExit) -> None:
        if run.handle is None or run.adopting:
            run.early_exit = raw
            return
        run.dead = True
        if run.plan.contained is not None and raw.code == CANNOT_START:
            self._leftover_containers.add(run.name)
        run.reporting = self._tasks.start(self._report_exit(run, run.handle, raw), f"report the exit of {run.name}")

    async def _report_exit(self, run: Run, handle: ProcessHandle, raw: RawExit) -> None:
        try:
            async with asyncio.timeout(_TAIL_TIMEOUT_S):
                lines = await self._host.logs.run_tail(handle, _VERDICT_LINES)
        except (TimeoutError, OSError, FleetError):
            lines = []
        report = exit_report(run.plan, raw, tuple(line.text for line in lines))
        self._dispatch(Exited(run.name, run.generation, report))

    def log_exit(self, event: Event) -> None:
        """Log the exit of a process, as a warning if no stop was requested."""
        if not isinstance(event, Exited):
            return
        report = event.report
        if not (report.log_tail or report.code or report.signal):
            return
        process = self._context.queries.process(event.name)
        ordered = process is not None and process.outcome is None
        log = self._context.reporter.log.info if ordered else self._context.reporter.log.warning
        log(
            str(code_of(event)),
            name=event.name,
            generation=event.generation,
            code=report.code,
            signal=report.signal,
            reason=describe_exit(report),
            **({} if ordered else {"last_lines": list(report.log_tail[-5:])}),
        )

    # -- stop and sweep -----------------------------------------------------------------------------------------------

    async def _empty(self, name: str, generation: int, force: bool | None) -> None:
        """Empty a generation's process set and report it. `force` None: leader is dead."""
        run = self.run_of(name, generation)
        survivors: tuple[int, ...] = ()
        if run is not None and run.emptying:
            await self._end_grace(run, force)
            return
        try:
            if run is not None:
                run.emptying = True
                survivors = await self._empty_run(run, force)
        finally:
            if run is not None:
                run.emptying = False
            if run is not None and not survivors and self.runs.get(name) is run:
                del self.runs[name]
            self._dispatch(SetEmpty(name, generation, survivors))

    async def _empty_run(self, run: Run, force: bool | None) -> tuple[int, ...]:
        if run.starting is not None:
            await asyncio.wait({run.starting})
        if run.handle is None:
            return ()
        plan = self._config.plans.get(run.name, run.plan)
        survivors = await self._stop_set(run, run.handle, plan, force)
        if run.reporting is not None:
            await asyncio.wait({run.reporting})
        if not survivors and plan.post_stop:
            try:
                await self._hooks.post_stop(plan)
            except HostError as error:
                self._context.reporter.warn(run.name, error.sentence)
        return survivors

    async def _end_grace(self, run: Run, force: bool | None) -> None:
        """Force a stop in progress; its answer serves for both commands."""
        if not force:
            return
        self._hooks.cancel_post_stop(run.name)
        if run.handle is not None:
            await self._stop_set(run, run.handle, self._config.plans.get(run.name, run.plan), True)

    async def _stop_set(self, run: Run, handle: ProcessHandle, plan: LaunchPlan, force: bool | None) -> tuple[int, ...]:
        """Stop the process set; a container before its client if that cannot be asked."""
        problem = None
        if force is not False:
            problem = await self._end_container(run, plan.stop.timeout_s if force is None else None)
        if force is None:
            survivors = await self._host.sweep(handle, plan.stop.kill)
        else:
            survivors = await self._host.stop(handle, plan.stop, force)
            self._report_stop_command(run, handle)
        if force is False:
            problem = await self._end_container(run, None)
        if problem is not None:
            self._context.reporter.warn(run.name, problem)
            return survivors or (handle.pid,)
        return survivors

    def _report_stop_command(self, run: Run, handle: ProcessHandle) -> None:
        """Report the result of the stop.command once."""
        result = handle.stop_command
        if result is None or run.stop_command_reported:
            return
        run.stop_command_reported = True
        if result.ok:
            text = f"its stop.command succeeded after {result.took_s:.1f} s: {result.text}"
            self._context.reporter.events.report("process", run.name, EventCode.HOOK, text)
        else:
            self._context.reporter.warn(run.name, f"its stop.command failed: {result.text}")

    async def _end_container(self, run: Run, stop_s: float | None) -> str | None:
        contained = run.plan.contained
        if contained is None:
            return None
        return await containers.end(self._host, contained, self._config.environment(run.plan), stop_s)

    async def _remove_leftover_container(self, plan: LaunchPlan) -> None:
        """Remove a container that an earlier failed start left. Raises HostError."""
        if plan.contained is None or plan.name not in self._leftover_containers:
            return
        problem = await containers.end(self._host, plan.contained, self._config.environment(plan), None)
        if problem is not None:
            raise HostError(problem)
        self._leftover_containers.discard(plan.name)
