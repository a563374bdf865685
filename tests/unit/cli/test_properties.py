"""Whatever the texts are: widths hold, nothing steers the terminal, and a stream arrives as it was sent."""

from __future__ import annotations

import io
import re
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from fleetd.cli import client, render
from fleetd.cli.render import Column, Screen
from fleetd.cli.views import tables
from fleetd.control import sse, wire

ANY_TEXT = st.text(st.characters(), max_size=60)
STEERING = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**53), 2**53)
    | st.floats(allow_nan=False, allow_infinity=False)
    | ANY_TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(ANY_TEXT, inner, max_size=4),
    max_leaves=12,
)


@given(ANY_TEXT)
def test_clean_text_steers_nothing(text: str) -> None:
    cleaned = render.clean(text)
    assert not STEERING.search(cleaned)
    assert "\n" not in cleaned
    assert render.clean(cleaned) == cleaned


@given(ANY_TEXT)
def test_coloured_line_keeps_only_colours(text: str) -> None:
    kept = re.sub(r"\x1b\[[0-9;:]*m", "", render.keep_colour(text + "\x1b[31mx\x1b[2J" + text))
    assert not STEERING.search(kept.replace("\n", ""))


@given(ANY_TEXT, st.integers(0, 40))
def test_shortened_text_fits(text: str, width: int) -> None:
    text = render.clean(text)
    assert render.width_of(render.shorten(text, width)) <= max(width, 0)


@given(
    st.lists(st.tuples(ANY_TEXT, ANY_TEXT, ANY_TEXT), max_size=5),
    st.integers(20, 120),
    st.booleans(),
)
def test_tables_fit(rows: list[tuple[str, str, str]], columns: int, unicode: bool) -> None:
    out = io.StringIO()
    screen = Screen(out, columns=columns, unicode=unicode)
    render.table(screen, [Column("A", shrink=True), Column("B", 1), Column("C", 2, right=True)], rows)
    lines = out.getvalue().split("\n")[:-1]
    assert len(lines) == len(rows) + 1
    assert all(render.width_of(line) <= columns for line in lines)


@settings(max_examples=60)
@given(st.lists(st.dictionaries(ANY_TEXT.filter(lambda key: key != "schema"), JSON, max_size=4), max_size=4))
def test_stream_arrives_unchanged(documents: list[dict[str, Any]]) -> None:
    raw = b": fleetctl/v1\n\n"
    for number, document in enumerate(documents):
        raw += sse._frame("event", wire.document(document), number) + b": ping\n\n"
    raw += sse._frame("end", wire.document({}))
    assert list(client._events(raw.split(b"\n"))) == [wire.document(document) for document in documents]


@given(st.dictionaries(st.sampled_from(["name", "state", "reason", "next_start_s", "pid", "uptime_s", "port"]), JSON))
def test_any_row_of_a_later_daemon_can_be_drawn(row: dict[str, Any]) -> None:
    if not isinstance(row.get("next_start_s"), str | list | dict):
        tables.processes(Screen(io.StringIO(), columns=60), [row], wide=True)


@given(st.floats(0, 4e9))
def test_times_come_back(moment: float) -> None:
    text = wire.rfc3339(moment)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", text)
    assert abs(wire.parse_rfc3339(text) - moment) < 0.001
