"""Durations, sizes, percentages and home folders as people write them, and back.

Invariants:
- Pure text and numbers. Every mistake is a `ValueError` whose text is one sentence a person can act on.
- Durations are seconds (float), sizes are bytes (int), percentages are fractions of one (float).
- A unit is never guessed: a bare number other than 0 is not a duration, and `10G` is neither 10GiB nor 10GB.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from pathlib import Path

MAX_SIZE_BYTES = 2**63 - 1
MAX_DURATION_S = 10 * 365 * 86400.0

_LONGEST_TEXT = 64
_UNIT_S = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_UNIT_NAMES = {
    "ns": "ms", "us": "ms", "msec": "ms", "sec": "s", "secs": "s", "second": "s", "seconds": "s", "min": "m", "mins": "m",
    "minute": "m", "minutes": "m", "hr": "h", "hrs": "h", "hour": "h", "hours": "h", "day": "d", "days": "d", "w": "d",
}  # fmt: skip
_PART = re.compile(r"(\d+(?:\.\d+)?)(ms|s|m|h|d)")
_NUMBER_AND_WORD = re.compile(r"([-+]?\d+(?:\.\d+)?)\s*([A-Za-z%]*)")
_DECIMAL = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_BINARY = {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
_SIZE_UNITS = {"B": 1, **_DECIMAL, **_BINARY, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}
_SIZE_SPELLING = {unit.lower(): unit for unit in _SIZE_UNITS}


def shown(value: object) -> str:
    """Return a value as a message quotes it: short, one line, containers by kind."""
    if isinstance(value, str):
        cut = value if len(value) <= 60 else value[:57] + "..."
        return repr(cut)
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return str(value) if not isinstance(value, int) or abs(value) < 10**30 else "a huge number"
    return "a mapping" if isinstance(value, dict) else "a list" if isinstance(value, list | tuple) else "something else"


def parse_duration(value: object) -> float:
    """Return seconds from `250ms`, `10s`, `5m`, `1h30m`, `7d` or 0. Raises ValueError."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError(f"must be a duration such as 10s or 5m, not {shown(value)}")
    if isinstance(value, int | float):
        if value == 0:
            return 0.0
        raise ValueError(f"invalid duration {shown(value)}: no unit (try {_with_unit(value)})")
    text = value.strip()
    if text in ("0", "0.0"):
        return 0.0
    if len(text) > _LONGEST_TEXT:
        raise ValueError(f"must be a duration such as 10s or 5m, not {shown(text)}")
    return _sum_of_parts(text)


def _with_unit(value: int | float) -> str:
    if not math.isfinite(value) or value < 0 or value > MAX_DURATION_S:
        return "10s or 5m"
    number = str(value)
    return f"{number}s or {number}ms"


def _sum_of_parts(text: str) -> float:
    position, total, smallest = 0, 0.0, math.inf
    while position < len(text):
        part = _PART.match(text, position)
        if part is None:
            raise ValueError(_duration_mistake(text))
        unit_s = _UNIT_S[part[2]]
        if unit_s >= smallest:
            raise ValueError(
                f"invalid duration {shown(text)}: units out of order (each once, from long to short, such as 1h30m)"
            )
        smallest, total, position = unit_s, total + float(part[1]) * unit_s, part.end()
    if position == 0:
        raise ValueError("must be a duration such as 10s or 5m, not an empty string")
    if total > MAX_DURATION_S:
        raise ValueError(f"invalid duration {shown(text)}: longer than ten years")
    return round(total, 6)


def _duration_mistake(text: str) -> str:
    found = _NUMBER_AND_WORD.fullmatch(text)
    if found is None:
        return f"invalid duration {shown(text)}: not numbers with units (write 250ms, 10s, 5m, 1h30m or 7d)"
    number, word = found[1], found[2]
    if number.startswith("-"):
        return f"invalid duration {shown(text)}: negative (use 0 or more)"
    if not word:
        return f"invalid duration {shown(text)}: no unit (try {number}s or {number}ms)"
    lower = word.lower()
    unit = lower if lower in _UNIT_S else _UNIT_NAMES.get(lower)
    hint = f"try {number}{unit}" if unit and lower not in ("ns", "us", "w") else "use ms, s, m, h or d"
    return f"invalid duration {shown(text)}: unknown unit ({hint})"


def format_duration(seconds: float) -> str:
    """Return the shortest text that `parse_duration` reads back: 5400.0 gives 1h30m."""
    if seconds <= 0:
        return "0s"
    left_ms = round(seconds * 1000)
    if abs(left_ms - seconds * 1000) > 1e-6 or left_ms == 0:
        exact = f"{seconds * 1000:.3f}".rstrip("0").rstrip(".")
        return f"{exact}ms"
    parts = []
    for unit, unit_ms in (("d", 86_400_000), ("h", 3_600_000), ("m", 60_000), ("s", 1000), ("ms", 1)):
        count, left_ms = divmod(left_ms, unit_ms)
        if count:
            parts.append(f"{count}{unit}")
    return "".join(parts)


def parse_size(value: object) -> int:
    """Return bytes from `14GiB`, `16GB` (decimal), `10Gi`, 1024. Raises ValueError."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError(f"must be a size such as 8GiB or 512MiB, not {shown(value)}")
    if isinstance(value, int | float):
        return _checked_bytes(value, value)
    text = value.strip()
    if not text:
        raise ValueError("must be a size such as 8GiB or 512MiB, not an empty string")
    found = _NUMBER_AND_WORD.fullmatch(text) if len(text) <= _LONGEST_TEXT else None
    if found is None:
        raise ValueError(
            f"invalid size {shown(text)}: not a number with a unit (write 14GiB, 512MiB, 16GB or whole bytes)"
        )
    number, unit = found[1], found[2]
    if not unit:
        return _checked_bytes(_number(number), text)
    if unit not in _SIZE_UNITS:
        raise ValueError(_size_mistake(text, number, unit))
    return _checked_bytes(_scaled(number, _SIZE_UNITS[unit]), text)


def _number(number: str) -> int | float:
    return float(number) if "." in number else int(number)


def _scaled(number: str, factor: int) -> int | float:
    """Exact for whole numbers; a fraction such as 1.5GiB is rounded to a byte."""
    return round(float(number) * factor) if "." in number else int(number) * factor


def _size_mistake(text: str, number: str, unit: str) -> str:
    if unit == "%":
        return f"invalid size {shown(text)}: a percentage is accepted only for devices.NAME.budget"
    if unit.upper() in ("K", "M", "G", "T"):
        letter = unit.upper()
        return f"invalid size {shown(text)}: ambiguous unit (try {number}{letter}iB or {number}{letter}B)"
    spelling = _SIZE_SPELLING.get(unit.lower())
    hint = f"try {number}{spelling}" if spelling else "use B, KiB, MiB, GiB, TiB, KB, MB, GB or TB"
    return f"invalid size {shown(text)}: unknown unit ({hint})"


def _checked_bytes(count: int | float, source: object) -> int:
    if isinstance(count, float) and not (math.isfinite(count) and count == int(count)):
        raise ValueError(f"invalid size {shown(source)}: not a whole number of bytes")
    if count < 0:
        raise ValueError(f"invalid size {shown(source)}: negative (use 0 or more)")
    if count > MAX_SIZE_BYTES:
        raise ValueError(f"invalid size {shown(source)}: more than any machine has")
    return int(count)


def format_size(size_bytes: int) -> str:
    """Return an exact text that `parse_size` reads back: 1000 gives 1KB."""
    if size_bytes == 0:
        return "0B"
    for units in (_BINARY, _DECIMAL):
        for unit, factor in sorted(units.items(), key=lambda item: -item[1]):
            if size_bytes % factor == 0:
                return f"{size_bytes // factor}{unit}"
    return f"{size_bytes}B"


def show_size(size_bytes: int) -> str:
    """Return a rounded size for messages: 1610612736 gives 1.50 GiB."""
    for unit, decimals in (("GiB", 2), ("MiB", 1), ("KiB", 1)):
        if size_bytes >= _BINARY[unit]:
            return f"{size_bytes / _BINARY[unit]:.{decimals}f} {unit}"
    return f"{size_bytes} B"


def parse_percent(value: object) -> float:
    """Return a fraction from `85%`: more than 0, at most 1. Raises ValueError."""
    if not isinstance(value, str):
        raise ValueError(f"must be a percentage such as 85%, not {shown(value)}")
    found = re.fullmatch(r"(\d{1,3}(?:\.\d{1,6})?)\s*%", value.strip())
    if found is None:
        raise ValueError(f"invalid percentage {shown(value)}: not a number with % (write 85%)")
    fraction = float(found[1]) / 100
    if not 0 < fraction <= 1:
        raise ValueError(f"invalid percentage {shown(value)}: must be more than 0% and at most 100%")
    return fraction


def format_percent(fraction: float) -> str:
    """Return `85%` for 0.85."""
    return f"{fraction * 100:.6f}".rstrip("0").rstrip(".") + "%"


def expand_home(text: str) -> str:
    """Return a path with `~` or `~user` expanded, unchanged without such a home."""
    try:
        return str(Path(text).expanduser()) if text.startswith("~") else text
    except RuntimeError:
        return text


def counted(count: int, noun: str, plural: str = "s") -> str:
    """Return a number with its noun: `1 process`, `2 processes` (with `es`)."""
    return f"{count} {noun}{'' if count == 1 else plural}"


def listed(names: Iterable[str], most: int = 3) -> str:
    """Return the first names and how many more there are: `a, b, c and 2 more`."""
    every = list(names)
    more = f" and {len(every) - most} more" if len(every) > most else ""
    return ", ".join(every[:most]) + more
