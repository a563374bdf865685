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
def test_parse_duration_returns_seconds(text: object, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (10, "invalid duration 10: no unit (try 10s or 10ms)"),
        ("10", "invalid duration '10': no unit (try 10s or 10ms)"),
        ("2.5", "invalid duration '2.5': no unit (try 2.5s or 2.5ms)"),
        ("10sec", "invalid duration '10sec': unknown unit (try 10s)"),
        ("5min", "invalid duration '5min': unknown unit (try 5m)"),
        ("5M", "invalid duration '5M': unknown unit (try 5m)"),
        ("2w", "invalid duration '2w': unknown unit (use ms, s, m, h or d)"),
        ("10GiB", "invalid duration '10GiB': unknown unit (use ms, s, m, h or d)"),
        ("-5s", "invalid duration '-5s': negative (use 0 or more)"),
        ("30m1h", "invalid duration '30m1h': units out of order (each once, from long to short, such as 1h30m)"),
        ("1s1s", "invalid duration '1s1s': units out of order (each once, from long to short, such as 1h30m)"),
        ("", "must be a duration such as 10s or 5m, not an empty string"),
        ("soon", "invalid duration 'soon': not numbers with units (write 250ms, 10s, 5m, 1h30m or 7d)"),
        ("10 s", "invalid duration '10 s': unknown unit (try 10s)"),
        (True, "must be a duration such as 10s or 5m, not true"),
        (None, "must be a duration such as 10s or 5m, not nothing"),
        ([1], "must be a duration such as 10s or 5m, not a list"),
        ("99999d", "invalid duration '99999d': longer than ten years"),
        (float("nan"), "invalid duration nan: no unit (try 10s or 5m)"),
        ("9" * 1000 + "s", f"must be a duration such as 10s or 5m, not '{'9' * 57}...'"),
    ],
)
def test_parse_duration_invalid_value_raises(text: object, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        parse_duration(text)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("text", "size"),
    [("14GiB", 14 * 2**30), ("512MiB", 512 * 2**20), ("16GB", 16 * 10**9), ("10Gi", 10 * 2**30), (1024, 1024), ("1024", 1024),
     ("1.5GiB", 3 * 2**29), ("0B", 0), (0, 0), ("3 GiB", 3 * 2**30), ("1KB", 1000), ("2TiB", 2**41), (1e3, 1000)],
)  # fmt: skip
def test_parse_size_returns_bytes(text: object, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("10G", "invalid size '10G': ambiguous unit (try 10GiB or 10GB)"),
        ("10g", "invalid size '10g': ambiguous unit (try 10GiB or 10GB)"),
        ("512M", "invalid size '512M': ambiguous unit (try 512MiB or 512MB)"),
        ("10gb", "invalid size '10gb': unknown unit (try 10GB)"),
        ("10gib", "invalid size '10gib': unknown unit (try 10GiB)"),
        ("10m5", "invalid size '10m5': not a number with a unit (write 14GiB, 512MiB, 16GB or whole bytes)"),
        ("10s", "invalid size '10s': unknown unit (use B, KiB, MiB, GiB, TiB, KB, MB, GB or TB)"),
        ("85%", "invalid size '85%': a percentage is accepted only for devices.NAME.budget"),
        ("-1GiB", "invalid size '-1GiB': negative (use 0 or more)"),
        (-1, "invalid size -1: negative (use 0 or more)"),
        (1.5, "invalid size 1.5: not a whole number of bytes"),
        ("1.5", "invalid size '1.5': not a whole number of bytes"),
        ("99999999TiB", "invalid size '99999999TiB': more than any machine has"),
        (float("inf"), "invalid size inf: not a whole number of bytes"),
        (10**400, "invalid size a huge number: more than any machine has"),
        (True, "must be a size such as 8GiB or 512MiB, not true"),
        ({}, "must be a size such as 8GiB or 512MiB, not a mapping"),
        ("", "must be a size such as 8GiB or 512MiB, not an empty string"),
        ("much", "invalid size 'much': not a number with a unit (write 14GiB, 512MiB, 16GB or whole bytes)"),
    ],
)
def test_parse_size_invalid_value_raises(text: object, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        parse_size(text)
    assert str(caught.value) == message


@pytest.mark.parametrize(("text", "share"), [("85%", 0.85), ("100%", 1.0), ("0.5 %", 0.005), (" 7% ", 0.07)])
def test_parse_percent_returns_a_fraction(text: str, share: float) -> None:
    assert parse_percent(text) == pytest.approx(share)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0%", "invalid percentage '0%': must be more than 0% and at most 100%"),
        ("101%", "invalid percentage '101%': must be more than 0% and at most 100%"),
        ("85", "invalid percentage '85': not a number with % (write 85%)"),
        (0.85, "must be a percentage such as 85%, not 0.85"),
        ("-5%", "invalid percentage '-5%': not a number with % (write 85%)"),
    ],
)
def test_parse_percent_invalid_value_raises(text: object, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        parse_percent(text)
    assert str(caught.value) == message


@given(st.integers(0, MAX_SIZE_BYTES))
def test_format_size_round_trips(size: int) -> None:
    assert parse_size(format_size(size)) == size


@given(st.integers(0, int(MAX_DURATION_S * 1000)))
def test_format_duration_round_trips(milliseconds: int) -> None:
    assert parse_duration(format_duration(milliseconds / 1000)) == pytest.approx(milliseconds / 1000, abs=1e-6)


@given(st.integers(1, 100_000_000))
def test_format_percent_round_trips(millionths: int) -> None:
    share = millionths / 100_000_000
    assert parse_percent(format_percent(share)) == pytest.approx(share, abs=1e-8)


@given(st.text(max_size=40))
def test_parse_any_text_gives_a_value_or_one_line(text: str) -> None:
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
def test_show_size_rounds(size: int, text: str) -> None:
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
def test_shown_quotes_a_value(value: object, text: str) -> None:
    assert shown(value) == text
