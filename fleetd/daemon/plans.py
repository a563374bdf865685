"""What applying a file would do, in the words of the control plane.

The rules of this file
- Keys come from the comparison of the configurations; what happens to a process comes from its launch hash, the only thing
  that the core goes by. So the plan says what will be, not what the key usually means.
"""

from __future__ import annotations

from fleetd.config.diff import Action, diff
from fleetd.config.diff import Change as FileChange
from fleetd.config.effects import Effect
from fleetd.control.wire import Change, KeyChange, Plan
from fleetd.daemon.assembly import Assembly


def plan_of(old: Assembly, new: Assembly, file: str | None) -> Plan:
    """Return the way from what runs to another assembly."""
    restarted = restarting(old, new)
    changes = [_change(change, new, restarted) for change in diff(old.loaded.config, new.loaded.config)]
    touched = restarted | (set(old.spec.processes) ^ set(new.spec.processes))
    return {
        "file": file,
        "config_hash": new.loaded.config_hash,
        "changes": changes,
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


def _change(change: FileChange, new: Assembly, restarted: set[str]) -> Change:
    bases = {new.spec.processes[name].base for name in restarted}
    keys: list[KeyChange] = [
        {
            "path": field.path,
            "before": field.old,
            "after": field.new,
            "effect": "restart" if field.effect in (Effect.RESTART, Effect.DAEMON) else "hot",
        }
        for field in change.fields
    ]
    if change.action is Action.ADD:
        effect = "start"
    elif change.action is Action.REMOVE:
        effect = "stop"
    else:
        effect = "restart" if change.name in bases else "hot"
    return {
        "kind": change.kind,
        "name": change.name or "fleet",
        "change": str(change.action),
        "effect": effect,
        "keys": keys,
    }
