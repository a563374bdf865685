"""What applying a file would do, in the words of the control plane.

The rules of this file
- Keys come from the comparison of the configurations; what happens to a process comes from its launch hash, the only thing
  that the core goes by. So the plan says what will be, not what the key usually means.
"""

from __future__ import annotations

from collections.abc import Collection

from fleetd.control.wire import Change, Plan
from fleetd.daemon.assembly import Assembly
from fleetd.daemon.readings import Edit, Reading


def plan_of(old: Assembly, reading: Reading, file: str | None) -> Plan:
    """Return the way from what runs to what was read."""
    new = reading.assembly
    restarted = restarting(old, new)
    bases = {new.spec.processes[name].base for name in restarted}
    touched = restarted | (set(old.spec.processes) ^ set(new.spec.processes))
    return {
        "file": file,
        "config_hash": new.config_hash,
        "changes": [_change(edit, bases) for edit in reading.edits],
        "unchanged": len(set(new.spec.processes) - touched),
    }


def restarting(old: Assembly, new: Assembly) -> set[str]:
    """Return the processes in both whose launch differs."""
    return {
        name
        for name, spec in new.spec.processes.items()
        if name in old.spec.processes and old.spec.processes[name].launch_hash != spec.launch_hash
    }


def affected(old: Assembly, new: Assembly) -> list[str]:
    """Return the processes of the new assembly that an apply starts or restarts."""
    added = [name for name, spec in new.spec.processes.items() if name not in old.spec.processes and not spec.on_demand]
    return [*added, *sorted(restarting(old, new))]


def _change(edit: Edit, restarted: Collection[str]) -> Change:
    if edit.action == "add":
        effect = "start"
    elif edit.action == "remove":
        effect = "stop"
    else:
        effect = "restart" if edit.name in restarted else "hot"
    return {"kind": edit.kind, "name": edit.name, "change": edit.action, "effect": effect, "keys": list(edit.keys)}
