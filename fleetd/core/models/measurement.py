"""Enter measured memory: correct the ledger, learn footprints, choose what leaves when a budget is exceeded.

Invariants:
- A measurement is entered in the ledger even if it exceeds the budget.
- The highest measured footprint is kept and planned with (for a declared one: if it is larger), as long as the options of the
  load are unchanged.
"""

from __future__ import annotations

from collections.abc import Mapping

from fleetd.core.data.commands import LearnFootprint
from fleetd.core.data.fleet_state import FleetState
from fleetd.core.data.journal import Evicted, FootprintLearned
from fleetd.core.data.specs import FootprintSource, asleep_hash
from fleetd.core.data.state import Placement, Residency, SleepStep
from fleetd.core.models.eviction import coming_free, reload_cost

SETTLED_S = 30.0  # largest age of a device sample


def learn(state: FleetState, placement: Placement, measured: Mapping[str, int]) -> None:
    """Enter a loaded model's measured memory; learn it if it is the highest."""
    model = state.models[placement.model]
    current = state.ledger.reservations.get(placement.key, {})
    if any(size > current.get(device, 0) for device, size in measured.items()):
        state.ledger.correct(placement.key, {**current, **{d: max(s, current.get(d, 0)) for d, s in measured.items()}})
    if placement.footprint_hash != model.spec.footprint_hash:
        return  # it was loaded with other options: the next load may take less
    before = model.footprint
    model.learned.update({d: size for d, size in measured.items() if size > model.learned.get(d, 0)})
    if model.footprint != before:
        earlier = model.spec.footprint.source is FootprintSource.LEARNED
        most = model.footprint.bytes if earlier else model.learned
        state.journal.note(FootprintLearned(model.name, dict(most)))
        state.emit(LearnFootprint(model.name, model.spec.footprint_hash, dict(most), "highest measured so far"))


def learn_asleep(state: FleetState, placement: Placement, measured: Mapping[str, int], now: float) -> None:
    """Enter a sleeper's measured memory from a sample taken after it fell asleep."""
    model = state.models[placement.model]
    if model.spec.asleep is None or now - placement.since_s < SETTLED_S:
        return
    if placement.footprint_hash != model.spec.footprint_hash:
        return
    grown = {device: size for device, size in measured.items() if size > model.learned_asleep.get(device, 0)}
    if grown:
        model.learned_asleep.update(grown)
        state.ledger.correct(placement.key, model.asleep or {})
        key = asleep_hash(model.spec.footprint_hash)
        state.journal.note(FootprintLearned(model.name, dict(model.learned_asleep), asleep=True))
        state.emit(LearnFootprint(model.name, key, dict(model.learned_asleep), "highest measured asleep"))


def eviction_note(state: FleetState, placement: Placement, now: float, reason: str, by: str) -> Evicted:
    """Return the note for an eviction: for whom, bytes per device, and the cost."""
    model = state.models[placement.model]
    held = state.ledger.reservations.get(placement.key, {})
    sleeps = placement.step is SleepStep.SLEEP
    freed = coming_free(placement, model, state.ledger) if sleeps else dict(held)
    cost = round(reload_cost(placement, model, now), 3)
    return Evicted(placement.model, placement.process, reason, by, freed, cost, sleeps)


def over_budget_victims(state: FleetState) -> list[Placement]:
    """Return idle, unpinned placements, cheapest first, to meet exceeded budgets."""
    excess = state.ledger.excess()
    if not excess:
        return []
    resident = state.resident()
    there = [p for m in resident.values() for p in m.placements.values()]
    if any(p.step is SleepStep.CHECK and p.process in state.unobserved for p in there):
        return []  # it may be asleep and use far less than the ledger assumes
    for placement in there:
        model = resident[placement.model]
        freed = coming_free(placement, model, state.ledger)
        if placement.closing and placement.step is None:
            freed = dict(state.ledger.reservations.get(placement.key, {}))
        for device, size in freed.items():
            if device in excess:
                excess[device] -= size
    victims: list[Placement] = []
    idle = [
        p
        for m in resident.values()
        for p in m.placements.values()
        if p.state in (Residency.LOADED, Residency.ASLEEP)
        and not p.in_flight
        and not p.closing
        and not m.pinned
        and not m.waiting
    ]
    for placement in sorted(idle, key=lambda p: (state.models[p.model].spec.priority, p.last_used_s, p.key)):
        held = state.ledger.reservations.get(placement.key, {})
        if any(excess.get(device, 0) > 0 and size for device, size in held.items()):
            victims.append(placement)
            for device, size in held.items():
                if device in excess:
                    excess[device] -= size
    for placement in list(victims):
        held = {d: size for d, size in state.ledger.reservations.get(placement.key, {}).items() if d in excess}
        if all(excess[device] + size <= 0 for device, size in held.items()):  # the others free enough
            victims.remove(placement)
            for device, size in held.items():
                excess[device] += size
    return victims
