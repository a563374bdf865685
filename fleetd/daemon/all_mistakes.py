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
from fleetd.config.marks import Marks
from fleetd.daemon import option_mistakes
from fleetd.daemon.assemble import assemble
from fleetd.daemon.assembly import Surroundings
from fleetd.errors import Problem


def finder(env: Mapping[str, str]) -> Beside:
    """Return what `load` asks for the mistakes that it does not know of itself."""
    return partial(_find, env)


def _find(env: Mapping[str, str], data: Any, marks: Marks, right: LoadedConfig | None) -> list[Problem]:
    found = option_mistakes.find(data, marks)
    if right is None:
        return found
    from fleetd.daemon.sampling import machine_devices
    from fleetd.host.memory import Devices

    around = Surroundings(tuple(machine_devices(Devices().sample())), dict(env))
    return [*found, *assemble(right, around).problems]
