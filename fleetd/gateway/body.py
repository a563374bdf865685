"""Read `model` and `stream` from a JSON body, and replace the model's name.

Invariants:
- A body is forwarded byte for byte. If the engine knows the model by another name, that one value is replaced in place.
- Of duplicate keys the last counts, as in every engine. Go reads `MODEL` as `model` and others do not: that is rejected.
- A large body is not turned into objects (that would delay every other stream): its top level is scanned in a thread.
"""

from __future__ import annotations

import re
from typing import Final, NamedTuple

import orjson

from fleetd.errors import ApiError
from fleetd.gateway.errors import invalid_request

LARGE_BYTES: Final = 1024 * 1024  # parsed in a thread from this size
MAX_MODEL_CHARS: Final = 512

_MODEL_KEY = re.compile(rb'"model"\s*:\s*("(?:[^"\\]|\\.)*")')
_STRUCTURE = re.compile(rb'["\[\]{}]')
_TOP = re.compile(rb'["\[\]{},:]')
# A run of short strings and the bytes between them, bounded so that no single match blocks other threads for long. Nothing
# follows the run, so it never backtracks; possessive quantifiers would enforce that, but are broken before Python 3.11.4.
_RUN = re.compile(rb'(?:[^"\[\]{}]+|"(?:[^"\\]|\\.){0,256}"){1,1000}', re.DOTALL)
_SPACE = b" \t\r\n"


_USUAL_KEYS = frozenset(
    {
        "dimensions",
        "encoding_format",
        "frequency_penalty",
        "input",
        "logit_bias",
        "max_completion_tokens",
        "max_tokens",
        "messages",
        "model",
        "n",
        "presence_penalty",
        "prompt",
        "reasoning_effort",
        "response_format",
        "seed",
        "stop",
        "stream",
        "stream_options",
        "temperature",
        "tool_choice",
        "tools",
        "top_p",
        "user",
    }
)


class BodyFields(NamedTuple):
    """The fields that the gateway reads; `span`: position of the value of `model`."""

    model: str
    stream: bool
    span: tuple[int, int] | None = None


_new = tuple.__new__  # a named tuple's own constructor takes three times as long


def parse(body: bytes | bytearray) -> BodyFields:
    """Parse a body on the event loop. Raises ApiError (400, 404)."""
    try:
        document = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise _not_json(str(error)) from None
    if type(document) is not dict:
        raise invalid_request("The body must be a JSON object.")
    if not _USUAL_KEYS.issuperset(document):
        for key in document:
            if key not in _USUAL_KEYS and key.lower() in ("model", "stream"):
                raise _ambiguous(key)
    model = document.get("model")
    if type(model) is not str or not model or len(model) > MAX_MODEL_CHARS or not model.isprintable():
        raise _bad_model(model)
    return _new(BodyFields, (model, document.get("stream") is True, None))


def scan(body: bytes | bytearray) -> BodyFields:
    """Parse the top level of a large body, without objects. Raises ApiError 400, 404.

    Values other than `model` and `stream` are skipped; the engine decides whether they are valid.
    """
    at = _skip_space(body, 0)
    if body[at : at + 1] != b"{":
        raise invalid_request("The body must be a JSON object.")
    at += 1
    found: dict[str, tuple[int, int]] = {}
    while True:
        at = _skip_space(body, at)
        if body[at : at + 1] == b"}":
            break
        end = _string_end(body, at)
        key = _load(body[at:end])
        colon = _skip_space(body, end)
        if body[colon : colon + 1] != b":" or not isinstance(key, str):
            raise _not_json("a key without a value")
        start = _skip_space(body, colon + 1)
        end = _value_end(body, start)
        if key.lower() in ("model", "stream"):
            if key not in ("model", "stream"):
                raise _ambiguous(key)
            found[key] = (start, end)
        at = _skip_space(body, end)
        mark = body[at : at + 1]
        if mark not in (b",", b"}"):
            raise _not_json("an object that does not end")
        if mark == b",":
            at += 1
    return _asked(body, found)


def _asked(body: bytes | bytearray, found: dict[str, tuple[int, int]]) -> BodyFields:
    start, end = found.get("model", (0, 0))
    model = _load(body[start:end]) if end else None
    if not isinstance(model, str) or not model or len(model) > MAX_MODEL_CHARS or not model.isprintable():
        raise _bad_model(model)
    stream = "stream" in found and bytes(body[slice(*found["stream"])]).strip() == b"true"
    return BodyFields(model, stream, (start, end))


def rename_model(body: bytes | bytearray, fields: BodyFields, served_name: str) -> bytes | bytearray:
    """Return the body with the engine's name for the model."""
    if served_name == fields.model:
        return body
    span = fields.span or _simple_span(body, fields.model) or scan(body).span
    assert span is not None
    view = memoryview(body)
    return b"".join((view[: span[0]], orjson.dumps(served_name), view[span[1] :]))


def _simple_span(body: bytes | bytearray, model: str) -> tuple[int, int] | None:
    """Return the position of the value of `model`; None unless it is unambiguous."""
    if b"\\u" in body or len(_MODEL_KEY.findall(body)) != 1:
        return None
    match = _MODEL_KEY.search(body)
    return match.span(1) if match is not None and _load(match.group(1)) == model else None


def _load(piece: bytes | bytearray) -> object:
    try:
        return orjson.loads(piece)
    except orjson.JSONDecodeError as error:
        raise _not_json(str(error)) from None


def _skip_space(body: bytes | bytearray, at: int) -> int:
    while body[at : at + 1] and body[at] in _SPACE:
        at += 1
    return at


def _string_end(body: bytes | bytearray, at: int) -> int:
    """Return the position after the string that starts at `at`."""
    if body[at : at + 1] != b'"':
        raise _not_json("a key that is not a string")
    quote = at
    while True:
        quote = body.find(b'"', quote + 1)
        if quote < 0:
            raise _not_json("a string that does not end")
        back = quote - 1
        while body[back] == 0x5C:
            back -= 1
        if (quote - back) % 2:
            return quote + 1


def _value_end(body: bytes | bytearray, at: int) -> int:
    """Return the position after the value that starts at `at`."""
    first = body[at : at + 1]
    if first == b'"':
        return _string_end(body, at)
    if first not in (b"[", b"{"):
        match = _TOP.search(body, at)
        if match is None:
            raise _not_json("an object that does not end")
        return match.start()
    depth = 0
    while True:
        run = _RUN.match(body, at)
        match = _STRUCTURE.search(body, at if run is None else run.end())
        if match is None:
            raise _not_json("an object that does not end")
        mark, at = match.group(), match.end()
        if mark == b'"':
            at = _string_end(body, at - 1)
        elif mark in b"[{":
            depth += 1
        else:
            depth -= 1
            if not depth:
                return at


def _not_json(what: str) -> ApiError:
    return invalid_request(f"The body is not valid JSON: {what}.")


def _ambiguous(key: str) -> ApiError:
    return invalid_request(f"The key {key!r} must be written in lower case: engines would read it differently.")


def _bad_model(model: object) -> ApiError:
    if not isinstance(model, str) or not model:
        return invalid_request("The body must name a model: a string under the key 'model'.")
    if len(model) > MAX_MODEL_CHARS:
        return ApiError(404, "model_not_found", f"There is no model with a name of {len(model)} characters.")
    return invalid_request("The model's name has characters that cannot be printed.")
