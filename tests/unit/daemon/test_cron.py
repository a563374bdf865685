"""Due times of cron schedules over time zones, offset changes, sleep, and clock jumps."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo

import pytest

from fleetd.daemon.sources.cron import CronSchedule, next_due

BERLIN, NEW_YORK, KOLKATA, APIA = (
    ZoneInfo(name) for name in ("Europe/Berlin", "America/New_York", "Asia/Kolkata", "Pacific/Apia")
)


def utc(text: str) -> datetime:
    return datetime.fromisoformat(text).replace(tzinfo=UTC)


@pytest.mark.parametrize(
    ("cron", "zone", "after", "due"),
    [
        ("0 4 * * *", UTC, "2026-03-01T03:59:59", "2026-03-01T04:00:00"),
        ("0 4 * * *", UTC, "2026-03-01T04:00:00", "2026-03-02T04:00:00"),
        ("0 4 * * *", BERLIN, "2026-01-10T00:00:00", "2026-01-10T03:00:00"),
        ("0 4 * * *", BERLIN, "2026-07-10T00:00:00", "2026-07-10T02:00:00"),
        ("0 4 * * *", KOLKATA, "2026-07-10T00:00:00", "2026-07-10T22:30:00"),
        ("*/15 * * * *", KOLKATA, "2026-07-10T00:01:00", "2026-07-10T00:15:00"),
        # The night on which Berlin skips 02:30: due right after the skipped hour, not only on the next night.
        ("30 2 * * *", BERLIN, "2026-03-28T12:00:00", "2026-03-29T01:00:00"),
        ("30 2 * * *", BERLIN, "2026-03-29T01:00:00", "2026-03-30T00:30:00"),
        # The night on which Berlin repeats 02:30: due at the first.
        ("30 2 * * *", BERLIN, "2026-10-24T12:00:00", "2026-10-25T00:30:00"),
        ("30 2 * * *", BERLIN, "2026-10-25T00:30:00", "2026-10-26T01:30:00"),
        ("30 1 * * *", NEW_YORK, "2026-11-01T00:00:00", "2026-11-01T05:30:00"),
        ("30 1 * * *", NEW_YORK, "2026-11-01T05:30:00", "2026-11-02T06:30:00"),
        # An hourly schedule is due every hour across offset changes.
        ("0 * * * *", BERLIN, "2026-03-29T00:00:00", "2026-03-29T01:00:00"),
        ("0 * * * *", BERLIN, "2026-03-29T01:00:00", "2026-03-29T02:00:00"),
        ("0 * * * *", BERLIN, "2026-10-25T00:00:00", "2026-10-25T01:00:00"),
        ("0 * * * *", BERLIN, "2026-10-25T01:00:00", "2026-10-25T02:00:00"),
        # The day that Samoa skipped: due when the next day begins.
        ("0 12 30 12 *", APIA, "2011-12-01T00:00:00", "2011-12-30T10:00:00"),
        ("0 0 29 2 *", UTC, "2026-01-01T00:00:00", "2028-02-29T00:00:00"),
        ("0 4 * * 7", UTC, "2026-11-23T00:00:00", "2026-11-29T04:00:00"),
        ("0 0 31 12 *", UTC, "2026-12-31T00:00:01", "2027-12-31T00:00:00"),
    ],
)
def test_next_due_returns_the_first_time_after(cron: str, zone: ZoneInfo, after: str, due: str) -> None:
    assert next_due(cron, zone, utc(after)) == utc(due)


def run(table: CronSchedule, now: datetime, until: datetime, step: timedelta) -> list[datetime]:
    """Check in steps; return the times at which the schedule was due."""
    found = []
    while now <= until:
        if table.is_due(now):
            found.append(now)
        now += step
    return found


def test_schedule_is_due_once_a_day_over_offset_changes() -> None:
    for day in ("2026-03-28T12:00:00", "2026-10-24T12:00:00"):
        table = CronSchedule("30 2 * * *", BERLIN, utc(day))
        assert len(run(table, utc(day), utc(day) + timedelta(days=2), timedelta(seconds=30))) == 2


def test_schedule_missed_during_sleep_is_due_once() -> None:
    table = CronSchedule("0 * * * *", UTC, utc("2026-05-01T00:30:00"))
    assert not table.is_due(utc("2026-05-01T00:59:59"))
    assert table.is_due(utc("2026-05-01T09:12:00"))
    assert not table.is_due(utc("2026-05-01T09:12:01"))
    assert table.due == utc("2026-05-01T10:00:00")


def test_wait_is_short_and_never_negative() -> None:
    table = CronSchedule("0 4 * * *", UTC, utc("2026-05-01T00:00:00"))
    assert table.wait_s(utc("2026-05-01T00:00:00")) == 30.0
    assert table.wait_s(utc("2026-05-01T03:59:50")) == 10.0
    assert table.wait_s(utc("2026-05-01T05:00:00")) == 0.0


def test_corrected_clock_makes_nothing_due_twice() -> None:
    table = CronSchedule("0 4 * * *", UTC, utc("2026-05-01T03:59:00"))
    assert table.is_due(utc("2026-05-01T04:00:00"))
    assert not table.is_due(utc("2026-05-01T03:59:58"))
    assert not table.is_due(utc("2026-05-01T04:00:01"))


def test_clock_set_back_by_years_restarts_the_schedule() -> None:
    table = CronSchedule("0 4 * * *", UTC, utc("2036-01-01T00:00:00"))
    assert not table.is_due(utc("2026-05-01T00:00:00"))
    assert table.is_due(utc("2026-05-01T04:00:00"))
