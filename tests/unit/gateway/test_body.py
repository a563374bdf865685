"""Reading `model` and `stream`, and writing another name: both ways of reading agree, and nothing else changes."""

from __future__ import annotations

import contextlib
import json
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fleetd.errors import ApiError
from fleetd.gateway import body as bodies

NAMES = st.text(st.characters(categories=("L", "N", "P", "S")), min_size=1, max_size=20)
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**53), 2**53)
    | st.text(max_size=20)
    | st.sampled_from(['"', "\\", '\\"', "{", "]", "model"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4),
    max_leaves=20,
)


def documents() -> st.SearchStrategy[dict[str, Any]]:
    keys = st.text(max_size=8).filter(lambda key: key.lower() not in ("model", "stream"))
    return st.dictionaries(keys, VALUES, max_size=6)


def written(document: dict[str, Any], spaces: bool, ascii_only: bool) -> bytes:
    return json.dumps(document, indent=1 if spaces else None, ensure_ascii=ascii_only).encode("utf-8", "surrogatepass")


@given(documents(), documents(), NAMES, NAMES, st.booleans(), st.booleans(), st.booleans())
def test_both_readings_agree_and_renaming_changes_one_value(
    before: dict[str, Any], after: dict[str, Any], model: str, served: str, stream: bool, spaces: bool, ascii_only: bool
) -> None:
    document = {**before, "model": model, "stream": stream, **after, "nested": [{"model": model, "stream": True}]}
    data = written(document, spaces, ascii_only)
    try:
        expected = bodies.parse(data)
    except ApiError:
        return
    scanned = bodies.scan(data)
    assert scanned[:2] == expected[:2] == (model, stream)
    assert scanned.span is not None
    assert orjson.loads(data[slice(*scanned.span)]) == model
    for asked in (expected, scanned):
        renamed = orjson.loads(bodies.rename_model(data, asked, served))
        assert renamed == {**orjson.loads(data), "model": served}


@given(st.binary(max_size=60) | st.text('{}[]":,\\ modelstream01', max_size=60).map(str.encode))
def test_any_bytes_are_read_or_refused(data: bytes) -> None:
    for way in (bodies.parse, bodies.scan):
        with contextlib.suppress(ApiError):  # anything else is a failure
            assert way(data).model


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{",
        b'{"',
        b'{"model',
        b'{"model"',
        b'{"model":',
        b'{"model":"m',
        b'{"model":"m"',
        b'{"model":"m",',
        b'{"a":[',
        b'{"a":{"b":"',
        b"[]",
        b"1",
    ],
)
def test_what_does_not_end_is_refused(data: bytes) -> None:
    for way in (bodies.parse, bodies.scan):
        with pytest.raises(ApiError):
            way(data)


def test_the_last_of_equal_keys_counts_and_is_renamed() -> None:
    data = b'{"model":"a","x":1,"model":"b"}'
    for asked in (bodies.parse(data), bodies.scan(data)):
        assert asked.model == "b"
        assert orjson.loads(bodies.rename_model(data, asked, "c"))["model"] == "c"
