"""Find processes that may hold a model, and placements that may be woken or waited for.

Invariants:
- Pure functions of the state.
- A process is *down* if it failed and may come back: a request waits for it only without an alternative.
- A stop or drain by an operator, a missing prerequisite and a failed process rule a process out in the same way.
"""

from __future__ import annotations

from fleetd.core.data.fleet_state import FleetState
from fleetd.core.data.state import RESTING, Model, Placement, Process, ProcessState, Residency, SleepStep


def usable(process: Process) -> bool:
    """Return whether a model may be placed on the process now or soon."""
    if process.stopped or process.removed or not process.spec.enabled or process.missing or process.drained:
        return False
    return process.state not in (ProcessState.FAILED, ProcessState.EXITED)


def down(model: Model, process: Process) -> bool:
    """Return whether the process was lost, or does not answer.

    A first start does not count, nor a start that only requests cause: if they all went elsewhere, it would never come back.
    """
    if process.state is ProcessState.STARTING and not process.spec.capabilities.owns_process:
        return bool(process.startup_detail)
    if process.state is ProcessState.STARTING:
        return process.record.deaths > 0 and (model.spec.preload or not process.spec.on_demand)
    if process.state is ProcessState.STOPPING:
        return process.outcome is not None
    return process.state in (ProcessState.BACKOFF, ProcessState.UNHEALTHY)


def out_of_reach(state: FleetState, model: Model) -> bool:
    """Return whether every process of the model is down or ruled out."""
    processes = [process for name in model.spec.holders if (process := state.processes.get(name)) is not None]
    return all(down(model, process) or not usable(process) for process in processes)


def best_process(state: FleetState, model: Model, avoid: tuple[str, ...] = ()) -> Process | None:
    """Return the usable process without this model with the fewest models, or None."""
    able = [
        process
        for name in model.spec.holders
        if (process := state.processes.get(name)) is not None
        and usable(process)
        and name not in model.placements
        and name not in avoid
    ]
    if not able:
        return None
    return min(
        able,
        key=lambda process: (
            process.state is not ProcessState.READY and not process.spec.on_demand,
            len(state.placed.get(process.name, ())),
        ),
    )


def can_still_serve(state: FleetState, placement: Placement) -> bool:
    """Return whether a request may wait for this placement, or for its successor."""
    process = state.processes.get(placement.process)
    if process is None or process.survivors:
        return False
    if process.stopped or process.removed or not process.spec.enabled or process.drained:
        return False
    return not (process.state in RESTING and not usable(process))


def sleeping_placement(state: FleetState, model: Model) -> Placement | None:
    """Return a sleeping placement that can be woken now; None: there is none."""
    for name, placement in model.placements.items():
        process = state.processes.get(name)
        if placement.state is not Residency.ASLEEP or process is None:
            continue
        if process.state in (ProcessState.READY, ProcessState.UNHEALTHY) and process.restart_wanted is None:
            return placement
    return None


def bytes_to_wake(state: FleetState, placement: Placement) -> dict[str, int]:
    """Return the bytes per device that waking takes on top of the reservation."""
    held = state.ledger.reservations.get(placement.key, {})
    need = state.models[placement.model].footprint.bytes
    return {device: max(0, size - held.get(device, 0)) for device, size in need.items()}


def reservation_of(model: Model, placement: Placement) -> dict[str, int]:
    """Return the planned reservation of a placement in its current state."""
    awake, asleep = model.footprint.bytes, model.asleep or {}
    if placement.state is Residency.ASLEEP:
        return dict(asleep or awake)
    if not (placement.slept or placement.step is SleepStep.SLEEP):
        return dict(awake)
    return {device: max(awake.get(device, 0), asleep.get(device, 0)) for device in {**awake, **asleep}}


def in_sleep_transition(placement: Placement, timeout_s: float, now: float) -> bool:
    """Return whether a probe ending now overlapped with falling asleep or waking."""
    if placement.step is not None:
        return placement.ordered
    return placement.slept and now - placement.since_s <= timeout_s
