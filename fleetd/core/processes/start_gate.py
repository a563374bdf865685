"""Whether a process may start now: what it requires, what it depends on, and its lane.

The rules of this file
- Pure questions over the facts; the answer always carries its reason.
- A dependency is judged by the *current* generation of what it names.
- Whoever waits for a lane waits for what is under way, never for what waits itself: nobody can wait in a circle.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from fleetd.core.data.fleet_state import FleetState
from fleetd.core.data.specs import Dependency, DependencyCondition
from fleetd.core.data.state import RUNNING, SERVING, Process, ProcessState, SleepStep
from fleetd.core.processes.restart_policy import succeeded


@dataclass(frozen=True, slots=True)
class Gate:
    """`open`: start. Otherwise `reason` says what is missing, and `impossible` that waiting alone cannot bring it."""

    open: bool
    reason: str = ""
    impossible: bool = False
    absent: bool = False  # something required is absent: BLOCKED rather than merely waiting


_OPEN = Gate(True)


def gate(state: FleetState, process: Process) -> Gate:
    """Say whether `process` may start."""
    if process.missing:
        return Gate(False, f"requires {', '.join(process.missing)}, absent now", absent=True)
    for dependency in process.spec.depends_on:
        verdict = _dependency(state, dependency)
        if not verdict.open:
            return verdict
    return _lane(state, process)


def dependents_running(state: FleetState, name: str) -> bool:
    """Return whether a process that depends on `name` still runs: the reverse order of a shutdown."""
    return any(
        other.state in RUNNING and any(dependency.name == name for dependency in other.spec.depends_on)
        for other in (state.processes[key] for key in state.awake if key in state.processes)
    )


def will_start(state: FleetState, wanted: Callable[[Process], bool], process: Process) -> bool:
    """Return whether it will run without somebody's help: all that it waits for runs, or is on its way itself."""
    seen: set[str] = set()
    todo = [process.name]
    while todo:
        name = todo.pop()
        found = state.processes.get(name)
        if found is None or found.missing or (found.state is ProcessState.STOPPED and not wanted(found)):
            return False
        seen.add(name)
        if found.state is ProcessState.BLOCKED:
            todo += [other.name for other in found.spec.depends_on if other.name not in seen]
    return True


def _dependency(state: FleetState, dependency: Dependency) -> Gate:
    other = state.processes.get(dependency.name)
    wait = f"waiting for {dependency.name} to be {dependency.condition}"
    if other is None:
        return Gate(False, f"depends on {dependency.name}, which is not in the fleet", impossible=True)
    if dependency.condition is DependencyCondition.COMPLETED:
        if other.state is ProcessState.EXITED:
            report = other.last_exit
            if report is not None and succeeded(
                other.spec.restart, report, other.spec.capabilities.exit_zero_is_failure
            ):
                return _OPEN
            return Gate(False, f"{dependency.name} ended without success", impossible=True)
    elif dependency.condition is DependencyCondition.STARTED:
        if other.state in SERVING or (other.state is ProcessState.STARTING and other.spawned):
            return _OPEN
    elif other.state in (ProcessState.READY, ProcessState.DRAINING):
        return _OPEN
    if other.state is ProcessState.FAILED:
        return Gate(False, f"depends on {dependency.name}, which failed: {other.reason}", impossible=True)
    if other.state is ProcessState.EXITED:
        return Gate(False, f"depends on {dependency.name}, which has ended", impossible=True)
    if not other.spec.enabled or other.stopped:
        return Gate(False, f"depends on {dependency.name}, which is stopped", impossible=True)
    return Gate(False, wait)


def _lane(state: FleetState, process: Process) -> Gate:
    """On one lane nothing starts while another starts or stops, if either demands it; nor while a model comes, goes, sleeps or wakes."""
    busy = lane_waits(state, process)
    return Gate(False, busy) if busy else _OPEN


def stop_waits(state: FleetState, process: Process) -> str:
    """Say which start, sleep or wake on its lane an ordered stop, a load or an unload would disturb; empty: none."""
    return _on_lane(state, process, (ProcessState.STARTING,)) or _moving(state, process, only_sleep=True)


def lane_waits(state: FleetState, process: Process) -> str:
    """Say what on its lane a start, a sleep or a wake waits for; empty: nothing."""
    busy = _on_lane(state, process, (ProcessState.STARTING, ProcessState.STOPPING))
    return busy or _moving(state, process, only_sleep=not process.spec.capabilities.exclusive_start)


def _moving(state: FleetState, process: Process, only_sleep: bool) -> str:
    """Say what comes, goes, falls asleep or wakes on its lane now; empty: nothing. Nothing at all may disturb a sleep or a wake."""
    lane = process.spec.lane
    if lane is None:
        return ""
    for name in sorted(state.placed):
        other = state.processes.get(name)
        if other is None or other is process or other.spec.lane != lane:
            continue
        for placement in state.placements_on(name):
            if not placement.ordered or placement.step is SleepStep.LOOK:
                continue
            if placement.step is not None:
                return f"waiting for its turn on {lane}: {placement.model} is told to {placement.step} on {name}"
            if not only_sleep:
                return f"waiting for its turn on {lane}: {placement.model} is {placement.state} on {name}"
    return ""


def _on_lane(state: FleetState, process: Process, states: tuple[ProcessState, ...]) -> str:
    lane = process.spec.lane
    if lane is None:
        return ""
    mine = process.spec.capabilities.exclusive_start
    busy = [
        other
        for name in state.awake
        if (other := state.processes.get(name)) is not None
        and other is not process
        and other.spec.lane == lane
        and other.state in states
        and (mine or other.spec.capabilities.exclusive_start)
    ]
    if not busy:
        return ""
    first = min(busy, key=lambda other: other.name)
    return f"waiting for its turn on {lane}: {first.name} is {first.state}"
