"""A plan: what an apply adds, changes and removes."""

from __future__ import annotations

from fleetd.cli.render import (
    GREEN,
    RED,
    YELLOW,
    Screen,
    clean,
    number,
)
from fleetd.cli.views.tables import Row


def plan_changes(screen: Screen, document: Row) -> None:
    """Print a plan: + add, ~ change with its keys, − remove, and the number of unchanged processes."""
    marks = {"add": ("+", GREEN), "change": ("~", YELLOW), "remove": ("−", RED)}
    changes = document.get("changes") or ()
    for change in changes:
        mark, colour = marks.get(str(change.get("change")), ("?", RED))
        text = f"{mark} {change.get('kind')} {change.get('name')} ({_effect(change)})"
        screen.raw(screen.paint(screen.symbols(clean(text)), colour))
        for key in change.get("keys") or ():
            before, after = _value(key.get("before")), _value(key.get("after"))
            screen.line(clean(f"    {key.get('path')}: {before} → {after} ({_effect(key)})"))
        moves = [f"{verb} {', '.join(change[verb])}" for verb in ("stops", "starts") if change.get(verb)]
        if moves:
            screen.line(clean(f"    {'; '.join(moves)}"))
    for warning in document.get("warnings") or ():
        screen.raw(screen.paint(f"warning: {clean(warning)}", YELLOW))
    count = {kind: sum(1 for change in changes if change.get("change") == kind) for kind in marks}
    screen.line(
        f"{count['add']} to add, {count['change']} to change, {count['remove']} to remove, "
        f"{number(document.get('unchanged'))} processes unchanged"
    )


def _effect(change: Row) -> str:
    effect = str(change.get("effect"))
    return "needs a restart of the daemon" if effect == "daemon" else effect


def _value(value: object) -> str:
    import json

    if value is None:
        return "(not set)"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
