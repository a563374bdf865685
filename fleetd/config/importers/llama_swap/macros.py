"""Merge the files of a llama-swap configuration and replace its macros, in llama-swap's order.

Invariants:
- Comment lines of `cmd` and `cmdStop` are dropped first. Macros are then replaced in every value, the last declared first, so that
  a macro may contain earlier ones; a value that is exactly one macro takes the macro's type.
- `${env.NAME}` and `${PORT}` become marks that no user writes; `written` turns them into what fleet.yaml understands.
- No text grows beyond a limit: macros that contain each other could double at every step.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from fleetd.config.importers.emit import Variable
from fleetd.config.placeholders import escaped
from fleetd.errors import ConfigError, Problem

PORT = "\U0010fff2"
_OPEN, _CLOSE = "\U0010fff0", "\U0010fff1"
_ENV = re.compile(r"\$\{env\.([A-Za-z_][A-Za-z0-9_]*)\}")
_MARKED = re.compile(f"{_OPEN}([A-Za-z0-9_]+){_CLOSE}")
_MACRO = re.compile(r"\$\{([A-Za-z0-9_-]+)\}")
_LONGEST = 1024 * 1024
# Mappings whose keys name one thing each: two files may not both have a key.
_NAMED = frozenset({
    "models", "groups", "profiles", "selectors", "peers", "matrix", "routing.router.settings.groups",
    "routing.router.settings.matrix",
})  # fmt: skip

Macros = list[tuple[str, Any]]


def marked(text: str) -> str:
    """Replace `${env.NAME}` by a mark, before YAML sees its braces."""
    return _ENV.sub(lambda found: f"{_OPEN}{found[1]}{_CLOSE}", text)


def has_variable(text: str) -> bool:
    """Return whether a text contains a variable of the environment."""
    return _OPEN in text


def variables(text: str) -> list[str]:
    """Return the names of the environment's variables in a text."""
    return _MARKED.findall(text)


def written(text: str) -> str:
    """Return a text of fleet.yaml: variables as `${NAME}`, the port as `{port}`."""
    text = text.replace(PORT, "{port}")
    if _OPEN not in text:
        return text
    return Variable(_MARKED.sub(lambda found: f"${{{found[1]}}}", text.replace("$", "$$")))


def written_word(text: str) -> str:
    """Return a word of a command or a value of `env`: literal braces around names of placeholders are doubled."""
    return written(escaped(text))


def shown(text: str) -> str:
    """Return a text as it was in the file, for messages."""
    return _MARKED.sub(lambda found: f"${{env.{found[1]}}}", text.replace(PORT, "${PORT}"))


def merge(into: dict[str, Any], other: Mapping[str, Any], source: str, path: str = "") -> None:
    """Merge a further file, as `-config-dir` does. Raises ConfigError where two files differ."""
    for key, value in other.items():
        where = f"{path}.{key}" if path else key
        old = into.get(key)
        if old is None:
            into[key] = value
        elif value is None or value == old:
            continue
        elif isinstance(old, dict) and isinstance(value, dict):
            twice = sorted(set(old) & set(value)) if where in _NAMED else []
            if twice:
                raise ConfigError([Problem(source, 0, 0, where, f"{twice[0]!r} is in another file too")])
            into[key] = merged = dict(old)
            merge(merged, value, source, where)
        elif isinstance(old, list) and isinstance(value, list):
            into[key] = [*old, *value]
        else:
            raise ConfigError([Problem(source, 0, 0, where, "has a different value in another file")])


def resolved(document: Mapping[str, Any], shown_name: str) -> dict[str, Any]:
    """Return the document with every macro replaced. Raises ConfigError if a text grows beyond 1 MiB."""
    common = _declared(document.get("macros"))
    try:
        result = {key: _all(value, common) for key, value in document.items() if key not in ("macros", "models")}
        models = document.get("models")
        if isinstance(models, dict):
            result["models"] = {name: _model(name, raw, common) for name, raw in models.items()}
    except OverflowError:
        problem = Problem(shown_name, 0, 0, "macros", "a value exceeds 1 MiB: macros contain each other")
        raise ConfigError([problem]) from None
    return result


def unknown(value: Any) -> Iterator[str]:
    """Yield the names of macros that are left in a value."""
    if isinstance(value, str):
        yield from _MACRO.findall(value)
    elif isinstance(value, dict):
        for item in value.values():
            yield from unknown(item)
    elif isinstance(value, list):
        for item in value:
            yield from unknown(item)


def without_comments(command: str) -> str:
    """Drop the lines that begin with `#`."""
    return "\n".join(line for line in command.split("\n") if not line.strip().startswith("#"))


def joined_lines(command: str) -> str:
    """Drop comment lines and replace a backslash at the end of a line by a blank."""
    lines = without_comments(command).split("\n")
    return "\n".join(line.strip()[:-1] + " " if line.strip().endswith("\\") else line for line in lines)


def _model(name: str, raw: Any, common: Macros) -> Any:
    if not isinstance(raw, dict):
        return raw
    model = {key: value for key, value in raw.items() if key != "macros"}
    for field in ("cmd", "cmdStop"):
        if isinstance(model.get(field), str):
            model[field] = without_comments(model[field])
    own = dict(_declared(raw.get("macros")))
    macros: Macros = [("MODEL_ID", name), *((key, own.pop(key, value)) for key, value in common), *own.items()]
    model = _all(model, macros)
    filters = model.get("filters")
    if isinstance(filters, dict) and isinstance(filters.get("setParamsByID"), dict):
        by_id = {_all(key, macros): value for key, value in filters["setParamsByID"].items()}
        model["filters"] = {**filters, "setParamsByID": by_id}
    return _replaced(model, "PORT", PORT)


def _declared(value: Any) -> Macros:
    return [(str(key), item) for key, item in value.items()] if isinstance(value, dict) else []


def _all(value: Any, macros: Sequence[tuple[str, Any]]) -> Any:
    for name, replacement in reversed(macros):
        value = _replaced(value, name, replacement)
    return value


def _replaced(value: Any, name: str, replacement: Any) -> Any:
    if isinstance(value, str):
        slug = f"${{{name}}}"
        if value == slug:
            return replacement
        if slug in value:
            text = _plain(replacement)
            if len(value) + value.count(slug) * len(text) > _LONGEST:
                raise OverflowError
            return value.replace(slug, text)
        return value
    if isinstance(value, dict):
        return {key: _replaced(item, name, replacement) for key, item in value.items()}
    if isinstance(value, list):
        return [_replaced(item, name, replacement) for item in value]
    return value


def _plain(value: Any) -> str:
    return ("true" if value else "false") if isinstance(value, bool) else "" if value is None else str(value)
