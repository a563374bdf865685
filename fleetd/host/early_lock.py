"""Hold the lock of the run folder from the first moment of a start, before fleet.yaml is read in full.

Invariants:
- A guess is never an error: without one, or if it was wrong, the start takes the lock as soon as the folders are known.
- Keep imports minimal: this module runs before everything else is loaded.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from fleetd.errors import HostError
from fleetd.host.lock import DaemonLock

DEFAULT_RUN = "~/.fleetd/run"
_MAX_BYTES = 4 * 1024 * 1024
_BLOCK = re.compile(r"^paths:[ \t]*(?:#.*)?\n((?:[ \t]+.*\n|[ \t]*\n|#.*\n)*)", re.MULTILINE)
_FLOW = re.compile(r"^paths:[ \t]*\{([^{}]*)\}", re.MULTILINE)
_RUN = re.compile(r"""(?:^|[{,\s])run:[ \t]*(["']?)([^"'\s,}#]+)\1[ \t]*(?:[,}#\n]|$)""")


def guess_run_folder(text: str, config: Path, home: str | None) -> Path | None:
    """Return the run folder that a fleet.yaml most likely means; None for one that only the loader can find."""
    if re.search(r"^include:", text, re.MULTILINE):
        return None
    found = _FLOW.search(text + "\n") or _BLOCK.search(text + "\n")
    value = DEFAULT_RUN
    if found is not None:
        run = _RUN.search(found[1])
        if run is not None:
            value = run[2]
        elif "run" in found[1]:
            return None
    elif re.search(r"^(?:[\"']?paths|\{)", text, re.MULTILINE):
        return None
    if "$" in value:
        return None
    if value.startswith("~/"):
        return Path(home) / value[2:] if home else None
    return config.parent / value


def take(config: Path, env: Mapping[str, str]) -> DaemonLock | None:
    """Lock the run folder of a fleet.yaml if it can be guessed and is free."""
    with suppress(OSError, HostError, UnicodeDecodeError, ValueError):
        with config.open("rb") as file:
            text = file.read(_MAX_BYTES).decode("utf-8")
        folder = guess_run_folder(text, config, env.get("HOME"))
        if folder is not None and folder.is_absolute():
            return DaemonLock.acquire(folder)
    return None
