"""What should be in memory without being asked, and how long the rest may stay.

The rules of this file
- What should stay (preload, or a process that always runs) comes back by itself when there is room: it evicts nobody for it, and it
  never takes room on a device that somebody in line waits for.
- What an operator unloaded, what was idle too long and what measured too large does not come back by itself.
- Idle time counts from the end of the last request.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fleetd.core.data.fleet_state import Facts
from fleetd.core.data.state import Model, Placement, Residency
from fleetd.core.models.candidates import holder, sleeper, to_wake
from fleetd.core.models.eviction import Fits, Never, plan

if TYPE_CHECKING:
    from fleetd.core.models.reconcile import Residencies


def stays(facts: Facts, model: Model) -> bool:
    """Return whether the configuration wants this model in memory without being asked."""
    if model.spec.preload:
        return True
    holders = (facts.processes[name].spec for name in model.spec.holders if name in facts.processes)
    return any(spec.own_model is not None and not spec.on_demand for spec in holders)


def due(facts: Facts, model: Model) -> None:
    """Want it loaded without being asked, as soon as there is room."""
    if model.name not in facts.leaving:
        model.preload_due = True
        facts.due.add(model.name)


def ttl_deadline(facts: Facts, placement: Placement) -> float | None:
    """Return when an idle placement leaves by itself; None: not as things stand."""
    model = facts.models[placement.model]
    spec = model.spec
    if (
        placement.state not in (Residency.LOADED, Residency.ASLEEP)
        or placement.in_flight
        or model.waiting
        or model.pinned
        or not spec.ttl_s
    ):
        return None
    process = facts.processes.get(placement.process)
    if process is not None and process.spec.own_model is not None and not process.spec.on_demand:
        return None
    return placement.last_used_s + spec.ttl_s


def preload(facts: Facts, residencies: Residencies, now: float) -> None:
    """Load what should stay, where there is room that nobody in line waits for."""
    if facts.shutting_down or facts.unseen:
        return
    for name in sorted(facts.due, key=lambda key: (-facts.models[key].spec.priority, key)):
        model = facts.models[name]
        asleep = sleeper(facts, model)
        if model.missing or (model.placements and asleep is None) or now < model.retry_s or model.failure_final:
            continue
        process = holder(facts, model) if asleep is None else facts.processes[asleep.process]
        need = model.footprint.bytes if asleep is None else to_wake(facts, asleep)
        if process is None or facts.held & set(need):
            continue
        verdict = plan(need, (name, process.name), facts.resident(), facts.ledger, now)
        if isinstance(verdict, Fits):
            reason = "preload" if model.spec.preload else "always running"
            if asleep is None:
                residencies.start(model, process, now, reason)
            else:
                residencies.sleeping.wake(asleep, now, reason, for_line=False)
        elif isinstance(verdict, Never) and not verdict.pinned:
            residencies.fail(model, verdict.reason, now, final=True)
