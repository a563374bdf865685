"""Plan where memory for a model comes from.

Invariants:
- Pure functions without side effects.
- Nothing is evicted unless the whole demand is met; a second pass drops victims that the others already cover.
- Never a victim: a model that is starting, leaving, pinned, busy, or awaited by an earlier request. A busy one may be *drained*
  for the first request in the queue: the plan is then `Wait`, and names it.
- A victim that can sleep is put to sleep where that frees enough; memory that its sleep takes elsewhere has to be free there.
- Cheapest first: lower priority, past its minimum residency, then (seconds to load again x recent demand) per byte freed.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from math import exp

from fleetd.core.data.state import Model, Placement, Residency, SleepStep
from fleetd.core.models.ledger import Ledger
from fleetd.units import show_size

DEMAND_HALF_LIFE_S = 300.0
_LN2 = 0.6931471805599453
_UNKNOWN_LOAD_S = 1.0


@dataclass(frozen=True, slots=True)
class Fits:
    """There is room now."""


@dataclass(frozen=True, slots=True)
class Evict:
    """There is room once these leave: `sleepers` sleep, the others are unloaded."""

    victims: tuple[Placement, ...]
    sleepers: tuple[Placement, ...] = ()


@dataclass(frozen=True, slots=True)
class Wait:
    """There is room later, once the busy placements in `drain` are idle."""

    reason: str
    drain: tuple[Placement, ...] = ()


@dataclass(frozen=True, slots=True)
class Never:
    """Cannot fit: with this configuration, or (`pinned`) with these pins."""

    reason: str
    pinned: bool = False
    hint: str | None = None


Plan = Fits | Evict | Wait | Never


def demand_at(model: Model, now: float) -> float:
    """Return the model's recent requests, decayed with a half-life of five minutes."""
    return model.demand * exp(-_LN2 * max(0.0, now - model.demand_s) / DEMAND_HALF_LIFE_S)


def plan(
    need: Mapping[str, int],
    key: tuple[str, str],
    models: Mapping[str, Model],
    ledger: Ledger,
    now: float,
    awaited: Collection[tuple[str, str]] = (),
) -> Plan:
    """Plan `need` bytes per device for `key`, given the models and the ledger."""
    never = ledger.never_fits(need)
    if never:
        numbers = ", ".join(
            f"needs {show_size(size)} on {device}, whose budget is {show_size(budget)}"
            for device, (size, budget) in never.items()
        )
        keys = ", ".join(f"devices.{device}.budget" for device in never)
        return Never(
            f"{key[0]} can never fit: it {numbers}", hint=f"raise {keys} in fleet.yaml, or make the model smaller"
        )
    lack = ledger.lacking(need)
    if not lack:
        return Fits()
    lack = _less(lack, _leaving(models, ledger))
    if not lack:
        return Wait("memory is being freed")
    others = [
        p for model in models.values() for p in model.placements.values() if p.key != key and _frees(p, lack, ledger)
    ]
    unpinned = [p for p in others if not models[p.model].pinned]
    if _less(_less(lack, _sum(unpinned, ledger)), _kept_by_drowsy(models, ledger)):
        return _no_room(key[0], need, [p for p in others if models[p.model].pinned], ledger)
    free_to_go = [p for p in unpinned if p.state in (Residency.LOADED, Residency.ASLEEP) and p.key not in awaited]
    free_to_go.sort(key=lambda p: _cost(p, models[p.model], ledger, now))
    idle = [p for p in free_to_go if not p.in_flight]
    chosen = _choose(lack, idle, ledger)
    if chosen is not None:
        return Evict(tuple(chosen), tuple(_sleepers(chosen, need, lack, models, ledger, now)))
    chosen = _choose(lack, sorted(free_to_go, key=lambda p: p.in_flight > 0), ledger)
    if chosen is not None:
        busy = ", ".join(sorted(p.model for p in chosen if p.in_flight))
        return Wait(f"waiting for {busy} to become idle", tuple(chosen))
    return Wait("waiting for models that are still starting or awaited")


def _no_room(model: str, need: Mapping[str, int], pinned: Sequence[Placement], ledger: Ledger) -> Never:
    """Return that pinned models take the room, with the numbers of the devices that lack it."""
    numbers = []
    for device, size in need.items():
        free, spec = ledger.free_bytes(device), ledger.devices.get(device)
        if free is not None and spec is not None and size > free:
            of = f"of {show_size(spec.budget_bytes)} {'is' if free == 1 else 'are'} free on {device}"
            numbers.append(f"{model} needs {show_size(size)}; {show_size(free)} {of}")
    held = {p.model: sum(ledger.reservations.get(p.key, {}).values()) for p in pinned}
    text = ", ".join(numbers) or f"{model} has no room"
    if held:
        names = ", ".join(f"{name} ({show_size(size)})" for name, size in sorted(held.items()))
        text += f" and {names} {'is' if len(held) == 1 else 'are'} pinned"
    return Never(text, pinned=True, hint=f"fleetctl unpin {' '.join(sorted(held))}" if held else None)


def _cost(
    placement: Placement, model: Model, ledger: Ledger, now: float
) -> tuple[int, bool, float, float, tuple[str, str]]:
    freed = max(1, sum(ledger.reservations.get(placement.key, {}).values()))
    young = placement.loaded_s is not None and now - placement.loaded_s < model.spec.min_resident_s
    cost = reload_cost(placement, model, now) / freed
    return (model.spec.priority, young, cost, placement.last_used_s, placement.key)


def reload_cost(placement: Placement, model: Model, now: float) -> float:
    """Return the expected loading time that evicting a placement causes, in seconds."""
    reload_s = model.load_s if model.load_s is not None else _UNKNOWN_LOAD_S
    if model.wake_s is not None and placement.state is Residency.LOADED and sleeps_on(model, now) is not None:
        reload_s = model.wake_s
    return reload_s * demand_at(model, now)


def _frees(placement: Placement, lack: Mapping[str, int], ledger: Ledger) -> bool:
    held = ledger.reservations.get(placement.key, {})
    if placement.state is Residency.UNLOADING or placement.step is SleepStep.SLEEP:
        return False
    return any(held.get(device, 0) > 0 for device in lack)


def sleeps_on(model: Model, now: float) -> Mapping[str, int] | None:
    """Return the bytes per device that it would use asleep; None: it cannot sleep now."""
    return model.asleep if now >= model.sleepless_until_s else None


def coming_free(placement: Placement, model: Model, ledger: Ledger) -> dict[str, int]:
    """Return the bytes that a placement frees: all, or all but its sleeping size."""
    held = ledger.reservations.get(placement.key, {})
    if placement.state is Residency.UNLOADING:
        return dict(held)
    if placement.step is not SleepStep.SLEEP:
        return {}
    kept = model.asleep or {}
    return {device: size - kept.get(device, 0) for device, size in held.items() if size > kept.get(device, 0)}


def _leaving(models: Mapping[str, Model], ledger: Ledger) -> dict[str, int]:
    total: dict[str, int] = {}
    for model in models.values():
        for placement in model.placements.values():
            for device, size in coming_free(placement, model, ledger).items():
                total[device] = total.get(device, 0) + size
    return total


def _kept_by_drowsy(models: Mapping[str, Model], ledger: Ledger) -> dict[str, int]:
    """Return the bytes that models falling asleep keep; those can be evicted later."""
    kept: dict[str, int] = {}
    for model in models.values():
        for placement in model.placements.values():
            if placement.step is SleepStep.SLEEP:
                freed = coming_free(placement, model, ledger)
                for device, size in ledger.reservations.get(placement.key, {}).items():
                    kept[device] = kept.get(device, 0) + size - freed.get(device, 0)
    return kept


def _sleepers(
    chosen: Sequence[Placement],
    need: Mapping[str, int],
    lack: Mapping[str, int],
    models: Mapping[str, Model],
    ledger: Ledger,
    now: float,
) -> list[Placement]:
    """Return those of `chosen` for which sleep suffices, costly reloads first."""
    found: list[Placement] = []
    for placement in reversed(chosen):
        able = placement.state is Residency.LOADED and sleeps_on(models[placement.model], now) is not None
        if able and _enough(chosen, [*found, placement], need, lack, models, ledger):
            found.append(placement)
    return found


def _enough(
    chosen: Sequence[Placement],
    sleepers: Sequence[Placement],
    need: Mapping[str, int],
    lack: Mapping[str, int],
    models: Mapping[str, Model],
    ledger: Ledger,
) -> bool:
    """Return whether there is room if `sleepers` sleep, at the end and meanwhile."""
    freed: dict[str, int] = {}
    taken: dict[str, int] = {}
    for placement in chosen:
        held = ledger.reservations.get(placement.key, {})
        kept = (models[placement.model].asleep or {}) if placement in sleepers else {}
        for device in {**held, **kept}:
            change = held.get(device, 0) - kept.get(device, 0)
            total = freed if change > 0 else taken
            total[device] = total.get(device, 0) + abs(change)
    if _less(lack, freed):
        return False
    for device, size in taken.items():
        free = ledger.free_bytes(device)
        if free is not None and size and size + max(0, need.get(device, 0) - freed.get(device, 0)) > free:
            return False
    return True


def _sum(placements: Collection[Placement], ledger: Ledger) -> dict[str, int]:
    total: dict[str, int] = {}
    for placement in placements:
        for device, size in ledger.reservations.get(placement.key, {}).items():
            total[device] = total.get(device, 0) + size
    return total


def _less(lack: Mapping[str, int], freed: Mapping[str, int]) -> dict[str, int]:
    return {device: size - freed.get(device, 0) for device, size in lack.items() if size > freed.get(device, 0)}


def _choose(lack: Mapping[str, int], ordered: Collection[Placement], ledger: Ledger) -> list[Placement] | None:
    """Return the fewest of `ordered` (cheapest first) that cover `lack`, or None."""
    chosen: list[Placement] = []
    rest = dict(lack)
    for placement in ordered:
        if not rest:
            break
        if _frees(placement, rest, ledger):
            chosen.append(placement)
            rest = _less(rest, _sum([placement], ledger))
    if rest:
        return None
    for placement in reversed(chosen.copy()):  # the most expensive first: is it still needed?
        others = [p for p in chosen if p is not placement]
        if not _less(lack, _sum(others, ledger)):
            chosen = others
    return chosen
