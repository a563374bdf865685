"""Load the models that should stay in memory, where there is room.

Invariants:
- A preload evicts no model and takes no room on a device that a waiting request claims.
"""

from __future__ import annotations

from fleetd.core.data.fleet_state import FleetState
from fleetd.core.models.candidates import best_process, bytes_to_wake, sleeping_placement
from fleetd.core.models.eviction import Fits, Never, plan
from fleetd.core.models.reconcile import ModelLoader


def preload(state: FleetState, loader: ModelLoader, now: float) -> None:
    """Load models that are due, where there is room that no waiting request claims."""
    if state.shutting_down or state.unobserved:
        return
    for name in sorted(state.due, key=lambda key: (-state.models[key].spec.priority, key)):
        model = state.models[name]
        asleep = sleeping_placement(state, model)
        if model.missing or (model.placements and asleep is None) or now < model.retry_s or model.failure_final:
            continue
        process = best_process(state, model) if asleep is None else state.processes[asleep.process]
        need = model.footprint.bytes if asleep is None else bytes_to_wake(state, asleep)
        if process is None or state.claimed & set(need):
            continue
        verdict = plan(need, (name, process.name), state.resident(), state.ledger, now)
        if isinstance(verdict, Fits):
            reason = "preload" if model.spec.preload else "always running"
            if asleep is None:
                loader.start(model, process, now, reason)
            else:
                loader.sleeping.wake(asleep, now, reason, for_request=False)
        elif isinstance(verdict, Never) and not verdict.pinned:
            loader.fail(model, verdict.reason, now, final=True)
