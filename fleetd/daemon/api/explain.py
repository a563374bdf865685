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
from fleetd.units import show_size


def explain(
    queries: FleetQueries, model: Model, now: float, store: Mapping[str, Any] | None = None
) -> Mapping[str, Any]:
    """Return the document of `fleetctl explain MODEL`; `store` is its store's state."""
    footprint = model.footprint
    advice = queries.model_advice(model, now)
    text = [_where(queries, model)]
    victims: list[dict[str, str]] = []
    if model.spec.routes:
        text = ["It routes to " + ", ".join(f"{route.to} (weight {route.weight})" for route in model.spec.routes) + "."]
    else:
        text.append(_cost(model))
        if model.asleep is not None:
            text.append(_asleep(model, now))
        forecast = queries.forecast(model, now)
        loading = next((p for p in model.placements.values() if p.state is Residency.LOADING), None)
        if loading is not None:
            text.append(queries.loading_detail(loading, now) + ".")
        if forecast is not None and not (model.failure and (model.failure_final or model.retry_s > now)):
            sentence, victims = _if_wanted(queries, model, forecast, now)
            text.append(sentence)
    if model.missing:
        text.append(f"It is blocked until these are available: {', '.join(model.missing)}.")
    if store is not None:
        text.append(f"State in its store: {store['state']}, {store['detail']}.")
    if model.failure:
        text.insert(1, f"Its last load failed: {model.failure}.")
        if model.failure_final:
            text.insert(2, "It is not tried again by itself.")
        elif model.retry_s > now:
            text.insert(2, f"The next attempt is possible in {model.retry_s - now:.0f} s.")
    return {
        "model": model.name,
        "state": "ROUTE" if model.spec.routes else str(model.state),
        "reason": advice.reason,
        "hint": advice.hint,
        "store": store,
        "footprint": {"source": str(footprint.source), "bytes": dict(footprint.bytes)},
        "devices": [asdict(queries.device(device)) for device in footprint.bytes or queries.limited_devices()],
        "holders": [_holder(queries, model, name) for name in model.spec.holders],
        "victims": victims,
        "text": text,
    }


def _where(queries: FleetQueries, model: Model) -> str:
    if not model.placements:
        return f"{model.name} is not in memory."
    places = []
    for name, placement in model.placements.items():
        process = queries.process(name)
        pid = f", pid {process.pid}" if process is not None and process.pid else ""
        why = f": {placement.reason}" if placement.reason != placement.state.lower() else ""
        places.append(f"{placement.state.lower()} (process {name}{pid}{why})")
    return f"{model.name} is {', '.join(places)}."


def _cost(model: Model) -> str:
    footprint = model.footprint
    if not footprint.bytes:
        return "Memory unknown: counted as 0 until measured; set `memory:` to change that."
    sizes = ", ".join(f"{show_size(size)} on {device}" for device, size in footprint.bytes.items())
    how = {
        "declared": "declared in fleet.yaml",
        "learned": "highest measured",
        "estimated": "estimated from its file",
    }
    return f"Memory: {sizes} ({how[footprint.source]})."


def _asleep(model: Model, now: float) -> str:
    sizes = ", ".join(f"{show_size(size)} on {device}" for device, size in (model.asleep or {}).items())
    if now < model.sleepless_until_s:
        return f"It can sleep, but its last attempt failed: it is unloaded instead for {model.sleepless_until_s - now:.0f} s."
    return f"It can sleep, and then uses {sizes}."


def _why_no_process(queries: FleetQueries, model: Model) -> str:
    standings = []
    for name in model.spec.holders:
        process = queries.process(name)
        if process is None:
            continue
        how = "was stopped by hand" if process.stopped else f"is {process.state}: {process.reason}"
        standings.append(f"process {name} {how}")
    return "; ".join(standings) or "no process serves it"


def _room(queries: FleetQueries, model: Model) -> str:
    """Return what it needs and what is free, on the first device with a budget."""
    for device, size in model.footprint.bytes.items():
        free = queries.device(device).free_bytes
        if free is not None:
            return f"{show_size(size)} needed, {show_size(free)} free"
    return "there is room"


def _if_wanted(
    queries: FleetQueries, model: Model, forecast: LoadForecast, now: float
) -> tuple[str, list[dict[str, str]]]:
    outlook = forecast.outlook
    if outlook is Outlook.NO_PROCESS:
        return f"It cannot load: {_why_no_process(queries, model)}.", []
    if outlook is Outlook.FITS:
        how = "wake" if forecast.wakes else "load"
        return f"A request now would {how} it at once: {_room(queries, model)}.", []
    if outlook is Outlook.EVICTS:
        victims = [{"name": name, "reason": _why_victim(queries, name, now)} for name in forecast.leaving]
        moves = [
            f"{name} would be {'put to sleep' if name in forecast.put_to_sleep else 'unloaded'}"
            for name in forecast.leaving
        ]
        return f"A request now would load it: {', '.join(moves)} for it, the cheapest to load again.", victims
    if outlook is Outlook.WAITS:
        victims = [{"name": name, "reason": "busy; it would be drained first"} for name in forecast.leaving]
        return f"A request now would wait: {forecast.reason}.", victims
    return forecast.reason + ".", []


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
