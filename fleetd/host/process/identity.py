"""Decide whether a record of an earlier daemon names a live process of the fleet.

Invariants:
- A pid alone proves nothing: the start time has to match too, and, if the environment is readable, token, program or cgroup.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from pathlib import Path

from fleetd.host.process import cgroup
from fleetd.host.process.process_set import read_token, strays
from fleetd.host.process.table import ProcessTable, executable_of
from fleetd.host.types import HandleRecord


def doubt(record: HandleRecord, table: ProcessTable, boot_id: str) -> str | None:
    """Return why this record does not prove a live process; None: it does. Blocks."""
    if record.boot_id != boot_id:
        return "the machine was restarted since"
    if record.pid is None:
        return "its start was never confirmed" if record.spawned_at else "its record was lost"
    entry = table.entry(record.pid)
    if entry is None:
        return f"pid {record.pid} is gone"
    if entry.start != record.start_ticks:
        return f"pid {record.pid} belongs to another process now"
    if entry.dead:
        return None if entry.ppid == os.getpid() else f"pid {record.pid} is dead"
    environment = table.environment(record.pid)
    if environment is None or read_token(environment) == record.token:
        return None
    if record.exe and executable_of(record.pid) == record.exe:
        return None
    if record.cgroup and record.pid in cgroup.Cgroup(Path(record.cgroup)).pids():
        return None
    return f"pid {record.pid} has neither the token nor the program of its record"


def is_gone(record: HandleRecord, table: ProcessTable, boot_id: str) -> bool:
    """Return whether a recorded run has provably exited since this boot. Blocks."""
    if record.boot_id != boot_id or record.pid is None:
        return False
    entry = table.entry(record.pid)
    return entry is None or entry.dead or entry.start != record.start_ticks


def unrecorded(table: ProcessTable, boot_id: str, place: str, known: Collection[str]) -> Iterator[HandleRecord]:
    """Yield records for unrecorded sets: their token is enough to kill them."""
    for token, tag in strays(table, place, known).items():
        name, _, generation = tag.rpartition(":")
        if name and generation.isdecimal():
            yield HandleRecord(name, int(generation), token, boot_id)
