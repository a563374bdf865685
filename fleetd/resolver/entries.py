"""The entries of fleet.yaml that are processes, one for each replica.

Invariants:
- `replicas: n` gives NAME-1 … NAME-n, on consecutive ports where a port is stated; without replicas the name is the key.
- An entry that needs a port and states none gets one from `port_assignment`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from fleetd.config.schema.fleet import FleetConfig
from fleetd.config.schema.model import EngineModel, HeldModel
from fleetd.config.schema.process import EngineKeys, Service
from fleetd.core.data.specs import ProcessKind
from fleetd.resolver.environment import mentions_port

Path_ = tuple[str | int, ...]


@dataclass(frozen=True, slots=True)
class ConfigEntry:
    """One process. `path` leads to its mapping in the file."""

    name: str
    base: str
    replica: int
    kind: ProcessKind
    path: Path_
    keys: Service | EngineKeys
    port: int | None

    @property
    def engine_keys(self) -> EngineKeys | None:
        return self.keys if isinstance(self.keys, EngineKeys) else None

    @property
    def external(self) -> str | None:
        return self.keys.external if isinstance(self.keys, EngineKeys) else None

    @property
    def own_model(self) -> EngineModel | None:
        return self.keys if isinstance(self.keys, EngineModel) else None


def replica_names(base: str, replicas: int) -> list[str]:
    """Return the process names of an entry."""
    return [base] if replicas == 1 else [f"{base}-{number}" for number in range(1, replicas + 1)]


def entries(config: FleetConfig) -> Iterator[ConfigEntry]:
    """Yield all processes in file order: services, instances, models with an engine."""
    sections: tuple[tuple[str, dict[str, Service | EngineKeys]], ...] = (
        ("services", dict(config.services)),
        ("instances", dict(config.instances)),
        ("models", {name: model for name, model in config.models.items() if isinstance(model, EngineModel)}),
    )
    for section, found in sections:
        kind = ProcessKind.SERVICE if section == "services" else ProcessKind.INSTANCE
        for base, keys in found.items():
            for number, name in enumerate(replica_names(base, keys.replicas), start=1):
                port = keys.port + number - 1 if keys.port is not None else None
                yield ConfigEntry(name, base, number, kind, (section, base), keys, port)


def needs_assigned_port(entry: ConfigEntry) -> bool:
    """Return whether fleetd assigns its port."""
    if entry.port is not None or entry.external is not None:
        return False
    if entry.kind is ProcessKind.INSTANCE:
        return True
    keys = entry.keys
    assert isinstance(keys, Service)
    return mentions_port((*keys.command, *keys.args, *keys.env.values()))


def holders(config: FleetConfig) -> dict[str, list[str]]:
    """Return the processes that may hold each model; an entry means all its replicas."""
    by_base: dict[str, list[str]] = {}
    for base, keys in config.instances.items():
        names = replica_names(base, keys.replicas)
        by_base[base] = names
        by_base.update({name: [name] for name in names})
    return {
        model: list(dict.fromkeys(name for base in keys.instance for name in by_base.get(base, [])))
        for model, keys in config.models.items()
        if isinstance(keys, HeldModel)
    }


def process_names(config: FleetConfig) -> dict[str, list[str]]:
    """Return the process names behind every name that a dependency may use."""
    found: dict[str, list[str]] = {}
    for base, keys in config.processes().items():
        names = replica_names(base, keys.replicas)
        found[base] = names
        found.update({name: [name] for name in names})
    return found
