"""Text on a terminal or into a pipe: columns, colour, widths, and numbers.

Invariants:
- Colour only where `Screen.colour` is true; no drawn lines or boxes. A pipe gets every column in full.
- External text (names, reasons, log lines) cannot control the terminal: control characters are removed.
- Without UTF-8 every symbol has an ASCII replacement.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import isfinite
from typing import Any, TextIO

RED, GREEN, YELLOW, BLUE, MAGENTA, CYAN, DIM, BOLD = "31", "32", "33", "34", "35", "36", "2", "1"
_EMPTY_RANK = 1000
SHRUNK = 16  # columns that a name keeps while another column can be dropped
PREFIX_COLOURS = (CYAN, YELLOW, GREEN, MAGENTA, BLUE, RED)
STATE_COLOURS = {
    "READY": GREEN,
    "LOADED": GREEN,
    "STARTING": YELLOW,
    "LOADING": YELLOW,
    "UNLOADING": YELLOW,
    "DRAINING": YELLOW,
    "STOPPING": YELLOW,
    "BACKOFF": YELLOW,
    "BLOCKED": YELLOW,
    "ASLEEP": BLUE,
    "UNHEALTHY": RED,
    "FAILED": RED,
    "STOPPED": DIM,
    "EXITED": DIM,
    "ABSENT": DIM,
}
_ASCII = {"↺": "RST", "●": "*", "○": "o", "…": "~", "−": "-", "→": "->", "·": "-", "°": " "}
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\u200e\u200f\u202a-\u202e\u2066-\u2069]")
_ESCAPE = re.compile(
    r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)?|[PX^_][^\x1b]*(?:\x1b\\)?|.)?", re.DOTALL
)
_SGR = re.compile(r"\x1b\[[0-9;:]*m")


def clean(text: object) -> str:
    """Return one line of text without control sequences."""
    line = " ".join(_ESCAPE.sub("", str(text)).replace("\t", " ").split("\n"))
    return _CONTROL.sub("?", line)


def keep_colour(line: str) -> str:
    """Return a log line with its colours and without other control sequences."""
    parts = [_CONTROL.sub("?", part.replace("\r", "")) for part in _outside_colours(line)]
    return "".join(part for pair in zip(parts, [*_SGR.findall(line), ""], strict=True) for part in pair)


def _outside_colours(line: str) -> list[str]:
    return [_ESCAPE.sub("", part).replace("\t", "    ") for part in _SGR.split(line)]


def width_of(text: str) -> int:
    """Return the columns that a text takes on a terminal."""
    if text.isascii():
        return len(text)
    wide = sum(2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text if not unicodedata.combining(c))
    return wide - text.count("\ufe0f") - text.count("\u200d")


def shorten(text: str, width: int, dots: str = "…") -> str:
    """Return the text in at most `width` columns, its end replaced by dots when it was longer."""
    if width_of(text) <= width:
        return text
    if width <= len(dots):
        return dots[:width]
    kept = ""
    for character in text:
        if width_of(kept + character) > width - len(dots):
            break
        kept += character
    return kept + dots


@dataclass
class Screen:
    """The output. `columns` None means a pipe, where nothing is cut. `colour` is decided once, at the start."""

    out: TextIO
    colour: bool = False
    columns: int | None = None
    unicode: bool = True

    def paint(self, text: str, colour: str | None) -> str:
        return f"\x1b[{colour}m{text}\x1b[0m" if self.colour and colour and text else text

    def state(self, state: object) -> str:
        return self.paint(clean(state), STATE_COLOURS.get(str(state)))

    def symbols(self, text: str) -> str:
        if self.unicode:
            return text
        for symbol, stand_in in _ASCII.items():
            text = text.replace(symbol, stand_in)
        return text

    def line(self, text: str = "") -> None:
        """Write a line, cut to the terminal's width. A line that may be too long must not contain colour codes."""
        text = self.symbols(text)
        if self.columns is not None and "\x1b" not in text:
            text = shorten(text, self.columns, "…" if self.unicode else "~")
        self.raw(text)

    def raw(self, text: str) -> None:
        self.out.write(text + "\n")

    def json(self, body: Any, indent: int | None = 2) -> None:
        """Write JSON; escape lone surrogates, and everything when the output is not UTF-8."""
        text = json.dumps(body, indent=indent, ensure_ascii=not self.unicode)
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            text = json.dumps(body, indent=indent)
        self.raw(text)

    def yaml(self, body: Any) -> None:
        import yaml

        dumper = getattr(yaml, "CSafeDumper", yaml.SafeDumper)
        text = yaml.dump(body, Dumper=dumper, sort_keys=False, allow_unicode=self.unicode)
        self.out.write(text.encode("utf-8", "backslashreplace").decode("utf-8"))


def open_screen(color: str, env: Mapping[str, str]) -> Screen:
    """Return the screen for standard output. `color` is auto, always or never; NO_COLOR and TERM=dumb turn auto into never."""
    out = sys.stdout
    terminal = out.isatty()
    colour = color == "always" or (
        color == "auto" and terminal and not env.get("NO_COLOR") and env.get("TERM", "") != "dumb"
    )
    encoding = (out.encoding or "ascii").lower().replace("-", "").replace("_", "")
    if hasattr(out, "reconfigure"):
        out.reconfigure(errors="backslashreplace")
    columns = max(20, shutil.get_terminal_size((80, 24)).columns) if terminal else None
    return Screen(out, colour, columns, encoding == "utf8")


@dataclass(frozen=True)
class Column:
    """One column of a table. On a narrow terminal the lowest `keep` is dropped first; 0 is never dropped.

    `shrink`: cut this column when the remaining ones do not fit.
    """

    title: str
    keep: int = 0
    right: bool = False
    shrink: bool = False


@dataclass(frozen=True)
class Cell:
    text: str
    colour: str | None = None


def table(screen: Screen, columns: Sequence[Column], rows: Iterable[Sequence[Cell | str]], whole: bool = False) -> None:
    """Write a table with two spaces between columns; on a narrow terminal without its least important columns.

    Columns of dashes go first. `whole`: nothing is cut or left out, however wide it is.
    """
    cells = [[cell if isinstance(cell, Cell) else Cell(cell) for cell in row] for row in rows]
    texts = [[screen.symbols(clean(cell.text)) for cell in row] for row in cells]
    titles = [screen.symbols(column.title) for column in columns]
    widths = [max([width_of(title), *(width_of(row[index]) for row in texts)]) for index, title in enumerate(titles)]
    shown = list(range(len(columns))) if whole else _fit(screen, _ranked(columns, texts), widths)

    def put(values: Sequence[str], colours: Sequence[str | None]) -> None:
        parts = []
        for place, index in enumerate(shown):
            text = shorten(values[index], widths[index], "…" if screen.unicode else "~")
            space = " " * (widths[index] - width_of(text))
            if place == len(shown) - 1 and not columns[index].right:
                space = ""
            painted = screen.paint(text, colours[index])
            parts.append(space + painted if columns[index].right else painted + space)
        screen.raw("  ".join(parts).rstrip())

    put(titles, [BOLD] * len(titles))
    for row, values in zip(cells, texts, strict=True):
        put(values, [cell.colour for cell in row])


def _ranked(columns: Sequence[Column], texts: Sequence[Sequence[str]]) -> list[Column]:
    """Return the columns; one that holds only dashes is dropped before any other."""
    empty = [bool(texts) and all(row[index] in ("-", "") for row in texts) for index in range(len(columns))]
    return [
        replace(column, keep=column.keep - _EMPTY_RANK) if column.keep and nothing else column
        for column, nothing in zip(columns, empty, strict=True)
    ]


def _fit(screen: Screen, columns: Sequence[Column], widths: list[int]) -> list[int]:
    """Return the columns that fit, and shrink `widths` of those that may be cut."""
    shown = list(range(len(columns)))
    if screen.columns is None:
        return shown

    def excess() -> int:
        return sum(widths[index] for index in shown) + 2 * (len(shown) - 1) - (screen.columns or 0)

    def spare(index: int) -> int:
        return max(0, widths[index] - SHRUNK) if columns[index].shrink else 0

    while excess() > sum(spare(index) for index in shown):
        removable = [index for index in shown if columns[index].keep]
        if not removable:
            break
        shown.remove(min(removable, key=lambda index: columns[index].keep))
    for index in sorted(shown, key=spare, reverse=True):
        widths[index] -= max(0, min(spare(index), excess()))
    for index in reversed(shown):  # still too wide: cut from the right
        widths[index] -= max(0, min(widths[index] - 3, excess()))
    return shown


# -- numbers -------------------------------------------------------------------------------------------------


def size(count: object) -> str:
    """Return bytes as 1.5G, 512M; `-` for null."""
    value = _finite(count)
    if value is None:
        return "-"
    for unit in ("B", "K", "M", "G", "T"):
        if abs(value) < 1000 or unit == "T":
            return f"{value:.0f}{unit}" if unit == "B" or abs(value) >= 10 else f"{value:.1f}{unit}"
        value /= 1024
    return "-"


def duration(value: object) -> str:
    """Return seconds as 250ms, 1.5s, 42s, 5m10s, 3h02m, 4d1h; `-` for null."""
    seconds = _finite(value)
    if seconds is None:
        return "-"
    if seconds < 0.9995:
        return f"{round(max(0.0, seconds) * 1000)}ms" if seconds else "0s"
    whole = round(seconds)
    if whole < 10:
        return f"{seconds:.1f}s"
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02}s"
    if whole < 86_400:
        return f"{whole // 3600}h{whole % 3600 // 60:02}m"
    return f"{whole // 86_400}d{whole % 86_400 // 3600}h"


def _finite(value: object) -> float | None:
    """Return a finite number; None for everything else that JSON can hold."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return None
    try:
        found = float(value)
    except OverflowError:
        return None
    return found if isfinite(found) else None


def number(value: object, suffix: str = "") -> str:
    """Return a count, or `-` for null."""
    if value is None:
        return "-"
    return f"{value:.1f}{suffix}" if isinstance(value, float) else f"{value}{suffix}"


def clock(moment: object) -> str:
    """Return an RFC 3339 time as local `Nov 22 10:00:00`, or unchanged when it is invalid."""
    from fleetd.control.wire import parse_rfc3339

    if not isinstance(moment, str):
        return "-"
    try:
        from datetime import datetime

        return datetime.fromtimestamp(parse_rfc3339(moment)).astimezone().strftime("%b %d %H:%M:%S")
    except (ValueError, OverflowError, OSError):
        return clean(moment)


def ago(moment: object, now: float) -> str:
    """Return how long ago an RFC 3339 time was; `-` for null."""
    from fleetd.control.wire import parse_rfc3339

    if not isinstance(moment, str):
        return "-"
    try:
        return f"{duration(max(0.0, round(now - parse_rfc3339(moment))))} ago"
    except (ValueError, OverflowError):
        return clean(moment)


def close_stdout() -> None:
    """Redirect standard output to /dev/null: its reader is gone, and Python would report an error at exit."""
    nothing = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nothing, sys.stdout.fileno())
    finally:
        os.close(nothing)
