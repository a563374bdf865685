"""When a schedule is due, by a wall clock that may sleep, jump and change its offset.

The rules of this file
- Pure: now is an argument, in UTC. Differences are taken in UTC alone: two times of one zone differ by their wall clocks
  in Python, which is an hour wrong over a change of its offset.
- What was missed, however often, while the machine slept is due once, as soon as it is seen.
- A time that a change of the offset skips is due right after it; one that it repeats is due once.
- A clock that is set back makes nothing due twice; one that was wrong by far is believed anew.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta, tzinfo

from cronsim import CronSim

_SLEEP_S = 30.0  # a suspended machine and a changed clock are noticed within this time
_SET_BACK = timedelta(hours=2)


def next_due(cron: str, zone: tzinfo, after: datetime) -> datetime:
    """Return the first time after `after` that five fields of cron name in a zone, in UTC."""
    found: datetime = next(CronSim(cron, after.astimezone(zone)))
    return found.astimezone(UTC)


class Timetable:
    """One schedule, followed from `now` on."""

    def __init__(self, cron: str, zone: tzinfo, now: datetime) -> None:
        self._cron, self._zone = cron, zone
        self._seen = now
        self.due = next_due(cron, zone, now)

    def look(self, now: datetime) -> bool:
        """Return whether it is due now; if so, the next time is the first one after this."""
        if now < self._seen - _SET_BACK:
            self.due = next_due(self._cron, self._zone, now)
        self._seen = now
        if now < self.due:
            return False
        self.due = next_due(self._cron, self._zone, now)
        return True

    def wait_s(self, now: datetime) -> float:
        """Return how long to wait before looking again."""
        return min(_SLEEP_S, max(0.0, (self.due - now).total_seconds()))
