"""Placeholders of a process in its command, arguments and environment: {port} {host} {name} {replica} {index}.

Invariants:
- Only braces around one of these names mean anything: {{name}} is the text {name}; JSON and templates stay as they are.
- `substitute(escaped(text), …)` returns `text`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

_PLACE = re.compile(r"(\{+)(port|host|name|replica|index)(\}+)")


def substitute(text: str, places: Mapping[str, object]) -> str:
    """Replace the placeholders, and each doubled brace by one; a placeholder without a value stays as it is."""
    return _PLACE.sub(lambda found: _value(found, places), text) if "{" in text else text


def _value(found: re.Match[str], places: Mapping[str, object]) -> str:
    opening, name, closing = found.groups()
    pairs = min(len(opening), len(closing))
    value = places.get(name)
    if pairs % 2 == 0:
        inner = name
    else:
        inner = str(value) if value is not None else f"{{{name}}}"
    braces = pairs // 2
    return opening[pairs:] + "{" * braces + inner + "}" * braces + closing[pairs:]


def escaped(text: str) -> str:
    """Return a text that `substitute` turns into `text`."""
    return _PLACE.sub(_doubled, text)


def _doubled(found: re.Match[str]) -> str:
    pairs = min(len(found[1]), len(found[3]))
    return "{" * pairs + found[0] + "}" * pairs


def mentions_port(texts: Sequence[str]) -> bool:
    """Return whether any text contains the placeholder of the process' port."""
    marked = {"port": "\0"}
    return any("{port}" in text and "\0" in substitute(text, marked) for text in texts)
