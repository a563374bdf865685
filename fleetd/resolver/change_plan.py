"""Plan the effects of applying a file, as the control API reports them.

Invariants:
- Keys come from the comparison of the configurations; effects on a process come from its launch hash, as in the core. So the plan
  states what will happen, not what a key usually means: every restart is in it, and processes whose names change with the
  number of replicas are stopped and started.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from fleetd.control.wire import KeyChange, Plan, PlannedChange
from fleetd.resolver.launch_plan import LaunchPlan
from fleetd.resolver.resolved import Edit, ResolvedFleet

_KINDS = {"services": "service", "instances": "instance", "models": "engine model"}
_SHOWN = 200  # characters of one value


def plan_of(old: ResolvedFleet, new: ResolvedFleet, edits: Sequence[Edit], file: str | None) -> Plan:
    """Return the plan from the running fleet to the new one; `edits` are by entry."""
    restarted = restarting(old, new)
    touched = restarted | (set(old.spec.processes) ^ set(new.spec.processes))
    moves = _moves(old, new, restarted)
    changes = [_change(edit, moves.get((edit.kind, edit.name), _Moves())) for edit in edits]
    planned = {(edit.kind, edit.name) for edit in edits}
    for (kind, name), found in moves.items():
        if found.restarts and (kind, name) not in planned:
            changes.append(_change(Edit(kind, name, "change"), found))
    return {
        "file": file,
        "config_hash": new.config_hash,
        "changes": changes,
        "unchanged": len(set(new.spec.processes) - touched),
    }


@dataclass(slots=True)
class _Moves:
    """The effects on an entry's processes; `causes` are those of a restarting one."""

    stays: bool = False
    starts: list[str] = field(default_factory=list)
    stops: list[str] = field(default_factory=list)
    restarts: list[str] = field(default_factory=list)
    causes: list[KeyChange] = field(default_factory=list)


def _moves(old: ResolvedFleet, new: ResolvedFleet, restarted: Collection[str]) -> dict[tuple[str, str], _Moves]:
    """Return the moves by kind and name of the entry."""
    found: dict[tuple[str, str], _Moves] = {}
    for name, plan in {**old.plans, **new.plans}.items():
        moves = found.setdefault((_KINDS[plan.place.partition(".")[0]], plan.base), _Moves())
        if name not in old.plans:
            moves.starts.append(name)
        elif name not in new.plans:
            moves.stops.append(name)
        elif name in restarted:
            moves.restarts.append(name)
            moves.causes = moves.causes or _causes(old.plans[name], new.plans[name])
        moves.stays |= name in old.plans and name in new.plans
    return found


def _causes(old: LaunchPlan, new: LaunchPlan) -> list[KeyChange]:
    """Return differences between two launches that no key shows: env files, programs."""
    unread = [
        path for path in dict.fromkeys([*old.unread, *new.unread]) if (path in old.unread) != (path in new.unread)
    ]
    found = [_key("env_file", *(None if path in plan.unread else path for plan in (old, new))) for path in unread]
    before, after = old.set_env(), new.set_env()
    shown, shown_after = old.shown_env(), new.shown_env()
    changed = [name for name in dict.fromkeys([*before, *after]) if before.get(name) != after.get(name)]
    found += [_key(f"env.{name}", shown.get(name), shown_after.get(name)) for name in changed]
    if old.launch.argv != new.launch.argv:
        found.append(_key("command", " ".join(old.shown_argv()), " ".join(new.shown_argv())))
    return found


def _key(path: str, before: str | None, after: str | None) -> KeyChange:
    return {"path": path, "before": _short(before), "after": _short(after), "effect": "restart"}


def _short(text: str | None) -> str | None:
    return text if text is None or len(text) <= _SHOWN else f"{text[: _SHOWN - 3]}..."


def restarting(old: ResolvedFleet, new: ResolvedFleet) -> set[str]:
    """Return the processes in both whose launch differs."""
    return {
        name
        for name, spec in new.spec.processes.items()
        if name in old.spec.processes and old.spec.processes[name].launch_hash != spec.launch_hash
    }


def affected(old: ResolvedFleet, new: ResolvedFleet) -> list[str]:
    """Return the processes of the new fleet that an apply starts or restarts."""
    added = [name for name, spec in new.spec.processes.items() if name not in old.spec.processes and not spec.on_demand]
    return [*added, *sorted(restarting(old, new))]


def _change(edit: Edit, moves: _Moves) -> PlannedChange:
    keys = list(edit.keys)
    change: PlannedChange = {"kind": edit.kind, "name": edit.name, "change": edit.action, "effect": "hot", "keys": keys}
    if edit.action != "change":
        change["effect"] = "start" if edit.action == "add" else "stop"
        return change
    renamed = not moves.stays and bool(moves.stops)
    if renamed:
        change["keys"] = keys = [{**key, "effect": "restart"} if key["effect"] == "scale" else key for key in keys]
    if moves.restarts and not any(key["effect"] == "restart" for key in keys):
        keys += moves.causes
    if any(key["effect"] == "daemon" for key in keys):
        change["effect"] = "daemon"
    elif moves.restarts or renamed:
        change["effect"] = "restart"
    elif moves.starts or moves.stops:
        change["effect"] = "scale"
    elif any(key["effect"] == "reload" for key in keys):
        change["effect"] = "reload"
    if moves.starts or moves.stops:
        change["starts"], change["stops"] = moves.starts, moves.stops
    return change
