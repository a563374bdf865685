"""All that is wrong with a fleet.yaml that is refused: what its types tell does not hide what only an assembly finds.

The rules of this file
- Options are looked at in every entry; the rest only where the entry is right, or where another stands in for its server.
- It costs an assembly, and a look at this machine's devices: nothing that a good file pays for.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from fleetd.config.load import Beside, LoadedConfig
from fleetd.config.yaml.source_map import Marks
from fleetd.errors import Problem
from fleetd.resolver import engine_options
from fleetd.resolver.build import assemble
from fleetd.resolver.resolved import Surroundings, machine_devices


def finder(env: Mapping[str, str]) -> Beside:
    """Return what `load` asks for the mistakes that it does not know of itself."""
    return partial(_find, env)


def _find(env: Mapping[str, str], data: Any, marks: Marks, right: LoadedConfig | None) -> list[Problem]:
    found = engine_options.find(data, marks)
    if right is None:
        return found
    from fleetd.host.system.memory import Devices

    around = Surroundings(tuple(machine_devices(Devices().sample())), dict(env))
    return [*found, *assemble(right, around).problems]
