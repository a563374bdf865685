"""Build ModelSpecs from the models of fleet.yaml: holders, footprints, limits, routes.

Invariants:
- A footprint is declared (or the larger measured one), or learned, or estimated, in this order; an unknown footprint counts as
  0 with a warning.
- The footprint hash covers what changes a model's memory: engine, options, source, and the device it lives on.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fleetd.config.load import LoadedConfig
from fleetd.config.schema.model import EngineModel, HeldModel, ModelKeys, RouteModel
from fleetd.config.yaml.source_map import Path_
from fleetd.core.data.specs import (
    Footprint,
    FootprintSource,
    ModelSpec,
    Route,
    asleep_hash,
)
from fleetd.engines.base import ServedModel, capabilities_of
from fleetd.errors import FleetError
from fleetd.resolver.launch_plan import LaunchPlan, plain
from fleetd.resolver.process_plans import ProcessResolver
from fleetd.resolver.resolved import Surroundings
from fleetd.units import show_size


@dataclass(slots=True)
class ModelResolver:
    """One pass over the models, once the processes are known."""

    loaded: LoadedConfig
    around: Surroundings
    processes: ProcessResolver
    holders: Mapping[str, list[str]]
    _own: dict[str, list[str]] = field(default_factory=dict)
    _shown: tuple[str, Any] = ("", None)

    def specs(self) -> dict[str, ModelSpec]:
        result: dict[str, ModelSpec] = {}
        for name, keys in self.loaded.config.models.items():
            if isinstance(keys, RouteModel):
                routes = tuple(Route(route.to, route.weight, route.shadow) for route in keys.route)
                result[name] = ModelSpec(name, aliases=keys.aliases, routes=routes, fallback=keys.fallback)
            else:
                spec = self._memory_model(name, keys)
                if spec is not None:
                    result[name] = spec
        return result

    def _memory_model(self, name: str, keys: HeldModel | EngineModel) -> ModelSpec | None:
        wanted = self.holders.get(name, []) if isinstance(keys, HeldModel) else self._own_processes(name)
        found = [process for process in wanted if process in self.processes.plans]
        if not found:
            return None  # its processes have problems of their own
        plan = self.processes.plans[found[0]]
        held = plan.held.get(name)
        footprint_hash = self._hash(plan, held)
        footprint = self._footprint(name, keys, plan, held, footprint_hash)
        concurrency = (
            keys.concurrency if keys.concurrency is not None else plan.engine.concurrency(plan.context.options)
        )
        return ModelSpec(
            name=name,
            holders=tuple(found),
            served_as=keys.served_as or name,
            aliases=keys.aliases,
            footprint=footprint,
            footprint_hash=footprint_hash,
            preload=keys.preload,
            pin=keys.pin,
            priority=keys.priority,
            ttl_s=keys.ttl,
            min_resident_s=keys.min_resident,
            concurrency=max(1, concurrency),
            queue_max=keys.queue.max,
            queue_timeout_s=self.loaded.config.gateway.queue.timeout
            if keys.queue.timeout is None
            else keys.queue.timeout,
            load_timeout_s=keys.load_timeout,
            asleep=self._asleep(plan, footprint, footprint_hash),
            fallback=keys.fallback,
        )

    def _own_processes(self, name: str) -> list[str]:
        if not self._own:
            for process, spec in self.processes.specs.items():
                if spec.own_model is not None:
                    self._own.setdefault(spec.own_model, []).append(process)
        return self._own.get(name, [])

    def _hash(self, plan: LaunchPlan, held: ServedModel | None) -> str:
        if plan.name != self._shown[0]:  # the many models of one server come one after another
            self._shown = (plan.name, plain(plan.context.options))
        parts = [plan.engine_name, plan.device, self._shown[1], plan.context.args, plan.context.command]
        if held is not None:
            parts += [held.served_as, held.source, held.quantize, plain(held.modelfile), plain(held.options)]
        return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]

    def _footprint(
        self, name: str, keys: ModelKeys, plan: LaunchPlan, held: ServedModel | None, footprint_hash: str
    ) -> Footprint:
        path: Path_ = ("models", name, "memory")
        if keys.memory != "auto":
            declared = {plan.device: keys.memory} if isinstance(keys.memory, int) else dict(keys.memory)
            footprint = Footprint(declared, FootprintSource.DECLARED)
            footprint = footprint.raised(self.around.learned.get(footprint_hash, {}))
        elif plan.external:
            footprint = Footprint()  # another machine's memory
        elif learned := self.around.learned.get(footprint_hash):
            footprint = Footprint(dict(learned), FootprintSource.LEARNED)
        else:
            footprint = self._estimated(path, plan, held)
        self._check_fit(path, footprint)
        return footprint

    def _asleep(self, plan: LaunchPlan, footprint: Footprint, footprint_hash: str) -> Mapping[str, int] | None:
        sleep = plan.engine.sleep
        if sleep is None or plan.external or not capabilities_of(plan.engine, plan.context.options).can_sleep:
            return None
        estimated = sleep.asleep_bytes(plan.context, footprint.bytes)
        if estimated is None:
            return None
        return {**estimated, **self.around.learned.get(asleep_hash(footprint_hash), {})}

    def _estimated(self, path: Path_, plan: LaunchPlan, held: ServedModel | None) -> Footprint:
        try:
            estimated = plan.engine.estimate(plan.context, held)
        except FleetError as error:
            key = getattr(error, "key", None)
            where, prefix = ((*path[:2], key), "") if key else (path, "its memory cannot be estimated: ")
            self.processes.findings.warn(where, f"{prefix}{error}")
            return Footprint()
        if estimated is None:
            self.processes.findings.warn(
                path, "its memory is unknown: it counts as 0 until it is measured (set memory)"
            )
            return Footprint()
        return estimated

    def _check_fit(self, path: Path_, footprint: Footprint) -> None:
        for device, size in footprint.bytes.items():
            spec = self.processes.devices.get(device)
            if spec is None:
                self.processes.findings.warn(path, f"this machine has no device {device!r}")
            elif size > spec.budget_bytes:
                budget = f"{device}, whose budget is {show_size(spec.budget_bytes)}"
                self.processes.findings.warn(
                    path, f"can never fit: needs {show_size(size)} on {budget} ({footprint.source})"
                )
