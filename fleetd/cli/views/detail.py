"""One process or one model on one screen, and the explanation of a model."""

from __future__ import annotations

import textwrap
import time

from fleetd.cli.render import (
    BOLD,
    GREEN,
    RED,
    STATE_COLOURS,
    Screen,
    ago,
    clean,
    clock,
    duration,
    number,
    size,
    width_of,
)
from fleetd.cli.views.lines import event_line
from fleetd.cli.views.tables import Row, on_of, split_of, ttl_of
from fleetd.units import counted


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
    _field(screen, "Wanted", f"{row.get('desired')}, restarted {counted(row.get('restarts'), 'time')}")
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
    _field(screen, "On", clean(on_of(row)))
    _field(screen, "Memory", f"{clean(split_of(row.get('device_bytes')))} ({clean(row.get('footprint') or 'unknown')})")
    _field(screen, "Requests", f"{number(row.get('in_flight'))} running, {number(row.get('queued'))} waiting")
    _field(screen, "Loads", f"{number(row.get('loads'))}, last took {duration(row.get('load_s'))}")
    _field(screen, "Evictions", number(row.get("evictions")))
    _field(screen, "Last used", ago(row.get("last_used"), time.time()))
    _field(screen, "TTL left", ttl_of(row))
    if row.get("aliases"):
        _field(screen, "Aliases", clean(", ".join(row["aliases"])))
    _ends(screen, detail)


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
