"""One run of a process: the plan that started it, its handle, and the report of its exit."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field, replace

from fleetd.core.data.specs import ExitKind, ExitReport
from fleetd.engines.base import ExitVerdict
from fleetd.engines.container import client_verdict, inner_signal
from fleetd.host.process.handle import ProcessHandle
from fleetd.host.types import RawExit, Usage
from fleetd.resolver.launch_plan import LaunchPlan

_TAIL_LINES = 30  # kept with the report


@dataclass(slots=True, eq=False)
class Run:
    """One generation of a process, with the plan that started it."""

    name: str
    generation: int
    plan: LaunchPlan
    restarts: int = 0
    handle: ProcessHandle | None = None
    starting: asyncio.Task[None] | None = None
    emptying: bool = False
    stop_command_reported: bool = False
    adopting: bool = False  # the fleet has not received its Adopted event yet
    early_exit: RawExit | None = None  # seen before the fleet knew the run
    dead: bool = False
    reporting: asyncio.Task[None] | None = None
    inner_pid_requested: bool = False
    inner_pid: int | None = None  # of the first process in its container
    usage: Usage = field(default_factory=Usage)
    cpu_percent: float | None = None
    sampled_at: float = 0.0


def with_launch(plan: LaunchPlan) -> LaunchPlan:
    """Return the plan with a new command line. Raises EngineError (no program)."""
    if plan.recipe is not None:
        contained = plan.recipe.contain(plan.engine, plan.context)
        return replace(plan, launch=contained.launch, contained=contained, missing_program=None)
    return replace(plan, launch=plan.engine.launch(plan.context), missing_program=None)


def exit_report(plan: LaunchPlan, raw: RawExit, tail: tuple[str, ...]) -> ExitReport:
    """Return what the restart policy reads of an exit, classified by the engine."""
    if raw.code is None and raw.signal is None:
        return ExitReport(None, None, raw.oom, ExitKind.UNKNOWN, "", tail[-_TAIL_LINES:])
    verdict = _verdict(plan, raw, tail)
    kind = ExitKind.OOM if raw.oom else verdict.kind
    reason = "" if raw.oom else verdict.reason
    return ExitReport(raw.code, raw.signal, raw.oom, kind, reason, tail[-_TAIL_LINES:])


def _verdict(plan: LaunchPlan, raw: RawExit, tail: tuple[str, ...]) -> ExitVerdict:
    """Ask the engine; for a container, check first whether its client failed."""
    if plan.contained is None:
        return plan.engine.classify_exit(raw.code, raw.signal, tail)
    if raw.signal is not None:
        return ExitVerdict(ExitKind.CRASH, f"{plan.contained.remove[0]} itself was killed")
    own = client_verdict(raw.code, tail, plan.context.command[0] if plan.context.command else "")
    if own is not None:
        return own
    inner = inner_signal(raw.code)
    return plan.engine.classify_exit(raw.code if inner is None else None, inner, tail)
