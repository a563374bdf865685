"""When schedules are due: tables over zones, changes of their offset, sleep, and clocks that jump. And the flap guard."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo

import pytest

from fleetd.daemon.sources.cron import Timetable, next_due
from fleetd.daemon.sources.flapping import FlapGuard

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
        # The night on which Berlin has no 02:30: it is due as soon as there is a time again, and not on the next night only.
        ("30 2 * * *", BERLIN, "2026-03-28T12:00:00", "2026-03-29T01:00:00"),
        ("30 2 * * *", BERLIN, "2026-03-29T01:00:00", "2026-03-30T00:30:00"),
        # The night on which it has two: due at the first.
        ("30 2 * * *", BERLIN, "2026-10-24T12:00:00", "2026-10-25T00:30:00"),
        ("30 2 * * *", BERLIN, "2026-10-25T00:30:00", "2026-10-26T01:30:00"),
        ("30 1 * * *", NEW_YORK, "2026-11-01T00:00:00", "2026-11-01T05:30:00"),
        ("30 1 * * *", NEW_YORK, "2026-11-01T05:30:00", "2026-11-02T06:30:00"),
        # Every hour is every hour, whatever the clocks on the wall do.
        ("0 * * * *", BERLIN, "2026-03-29T00:00:00", "2026-03-29T01:00:00"),
        ("0 * * * *", BERLIN, "2026-03-29T01:00:00", "2026-03-29T02:00:00"),
        ("0 * * * *", BERLIN, "2026-10-25T00:00:00", "2026-10-25T01:00:00"),
        ("0 * * * *", BERLIN, "2026-10-25T01:00:00", "2026-10-25T02:00:00"),
        # The day that Samoa left out: due when the next one begins.
        ("0 12 30 12 *", APIA, "2011-12-01T00:00:00", "2011-12-30T10:00:00"),
        ("0 0 29 2 *", UTC, "2026-01-01T00:00:00", "2028-02-29T00:00:00"),
        ("0 4 * * 7", UTC, "2026-11-23T00:00:00", "2026-11-29T04:00:00"),
        ("0 0 31 12 *", UTC, "2026-12-31T00:00:01", "2027-12-31T00:00:00"),
    ],
)
def test_next_due(cron: str, zone: ZoneInfo, after: str, due: str) -> None:
    assert next_due(cron, zone, utc(after)) == utc(due)


def run(table: Timetable, now: datetime, until: datetime, step: timedelta) -> list[datetime]:
    """Look again and again; return when it was due."""
    found = []
    while now <= until:
        if table.look(now):
            found.append(now)
        now += step
    return found


def test_a_day_has_one_restart_over_both_changes_of_the_offset() -> None:
    for day in ("2026-03-28T12:00:00", "2026-10-24T12:00:00"):
        table = Timetable("30 2 * * *", BERLIN, utc(day))
        assert len(run(table, utc(day), utc(day) + timedelta(days=2), timedelta(seconds=30))) == 2


def test_what_was_missed_in_sleep_is_due_once() -> None:
    table = Timetable("0 * * * *", UTC, utc("2026-05-01T00:30:00"))
    assert not table.look(utc("2026-05-01T00:59:59"))
    assert table.look(utc("2026-05-01T09:12:00"))
    assert not table.look(utc("2026-05-01T09:12:01"))
    assert table.due == utc("2026-05-01T10:00:00")


def test_it_waits_in_small_steps_and_never_less_than_nothing() -> None:
    table = Timetable("0 4 * * *", UTC, utc("2026-05-01T00:00:00"))
    assert table.wait_s(utc("2026-05-01T00:00:00")) == 30.0
    assert table.wait_s(utc("2026-05-01T03:59:50")) == 10.0
    assert table.wait_s(utc("2026-05-01T05:00:00")) == 0.0


def test_a_clock_that_is_corrected_makes_nothing_due_twice() -> None:
    table = Timetable("0 4 * * *", UTC, utc("2026-05-01T03:59:00"))
    assert table.look(utc("2026-05-01T04:00:00"))
    assert not table.look(utc("2026-05-01T03:59:58"))
    assert not table.look(utc("2026-05-01T04:00:01"))


def test_a_clock_that_was_wrong_by_years_is_believed_anew() -> None:
    table = Timetable("0 4 * * *", UTC, utc("2036-01-01T00:00:00"))
    assert not table.look(utc("2026-05-01T00:00:00"))
    assert table.look(utc("2026-05-01T04:00:00"))


def test_the_guard_lets_so_many_through_in_its_window() -> None:
    guard = FlapGuard(3, 10.0)
    assert [guard.passes(now) for now in (0.0, 1.0, 2.0, 3.0, 9.9, 10.0, 10.5, 11.0, 12.0)] == [
        True, True, True, False, False, True, False, True, True,
    ]  # fmt: skip
