"""Decide which models stay in memory without requests, and how long the others stay.

Invariants:
- A model that should stay (`preload`, or an always-running process) is loaded again when there is room.
- A model that was unloaded by an operator, for being idle, or for measuring over the budget is not loaded again by itself.
- Idle time counts from the end of the last request.
"""

from __future__ import annotations

from fleetd.core.data.fleet_state import FleetState
from fleetd.core.data.state import Model, Placement, Residency


def stays_loaded(state: FleetState, model: Model) -> bool:
    """Return whether the configuration keeps this model in memory without requests."""
    if model.spec.preload:
        return True
    holders = (state.processes[name].spec for name in model.spec.holders if name in state.processes)
    return any(spec.own_model is not None and not spec.on_demand for spec in holders)


def due(state: FleetState, model: Model) -> None:
    """Load the model as soon as there is room, without a request."""
    if model.name not in state.leaving:
        state.due.add(model.name)


def cancel_preload(state: FleetState, name: str) -> None:
    """Do not load a model without a request."""
    state.due.discard(name)


def ttl_deadline(state: FleetState, placement: Placement) -> float | None:
    """Return when an idle placement is unloaded; None: not for now."""
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
