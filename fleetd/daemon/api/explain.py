"""Why a model is where it is, and what would happen if somebody asked for it now: numbers first, then sentences.

The rules of this file
- Read from the facts alone, with the core's own planner: what it says is what would be decided.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from fleetd.core.data.state import Model, Residency
from fleetd.core.models.candidates import holder, sleeper, to_wake
from fleetd.core.models.eviction import Evict, Fits, Never, Wait, gib, plan
from fleetd.daemon.api.status import reason_of

if TYPE_CHECKING:
    from fleetd.core.fleet import Fleet


def explain(fleet: Fleet, model: Model, now: float, store: Mapping[str, Any] | None = None) -> Mapping[str, Any]:
    """Return the answer of `fleetctl explain MODEL`. `store` is what is known of it in its server's store."""
    footprint = model.footprint
    text = [_where(model)]
    victims: list[dict[str, str]] = []
    if model.spec.routes:
        text = ["It routes to " + ", ".join(f"{route.to} (weight {route.weight})" for route in model.spec.routes) + "."]
    else:
        text.append(_cost(model))
        if model.asleep is not None:
            text.append(_asleep(model, now))
        if not model.missing and (not model.placements or sleeper(fleet.facts, model) is not None):
            said, victims = _if_wanted(fleet, model, now)
            text.append(said)
    if model.missing:
        text.append(f"It is blocked: it requires {', '.join(model.missing)}, absent now. It comes back by itself.")
    if store is not None:
        text.append(f"In its store it is {store['state']}: {store['detail']}.")
    if model.failure:
        text.append(f"Its last load failed: {model.failure}.")
        if not model.failure_final and model.retry_s > now:
            text.append(f"It is not tried again for {model.retry_s - now:.0f} s.")
    return {
        "model": model.name,
        "state": "ROUTE" if model.spec.routes else str(model.state),
        "reason": reason_of(model),
        "store": store,
        "footprint": {"source": str(footprint.source), "bytes": dict(footprint.bytes)},
        "devices": [_device(fleet, device) for device in footprint.bytes or fleet.ledger.devices],
        "holders": [_holder(fleet, model, name) for name in model.spec.holders],
        "victims": victims,
        "text": text,
    }


def _where(model: Model) -> str:
    if not model.placements:
        return f"{model.name} is not in memory."
    places = [
        f"{placement.state.lower()} on {name} ({placement.reason})" for name, placement in model.placements.items()
    ]
    return f"{model.name} is {', '.join(places)}."


def _cost(model: Model) -> str:
    footprint = model.footprint
    if not footprint.bytes:
        return "Nothing is known of its memory, so it counts as nothing until it was measured."
    sizes = ", ".join(f"{gib(size)} on {device}" for device, size in footprint.bytes.items())
    how = {
        "declared": "as fleet.yaml declares",
        "learned": "the most that was measured",
        "estimated": "estimated from its file",
    }
    return f"It takes {sizes}: {how[footprint.source]}."


def _asleep(model: Model, now: float) -> str:
    sizes = ", ".join(f"{gib(size)} on {device}" for device, size in (model.asleep or {}).items())
    if now < model.sleepless_until_s:
        return (
            f"It can sleep, but its last try failed: for {model.sleepless_until_s - now:.0f} s it is unloaded instead."
        )
    return f"It can sleep, and then holds {sizes}."


def _if_wanted(fleet: Fleet, model: Model, now: float) -> tuple[str, list[dict[str, str]]]:
    asleep = sleeper(fleet.facts, model)
    process = holder(fleet.facts, model) if asleep is None else fleet.processes[asleep.process]
    if process is None:
        return "No process can take it now.", []
    need = model.footprint.bytes if asleep is None else to_wake(fleet.facts, asleep)
    verdict = plan(need, (model.name, process.name), fleet.facts.resident(), fleet.ledger, now)
    if isinstance(verdict, Fits):
        how = "loaded" if asleep is None else "woken"
        return f"If it were asked for now, it would be {how} on {process.name} at once: there is room.", []
    if isinstance(verdict, Evict):
        victims = [
            {"name": victim.model, "reason": _why_victim(fleet, victim.model, now)} for victim in verdict.victims
        ]
        told = [
            f"{p.model} would be {'put to sleep' if p in verdict.sleepers else 'unloaded'}" for p in verdict.victims
        ]
        return f"If it were asked for now, {', '.join(told)} for it: the cheapest to bring back.", victims
    if isinstance(verdict, Wait):
        victims = [{"name": busy.model, "reason": "busy; it would be drained first"} for busy in verdict.drain]
        return f"If it were asked for now, it would wait: {verdict.reason}.", victims
    assert isinstance(verdict, Never)
    return verdict.reason[:1].upper() + verdict.reason[1:] + ".", []


def _why_victim(fleet: Fleet, name: str, now: float) -> str:
    model = fleet.models[name]
    idle = f"idle for {now - model.last_used_s:.0f} s" if model.last_used_s else "never used"
    load = f"{model.load_s:.2f} s to load again" if model.load_s is not None else "load time unknown"
    return f"{idle}, {load}, priority {model.spec.priority}"


def _device(fleet: Fleet, name: str) -> dict[str, Any]:
    spec = fleet.ledger.devices.get(name)
    return {
        "name": name,
        "budget_bytes": spec.budget_bytes if spec is not None else None,
        "reserved_bytes": fleet.ledger.reserved_bytes(name),
        "free_bytes": fleet.ledger.free_bytes(name),
    }


def _holder(fleet: Fleet, model: Model, name: str) -> dict[str, Any]:
    process = fleet.processes.get(name)
    placement = model.placements.get(name)
    if process is None:
        return {"name": name, "state": "ABSENT", "reason": "not in the fleet"}
    state = str(placement.state) if placement is not None else str(Residency.ABSENT)
    return {"name": name, "state": str(process.state), "reason": process.reason, "residency": state}
