"""Durations, sizes and percentages: tables of good and bad texts, then round trips."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fleetd.units import (
    MAX_DURATION_S,
    MAX_SIZE_BYTES,
    format_duration,
    format_percent,
    format_size,
    parse_duration,
    parse_percent,
    parse_size,
    show_size,
    shown,
)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("250ms", 0.25), ("10s", 10), ("5m", 300), ("1h30m", 5400), ("7d", 604800), (0, 0), ("0", 0), ("0s", 0), ("1.5s", 1.5),
     ("1d2h3m4s5ms", 93784.005), (" 3s ", 3), (0.0, 0)],
)  # fmt: skip
def test_durations(text: object, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (10, "a duration needs a unit: try 10s or 10ms"),
        ("10", "a duration needs a unit: try 10s or 10ms"),
        ("2.5", "a duration needs a unit: try 2.5s or 2.5ms"),
        ("10sec", "'10sec' has no unit that a duration knows: try 10s"),
        ("5min", "'5min' has no unit that a duration knows: try 5m"),
        ("5M", "'5M' has no unit that a duration knows: try 5m"),
        ("2w", "'2w' has no unit that a duration knows: use ms, s, m, h or d"),
        ("10GiB", "'10GiB' has no unit that a duration knows: use ms, s, m, h or d"),
        ("-5s", "'-5s' is negative: a duration is 0 or more"),
        ("30m1h", "'30m1h' must name its units once each, from long to short, such as 1h30m"),
        ("1s1s", "'1s1s' must name its units once each, from long to short, such as 1h30m"),
        ("", "must be a duration such as 10s or 5m, not an empty string"),
        ("soon", "'soon' is not a duration: write it as 250ms, 10s, 5m, 1h30m or 7d"),
        ("10 s", "'10 s' has no unit that a duration knows: try 10s"),
        (True, "must be a duration such as 10s or 5m, not true"),
        (None, "must be a duration such as 10s or 5m, not nothing"),
        ([1], "must be a duration such as 10s or 5m, not a list"),
        ("99999d", "'99999d' is longer than ten years"),
        (float("nan"), "a duration needs a unit: try 10s or 5m"),
        ("9" * 1000 + "s", f"must be a duration such as 10s or 5m, not '{'9' * 57}...'"),
    ],
)
def test_durations_that_are_refused(text: object, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        parse_duration(text)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("text", "size"),
    [("14GiB", 14 * 2**30), ("512MiB", 512 * 2**20), ("16GB", 16 * 10**9), ("10Gi", 10 * 2**30), (1024, 1024), ("1024", 1024),
     ("1.5GiB", 3 * 2**29), ("0B", 0), (0, 0), ("3 GiB", 3 * 2**30), ("1KB", 1000), ("2TiB", 2**41), (1e3, 1000)],
)  # fmt: skip
def test_sizes(text: object, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("10G", "'10G' is ambiguous: try 10GiB or 10GB"),
        ("10g", "'10g' is ambiguous: try 10GiB or 10GB"),
        ("512M", "'512M' is ambiguous: try 512MiB or 512MB"),
        ("10gb", "'10gb' has no unit that a size knows: try 10GB"),
        ("10gib", "'10gib' has no unit that a size knows: try 10GiB"),
        ("10m5", "'10m5' is not a size: write it as 14GiB, 512MiB, 16GB or whole bytes"),
        ("10s", "'10s' has no unit that a size knows: use B, KiB, MiB, GiB, TiB, KB, MB, GB or TB"),
        ("85%", "'85%': a percentage can only be used for devices.NAME.budget, where a device total is the base"),
        ("-1GiB", "'-1GiB' is negative: a size is 0 or more"),
        (-1, "-1 is negative: a size is 0 or more"),
        (1.5, "1.5 is not a whole number of bytes"),
        ("1.5", "'1.5' is not a whole number of bytes"),
        ("99999999TiB", "'99999999TiB' is more than any machine has"),
        (float("inf"), "inf is not a whole number of bytes"),
        (10**400, "a huge number is more than any machine has"),
        (True, "must be a size such as 8GiB or 512MiB, not true"),
        ({}, "must be a size such as 8GiB or 512MiB, not a mapping"),
        ("", "must be a size such as 8GiB or 512MiB, not an empty string"),
        ("much", "'much' is not a size: write it as 14GiB, 512MiB, 16GB or whole bytes"),
    ],
)
def test_sizes_that_are_refused(text: object, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        parse_size(text)
    assert str(caught.value) == message


@pytest.mark.parametrize(("text", "share"), [("85%", 0.85), ("100%", 1.0), ("0.5 %", 0.005), (" 7% ", 0.07)])
def test_percentages(text: str, share: float) -> None:
    assert parse_percent(text) == pytest.approx(share)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0%", "'0%' must be more than 0% and at most 100%"),
        ("101%", "'101%' must be more than 0% and at most 100%"),
        ("85", "'85' is not a percentage: write it as 85%"),
        (0.85, "must be a percentage such as 85%, not 0.85"),
        ("-5%", "'-5%' is not a percentage: write it as 85%"),
    ],
)
def test_percentages_that_are_refused(text: object, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        parse_percent(text)
    assert str(caught.value) == message


@given(st.integers(0, MAX_SIZE_BYTES))
def test_a_size_survives_printing(size: int) -> None:
    assert parse_size(format_size(size)) == size


@given(st.integers(0, int(MAX_DURATION_S * 1000)))
def test_a_duration_survives_printing(milliseconds: int) -> None:
    assert parse_duration(format_duration(milliseconds / 1000)) == pytest.approx(milliseconds / 1000, abs=1e-6)


@given(st.integers(1, 100_000_000))
def test_a_percentage_survives_printing(millionths: int) -> None:
    share = millionths / 100_000_000
    assert parse_percent(format_percent(share)) == pytest.approx(share, abs=1e-8)


@given(st.text(max_size=40))
def test_any_text_is_read_or_refused_in_one_line(text: str) -> None:
    for read in (parse_duration, parse_size, parse_percent):
        message = ""
        try:
            assert read(text) >= 0
        except ValueError as error:
            message = str(error)
        assert "\n" not in message
        assert len(message) < 300


@pytest.mark.parametrize(
    ("size", "text"),
    [(3 * 2**29, "1.50 GiB"), (2**30, "1.00 GiB"), (100, "100 B"), (10 * 2**30 + 1, "10.00 GiB"), (0, "0 B")],
)
def test_sizes_for_people(size: int, text: str) -> None:
    assert show_size(size) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("a" * 70, repr("a" * 57 + "...")),
        (None, "nothing"),
        (False, "false"),
        (3, "3"),
        ({}, "a mapping"),
        (object(), "something else"),
    ],
)
def test_values_as_messages_quote_them(value: object, text: str) -> None:
    assert shown(value) == text
