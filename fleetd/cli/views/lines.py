"""One event, or one line of a log, as one line."""

from __future__ import annotations

from fleetd.cli.render import (
    DIM,
    Screen,
    clean,
    clock,
    keep_colour,
    shorten,
)
from fleetd.cli.views.tables import Row


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
