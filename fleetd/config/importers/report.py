"""What an import did with every field it found.

The rules of this file
- Nothing is lost in silence: a field is mapped, approximated (and the difference said), refused, or a warning is given.
- The report holds no secret values; it may be printed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any


class Outcome(StrEnum):
    MAPPED = "mapped"
    APPROXIMATED = "approximated"
    REFUSED = "refused"
    WARNING = "warning"


@dataclass(frozen=True, slots=True)
class Entry:
    """One field of one subject. `detail` says where it went, how it differs, or why it was left out."""

    outcome: Outcome
    subject: str
    field: str
    detail: str

    def __str__(self) -> str:
        where = ".".join(part for part in (self.subject, self.field) if part)
        return f"{self.outcome:<12} {where}: {self.detail}"


@dataclass(slots=True)
class Report:
    """All entries, in the order of the source."""

    entries: list[Entry] = field(default_factory=list)

    def mapped(self, subject: str, name: str, detail: str) -> None:
        self.entries.append(Entry(Outcome.MAPPED, subject, name, detail))

    def approximated(self, subject: str, name: str, detail: str) -> None:
        self.entries.append(Entry(Outcome.APPROXIMATED, subject, name, detail))

    def refused(self, subject: str, name: str, detail: str) -> None:
        self.entries.append(Entry(Outcome.REFUSED, subject, name, detail))

    def warn(self, subject: str, name: str, detail: str) -> None:
        self.entries.append(Entry(Outcome.WARNING, subject, name, detail))

    def of(self, outcome: Outcome) -> Iterator[Entry]:
        return (entry for entry in self.entries if entry.outcome is outcome)

    def lines(self) -> list[str]:
        """Return the report for a person: warnings and losses first, then a count of what was carried over."""
        order = (Outcome.WARNING, Outcome.REFUSED, Outcome.APPROXIMATED, Outcome.MAPPED)
        return [str(entry) for outcome in order for entry in self.of(outcome)]


@dataclass(frozen=True, slots=True)
class Imported:
    """The result of an import: the text of a fleet.yaml, the same as plain data, and the report."""

    text: str
    data: dict[str, Any]
    report: Report
