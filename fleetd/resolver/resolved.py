"""What comes out of reading fleet.yaml: the core's FleetSpec, the shell's launch plans, and what is wrong or doubtful.

The rules of this file
- An Assembly is a value, replaced as a whole by every applied change.
- A problem refuses the file; a warning is worth saying and stops nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from fleetd.core.data.specs import FleetSpec
from fleetd.errors import Problem
from fleetd.resolver.launch_plan import LaunchPlan

if TYPE_CHECKING:
    from fleetd.host.system.memory import DeviceSample


@dataclass(frozen=True, slots=True)
class MachineDevice:
    """A pool of memory that this machine has: `host`, `gpuN` or `unified`."""

    name: str
    kind: str
    total_bytes: int
    uuid: str | None = None


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What the assembly may know of the machine and of earlier runs. All values; nothing is looked up later.

    `ports` are the kept assignments; `learned` are measured footprints by footprint hash; `port_usable(name, port)` is in
    `Assembler`, since only a running daemon may ask.
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


@dataclass(frozen=True, slots=True)
class GatewaySettings:
    """What the gateway is told when it starts."""

    host: str
    port: int
    allowed_hosts: tuple[str, ...] = ()
    max_body_bytes: int = 0
    retry_attempts: int = 1


@dataclass(frozen=True, slots=True)
class Assembly:
    """Everything that follows from one configuration on one machine. `files` are all that were read, `patterns` the (folder,
    pattern) that brought some of them; `watch`: read them again when they are saved, come or go."""

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


def machine_devices(samples: Sequence[DeviceSample]) -> list[MachineDevice]:
    """Return the memory pools of this machine."""
    return [MachineDevice(one.name, one.kind, one.limit_bytes or one.total_bytes, one.uuid) for one in samples]
