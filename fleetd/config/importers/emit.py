"""Write plain data as YAML that the loader reads back unchanged.

Invariants:
- A string is quoted whenever YAML would read it as anything else; `$` is doubled, so that nothing is interpolated.
- Short lists and mappings are on one line, everything else in blocks; the order of the data is kept.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from fleetd.config.placeholders import escaped
from fleetd.config.yaml.scalars import resolve

_SIMPLE = re.compile(r"[A-Za-z0-9_./~+][A-Za-z0-9_./~+=@%-]*(?: [A-Za-z0-9_./~+=@%-]+)*")
_WIDTH = 110
_LITERAL = re.compile(r"[^\x00-\x09\x0b-\x1f\x7f-\xa0\u2028\u2029\ud800-\udfff\ufeff\ufffe\uffff]*")


class Variable(str):
    """A text such as ${HF_TOKEN} that fleetd interpolates; every other `$` is literal."""

    __slots__ = ()


def literal(text: str) -> str:
    """Return a text for a command or `env`, in which braces around names of placeholders mean themselves."""
    return type(text)(escaped(text))


def to_yaml(data: Mapping[str, Any], comments: Mapping[str, list[str]] | None = None) -> str:
    """Return the text; `comments` are lines above `section` or `section.name`; those of "" come first."""
    said = comments or {}
    lines = [f"# {line}".rstrip() for line in said.get("", ())]
    for section, value in data.items():
        if lines:
            lines.append("")
        lines += [f"# {line}".rstrip() for line in said.get(section, ())]
        if isinstance(value, Mapping) and value and section in ("services", "instances", "models"):
            lines.append(f"{_key(section)}:")
            for name, entry in value.items():
                lines += [f"  # {line}".rstrip() for line in said.get(f"{section}.{name}", ())]
                lines += _block(name, entry, 2)
        else:
            lines += _block(section, value, 0)
    return "\n".join(lines) + "\n"


def _block(key: str, value: Any, indent: int) -> list[str]:
    head = " " * indent + _key(key) + ":"
    flow = _flow(value)
    # Entries are readable with one key per line, even if they would fit on one.
    short = len(head) + 1 + len(flow) <= _WIDTH and not (indent == 2 and isinstance(value, Mapping) and len(value) > 2)
    if isinstance(value, str) and "\n" in value:
        return _literal(head, value, indent + 2) or [f"{head} {flow}"]
    if short or not isinstance(value, Mapping | list) or not value:
        return [f"{head} {flow}"]
    if isinstance(value, Mapping):
        return [head, *(line for name, item in value.items() for line in _block(str(name), item, indent + 2))]
    return [head, *(f"{' ' * indent}  - {_flow(item)}" for item in value)]


def _literal(head: str, value: str, indent: int) -> list[str]:
    """Return a block scalar, or None if it would not read back as the same text."""
    text = value.replace("$", "$$")
    if not _LITERAL.fullmatch(text) or text.startswith((" ", "\n")) or text.endswith("\n\n") or text.strip() == "":
        return []
    mark = "|" if text.endswith("\n") else "|-"
    return [f"{head} {mark}", *(" " * indent + line if line else "" for line in text.removesuffix("\n").split("\n"))]


def _key(key: str) -> str:
    return key if _SIMPLE.fullmatch(key) and " " not in key else _quoted(key)


def _flow(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_key(str(key))}: {_flow(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_flow(item) for item in value) + "]"
    if isinstance(value, str):
        return _string(value)
    return json.dumps(value)


def _string(value: str) -> str:
    text = value if isinstance(value, Variable) else value.replace("$", "$$")
    if _SIMPLE.fullmatch(text) and isinstance(resolve(text), str):
        return text
    return _quoted(text)


def _quoted(text: str) -> str:
    """Return a double-quoted scalar: JSON's escapes are valid YAML; unprintable characters are escaped."""
    quoted = json.dumps(text, ensure_ascii=False)
    return re.sub(r"[\x7f-\xa0\u2028\u2029\ufeff\ufffe\uffff]", lambda char: f"\\u{ord(char[0]):04x}", quoted)
