"""Turn single probe results into a verdict.

Invariants:
- A verdict changes after `failures` bad results in a row, or `successes` good ones.
- The verdict decides nothing: startup gates the other probes, readiness routes, liveness restarts.
"""

from __future__ import annotations

from dataclasses import dataclass

from fleetd.core.data.specs import ProbeSpec


@dataclass(slots=True)
class Verdict:
    """The current verdict of one probe of one generation."""

    good: bool | None = None  # None: no verdict yet
    streak: int = 0  # equal results in a row
    last_ok: bool | None = None
    detail: str = ""

    def reset(self) -> None:
        self.good, self.streak, self.last_ok, self.detail = None, 0, None, ""

    def refute(self, detail: str) -> None:
        """Make the verdict bad after a refused connection; the next result counts."""
        self.good, self.streak, self.last_ok, self.detail = False, 0, False, detail

    def add(self, spec: ProbeSpec, ok: bool, detail: str) -> bool:
        """Count one result; return whether the verdict changed."""
        self.streak = self.streak + 1 if ok is self.last_ok else 1
        self.last_ok, self.detail = ok, detail
        needed = spec.successes if ok else spec.failures
        if self.streak < needed or self.good is ok:
            return False
        self.good = ok
        return True
