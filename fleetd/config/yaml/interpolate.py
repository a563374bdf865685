"""`${VAR}`, `${VAR:-default}`, `${VAR:?message}` and `$$` in scalars.

Invariants:
- Pure: the environment is an argument. A value that was put in is never read again for `${`.
- `:-` and `:?` also act on an empty variable, `-` and `?` only on an unset one, as in a shell.
- No message holds the value of a variable. A `$` before anything but `{` or `$` stays as it is.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

MAX_DEPTH = 8
MAX_RESULT = 1024 * 1024
_PLACEHOLDERS = (
    "port",
    "host",
    "name",
    "replica",
)  # known only once a process is planned, and written without the dollar sign
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


def interpolate(text: str, env: Mapping[str, str]) -> str:
    """Return the text with its variables replaced. Raises ValueError without values."""
    if "$" not in text:
        return text
    result, end = _until(text, 0, env, closing=False, depth=0)
    assert end == len(text)
    if len(result) > MAX_RESULT:
        raise ValueError("is longer than 1 MiB after interpolation")
    return result


def _until(text: str, start: int, env: Mapping[str, str], *, closing: bool, depth: int) -> tuple[str, int]:
    """Read to the end or to the `}` of a default; return the result and position."""
    parts: list[str] = []
    position = start
    while position < len(text):
        char = text[position]
        if char == "}" and closing:
            return "".join(parts), position + 1
        if char != "$":
            stop = _next(text, position, "$}" if closing else "$")
            parts.append(text[position:stop])
            position = stop
        elif text.startswith("$$", position):
            parts.append("$")
            position += 2
        elif text.startswith("${", position):
            value, position = _variable(text, position, env, depth)
            parts.append(value)
        else:
            parts.append("$")
            position += 1
    if closing:
        raise ValueError("'${' is not closed by '}' (write $${ for a plain '${')")
    return "".join(parts), position


def _next(text: str, start: int, stops: str) -> int:
    found = [index for index in (text.find(stop, start) for stop in stops) if index >= 0]
    return min(found, default=len(text))


def _variable(text: str, start: int, env: Mapping[str, str], depth: int) -> tuple[str, int]:
    if depth >= MAX_DEPTH:
        raise ValueError(f"variables are nested more than {MAX_DEPTH} levels deep")
    name = _NAME.match(text, start + 2)
    if name is None:
        raise ValueError("'${' must be followed by the name of a variable (write $${ for a plain '${')")
    variable, position = name[0], name.end()
    value = env.get(variable)
    if text.startswith("}", position):
        if value is None:
            raise ValueError(f"the variable {variable!r} is not set ({_unset_hint(variable)})")
        return value, position + 1
    for operator in (":-", ":?", "-", "?"):
        if text.startswith(operator, position):
            break
    else:
        if position >= len(text):
            raise ValueError("'${' is not closed by '}' (write $${ for a plain '${')")
        raise ValueError(f"'${{{variable}' must be followed by '}}', ':-default' or ':?message'")
    other, end = (
        _until(text, position + len(operator), env, closing=True, depth=depth + 1)
        if _needs_other(value, operator)
        else ("", _skip(text, position + len(operator)))
    )
    if value is not None and (value or not operator.startswith(":")):
        return value, end
    if operator.endswith("?"):
        raise ValueError(f"the variable {variable!r} is not set: {other or 'it is required'}")
    return other, end


def _unset_hint(variable: str) -> str:
    if variable in _PLACEHOLDERS:
        return f"for the process's own, write {{{variable}}}"
    return f"set it, or write ${{{variable}:-default}}"


def _needs_other(value: str | None, operator: str) -> bool:
    return value is None or (not value and operator.startswith(":"))


def _skip(text: str, start: int) -> int:
    """Return the position after an unused default; its variables need not be set."""
    depth, position = 1, start
    while position < len(text):
        if text.startswith("$$", position):
            position += 2
        elif text.startswith("${", position):
            depth, position = depth + 1, position + 2
        elif text[position] == "}":
            depth, position = depth - 1, position + 1
            if depth == 0:
                return position
        else:
            position += 1
    raise ValueError("'${' is not closed by '}' (write $${ for a plain '${')")
