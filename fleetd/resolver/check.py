"""Read and resolve a fleet.yaml without a daemon, for `check` and `render`, and find every mistake in an invalid one.

Invariants:
- Nothing is written. Kept ports and learned footprints are read where they exist, so the answer is what a start would do.
- Options are checked in every entry, even where another key of it is invalid.
- A valid file never pays for the search of further mistakes.
"""

from __future__ import annotations

import json
import socket
import sqlite3
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from fleetd.config.load import FurtherChecks, LoadedConfig, load
from fleetd.config.yaml.source_map import SourceMap
from fleetd.errors import Problem
from fleetd.host.system.memory import Devices
from fleetd.resolver import engine_options
from fleetd.resolver.build import checked, resolve_fleet
from fleetd.resolver.port_assignment import kept_ports
from fleetd.resolver.resolved import ResolvedFleet, Surroundings, machine_devices, paths_of


def load_and_resolve(path: Path, env: Mapping[str, str]) -> tuple[LoadedConfig, ResolvedFleet]:
    """Load and resolve a file. Raises ConfigError with every problem."""
    loaded = load(path, env, finder(env))
    state = paths_of(loaded).state
    devices = tuple(machine_devices(Devices().sample()))
    around = Surroundings(devices, dict(env), kept_ports(state), learned_footprints(state))
    return loaded, checked(resolve_fleet(loaded, around, hostname=socket.gethostname()))


def finder(env: Mapping[str, str]) -> FurtherChecks:
    """Return the checks of options, models and the machine, for `load`."""
    return partial(_find, env)


def _find(env: Mapping[str, str], data: Any, source_map: SourceMap, valid: LoadedConfig | None) -> list[Problem]:
    found = engine_options.find(data, source_map)
    if valid is None:
        return found
    around = Surroundings(tuple(machine_devices(Devices().sample())), dict(env))
    return [*found, *resolve_fleet(valid, around).problems]


def learned_footprints(state: Path) -> dict[str, dict[str, int]]:
    """Return measured footprints, in bytes by device; empty if there are none."""
    file = state / "fleetd.db"
    if not file.is_file():
        return {}
    try:
        database = sqlite3.connect(f"{file.absolute().as_uri()}?mode=ro", uri=True, timeout=1.0)
        try:
            rows = database.execute("SELECT hash, bytes FROM footprint").fetchall()
        finally:
            database.close()
        return {str(key): {str(device): int(size) for device, size in json.loads(text).items()} for key, text in rows}
    except (sqlite3.Error, ValueError, AttributeError, TypeError):
        return {}
