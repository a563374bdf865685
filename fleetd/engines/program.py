"""Find the program of an engine that fleet.yaml does not name."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from pathlib import Path

from fleetd.engines.base import LaunchContext
from fleetd.errors import EngineError


def in_places(name: str, places: Iterable[str]) -> str | None:
    """Return the path of a program in folders of its installers, which may begin with `~`; None without."""
    return shutil.which(name, path=os.pathsep.join(str(Path(place).expanduser()) for place in places))


def find_program(context: LaunchContext, name: str, hint: str, places: Iterable[str] = ()) -> str:
    """Return the path of a program, from the entry's PATH or from `places`. Raises EngineError."""
    found = shutil.which(name, path=context.env.get("PATH")) or in_places(name, places)
    if found is None:
        raise EngineError(f"{context.name}: no program named {name} on PATH", hint=hint, recoverable=False)
    return found
