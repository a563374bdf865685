"""Decide whether a process may start now: prerequisites, dependencies, and its device lane.

Invariants:
- Pure functions of the state; a closed gate has a reason.
- A dependency is judged by the *current* generation of the process that it names.
- A process waits for starts and stops that are under way on its lane, never for another waiting process: no deadlock.
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
    """`open`: start. Otherwise `reason`; `impossible`: waiting alone does not help."""

    open: bool
    reason: str = ""
    impossible: bool = False


_OPEN = Gate(True)


def gate(state: FleetState, process: Process) -> Gate:
    """Return whether `process` may start."""
    if process.missing:
        return Gate(False, f"missing: {', '.join(process.missing)}")
    for dependency in process.spec.depends_on:
        verdict = _dependency(state, dependency)
        if not verdict.open:
            return verdict
    return _lane(state, process)


def dependents_running(state: FleetState, name: str) -> bool:
    """Return whether a dependent of `name` runs, which a shutdown stops first."""
    return any(
        other.state in RUNNING and any(dependency.name == name for dependency in other.spec.depends_on)
        for other in (state.processes[key] for key in state.awake if key in state.processes)
    )


def will_start(state: FleetState, wanted: Callable[[Process], bool], process: Process) -> bool:
    """Return whether it starts without help: all it waits for runs or soon will."""
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
            return Gate(False, f"{dependency.name} exited without success", impossible=True)
    elif dependency.condition is DependencyCondition.STARTED:
        if other.state in SERVING or (other.state is ProcessState.STARTING and other.spawned):
            return _OPEN
    elif other.state in (ProcessState.READY, ProcessState.DRAINING):
        return _OPEN
    if other.state is ProcessState.FAILED:
        return Gate(False, f"depends on {dependency.name}, which failed: {other.reason}", impossible=True)
    if other.state is ProcessState.EXITED:
        return Gate(False, f"depends on {dependency.name}, which has exited", impossible=True)
    if not other.spec.enabled or other.stopped:
        return Gate(False, f"depends on {dependency.name}, which is stopped", impossible=True)
    return Gate(False, wait)


def _lane(state: FleetState, process: Process) -> Gate:
    """Close the gate while another process or model on the lane is in transition."""
    busy = lane_waits(state, process)
    return Gate(False, busy) if busy else _OPEN


def stop_waits(state: FleetState, process: Process) -> str:
    """Return why a stop, load or unload must wait for its lane; empty: it need not."""
    return _on_lane(state, process, (ProcessState.STARTING,)) or _moving(state, process, only_sleep=True)


def lane_waits(state: FleetState, process: Process) -> str:
    """Return why a start, sleep or wake must wait for its lane; empty: it need not."""
    busy = _on_lane(state, process, (ProcessState.STARTING, ProcessState.STOPPING))
    return busy or _moving(state, process, only_sleep=not process.spec.capabilities.exclusive_start)


def _moving(state: FleetState, process: Process, only_sleep: bool) -> str:
    """Return the model in transition on the lane; `only_sleep` ignores loads."""
    lane = process.spec.lane
    if lane is None:
        return ""
    for name in sorted(state.placed):
        other = state.processes.get(name)
        if other is None or other is process or other.spec.lane != lane:
            continue
        for placement in state.placements_on(name):
            if not placement.ordered or placement.step is SleepStep.CHECK:
                continue
            if placement.step is not None:
                return f"waiting for its turn on {lane}: {placement.model} is ordered to {placement.step} on {name}"
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
