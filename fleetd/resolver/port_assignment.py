"""Ports of processes that do not state one: assigned once, and kept.

Invariants:
- A name keeps its port over edits of fleet.yaml, restarts of the daemon, and the removal of other names.
- The search for a new name starts at a port that depends only on the name and the fleet: even a lost file gives the same ports
  again, and two fleets with equal names on one machine get different ports.
- Assigned ports are below the ephemeral range of every system (Linux 32768, macOS 49152), where an outgoing connection of
  some other program could take them while a process restarts.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path

FIRST, LAST = 20000, 32767
FILE = "ports.json"
_REMEMBERED = 4096  # this many removed names keep their ports


class NoPortLeftError(LookupError):
    """Every port of the range is taken."""


def assign(
    names: Iterable[str],
    kept: Mapping[str, int],
    taken: Collection[int],
    usable: Callable[[str, int], bool] = lambda *_: True,
    fleet: str = "",
) -> dict[str, int]:
    """Return a port for each of `names` of the fleet that the text `fleet` identifies.

    `kept` is what earlier runs assigned, `taken` the ports that fleet.yaml states; `usable(name, port)` says whether a port
    is free on this machine or held by that process of ours. Raises NoPortLeftError.
    """
    names = list(names)
    used = set(taken)
    result: dict[str, int] = {}
    for name in names:
        port = kept.get(name)
        if port is not None and FIRST <= port <= LAST and port not in used and usable(name, port):
            result[name] = port
            used.add(port)
    # A removed name keeps its port as long as there is room.
    reserved = set(kept.values())
    for name in names:
        if name not in result:
            port = _search(name, fleet, used, reserved, usable)
            result[name] = port
            used.add(port)
    return result


def _search(name: str, fleet: str, used: set[int], reserved: set[int], usable: Callable[[str, int], bool]) -> int:
    span = LAST - FIRST + 1
    start = zlib.crc32(f"{fleet}/{name}".encode()) % span
    for blocked in (used | reserved, used):
        for step in range(span):
            port = FIRST + (start + step) % span
            if port not in blocked and usable(name, port):
                return port
    raise NoPortLeftError(f"no free port between {FIRST} and {LAST} for {name!r}")


def remember(kept: Mapping[str, int], assigned: Mapping[str, int]) -> dict[str, int]:
    """Return the assignments to keep: the new ones, and old ones without a clash."""
    ports = set(assigned.values())
    old = {name: port for name, port in kept.items() if name not in assigned and port not in ports}
    for name in list(old)[: max(0, len(old) - _REMEMBERED)]:
        del old[name]
    return {**old, **assigned}


def kept_ports(state: Path) -> dict[str, int]:
    """Return the assignments of earlier runs; none for a missing or torn file."""
    try:
        content = json.loads((state / FILE).read_bytes())
        return {str(name): int(port) for name, port in content["ports"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}


def keep_ports(state: Path, assigned: Mapping[str, int]) -> None:
    """Keep assignments for later runs. Raises OSError. Blocks."""
    from fleetd.host.process.handle import write_atomically

    before = kept_ports(state)
    after = remember(before, assigned)
    if after != before:
        state.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_atomically(state / FILE, json.dumps({"version": 1, "ports": after}).encode(), durable=False)
