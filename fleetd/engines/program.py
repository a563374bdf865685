"""Find the program of an engine that fleet.yaml does not name."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from pathlib import Path

from fleetd.engines.base import LaunchContext
from fleetd.errors import EngineError


def find_program(context: LaunchContext, name: str, hint: str, places: Iterable[str] = ()) -> str:
    """Return the path of a program, from the entry's PATH or from `places`. Raises EngineError."""
    usual = os.pathsep.join(str(Path(place).expanduser()) for place in places)
    found = shutil.which(name, path=context.env.get("PATH")) or shutil.which(name, path=usual)
    if found is None:
        raise EngineError(f"{context.name}: no program named {name} on PATH", hint=hint, recoverable=False)
    return found
