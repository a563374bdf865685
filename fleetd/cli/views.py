"""Text output of `fleetctl`: the fleet, one process, one model, loaded models, events, a plan.

Invariants:
- Every view is rendered from documents of `fleetd.control.wire`; a key that an older daemon does not send is shown as `-`.
"""

from __future__ import annotations

import textwrap
import time
from collections.abc import Mapping, Sequence
from typing import Any

from fleetd.cli.problems import problem_lines, warning_lines, wrapped
from fleetd.cli.render import (
    BOLD,
    DIM,
    GREEN,
    RED,
    STATE_COLOURS,
    YELLOW,
    Cell,
    Column,
    Screen,
    ago,
    clean,
    clock,
    duration,
    keep_colour,
    number,
    shorten,
    size,
    table,
    width_of,
)

Row = Mapping[str, Any]
GOOD_STATES = frozenset({"READY", "DRAINING", "LOADED", "ASLEEP"})


def state_cell(row: Row) -> Cell:
    state = str(row.get("state", "-"))
    return Cell(state, STATE_COLOURS.get(state))


def note_of(row: Row) -> str:
    """Return why a process is not running normally, or an empty text."""
    if row.get("state") in ("READY", "LOADED"):
        return "draining" if row.get("draining") else ""
    reason = str(row.get("reason") or "")
    if row.get("next_start_s") is not None:
        return f"starts in {duration(row['next_start_s'])}: {reason}"
    return reason


def split_of(device_bytes: object) -> str:
    """Return bytes per device as `gpu0 3.0G + host 1.0G`."""
    if not isinstance(device_bytes, dict) or not device_bytes:
        return "-"
    return " + ".join(f"{name} {size(count)}" for name, count in device_bytes.items())


def processes(screen: Screen, rows: Sequence[Row], wide: bool) -> None:
    columns = [
        Column("NAME", shrink=True),
        Column("KIND", 3),
        Column("STATE"),
        Column("PID", 4, right=True),
        Column("↺", 6, right=True),
        Column("UPTIME", 9, right=True),
        Column("CPU", 5, right=True),
        Column("MEM", 8, right=True),
        Column("PORT", 7, right=True),
    ]
    if wide:
        columns += [Column("TYPE"), Column("DESIRED"), Column("GEN", right=True)]
    noted = any(note_of(row) for row in rows) or wide
    if noted:
        columns.append(Column("NOTE", 2, shrink=True))
    drawn: list[list[Cell | str]] = []
    for row in rows:
        cells: list[Cell | str] = [
            Cell(str(row.get("name")), BOLD),
            str(row.get("engine") or row.get("kind") or "-"),
            state_cell(row),
            number(row.get("pid")),
            number(row.get("restarts")),
            duration(row.get("uptime_s")),
            number(row.get("cpu_percent"), "%"),
            size(row.get("rss_bytes")),
            number(row.get("port")),
        ]
        if wide:
            cells += [str(row.get("kind") or "-"), str(row.get("desired") or "-"), number(row.get("generation"))]
        if noted:
            cells.append(str(row.get("reason") or "") if wide else note_of(row))
        drawn.append(cells)
    table(screen, columns, drawn, whole=wide)


def models(screen: Screen, rows: Sequence[Row], wide: bool) -> None:
    columns = [
        Column("MODEL", shrink=True),
        Column("STATE"),
        Column("ON", 4, shrink=True),
        Column("MEM", 8),
        Column("RUN", 7, right=True),
        Column("QUEUE", 6, right=True),
        Column("TTL", 5, right=True),
        Column("LOADS", 3, right=True),
    ]
    if wide:
        titles = ("ENGINE", "FOOTPRINT", "PRIO", "EVICTED", "LOAD", "USED", "ALIASES")
        columns += [Column(title, 1, right=title in ("PRIO", "EVICTED", "LOAD")) for title in titles]
    noted = any(note_of(row) for row in rows)
    if noted:
        columns.append(Column("NOTE", 2, shrink=True))
    now = time.time()
    drawn: list[list[Cell | str]] = []
    for row in rows:
        cells: list[Cell | str] = [
            Cell(str(row.get("name")), BOLD),
            state_cell(row),
            _on(row),
            split_of(row.get("device_bytes")),
            number(row.get("in_flight")),
            number(row.get("queued")),
            _ttl(row),
            number(row.get("loads")),
        ]
        if wide:
            cells += [
                str(row.get("engine") or "-"),
                str(row.get("footprint") or "-"),
                number(row.get("priority")),
                number(row.get("evictions")),
                duration(row.get("load_s")),
                ago(row.get("last_used"), now),
                ",".join(row.get("aliases") or ()) or "-",
            ]
        if noted:
            cells.append(note_of(row))
        drawn.append(cells)
    table(screen, columns, drawn, whole=wide)


def _on(row: Row) -> str:
    routes = row.get("routes")
    if routes:
        return "-> " + ", ".join(f"{route.get('to')} {route.get('weight', '')}".strip() for route in routes)
    return ",".join(row.get("instances") or ()) or "-"


def _ttl(row: Row) -> str:
    if row.get("pinned"):
        return "pinned"
    if row.get("state") == "LOADED" and row.get("ttl_left_s") is None and row.get("ttl_s") == 0:
        return "forever"
    return duration(row.get("ttl_left_s"))


def device_line(device: Row) -> str:
    """Return one device as one line, with reserved and used bytes."""
    parts = [
        f"{device.get('name')}: reserved {size(device.get('reserved_bytes'))} of {size(device.get('budget_bytes'))}",
        f"used {size(device.get('used_bytes'))} of {size(device.get('total_bytes'))}",
    ]
    if device.get("utilization") is not None:
        parts.append(f"{float(device['utilization']) * 100:.0f}% busy")
    if device.get("temperature_c") is not None:
        parts.append(f"{float(device['temperature_c']):.0f}°C")
    return " · ".join(clean(part) for part in parts)


def fleet(screen: Screen, status: Row, wide: bool = False) -> None:
    """Print the whole fleet."""
    drawn = False
    for rows, draw in ((status.get("processes") or (), processes), (status.get("models") or (), models)):
        if rows:
            if drawn:
                screen.line()
            draw(screen, rows, wide)
            drawn = True
    if not drawn:
        screen.line("This fleet has no processes and no models.")
    screen.line()
    for device in status.get("devices") or ():
        screen.line(device_line(device))
    for line in wrapped(screen, _host_line(status), None):
        screen.raw(line)
    problems = [*problem_lines(screen, status), *warning_lines(screen, warnings_of(status))]
    if problems:
        screen.line()
    for line in problems:
        screen.raw(line)


def _host_line(status: Row) -> str:
    daemon = status.get("daemon") or {}
    parts = [f"{status.get('name')}: {'ready' if status.get('ready') else 'not ready'}"]
    host = status.get("host")
    if host:
        used, total = size(host.get("memory_used_bytes")), size(host.get("memory_total_bytes"))
        parts.append(f"cpu {number(host.get('cpu_percent'), '%')} of {host.get('cpus')}, memory {used} of {total}")
    parts.append(f"fleetd {daemon.get('version')} pid {daemon.get('pid')} up {duration(daemon.get('uptime_s'))}")
    if daemon.get("gateway"):
        parts.append(f"gateway {daemon['gateway']}")
    return " · ".join(clean(part) for part in parts)


def warnings_of(status: Row) -> list[str]:
    """Return the warnings of a status document."""
    daemon = status.get("daemon") or {}
    config = clean(daemon.get("config") or "fleet.yaml")
    found = []
    if daemon.get("config_error"):
        found.append(
            "warning: fleet.yaml has errors and was not applied; the previous configuration stays in force: "
            f"{clean(daemon['config_error'])} (all of them: fleetd check {config})"
        )
    found += [f"warning: {clean(warning)}" for warning in daemon.get("config_warnings") or ()]
    found += [f"warning: {clean(problem)}" for problem in daemon.get("disk_problems") or ()]
    if daemon.get("store_problem"):
        found.append(f"warning: fleetd cannot save its state: {clean(daemon['store_problem'])}")
    if daemon.get("restart_needed"):
        keys = clean(", ".join(map(str, daemon["restart_needed"])))
        found.append(f"warning: {keys} of {config} needs a restart of the daemon")
    if daemon.get("stopping"):
        found.append("warning: fleetd is shutting down")
    return found


def one_process(screen: Screen, detail: Row) -> None:
    """Print one process on one screen, like systemctl status."""
    row = detail["process"]
    state = str(row.get("state"))
    mark = screen.paint(screen.symbols("●"), STATE_COLOURS.get(state))
    title = f"{row.get('kind')}, {row['engine']}" if row.get("engine") else row.get("kind")
    screen.raw(f"{mark} {screen.paint(clean(row.get('name')), BOLD)} - {clean(title)}")
    age_s = row.get("state_age_s", row.get("uptime_s"))
    since = f" for {duration(age_s)}" if age_s else ""
    following = f", starts in {duration(row['next_start_s'])}" if row.get("next_start_s") is not None else ""
    reason = f": {clean(row['reason'])}" if row.get("reason") else ""
    _field(screen, "State", f"{screen.state(state)}{since}{following}{reason}")
    _hint(screen, row)
    restarts = row.get("restarts")
    _field(screen, "Wanted", f"{row.get('desired')}, restarted {restarts} time{'' if restarts == 1 else 's'}")
    if row.get("pid"):
        _field(screen, "Uptime", duration(row.get("uptime_s")))
    if detail.get("source"):
        _field(screen, "Defined", clean(detail["source"]))
    if row.get("pid"):
        _field(screen, "Main PID", f"{row['pid']} (generation {row.get('generation')})")
        _field(screen, "CPU", number(row.get("cpu_percent"), "%"))
        devices = row.get("device_bytes")
        _field(screen, "Memory", size(row.get("rss_bytes")) + (f" ({split_of(devices)})" if devices else ""))
    if row.get("port"):
        _field(screen, "Port", str(row["port"]))
    _surroundings(screen, detail)
    _last_exit(screen, row.get("last_exit"))
    if detail.get("models"):
        held = [f"{clean(m.get('name'))} {screen.state(m.get('state'))}" for m in detail["models"]]
        _field(screen, "Models", ", ".join(held))
    _ends(screen, detail)


def _surroundings(screen: Screen, detail: Row) -> None:
    for label, key in (("Command", "command"), ("Folder", "cwd"), ("Log", "log_path")):
        value = detail.get(key)
        if value:
            _field(screen, label, clean(" ".join(map(str, value)) if isinstance(value, list) else value))
    if detail.get("depends_on"):
        _field(screen, "After", clean(", ".join(f"{name} {word}" for name, word in detail["depends_on"].items())))
    for path, there in (detail.get("requires") or {}).items():
        _field(screen, "Requires", clean(path) + ("" if there else screen.paint(" (missing)", RED)))
    state = (detail.get("process") or {}).get("state")
    for kind, probe in (detail.get("probes") or {}).items():
        if probe.get("ok") and state in ("STOPPED", "EXITED", "FAILED", "BLOCKED", "BACKOFF"):
            continue  # of a run that is over
        verdict = screen.paint("ok", GREEN) if probe.get("ok") else screen.paint("failed", RED)
        text = f" {clean(probe['detail'])}" if probe.get("detail") else ""
        _field(screen, kind.capitalize(), verdict + text)
    tree = detail.get("tree") or ()
    for place, member in enumerate(tree[:12]):
        command = clean(member.get("command") or "")
        _field(screen, "" if place else "Processes", f"{member.get('pid')} {command}")
    if len(tree) > 12:
        _field(screen, "", f"and {len(tree) - 12} more")


def _last_exit(screen: Screen, last: Row | None) -> None:
    if not last:
        return
    how = f"signal {last['signal']}" if last.get("signal") else f"code {number(last.get('code'))}"
    memory = ", out of memory" if last.get("oom") else ""
    reason = f": {clean(last['reason'])}" if last.get("reason") else ""
    _field(screen, "Last exit", f"{how}{memory} at {clock(last.get('at'))}{reason}")


def _hint(screen: Screen, row: Row) -> None:
    if row.get("hint"):
        _field(screen, "Hint", clean(row["hint"]))


def _field(screen: Screen, label: str, text: str) -> None:
    """Print one field; a text that is too long goes on below, aligned."""
    head = f"{label + ':' if label else '':>11} "
    if screen.columns is None or "\x1b" in text or width_of(head + text) <= screen.columns:
        screen.line(head + text)
        return
    for number_, line in enumerate(textwrap.wrap(text, max(20, screen.columns - len(head)), break_on_hyphens=False)):
        screen.line((" " * len(head) if number_ else head) + line)


def _ends(screen: Screen, detail: Row) -> None:
    if detail.get("events"):
        screen.line()
        for event in detail["events"]:
            event_line(screen, event, with_name=False)
    if detail.get("log"):
        screen.line()
        for line in detail["log"]:
            screen.line(clean(line.get("line", "")))


def one_model(screen: Screen, detail: Row) -> None:
    """Print one model on one screen."""
    row = detail["model"]
    state = str(row.get("state"))
    mark = screen.paint(screen.symbols("●"), STATE_COLOURS.get(state))
    screen.raw(f"{mark} {screen.paint(clean(row.get('name')), BOLD)} - model, {clean(row.get('engine') or 'route')}")
    reason = f": {clean(row['reason'])}" if row.get("reason") else ""
    _field(screen, "State", f"{screen.state(state)}{reason}")
    _hint(screen, row)
    if detail.get("source"):
        _field(screen, "Defined", clean(detail["source"]))
    _field(screen, "On", clean(_on(row)))
    _field(screen, "Memory", f"{clean(split_of(row.get('device_bytes')))} ({clean(row.get('footprint') or 'unknown')})")
    _field(screen, "Requests", f"{number(row.get('in_flight'))} running, {number(row.get('queued'))} waiting")
    _field(screen, "Loads", f"{number(row.get('loads'))}, last took {duration(row.get('load_s'))}")
    _field(screen, "Evictions", number(row.get("evictions")))
    _field(screen, "Last used", ago(row.get("last_used"), time.time()))
    _field(screen, "TTL left", _ttl(row))
    if row.get("aliases"):
        _field(screen, "Aliases", clean(", ".join(row["aliases"])))
    _ends(screen, detail)


def loaded(screen: Screen, rows: Sequence[Row]) -> None:
    """Print loaded models, like `ollama ps`."""
    columns = [
        Column("MODEL", shrink=True),
        Column("STATE"),
        Column("ON", 3, shrink=True),
        Column("SIZE", 9, right=True),
        Column("SPLIT", 6),
        Column("CONTEXT", 2, right=True),
        Column("RUN", 7, right=True),
        Column("QUEUE", 5, right=True),
        Column("TTL", 8, right=True),
    ]
    drawn: list[list[Cell | str]] = [
        [
            Cell(str(row.get("name")), BOLD),
            state_cell(row),
            _on(row),
            size(sum((row.get("device_bytes") or {}).values())) if row.get("device_bytes") else "-",
            _percent_split(row.get("device_bytes") or {}),
            number(row.get("context_length")),
            number(row.get("in_flight")),
            number(row.get("queued")),
            _ttl(row),
        ]
        for row in rows
    ]
    table(screen, columns, drawn)


def _percent_split(device_bytes: Mapping[str, int]) -> str:
    total = sum(device_bytes.values())
    if not total:
        return "-"
    return " ".join(f"{count * 100 / total:.0f}% {name}" for name, count in device_bytes.items() if count)


def event_line(screen: Screen, event: Row, with_name: bool = True) -> None:
    """Print one event as one line: time, name, event, reason. Times are local on a terminal, UTC in a pipe."""
    moved = ""
    if event.get("state"):
        before = f"{event['before']} → " if event.get("before") and event["before"] != event["state"] else ""
        moved = f" {before}{event['state']}"
    name = f" {event['name']}" if with_name and event.get("name") else ""
    reason = f": {event['reason']}" if event.get("reason") else ""
    text = clean(f"{name} {event.get('event', '')}{moved}{reason}")
    if screen.columns is None:
        screen.line(f"{clean(event.get('at', '-'))}{text}")
    elif screen.colour:
        text = shorten(text, max(8, screen.columns - 15))
        screen.raw(f"{screen.paint(clock(event.get('at')), DIM)}{screen.symbols(text)}")
    else:
        screen.line(f"{clock(event.get('at'))}{text}")


def log_line(screen: Screen, line: Row, prefix: tuple[str, int, str] | None) -> None:
    """Print one log line; `prefix` is (name, width, colour) when several processes are shown.

    On a terminal a line keeps its colours and no other control sequence; into a pipe it is unchanged.
    """
    text = str(line.get("line", ""))
    if screen.columns is not None:
        text = keep_colour(text) if screen.colour else clean(text)
    head = f"{clean(line['at'])} " if line.get("at") else ""
    if prefix is not None:
        name, width, colour = prefix
        head = screen.paint(f"{clean(name):<{width}} |", colour) + " " + head
    reset = "\x1b[0m" if screen.colour and "\x1b[" in text else ""
    screen.raw(head + text + reset)


def plan(screen: Screen, document: Row) -> None:
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
        return "(absent)"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def explanation(screen: Screen, document: Row) -> None:
    """Print the explanation of a model: sentences, then numbers."""
    head = f"{clean(document.get('model'))}: {screen.state(document.get('state'))}"
    screen.raw(head + (f", {clean(document['reason'])}" if document.get("reason") else ""))
    for sentence in document.get("text") or ():
        screen.raw(f"  {clean(sentence)}")
    footprint = document.get("footprint") or {}
    if document.get("hint"):
        screen.raw(f"  hint: {clean(document['hint'])}")
    if footprint.get("bytes"):
        screen.line(f"  needs {clean(split_of(footprint['bytes']))} ({clean(footprint.get('source'))})")
    for device in document.get("devices") or ():
        free, budget = size(device.get("free_bytes")), size(device.get("budget_bytes"))
        screen.line(f"  {clean(device.get('name'))}: {free} free of a budget of {budget}")
    for label, key in (("process", "holders"), ("would give way", "victims")):
        for row in document.get(key) or ():
            reason = f" ({clean(row['reason'])})" if row.get("reason") else ""
            state = f": {str(row['state']).lower()}" if row.get("state") else ""
            screen.line(f"  {label} {clean(row.get('name'))}{clean(state)}{reason}")
