"""What the gateway reads of a JSON body: `model` and `stream`; and the one thing it may change: the model's name.

The rules of this file
- A body goes on byte for byte. Where the engine knows the model by another name, that one value is replaced in place, and
  everything else stays as it was sent.
- Of doubled keys the last counts, as in every engine. Go reads `MODEL` as `model` and others do not: that is refused.
- A large body is not turned into objects (that would hold up every other stream): its top level is walked in a thread.
"""

from __future__ import annotations

import re
from typing import Final, NamedTuple

import orjson

from fleetd.errors import ApiError
from fleetd.gateway.errors import invalid_request

LARGE_BYTES: Final = 1024 * 1024  # read in a thread from here on
MAX_MODEL_CHARS: Final = 512

_MODEL_KEY = re.compile(rb'"model"\s*:\s*("(?:[^"\\]|\\.)*")')
_STRUCTURE = re.compile(rb'["\[\]{}]')
_TOP = re.compile(rb'["\[\]{},:]')
# A run of short strings and what lies between them, cut so that no single match holds up other threads for long. Nothing
# follows the run, so there is nothing to go back for; possessive quantifiers, which would say so, are broken before Python 3.11.4.
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


class Asked(NamedTuple):
    """What a body asks for. `span` is where the value of `model` stands, when that is known."""

    model: str
    stream: bool
    span: tuple[int, int] | None = None


_new = tuple.__new__  # a named tuple's own constructor takes three times as long, for every request


def read(body: bytes | bytearray) -> Asked:
    """Read a body of any size that may be parsed at once. Raises ApiError (400, 404)."""
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
    return _new(Asked, (model, document.get("stream") is True, None))


def scan(body: bytes | bytearray) -> Asked:
    """Read the top level of a large body without building it. Raises ApiError (400, 404).

    Values other than `model` and `stream` are only skipped; whether they are valid is the engine's to say.
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


def _asked(body: bytes | bytearray, found: dict[str, tuple[int, int]]) -> Asked:
    start, end = found.get("model", (0, 0))
    model = _load(body[start:end]) if end else None
    if not isinstance(model, str) or not model or len(model) > MAX_MODEL_CHARS or not model.isprintable():
        raise _bad_model(model)
    stream = "stream" in found and bytes(body[slice(*found["stream"])]).strip() == b"true"
    return Asked(model, stream, (start, end))


def rename(body: bytes | bytearray, asked: Asked, served_name: str) -> bytes | bytearray:
    """Return the body with the engine's own name for the model."""
    if served_name == asked.model:
        return body
    span = asked.span or _simple_span(body, asked.model) or scan(body).span
    assert span is not None
    view = memoryview(body)
    return b"".join((view[: span[0]], orjson.dumps(served_name), view[span[1] :]))


def _simple_span(body: bytes | bytearray, model: str) -> tuple[int, int] | None:
    """Return where the value of `model` stands, where one look is enough: one such key, and no key written in escapes."""
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
    """Return the place after the string that starts at `at`."""
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
    """Return the place after the value that starts at `at`."""
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
    return invalid_request("The model's name holds characters that cannot be printed.")
