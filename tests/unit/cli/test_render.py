"""Texts and numbers for people, and the pictures made of them."""

from __future__ import annotations

import io
from typing import Any

import pytest

from fleetd.cli import render
from fleetd.cli.render import Cell, Column, Screen
from fleetd.cli.views import detail as one_screen
from fleetd.cli.views import tables


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0B"),
        (999, "999B"),
        (1024, "1.0K"),
        (10 * 1024, "10K"),
        (1023 * 1024, "1.0M"),
        (3 * 1024**3, "3.0G"),
        (999 * 1024**3, "999G"),
        (2**50, "1024T"),
        (None, "-"),
        ("x", "-"),
        (True, "-"),
        (10**400, "-"),
        (float("inf"), "-"),
    ],
)
def test_size(count: object, text: str) -> None:
    assert render.size(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0s"),
        (0.25, "250ms"),
        (0.9999, "1.0s"),
        (1.25, "1.2s"),
        (9.96, "10s"),
        (59.6, "1m00s"),
        (310, "5m10s"),
        (3599.9, "1h00m"),
        (10_920, "3h02m"),
        (86_400 * 4 + 3600, "4d1h"),
        (-5.0, "0ms"),
        (-1.7e308, "0ms"),
        (10**400, "-"),
        (float("inf"), "-"),
        (float("nan"), "-"),
        (None, "-"),
    ],
)
def test_duration(seconds: object, text: str) -> None:
    assert render.duration(seconds) == text


@pytest.mark.parametrize(
    ("raw", "safe"),
    [
        ("plain", "plain"),
        ("two\nlines", "two lines"),
        ("a\tb", "a b"),
        ("\x1b[31mred\x1b[0m", "red"),
        ("\x1b]0;title\x07x", "x"),
        ("\x1b]8;;http://evil\x1b\\link\x1b]8;;\x1b\\", "link"),
        ("\x1b", ""),
        ("\x1bPq...\x1b\\x", "x"),
        ("\x9b31m", "?31m"),
        ("a\u202eb", "a?b"),
        ("\udcff", "?"),
        ("\x00\r", "??"),
    ],
)
def test_nothing_from_outside_steers_the_terminal(raw: str, safe: str) -> None:
    assert render.clean(raw) == safe


def test_log_line_keeps_only_colours() -> None:
    assert render.keep_colour("\x1b[1;31mred\x1b[0m \x1b[2Jx\r\x1b]0;t\x07y") == "\x1b[1;31mred\x1b[0m xy"


@pytest.mark.parametrize(
    ("text", "width", "expected"),
    [
        ("abc", 3, "abc"),
        ("abcd", 3, "ab…"),
        ("日本語", 5, "日本…"),
        ("日本語", 4, "日…"),
        ("abc", 1, "…"),
        ("abc", 0, ""),
        ("e\u0301e\u0301", 2, "e\u0301e\u0301"),
    ],
)
def test_shorten(text: str, width: int, expected: str) -> None:
    assert render.shorten(text, width) == expected
    assert render.width_of(expected) <= max(width, 0) or width >= render.width_of(text)


def screen(columns: int | None = None, unicode: bool = True, colour: bool = False) -> tuple[Screen, io.StringIO]:
    out = io.StringIO()
    return Screen(out, colour, columns, unicode), out


COLUMNS = [Column("NAME", shrink=True), Column("LEAST", 1), Column("N", 5, right=True)]


def test_table_in_a_pipe_is_complete() -> None:
    on, out = screen()
    render.table(on, COLUMNS, [["a" * 60, "x", "1"], [Cell("b", "31"), "日本", "22"]])
    lines = out.getvalue().splitlines()
    assert lines[1] == "a" * 60 + "  x       1"
    assert lines[2] == "b" + " " * 59 + "  日本   22"


def test_narrow_table_drops_columns_then_cuts() -> None:
    on, out = screen(columns=24)
    render.table(on, COLUMNS, [["a" * 20, "something", "1"]])
    assert "LEAST" not in out.getvalue()
    assert "a" * 15 + "…" in out.getvalue() or "a" * 20 in out.getvalue()
    assert all(render.width_of(line) <= 24 for line in out.getvalue().splitlines())


def test_colour_does_not_move_columns() -> None:
    plain, plain_out = screen()
    painted, painted_out = screen(colour=True)
    for on in (plain, painted):
        render.table(on, COLUMNS, [[Cell("a", "31"), "x", Cell("1", "32")]])
    uncoloured = painted_out.getvalue()
    for code in ("\x1b[1m", "\x1b[31m", "\x1b[32m", "\x1b[0m"):
        uncoloured = uncoloured.replace(code, "")
    assert uncoloured == plain_out.getvalue()


def status(**daemon: Any) -> dict[str, Any]:
    return {"name": "box", "ready": True, "daemon": {"config": "/f.yaml", **daemon}, "processes": [], "models": []}


@pytest.mark.parametrize(
    ("daemon", "words"),
    [
        (
            {"config_error": "line 3: no"},
            "fleet.yaml has errors and was not applied; the previous configuration stays in force: line 3: no",
        ),
        ({"restart_needed": ["paths.run", "admin"]}, "paths.run, admin of /f.yaml needs a restart of the daemon"),
        ({"stopping": True}, "shutting down"),
    ],
)
def test_warnings(daemon: dict[str, Any], words: str) -> None:
    on, out = screen()
    tables.fleet(on, status(**daemon))
    assert f"warning: {words}" in out.getvalue() or words in out.getvalue()
    quiet, nothing = screen()
    tables.fleet(quiet, status())
    assert "warning" not in nothing.getvalue()
    assert "no processes and no models" in nothing.getvalue()


def test_process_view_shows_why_it_does_not_run() -> None:
    row = {"name": "web", "state": "BACKOFF", "reason": "exit code 1", "next_start_s": 3.2, "kind": "service"}
    assert tables.note_of(row) == "starts in 3.2s: exit code 1"
    on, out = screen()
    crash = {"code": None, "signal": "SIGKILL", "oom": True, "at": "2026-11-22T10:00:00Z", "reason": "killed"}
    detail = {
        "process": {**row, "last_exit": crash},
        "models": [],
        "events": [],
        "log": [],
        "requires": {"/Volumes/B": False, "/srv": True},
        "depends_on": {"db": "ready"},
        "probes": {"readiness": {"ok": False, "detail": "503"}},
        "tree": [{"pid": number, "command": "x"} for number in range(20)],
    }
    one_screen.one_process(on, detail)
    text = out.getvalue()
    for words in ("SIGKILL, out of memory", "/Volumes/B (missing)", "db ready", "Readiness: failed 503", "and 8 more"):
        assert words in text


def test_view_of_a_route_and_a_pinned_model() -> None:
    on, out = screen()
    rows = [
        {"name": "chat", "state": "ABSENT", "routes": [{"to": "coder", "weight": 90}, {"to": "u", "weight": 10}]},
        {"name": "kept", "state": "LOADED", "pinned": True},
        {"name": "always", "state": "LOADED", "ttl_s": 0, "ttl_left_s": None},
    ]
    tables.models(on, rows, wide=True)
    text = out.getvalue()
    assert "-> coder 90, u 10" in text
    assert "pinned" in text
    assert "forever" in text
