"""What the doctor says: one verdict per check, with the command that helps."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import StrEnum

from fleetd.setup.doctor.facts import Facts


class Severity(StrEnum):
    """FAIL: the fleet, or a part of it, cannot run as it is. WARN: it runs, with a risk."""

    PASS = "PASS"  # noqa: S105 (a verdict, not a secret)
    WARN = "WARN"
    FAIL = "FAIL"


@dataclass(frozen=True, slots=True)
class Finding:
    """One line. `check` is a stable name; `fix` is a command to type, or the key to change."""

    check: str
    verdict: Severity
    text: str
    fix: str | None = None


Check = Callable[[Facts], Iterable[Finding]]


def passed(check: str, text: str) -> Finding:
    return Finding(check, Severity.PASS, text)


def warned(check: str, text: str, fix: str) -> Finding:
    return Finding(check, Severity.WARN, text, fix)


def failed(check: str, text: str, fix: str) -> Finding:
    return Finding(check, Severity.FAIL, text, fix)
