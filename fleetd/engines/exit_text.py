"""Words and rules shared by the engines when they explain why a process exited."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from fleetd.core.data.specs import ExitKind
from fleetd.engines.base import ExitVerdict

LONGEST = 300  # characters of a log line that is quoted

_PREFIX = re.compile(r"^\d+\.\d\d\.\d{3}\.\d{3} [A-Z] (?:(?:srv|slot|main|llama\w*|common\w*) +)?")

Causes = Iterable[tuple[ExitKind, Sequence[str]]]


def from_log(causes: Causes, log_tail: Sequence[str]) -> ExitVerdict | None:
    """Return the first cause with a phrase in a line; quote the last such line."""
    for kind, phrases in causes:
        for line in reversed(log_tail):
            if any(phrase in line.lower() for phrase in phrases):
                return ExitVerdict(kind, plain(line))
    return None


def last_line(log_tail: Sequence[str]) -> str:
    """Return the last line that is not blank, or an empty string."""
    return next((plain(line) for line in reversed(log_tail) if line.strip()), "")


def plain(line: str) -> str:
    """Return a log line without the time, level and component that llama.cpp writes before it."""
    return _PREFIX.sub("", line.strip())[:LONGEST]


def from_status(code: int | None, signal: str | None, reason: str = "") -> ExitVerdict:
    """Return the verdict by status alone; `reason` counts where it is a failure."""
    if code == 0 and signal is None:
        return ExitVerdict(ExitKind.EXPECTED)
    unknown = code is None and signal is None
    return ExitVerdict(ExitKind.UNKNOWN if unknown else ExitKind.CRASH, reason)
