"""Values in PM2's documents: words, variables, times, sizes, regular expressions.

Invariants:
- An unknown form is None or the unchanged text; the reader of the field reports it.
"""

from __future__ import annotations

import json
import re
from typing import Any

from fleetd.config.importers.emit import Variable
from fleetd.config.importers.nodejs import REGEXP, named_secrets
from fleetd.config.placeholders import escaped
from fleetd.units import format_duration

_TIMES = {"ms": 1, "s": 1000, "m": 60_000, "h": 3_600_000, "d": 86_400_000}
_WORDS = re.compile(r"""[^\s"'=]+="[^"]*"|[^\s"'=]+='[^']*'|"[^"]*"|'[^']*'|\S+""")  # PM2's own expression
_SIZES = {"": 1, "b": 1, "k": 2**10, "kb": 2**10, "m": 2**20, "mb": 2**20, "g": 2**30, "gb": 2**30}


def unmarked(value: Any) -> Any:
    """Return a value with every regular expression in it as its text: /x/."""
    if isinstance(value, dict):
        return {key: unmarked(item) for key, item in value.items()}
    if isinstance(value, list):
        return [unmarked(item) for item in value]
    return value.removeprefix(REGEXP) if isinstance(value, str) and value.startswith(REGEXP) else value


def words_of(value: Any) -> list[str]:
    """Return the words of a list, or of a text as PM2 splits it: backslashes and quotes inside a word are kept."""
    if value is None:
        return []
    if isinstance(value, list):
        return [env_text(word) for word in value]
    words = (_unquoted(found[0]) for found in _WORDS.finditer(env_text(value)))
    return [word for word in words if word.strip()]


def _unquoted(word: str) -> str:
    return word[1:-1] if word[0] in "\"'" and word[-1] == word[0] else word


def literal(value: Any, *, braces: bool) -> Any:
    """Return a value of fleet.yaml in which secrets are references, and (with `braces`) placeholders are plain text."""
    if isinstance(value, dict):
        return {key: literal(item, braces=braces) for key, item in value.items()}
    if isinstance(value, list):
        return [literal(item, braces=braces) for item in value]
    if not isinstance(value, str) or isinstance(value, Variable):
        return value
    text = escaped(value) if braces else value
    return Variable(named_secrets(text.replace("$", "$$"))) if named_secrets(text) != text else text


def env_texts(values: Any) -> dict[str, str]:
    """Return the variables of a mapping, without those that no process can have."""
    items = values.items() if isinstance(values, dict) else ()
    return {str(key): env_text(value) for key, value in items if re.fullmatch(r"[^=\x00\s]{1,200}", str(key))}


def env_text(value: Any) -> str:
    """Return a value as JavaScript would write it."""
    if isinstance(value, str):
        return value
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return json.dumps(value)


def milliseconds(value: Any) -> int | None:
    """Return milliseconds from PM2's numbers and texts: 200, "200", "10s", "5m"."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(ms|s|m|h|d)?\s*", str(value)) if value is not None else None
    return round(float(found[1]) * _TIMES[found[2] or "ms"]) if found else None


def duration(ms: int) -> str:
    """Return milliseconds as a duration of fleet.yaml."""
    return format_duration(ms / 1000)


def size_bytes(value: Any) -> int | None:
    """Return bytes from PM2's numbers and texts: 1073741824, "300M"; never less than a MiB."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kKmMgG]?[bB]?)\s*", str(value)) if value is not None else None
    return max(2**20, round(float(found[1]) * _SIZES[found[2].lower()])) if found and float(found[1]) > 0 else None
