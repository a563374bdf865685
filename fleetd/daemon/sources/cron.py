"""Due times of a cron schedule, for a wall clock that may sleep, jump and change its UTC offset.

Invariants:
- Pure: now is an argument, in UTC. Differences are taken in UTC only: Python subtracts two times of one zone by their
  wall clocks, which is an hour wrong across an offset change.
- Any number of due times missed during sleep of the machine is due once, at the next check.
- A local time that an offset change skips is due right after the change; a repeated one is due once.
- A clock that is set back makes nothing due twice; after a jump back of more than `_SET_BACK` the schedule starts over.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta, tzinfo

from cronsim import CronSim

_SLEEP_S = 30.0  # a suspended machine and a changed clock are noticed within this time
_SET_BACK = timedelta(hours=2)


def next_due(cron: str, zone: tzinfo, after: datetime) -> datetime:
    """Return the next time of a cron expression after `after`, in UTC."""
    found: datetime = next(CronSim(cron, after.astimezone(zone)))
    return found.astimezone(UTC)


class CronSchedule:
    """One schedule, followed from `now` on."""

    def __init__(self, cron: str, zone: tzinfo, now: datetime) -> None:
        self._cron, self._zone = cron, zone
        self._seen = now
        self.due = next_due(cron, zone, now)

    def is_due(self, now: datetime) -> bool:
        """Return whether it is due now; if so, advance to the first time after `now`."""
        if now < self._seen - _SET_BACK:
            self.due = next_due(self._cron, self._zone, now)
        self._seen = now
        if now < self.due:
            return False
        self.due = next_due(self._cron, self._zone, now)
        return True

    def wait_s(self, now: datetime) -> float:
        """Return the seconds until the next check."""
        return min(_SLEEP_S, max(0.0, (self.due - now).total_seconds()))
