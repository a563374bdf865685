"""Render the normalised configuration and the exact command line of every process, with secrets redacted.

Invariants:
- Secrets are redacted first; variables inherited from the daemon's environment are not listed.
"""

from __future__ import annotations

from typing import Any

from fleetd.config.load import LoadedConfig
from fleetd.config.secrets import redact
from fleetd.resolver.launch_plan import LaunchPlan
from fleetd.resolver.resolved import ResolvedFleet


def rendered(loaded: LoadedConfig, resolved: ResolvedFleet) -> dict[str, Any]:
    """Return the document of `fleetd render`."""
    plain = loaded.config.model_dump(mode="json", by_alias=True, exclude_none=True)
    return {
        "config": redact(plain),
        "config_hash": loaded.config_hash,
        "devices": {
            name: {"kind": spec.kind, "total_bytes": spec.total_bytes, "budget_bytes": spec.budget_bytes}
            for name, spec in resolved.spec.devices.items()
        },
        "processes": {name: _process(plan) for name, plan in resolved.plans.items()},
        "models": {
            name: {
                "holders": list(spec.holders),
                "served_as": spec.served_as,
                "footprint": {"source": str(spec.footprint.source), "bytes": dict(spec.footprint.bytes)},
                "concurrency": spec.concurrency,
            }
            for name, spec in resolved.spec.models.items()
            if not spec.routes
        },
    }


def _process(plan: LaunchPlan) -> dict[str, Any]:
    found: dict[str, Any] = {"source": f"{plan.source[0]}:{plan.source[1]}", "engine": plan.engine_name}
    if plan.external:
        found["external"] = plan.endpoint.base_url if plan.endpoint is not None else None
        return found
    found["argv"] = plan.shown_argv()
    found["env"] = plan.shown_env()
    if plan.launch.unset_env:
        found["unset_env"] = list(plan.launch.unset_env)
    found["cwd"] = plan.execution.cwd
    found["port"] = plan.context.port
    found["requires"] = list(plan.requires)
    if plan.missing_program:
        found["cannot_start"] = plan.missing_program
    return found
