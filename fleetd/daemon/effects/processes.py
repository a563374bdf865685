"""Runs of processes: Spawn, Stop and Sweep carried out on the host, and every death reported with its last words.

The rules of this file
- A run is one generation of one process. It keeps the plan that started it, whatever fleet.yaml says by now; only its stop
  policy is taken from the newest plan.
- Each command is answered by exactly one event, whatever goes wrong: an unexpected error is an answer too.
- Two stops of one run are one: the second only takes the grace away, if that is what it says.
- The death of a leader is reported with the log lines of its own run, classified by its engine; it comes before SetEmpty.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial

from fleetd.core.data.commands import Spawn, Stop, Sweep
from fleetd.core.data.events import Adopted, Event, Exited, SetEmpty, Spawned, SpawnFailed
from fleetd.core.data.specs import ExitKind, ExitReport
from fleetd.daemon.async_tools import Tasks
from fleetd.daemon.effects import containers
from fleetd.daemon.effects.hooks import Hooks
from fleetd.daemon.effects.machine import Handle, Machine
from fleetd.daemon.effects.startup_log import Starts
from fleetd.engines.base import ExitVerdict
from fleetd.engines.container import CANNOT_START, client_verdict, inner_signal
from fleetd.errors import EngineError, FleetError, HostError
from fleetd.host.types import HandleRecord, RawExit, Usage
from fleetd.resolver.launch_plan import LaunchPlan

_TAIL_LINES = 30  # kept with the report
_VERDICT_LINES = 400  # an engine of several processes writes the cause first, then a traceback for each of them
_LAST_WORDS_S = 2.0


@dataclass(slots=True, eq=False)
class Run:
    """One generation of one process. `ended` is set once the leader's death was reported."""

    name: str
    generation: int
    plan: LaunchPlan
    restarts: int = 0
    handle: Handle | None = None
    starting: asyncio.Task[None] | None = None
    emptying: bool = False
    told_of_command: bool = False
    entering: bool = False  # adopted, and the fleet has not been told of it yet
    early_exit: RawExit | None = None
    dead: bool = False
    reporting: asyncio.Task[None] | None = None
    looked_inside: bool = False  # where its container's first process is was asked
    inner_pid: int | None = None
    usage: Usage = field(default_factory=Usage)
    cpu_percent: float | None = None
    sampled_at: float = 0.0


class Processes:
    """The live runs by name. `plans()` gives the newest plans, `parent_env` what children
    inherit from; `complain(name, sentence)` hears of what failed without changing anything,
    `tell(name, sentence)` of hooks that did their work; `unwanted(name)` says whether nobody wants it started any more;
    `absent(name)` looks once more, right before a start, at what the process requires; `starts` reads along."""

    def __init__(
        self,
        machine: Machine,
        dispatch: Callable[[Event], None],
        plans: Callable[[], Mapping[str, LaunchPlan]],
        tasks: Tasks,
        parent_env: Mapping[str, str],
        complain: Callable[[str, str], None] = lambda *_: None,
        tell: Callable[[str, str], None] = lambda *_: None,
        unwanted: Callable[[str], bool] = lambda _: False,
        absent: Callable[[str], Awaitable[tuple[str, ...]]] | None = None,
        starts: Starts | None = None,
    ) -> None:
        self._starts = starts
        self._absent = absent
        self._machine = machine
        self._dispatch = dispatch
        self._plans = plans
        self._tasks = tasks
        self._parent_env = parent_env
        self._complain, self._tell = complain, tell
        self._half_made: set[str] = set()  # names whose container may exist although its client could not start it
        self.hooks = Hooks(machine, tasks, parent_env, tell, unwanted)
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
        """Send a signal to the leader of a process; False if it does not run. Raises HostError for an unknown signal."""
        run = self.runs.get(name)
        if run is None or run.handle is None or run.dead:
            return False
        return await self._machine.signal(run.handle, signal)

    async def inner_pid(self, plan: LaunchPlan) -> int | None:
        """Return the pid of the first process in a plan's container, as this machine sees it; None: not to be seen."""
        if plan.contained is None:
            return None
        return await containers.first_pid(self._machine, plan.contained, plan.environment(self._parent_env))

    # -- commands -----------------------------------------------------------------------------------------------------

    def spawn(self, command: Spawn) -> None:
        if self._resting:
            return
        plan = self._plans().get(command.name)
        if plan is None:
            self._dispatch(
                SpawnFailed(command.name, command.generation, "it is no longer in fleet.yaml", recoverable=False)
            )
            return
        run = self.runs[command.name] = Run(command.name, command.generation, plan, command.restarts)
        run.starting = self._tasks.start(self._spawn(run), f"spawn {command.name}")

    def stop(self, command: Stop) -> None:
        self._begin_emptying(command, command.force, f"stop {command.name}")

    def sweep(self, command: Sweep) -> None:
        self._begin_emptying(command, None, f"sweep {command.name}")

    def _begin_emptying(self, command: Stop | Sweep, force: bool | None, what: str) -> None:
        task = self._tasks.start(self._empty(command.name, command.generation, force), what)
        self._emptying.add(task)
        task.add_done_callback(self._emptying.discard)

    async def rest(self, timeout_s: float) -> None:
        """Begin no start any more, break off what only leads to one, and wait until nothing is under way.

        A start that comes too late has no answer: it is left to the program that takes over.
        """
        self._resting = True
        self.hooks.break_off_all()
        loop = asyncio.get_running_loop()
        end = loop.time() + timeout_s
        while (tasks := self._under_way()) and (left := end - loop.time()) > 0:
            await asyncio.wait(tasks, timeout=left, return_when=asyncio.FIRST_COMPLETED)

    def _under_way(self) -> set[asyncio.Task[None]]:
        known = {task for run in self.runs.values() for task in (run.starting, run.reporting) if task is not None}
        return {task for task in known | self._emptying if not task.done()}

    def adopt(self, plan: LaunchPlan, record: HandleRecord) -> Run:
        """Make the run that an adopted process will belong to; `adopted` completes it."""
        return Run(record.name, record.generation, plan)

    def adopted(self, run: Run, handle: Handle) -> Adopted:
        """Enter a run whose process was proven to be ours. Its death is told after `entered`: until then nobody knows it."""
        run.handle, run.entering = handle, True
        self.runs[run.name] = run
        return Adopted(run.name, run.generation, handle.pid, max(0.0, handle.uptime_s))

    def entered(self) -> None:
        """The fleet knows the adopted runs now: tell it of those that have died since."""
        for run in list(self.runs.values()):
            if run.entering:
                run.entering = False
                if run.early_exit is not None:
                    self._on_exit(run, run.early_exit)

    def exit_seen(self, run: Run) -> Callable[[RawExit], None]:
        """Return the callback for the host: it may fire before the spawn has returned."""
        return partial(self._on_exit, run)

    # -- spawn --------------------------------------------------------------------------------------------------------

    async def _spawn(self, run: Run) -> None:
        try:
            await self._look_again(run.name)
            plan = run.plan = self._starts.informed(written(run.plan)) if self._starts else written(run.plan)
            await self._clear_place(plan)
            await self.hooks.pre_start(plan)
            if self._resting:
                return
            request = plan.request(run.generation, self._parent_env, run.restarts)
            handle = await self._machine.spawn(request, self.exit_seen(run))
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
        if self._starts is not None:
            self._starts.began(run)
        if run.early_exit is not None:
            self._on_exit(run, run.early_exit)

    async def _look_again(self, name: str) -> None:
        """Raise HostError when what the process requires has gone since the last look: a server would make an empty folder."""
        missing = await self._absent(name) if self._absent is not None else ()
        if missing:
            raise HostError(f"requires {', '.join(missing)}, absent now")

    def _failed(self, run: Run, message: str, recoverable: bool) -> None:
        if self.runs.get(run.name) is run:
            del self.runs[run.name]
        self._dispatch(SpawnFailed(run.name, run.generation, message, recoverable=recoverable))

    # -- death --------------------------------------------------------------------------------------------------------

    def _on_exit(self, run: Run, raw: RawExit) -> None:
        if run.handle is None or run.entering:
            run.early_exit = raw
            return
        run.dead = True
        if run.plan.contained is not None and raw.code == CANNOT_START:
            self._half_made.add(run.name)
        run.reporting = self._tasks.start(self._report(run, raw), f"last words of {run.name}")

    async def _report(self, run: Run, raw: RawExit) -> None:
        try:
            async with asyncio.timeout(_LAST_WORDS_S):
                tail = await self._machine.last_words(run.handle, _VERDICT_LINES) if run.handle else ()
        except (TimeoutError, OSError, FleetError):
            tail = ()
        self._dispatch(Exited(run.name, run.generation, report_of(run.plan, raw, tail)))

    # -- stop and sweep -----------------------------------------------------------------------------------------------

    async def _empty(self, name: str, generation: int, force: bool | None) -> None:
        """Empty the process set of a generation and say so. `force` None: the leader is dead already."""
        run = self.run_of(name, generation)
        survivors: tuple[int, ...] = ()
        if run is not None and run.emptying:
            await self._hurry(run, force)
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
        plan = self._plans().get(run.name, run.plan)
        survivors = await self._end_client(run, plan, force)
        if run.reporting is not None:
            await asyncio.wait({run.reporting})
        if not survivors and plan.execution.post_stop:
            try:
                await self.hooks.post_stop(plan)
            except HostError as error:
                self._complain(run.name, error.sentence)
        return survivors

    async def _hurry(self, run: Run, force: bool | None) -> None:
        """A stop is under way, and its answer serves for this one too: only its grace may end."""
        if not force:
            return
        self.hooks.hurry(run.name)
        if run.handle is not None:
            await self._end_client(run, self._plans().get(run.name, run.plan), True)

    async def _end_client(self, run: Run, plan: LaunchPlan, force: bool | None) -> tuple[int, ...]:
        """End the process set; where it is a container's client, the container too: first, when nobody can ask it any more."""
        assert run.handle is not None
        why = None
        if force is not False:
            why = await self._end_container(run, plan.stop.timeout_s if force is None else None)
        if force is None:
            survivors = await self._machine.sweep(run.handle, plan.stop.kill)
        else:
            survivors = await self._machine.stop(run.handle, plan.stop, force)
            self._tell_of_command(run)
        if force is False:
            why = await self._end_container(run, None)
        if why is not None:
            self._complain(run.name, why)
            return survivors or (run.handle.pid,)
        return survivors

    def _tell_of_command(self, run: Run) -> None:
        """Say once how its stop.command went."""
        said = run.handle.stop_command if run.handle is not None else None
        if said is None or run.told_of_command:
            return
        run.told_of_command = True
        if said.ok:
            self._tell(run.name, f"its stop.command ended well after {said.took_s:.1f} s: {said.text}")
        else:
            self._complain(run.name, f"its stop.command failed: {said.text}")

    async def _end_container(self, run: Run, stop_s: float | None) -> str | None:
        contained = run.plan.contained
        if contained is None:
            return None
        return await containers.end(self._machine, contained, run.plan.environment(self._parent_env), stop_s)

    async def _clear_place(self, plan: LaunchPlan) -> None:
        """Remove a container that a start before left half made. Raises HostError."""
        if plan.contained is None or plan.name not in self._half_made:
            return
        why = await containers.end(self._machine, plan.contained, plan.environment(self._parent_env), None)
        if why is not None:
            raise HostError(why)
        self._half_made.discard(plan.name)


def written(plan: LaunchPlan) -> LaunchPlan:
    """Return the plan with a command line. Raises EngineError when its program still cannot be found."""
    if plan.missing_program is None:
        return plan
    if plan.recipe is not None:
        contained = plan.recipe.contain(plan.engine, plan.context)
        return replace(plan, launch=contained.launch, contained=contained, missing_program=None)
    return replace(plan, launch=plan.engine.launch(plan.context), missing_program=None)


def report_of(plan: LaunchPlan, raw: RawExit, tail: tuple[str, ...]) -> ExitReport:
    """Turn a death into what the restart policy reads, with the engine's own opinion of it."""
    if raw.code is None and raw.signal is None:
        return ExitReport(None, None, raw.oom, ExitKind.UNKNOWN, "", tail[-_TAIL_LINES:])
    verdict = _verdict(plan, raw, tail)
    kind = ExitKind.OOM if raw.oom else verdict.kind
    reason = "" if raw.oom else verdict.reason
    return ExitReport(raw.code, raw.signal, raw.oom, kind, reason, tail[-_TAIL_LINES:])


def _verdict(plan: LaunchPlan, raw: RawExit, tail: tuple[str, ...]) -> ExitVerdict:
    """Ask the engine; for a container first whether it was the client that failed, and what became of the program inside."""
    if plan.contained is None:
        return plan.engine.classify_exit(raw.code, raw.signal, tail)
    if raw.signal is not None:
        return ExitVerdict(ExitKind.CRASH, f"{plan.contained.remove[0]} itself was killed")
    own = client_verdict(raw.code, tail, plan.context.command[0] if plan.context.command else "")
    if own is not None:
        return own
    inner = inner_signal(raw.code)
    return plan.engine.classify_exit(raw.code if inner is None else None, inner, tail)
