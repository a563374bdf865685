"""The result of an import for every field.

Invariants:
- No field is dropped silently: it is mapped, approximated (with the difference), refused, or a warning.
- What `fleetd check` rejects in the result is a problem, and comes first.
- The report contains no secret values; it may be printed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

_NAMED = 6  # places that one line names


class FieldOutcome(StrEnum):
    PROBLEM = "problem"
    MAPPED = "mapped"
    APPROXIMATED = "approximated"
    REFUSED = "refused"
    WARNING = "warning"


@dataclass(frozen=True, slots=True)
class ReportEntry:
    """One field of one subject. `detail` is its new place, the difference, or the reason for leaving it out."""

    outcome: FieldOutcome
    subject: str
    field: str
    detail: str

    @property
    def place(self) -> str:
        """Return the subject and the field as one name; empty: the whole result."""
        return ".".join(part for part in (self.subject, self.field) if part)

    def __str__(self) -> str:
        return f"{self.outcome:<12} {self.place}: {self.detail}" if self.place else f"{self.outcome:<12} {self.detail}"


@dataclass(slots=True)
class Report:
    """All entries, in the order of the source."""

    entries: list[ReportEntry] = field(default_factory=list)

    def mapped(self, subject: str, name: str, detail: str) -> None:
        self.entries.append(ReportEntry(FieldOutcome.MAPPED, subject, name, detail))

    def approximated(self, subject: str, name: str, detail: str) -> None:
        self.entries.append(ReportEntry(FieldOutcome.APPROXIMATED, subject, name, detail))

    def refused(self, subject: str, name: str, detail: str) -> None:
        self.entries.append(ReportEntry(FieldOutcome.REFUSED, subject, name, detail))

    def warn(self, subject: str, name: str, detail: str) -> None:
        self.entries.append(ReportEntry(FieldOutcome.WARNING, subject, name, detail))

    def checked(self, problems: Iterable[str], warnings: Iterable[str]) -> None:
        """Add what a check of the result found."""
        self.entries += [ReportEntry(FieldOutcome.PROBLEM, "", "", text) for text in problems]
        self.entries += [ReportEntry(FieldOutcome.WARNING, "", "", text) for text in warnings]

    @property
    def accepted(self) -> bool:
        """Return whether the check of the result found no problem."""
        return not any(self.of(FieldOutcome.PROBLEM))

    def of(self, outcome: FieldOutcome) -> Iterator[ReportEntry]:
        return (entry for entry in self.entries if entry.outcome is outcome)

    def lines(self) -> list[str]:
        """Return the report as lines: problems, warnings and losses, equal ones as one, then how much was converted."""
        order = (FieldOutcome.PROBLEM, FieldOutcome.WARNING, FieldOutcome.REFUSED, FieldOutcome.APPROXIMATED)
        lines = [line for outcome in order for line in _joined(self.of(outcome))]
        converted = sum(1 for _ in self.of(FieldOutcome.MAPPED))
        return (
            [*lines, f"{FieldOutcome.MAPPED:<12} {converted} {'field' if converted == 1 else 'fields'}"]
            if converted
            else lines
        )


def _joined(entries: Iterable[ReportEntry]) -> Iterator[str]:
    """Yield one line for all entries of the same detail."""
    places: dict[tuple[FieldOutcome, str], list[str]] = {}
    for entry in entries:
        places.setdefault((entry.outcome, entry.detail), []).append(entry.place)
    for (outcome, detail), where in places.items():
        named = ", ".join(dict.fromkeys(where[:_NAMED]))
        more = f" and {len(where) - _NAMED} more" if len(where) > _NAMED else ""
        yield f"{outcome:<12} {named}{more}: {detail}" if named else f"{outcome:<12} {detail}"


@dataclass(frozen=True, slots=True)
class Imported:
    """The result of an import: the text of a fleet.yaml, the same as plain data, and the report."""

    text: str
    data: dict[str, Any]
    report: Report
