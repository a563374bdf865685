"""A fleet.yaml read without a daemon, for `check` and `render`: the same assembly, nothing written.

The rules of this file
- Kept ports and learned footprints are read if they are there, so that the answer is what a start would do.
"""

from __future__ import annotations

import json
import socket
import sqlite3
from collections.abc import Mapping
from pathlib import Path

from fleetd.config.load import LoadedConfig, load
from fleetd.host.system.memory import Devices
from fleetd.resolver import check
from fleetd.resolver.build import assemble, checked, paths_of
from fleetd.resolver.port_assignment import kept_ports
from fleetd.resolver.resolved import Assembly, Surroundings, machine_devices


def assembled(path: Path, env: Mapping[str, str]) -> tuple[LoadedConfig, Assembly]:
    """Load and assemble. Raises ConfigError with every problem."""
    loaded = load(path, env, check.finder(env))
    state = paths_of(loaded).state
    devices = tuple(machine_devices(Devices().sample()))
    around = Surroundings(devices, dict(env), kept_ports(state), learned_footprints(state))
    return loaded, checked(assemble(loaded, around, hostname=socket.gethostname()))


def learned_footprints(state: Path) -> dict[str, dict[str, int]]:
    """Return what a daemon has measured; nothing when there is no such file, or it cannot be read."""
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
