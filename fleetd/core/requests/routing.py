"""Resolve model names, and choose the process that serves a request.

Invariants:
- Names resolve in this order: alias, route (weighted, without targets that cannot serve or are down), model.
- Among loaded processes the one with the fewest requests in flight serves; one that failed this request is avoided.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

from fleetd.core.data.fleet_state import FleetState
from fleetd.core.data.state import Model, Placement, ProcessState, Residency
from fleetd.core.models.candidates import out_of_reach, usable

if TYPE_CHECKING:
    from random import Random

_ROUTE_DEPTH = 8


def resolve(state: FleetState, name: str, now: float) -> tuple[Model | None, tuple[str, ...]]:
    """Return the model that `name` means now, and its fallbacks in order."""
    model = _target(state, name)
    fallback: list[str] = []
    for _ in range(_ROUTE_DEPTH):
        if model is None or not model.spec.routes:
            break
        fallback.extend(model.spec.fallback)
        model, others = _along(state, model, now, state.rng)
        fallback[:0] = others
    if model is not None:
        fallback = [*model.spec.fallback, *fallback]
    return model, tuple(dict.fromkeys(key for key in fallback if model is None or key != model.name))


def _along(state: FleetState, model: Model, now: float, rng: Random) -> tuple[Model | None, list[str]]:
    routes = [route for route in model.spec.routes if route.weight > 0 and not route.shadow]
    able = [
        route for route in routes if (to := _target(state, route.to)) is not None and can_serve(state, to, now)
    ] or routes
    if not able:
        return None, []
    up = [route for route in able if (to := _target(state, route.to)) is None or not out_of_reach(state, to)] or able
    chosen = rng.choices(up, weights=[route.weight for route in up])[0]
    return _target(state, chosen.to), [route.to for route in routes if route.to != chosen.to]


def elsewhere(
    state: FleetState, model: Model, fallback: tuple[str, ...], avoid: Collection[str], now: float
) -> tuple[Model, tuple[str, ...]]:
    """Return another model for a request that the processes in `avoid` failed."""
    if not set(model.spec.holders) <= set(avoid):
        return model, fallback
    for index, name in enumerate(fallback):
        other = _target(state, name)
        if other is None or other.spec.routes or set(other.spec.holders) <= set(avoid):
            continue
        if can_serve(state, other, now):
            return other, fallback[index + 1 :]
    return model, fallback


def _target(state: FleetState, name: str) -> Model | None:
    model = state.models.get(state.names.get(name, name))
    return None if model is None or model.name in state.leaving else model


def relieved(state: FleetState, model: Model, fallback: Collection[str], now: float) -> bool:
    """Return whether `model` is down and one of its fallbacks is not."""
    if model.spec.routes or not out_of_reach(state, model):
        return False
    others = [other for name in fallback if (other := _target(state, name)) is not None and not other.spec.routes]
    return any(can_serve(state, other, now) and not out_of_reach(state, other) for other in others)


def can_serve(state: FleetState, model: Model, now: float) -> bool:
    """Return whether `model` may be served: not failed, not blocked, not full."""
    if model.spec.routes:
        return True
    if model.failure_final or (model.failure and now < model.retry_s):
        return False
    if model.waiting >= model.spec.queue_max and serving(state, model) is None:
        return False
    if model.missing and not model.placements:
        return False
    return any(usable(process) for name in model.spec.holders if (process := state.processes.get(name)) is not None)


def serving(
    state: FleetState, model: Model, avoid: Collection[str] = (), draining: Collection[tuple[str, str]] = ()
) -> Placement | None:
    """Return the placement with the fewest requests; None: none is available."""
    best: Placement | None = None
    for process, placement in model.placements.items():
        if (
            placement.state is not Residency.LOADED
            or placement.in_flight >= model.spec.concurrency
            or placement.closing is not None
        ):
            continue
        if (avoid and process in avoid) or (draining and placement.key in draining):
            continue
        if state.processes[process].state is not ProcessState.READY:
            continue
        if best is None or placement.in_flight < best.in_flight:
            best = placement
    return best
