"""Resolve a checked fleet.yaml: processes with exact command lines, models with footprints, devices with budgets.

Invariants:
- Nothing is started or written; engines open only the headers of model files.
- Every problem is collected with its place; a caller gets all of them with the resolved part.
- 5,000 models resolve in less than two seconds.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from fleetd.config.load import LoadedConfig
from fleetd.config.schema.fleet import FleetConfig
from fleetd.control import socket as control_socket
from fleetd.core.data.specs import FleetSpec, QueueLimits
from fleetd.errors import ConfigError
from fleetd.resolver.devices import device_specs
from fleetd.resolver.entries import entries, holders, needs_assigned_port
from fleetd.resolver.findings import Findings
from fleetd.resolver.model_specs import ModelResolver
from fleetd.resolver.port_assignment import NoPortLeftError, assign
from fleetd.resolver.process_plans import ProcessResolver
from fleetd.resolver.resolved import GatewaySettings, ResolvedFleet, Surroundings, paths_of

PortUsable = Callable[[str, int], bool]


def resolve_fleet(
    loaded: LoadedConfig, around: Surroundings, port_usable: PortUsable = lambda *_: True, hostname: str = "fleet"
) -> ResolvedFleet:
    """Return the resolved fleet with its `problems`. Never raises for an invalid file."""
    config, paths, findings = loaded.config, paths_of(loaded), Findings(loaded)
    devices = device_specs(loaded, around.devices, findings.warn)
    declared = list(entries(config))
    taken = {entry.port for entry in declared if entry.port is not None}
    taken |= {config.gateway.listen.port, config.admin.listen.port}
    unassigned = [entry for entry in declared if needs_assigned_port(entry)]
    ports: dict[str, int] = {}
    try:
        ports = assign((entry.name for entry in unassigned), around.ports, taken, port_usable, str(paths.state))
    except NoPortLeftError as error:
        findings.problem(unassigned[0].path, str(error))
    too_long = control_socket.length_problem(paths.run / control_socket.NAME)
    if too_long is not None:
        findings.problem(("paths", "run"), f"{too_long} (choose a shorter folder)")
    holders_of = holders(config)
    held_by: dict[str, list[str]] = {}
    for model, names in holders_of.items():
        for name in names:
            held_by.setdefault(name, []).append(model)
    processes = ProcessResolver(loaded, around, devices, findings)
    for entry in declared:
        processes.resolve(replace(entry, port=entry.port or ports.get(entry.name)), held_by.get(entry.name, []))
    models = ModelResolver(loaded, around, processes, holders_of)
    limits = QueueLimits(config.gateway.queue.max, config.gateway.queue.max_wait)
    sources = {("process", name): plan.source for name, plan in processes.plans.items()}
    sources |= {("model", name): findings.source(("models", name)) for name in config.models}
    return ResolvedFleet(
        config_hash=loaded.config_hash,
        files=loaded.files,
        patterns=loaded.patterns,
        watch=config.watch,
        gateway=gateway_of(config),
        name=config.name or hostname,
        paths=paths,
        spec=FleetSpec(processes.specs, models.specs(), devices, limits),
        plans=processes.plans,
        ports=ports,
        sources=sources,
        problems=findings.sorted(findings.problems),
        warnings=findings.sorted(findings.warnings),
    )


def gateway_of(config: FleetConfig) -> GatewaySettings:
    keys = config.gateway
    return GatewaySettings(
        keys.listen.host, keys.listen.port, tuple(keys.allowed_hosts), keys.max_body, keys.retry.attempts
    )


def checked(resolved: ResolvedFleet) -> ResolvedFleet:
    """Return `resolved`. Raises ConfigError with all of its problems."""
    if resolved.problems:
        raise ConfigError(resolved.problems, files=resolved.files)
    return resolved
