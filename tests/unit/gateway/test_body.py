"""Parsing `model` and `stream`, and renaming the model: both parsers agree, and nothing else changes."""

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
def test_body_parse_and_scan_agree_and_rename_changes_one_value(
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
    for fields in (expected, scanned):
        renamed = orjson.loads(bodies.rename_model(data, fields, served))
        assert renamed == {**orjson.loads(data), "model": served}


@given(st.binary(max_size=60) | st.text('{}[]":,\\ modelstream01', max_size=60).map(str.encode))
def test_body_any_bytes_are_parsed_or_rejected(data: bytes) -> None:
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
def test_body_truncated_json_is_rejected(data: bytes) -> None:
    for way in (bodies.parse, bodies.scan):
        with pytest.raises(ApiError):
            way(data)


def test_body_duplicate_model_key_last_counts_and_is_renamed() -> None:
    data = b'{"model":"a","x":1,"model":"b"}'
    for fields in (bodies.parse(data), bodies.scan(data)):
        assert fields.model == "b"
        assert orjson.loads(bodies.rename_model(data, fields, "c"))["model"] == "c"
