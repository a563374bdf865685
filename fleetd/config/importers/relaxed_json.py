"""Relaxed JSON as JavaScript programs accept it: comments, trailing commas, unquoted keys, single quotes.

Invariants:
- Each token is rewritten as strict JSON, which the standard library parses. Nothing is evaluated.
"""

from __future__ import annotations

import json
import re
from typing import Any

_TOKEN = re.compile(
    r"""(?P<blank>\s+|//[^\n]*|/\*.*?\*/)
      |(?P<double>"(?:[^"\\]|\\.)*")
      |(?P<single>'(?:[^'\\]|\\.)*')
      |(?P<number>[-+]?(?:0[xX][0-9a-fA-F]+|(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?))
      |(?P<word>[A-Za-z_$][\w$]*)
      |(?P<mark>[{}\[\]:,])""",
    re.VERBOSE | re.DOTALL,
)
_WORDS = frozenset({"true", "false", "null"})


def parse_relaxed(text: str) -> Any:
    """Return the value of a text. Raises ValueError with line and column."""
    tokens: list[str] = []
    position = 0
    text = text.removeprefix("\ufeff")
    while position < len(text):
        found = _TOKEN.match(text, position)
        if found is None:
            line = text.count("\n", 0, position) + 1
            column = position - (text.rfind("\n", 0, position) + 1) + 1
            raise ValueError(f"line {line}, column {column}: {text[position : position + 10]!r} is not JSON")
        position = found.end()
        _put(tokens, found)
    try:
        return json.loads(" ".join(tokens))
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _put(tokens: list[str], found: re.Match[str]) -> None:
    kind, token = found.lastgroup, found[0]
    if kind == "blank":
        return
    if kind == "single":
        inner = re.sub(
            r"\\(.)|(\")", lambda part: part[0] if part[1] and part[1] != "'" else part[1] or '\\"', token[1:-1]
        )
        token = f'"{inner}"'
    elif kind == "number":
        sign = "-" if token.startswith("-") else ""
        digits = token.lstrip("+-")
        token = sign + (str(int(digits, 16)) if digits[:2].lower() == "0x" else repr(float(digits)).removesuffix(".0"))
    elif kind == "word" and token not in _WORDS:
        token = json.dumps(token)
    elif found[0] in ("}", "]") and tokens and tokens[-1] == ",":
        tokens.pop()
    tokens.append(token)
