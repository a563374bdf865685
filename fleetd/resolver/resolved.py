"""The result of resolving fleet.yaml: the core's FleetSpec, the launch plans, problems and warnings.

Invariants:
- A ResolvedFleet is a value; an applied change replaces it as a whole.
- A problem rejects the file; a warning is reported and stops nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from fleetd.control.wire import KeyChange
from fleetd.core.data.specs import FleetSpec
from fleetd.errors import Problem
from fleetd.resolver.launch_plan import LaunchPlan

if TYPE_CHECKING:
    from fleetd.config.load import LoadedConfig
    from fleetd.host.system.memory import DeviceSample


@dataclass(frozen=True, slots=True)
class MachineDevice:
    """A pool of memory that this machine has: `host`, `gpuN` or `unified`."""

    name: str
    kind: str
    total_bytes: int
    uuid: str | None = None


def machine_devices(samples: Iterable[DeviceSample]) -> list[MachineDevice]:
    """Return the pools of memory that a resolved fleet may use."""
    return [MachineDevice(one.name, one.kind, one.limit_bytes or one.total_bytes, one.uuid) for one in samples]


@dataclass(frozen=True, slots=True)
class Surroundings:
    """The machine and the results of earlier runs, as values.

    `ports` are the kept assignments; `learned` are measured footprints by footprint hash; `port_usable(name, port)` is
    an argument of `resolve_fleet`, since only a running daemon may ask.
    """

    devices: tuple[MachineDevice, ...] = ()
    env: Mapping[str, str] = field(default_factory=dict)
    ports: Mapping[str, int] = field(default_factory=dict)
    learned: Mapping[str, Mapping[str, int]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class FleetPaths:
    """The three folders, absolute."""

    state: Path
    run: Path
    logs: Path


def paths_of(loaded: LoadedConfig) -> FleetPaths:
    """Return the folders of a configuration's fleet."""
    paths = loaded.config.paths
    state, run, logs = (
        loaded.resolve(("paths", key), getattr(paths, key))
        if key in paths.model_fields_set
        else Path(getattr(paths, key)).expanduser()
        for key in ("state", "run", "logs")
    )
    return FleetPaths(state, run, logs)


@dataclass(frozen=True, slots=True)
class GatewaySettings:
    """The settings of the gateway at its start."""

    host: str
    port: int
    allowed_hosts: tuple[str, ...] = ()
    max_body_bytes: int = 0
    retry_attempts: int = 1


@dataclass(frozen=True, slots=True)
class ResolvedFleet:
    """The result of one configuration on one machine.

    `files` are all that were read, `patterns` the (folder, pattern) pairs that matched some of them; `watch`: read them again
    when they are saved, appear or disappear.
    """

    config_hash: str
    files: tuple[Path, ...]
    watch: bool
    gateway: GatewaySettings
    name: str
    paths: FleetPaths
    spec: FleetSpec
    plans: Mapping[str, LaunchPlan]
    ports: Mapping[str, int]
    sources: Mapping[tuple[str, str], tuple[str, int]] = field(
        default_factory=dict
    )  # (process|model, name) to file, line
    patterns: tuple[tuple[Path, str], ...] = ()
    problems: tuple[Problem, ...] = ()
    warnings: tuple[Problem, ...] = ()


@dataclass(frozen=True, slots=True)
class Edit:
    """One entry of fleet.yaml that was added, changed or removed, secrets redacted."""

    kind: str
    name: str
    action: str
    keys: tuple[KeyChange, ...] = ()
