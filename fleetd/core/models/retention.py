"""What should be in memory without being asked, and how long the rest may stay.

The rules of this file
- What should stay (preload, or a process that always runs) comes back by itself when there is room: it evicts nobody for it, and it
  never takes room on a device that somebody in line waits for.
- What an operator unloaded, what was idle too long and what measured too large does not come back by itself.
- Idle time counts from the end of the last request.
"""

from __future__ import annotations

from fleetd.core.data.fleet_state import FleetState
from fleetd.core.data.state import Model, Placement, Residency


def stays_loaded(state: FleetState, model: Model) -> bool:
    """Return whether the configuration wants this model in memory without being asked."""
    if model.spec.preload:
        return True
    holders = (state.processes[name].spec for name in model.spec.holders if name in state.processes)
    return any(spec.own_model is not None and not spec.on_demand for spec in holders)


def due(state: FleetState, model: Model) -> None:
    """Want it loaded without being asked, as soon as there is room."""
    if model.name not in state.leaving:
        state.due.add(model.name)


def cancel_preload(state: FleetState, name: str) -> None:
    """Do not load a model by itself any more."""
    state.due.discard(name)


def ttl_deadline(state: FleetState, placement: Placement) -> float | None:
    """Return when an idle placement leaves by itself; None: not as things stand."""
    model = state.models[placement.model]
    spec = model.spec
    if (
        placement.state not in (Residency.LOADED, Residency.ASLEEP)
        or placement.in_flight
        or model.waiting
        or model.pinned
        or not spec.ttl_s
    ):
        return None
    process = state.processes.get(placement.process)
    if process is not None and process.spec.own_model is not None and not process.spec.on_demand:
        return None
    return placement.last_used_s + spec.ttl_s
