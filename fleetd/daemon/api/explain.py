"""Explain the state of a model, and what a request for it would do now.

Invariants:
- The core's own planner computes the forecast, so it is what the core would decide.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from fleetd.core.data.state import Model, Residency
from fleetd.core.queries import FleetQueries, LoadForecast, Outlook
from fleetd.daemon.api.status import reason_of
from fleetd.units import show_size


def explain(
    queries: FleetQueries, model: Model, now: float, store: Mapping[str, Any] | None = None
) -> Mapping[str, Any]:
    """Return the document of `fleetctl explain MODEL`; `store` is its store's state."""
    footprint = model.footprint
    text = [_where(model)]
    victims: list[dict[str, str]] = []
    if model.spec.routes:
        text = ["It routes to " + ", ".join(f"{route.to} (weight {route.weight})" for route in model.spec.routes) + "."]
    else:
        text.append(_cost(model))
        if model.asleep is not None:
            text.append(_asleep(model, now))
        forecast = queries.forecast(model, now)
        if forecast is not None:
            sentence, victims = _if_wanted(queries, forecast, now)
            text.append(sentence)
    if model.missing:
        text.append(f"It is blocked until these are available: {', '.join(model.missing)}.")
    if store is not None:
        text.append(f"State in its store: {store['state']}, {store['detail']}.")
    if model.failure:
        text.append(f"Its last load failed: {model.failure}.")
        if not model.failure_final and model.retry_s > now:
            text.append(f"The next attempt is possible in {model.retry_s - now:.0f} s.")
    return {
        "model": model.name,
        "state": "ROUTE" if model.spec.routes else str(model.state),
        "reason": reason_of(model),
        "store": store,
        "footprint": {"source": str(footprint.source), "bytes": dict(footprint.bytes)},
        "devices": [asdict(queries.device(device)) for device in footprint.bytes or queries.limited_devices()],
        "holders": [_holder(queries, model, name) for name in model.spec.holders],
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
        return "Its memory use is unknown and counts as zero until it is measured."
    sizes = ", ".join(f"{show_size(size)} on {device}" for device, size in footprint.bytes.items())
    how = {
        "declared": "as fleet.yaml declares",
        "learned": "the highest measured value",
        "estimated": "estimated from its file",
    }
    return f"It takes {sizes}: {how[footprint.source]}."


def _asleep(model: Model, now: float) -> str:
    sizes = ", ".join(f"{show_size(size)} on {device}" for device, size in (model.asleep or {}).items())
    if now < model.sleepless_until_s:
        return f"It can sleep, but its last attempt failed: it is unloaded instead for {model.sleepless_until_s - now:.0f} s."
    return f"It can sleep, and then uses {sizes}."


def _if_wanted(queries: FleetQueries, forecast: LoadForecast, now: float) -> tuple[str, list[dict[str, str]]]:
    outlook = forecast.outlook
    if outlook is Outlook.NO_PROCESS:
        return "No process can load it now.", []
    if outlook is Outlook.FITS:
        how = "woken" if forecast.wakes else "loaded"
        return f"If requested now, it would be {how} on {forecast.process} at once: it fits.", []
    if outlook is Outlook.EVICTS:
        victims = [{"name": name, "reason": _why_victim(queries, name, now)} for name in forecast.leaving]
        moves = [
            f"{name} would be {'put to sleep' if name in forecast.put_to_sleep else 'unloaded'}"
            for name in forecast.leaving
        ]
        return f"If requested now, {', '.join(moves)} for it: the cheapest to load again.", victims
    if outlook is Outlook.WAITS:
        victims = [{"name": name, "reason": "busy; it would be drained first"} for name in forecast.leaving]
        return f"If requested now, it would wait: {forecast.reason}.", victims
    return forecast.reason[:1].upper() + forecast.reason[1:] + ".", []


def _why_victim(queries: FleetQueries, name: str, now: float) -> str:
    model = queries.model(name)
    assert model is not None
    idle = f"idle for {now - model.last_used_s:.0f} s" if model.last_used_s else "never used"
    load = f"{model.load_s:.2f} s to load again" if model.load_s is not None else "load time unknown"
    return f"{idle}, {load}, priority {model.spec.priority}"


def _holder(queries: FleetQueries, model: Model, name: str) -> dict[str, Any]:
    process = queries.process(name)
    placement = model.placements.get(name)
    if process is None:
        return {"name": name, "state": "ABSENT", "reason": "not in the fleet"}
    state = str(placement.state) if placement is not None else str(Residency.ABSENT)
    return {"name": name, "state": str(process.state), "reason": process.reason, "residency": state}
