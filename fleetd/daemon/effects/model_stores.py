"""The model stores of the fleet: the servers that share one, and the models that fleet.yaml asks for.

Invariants:
- A store is identified by its engine's key; replicas over one folder are one store with each model once.
- Values only: no server is queried here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from fleetd.engines.base import ModelStore, ServedModel
from fleetd.resolver.launch_plan import LaunchPlan


@dataclass(slots=True)
class SharedStore:
    """A store: `plans` are its servers in order of fleet.yaml, `models` theirs."""

    key: str
    engine: ModelStore
    plans: list[LaunchPlan] = field(default_factory=list)
    models: dict[str, tuple[LaunchPlan, ServedModel]] = field(default_factory=dict)

    @property
    def instances(self) -> list[str]:
        return [plan.name for plan in self.plans]

    @property
    def has_recipes(self) -> bool:
        """Return whether fleet.yaml defines how any of its models is built."""
        return any(held.source is not None for _, held in self.models.values())


def stores_of(plans: Mapping[str, LaunchPlan]) -> dict[str, SharedStore]:
    """Return the stores by key. Blocks for a moment on the store's folder."""
    found: dict[str, SharedStore] = {}
    for plan in plans.values():
        of_engine = plan.engine.store
        if of_engine is None or plan.endpoint is None:
            continue
        key = of_engine.key(plan.context, plan.endpoint)
        store = found.setdefault(key, SharedStore(key, of_engine))
        store.plans.append(plan)
        for name, held in plan.held.items():
            store.models.setdefault(name, (plan, held))
    return found
