"""How busy the machine is, and how large this process: for the status line, and for `fleetctl doctor`.

Invariants:
- A look of the status line costs microseconds and reads no process but our own; `threads_of` reads the whole table.
"""

from __future__ import annotations

from typing import NamedTuple

import psutil


class MachineLoad(NamedTuple):
    """`cpu_percent` is since the last look, over all cores."""

    cpu_percent: float
    memory_total_bytes: int
    memory_used_bytes: int


def machine_load() -> MachineLoad:
    """Return the load of the machine now."""
    memory = psutil.virtual_memory()
    return MachineLoad(psutil.cpu_percent(None), int(memory.total), int(memory.total - memory.available))


def own_rss_bytes() -> int:
    """Return the resident memory of this process."""
    return int(psutil.Process().memory_info().rss)


def threads_of(uid: int) -> int:
    """Return the threads of a user, which the kernel counts against its limit of processes."""
    total = 0
    for process in psutil.process_iter(["uids", "num_threads"]):
        uids = process.info["uids"]
        if uids is not None and uids.real == uid:
            total += process.info["num_threads"] or 1
    return total
