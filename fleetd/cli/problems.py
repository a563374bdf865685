"""The problems of a fleet as uncut, wrapped lines below the tables of `status`.

Invariants:
- One entry per problem: name, state, cause, and a line `hint:` with the next command. Nothing is cut, on any terminal.
- A cause that many rows share is printed once, with their names.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping
from typing import Any

from fleetd.cli.render import STATE_COLOURS, YELLOW, Screen, clean, duration
from fleetd.units import listed

Row = Mapping[str, Any]
STATES = frozenset({"FAILED", "BACKOFF", "BLOCKED", "UNHEALTHY"})
_NAMES_SHOWN = 6


def is_problem(row: Row) -> bool:
    """Return whether a row needs attention: an older daemon does not say so, and its state decides."""
    return bool(row["problem"]) if "problem" in row else row.get("state") in STATES


def problem_lines(screen: Screen, status: Row) -> Iterator[str]:
    """Yield the lines of all problems, wrapped for the screen."""
    groups: dict[tuple[str, str, str], list[str]] = {}
    for row in (*(status.get("processes") or ()), *(status.get("models") or ())):
        if not is_problem(row):
            continue
        reason = clean(row.get("reason") or "")
        if row.get("next_start_s") is not None:
            reason = f"starts in {duration(row['next_start_s'])}: {reason}"
        name, state, hint = clean(row.get("name")), clean(row.get("state")), clean(row.get("hint") or "")
        names = groups.setdefault((state, reason, hint), [])
        if name not in names:  # a model that is its own process has both rows
            names.append(name)
    seen: set[tuple[str, str]] = set()
    for (state, reason, hint), names in groups.items():
        shown = listed(names, _NAMES_SHOWN)
        if (shown, reason) in seen:
            continue
        seen.add((shown, reason))
        yield from wrapped(screen, f"{shown}: {state}: {reason}", STATE_COLOURS.get(state))
        if hint:
            yield from wrapped(screen, f"hint: {hint}", None, indent="  ")


def warning_lines(screen: Screen, warnings: list[str]) -> Iterator[str]:
    """Yield warnings, wrapped for the screen."""
    for warning in warnings:
        yield from wrapped(screen, warning, YELLOW)


def wrapped(screen: Screen, text: str, colour: str | None, indent: str = "") -> Iterator[str]:
    """Yield one text in lines of the screen's width; into a pipe as one line. Nothing is lost."""
    text = screen.symbols(text)
    if screen.columns is None:
        yield indent + screen.paint(text, colour)
        return
    wrap = textwrap.TextWrapper(
        width=max(20, screen.columns - len(indent)), subsequent_indent="    ", break_on_hyphens=False
    )
    for line in wrap.wrap(text) or [""]:
        yield indent + screen.paint(line, colour)
