"""Tables of processes, models and loaded models, and the whole fleet on one screen."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from fleetd.cli.problems import problem_lines, warning_lines, wrapped
from fleetd.cli.render import (
    BOLD,
    STATE_COLOURS,
    Cell,
    Column,
    Screen,
    ago,
    clean,
    duration,
    number,
    size,
    table,
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
            on_of(row),
            split_of(row.get("device_bytes")),
            number(row.get("in_flight")),
            number(row.get("queued")),
            ttl_of(row),
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


def on_of(row: Row) -> str:
    routes = row.get("routes")
    if routes:
        return "-> " + ", ".join(f"{route.get('to')} {route.get('weight', '')}".strip() for route in routes)
    return ",".join(row.get("instances") or ()) or "-"


def ttl_of(row: Row) -> str:
    if row.get("pinned"):
        return "pinned"
    if row.get("state") == "LOADED" and row.get("ttl_left_s") is None and row.get("ttl_s") == 0:
        return "forever"
    return duration(row.get("ttl_left_s"))


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
            on_of(row),
            size(sum((row.get("device_bytes") or {}).values())) if row.get("device_bytes") else "-",
            _percent_split(row.get("device_bytes") or {}),
            number(row.get("context_length")),
            number(row.get("in_flight")),
            number(row.get("queued")),
            ttl_of(row),
        ]
        for row in rows
    ]
    table(screen, columns, drawn)


def _percent_split(device_bytes: Mapping[str, int]) -> str:
    total = sum(device_bytes.values())
    if not total:
        return "-"
    return " ".join(f"{count * 100 / total:.0f}% {name}" for name, count in device_bytes.items() if count)


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
