"""Field types shared by the options of several engines, in addition to those of fleet.yaml.

Invariants:
- A value that cannot be part of a command line, a variable or a header is rejected here.
- A secret never appears in a message.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import SecretStr

from fleetd.config.schema.types import (
    Choice,
    DurationType,
    FieldType,
    Flag,
    Misplaced,
    Schema,
    Strings,
    Text,
    Whole,
)
from fleetd.config.schema.types import Size as SizeType
from fleetd.engines.base import Api
from fleetd.engines.load_options import LARGEST
from fleetd.units import shown

_LONGEST_NAME_BYTES = 255
_ARGUMENT_NAME = re.compile(r"-{0,2}[A-Za-z][A-Za-z0-9_.-]{0,99}")
_DEEPEST = 32


class LifetimeType(DurationType):
    """A duration, or -1 for ever."""

    def parse(self, value: object) -> float:
        if value in ("forever", "-1") or (value == -1 and not isinstance(value, bool)):
            return -1.0
        return super().parse(value)

    def dump(self, value: Any) -> Any:
        return -1 if value < 0 else super().dump(value)

    def json_schema(self) -> Schema:
        return {"anyOf": [*super().json_schema()["anyOf"], {"const": -1}, {"const": "forever"}]}


class AnyOf(FieldType):
    """One of several kinds: `AnyOf("auto, or true or false", Choice("auto"), Flag())`."""

    def __init__(self, what: str, *kinds: FieldType) -> None:
        self.what, self.kinds = what, kinds

    def parse(self, value: object) -> Any:
        for kind in self.kinds:
            try:
                return kind.parse(value)
            except ValueError:
                continue
        raise ValueError(f"must be {self.what}, not {shown(value)}")

    def json_schema(self) -> Schema:
        return {"anyOf": [kind.json_schema() for kind in self.kinds]}


class ApiType(Choice):
    """The dialect of a port."""

    def __init__(self) -> None:
        super().__init__(*(one.value for one in Api))

    def parse(self, value: object) -> Any:
        return Api(super().parse(value))


class SecretType(FieldType):
    """A key that is sent in a header: visible ASCII on one line. It is never printed."""

    def parse(self, value: object) -> SecretStr:
        text = value.get_secret_value() if isinstance(value, SecretStr) else value
        if not isinstance(text, str):
            raise ValueError("must be a string (write it as ${NAME}, or in quotes)")
        if not text:
            raise ValueError("must not be empty (remove it where there is no key)")
        if len(text) > 4096 or not all("!" <= sign <= "~" for sign in text):
            raise ValueError("must be visible ASCII on one line, without spaces, since it is sent in a header")
        return SecretStr(text)

    def dump(self, value: Any) -> Any:
        return str(value)

    def json_schema(self) -> Schema:
        return {"type": "string", "minLength": 1}


class PathType(Text):
    """A path, or a name that an engine resolves itself. It may not exist."""

    def parse(self, value: object) -> str:
        text = super().parse(value)
        if any(len(part.encode("utf-8", "replace")) > _LONGEST_NAME_BYTES for part in text.split("/")):
            raise ValueError(f"must not have a name of more than {_LONGEST_NAME_BYTES} bytes between two slashes")
        return text


class Several(FieldType):
    """A list of values of one kind, duplicates allowed."""

    def __init__(self, item: FieldType, *, at_least: int = 0) -> None:
        self.item, self.at_least = item, at_least

    def parse(self, value: object) -> tuple[Any, ...]:
        if not isinstance(value, list | tuple):
            raise ValueError(f"must be a list, not {shown(value)}")
        if len(value) < self.at_least:
            raise ValueError(f"must have at least {self.at_least} entry")
        parsed = []
        for index, item in enumerate(value):
            try:
                parsed.append(self.item.parse(item))
            except ValueError as error:
                raise Misplaced(str(error), index, *(error.where if isinstance(error, Misplaced) else ())) from None
        return tuple(parsed)

    def json_schema(self) -> Schema:
        return {"type": "array", "items": self.item.json_schema(), "minItems": self.at_least}


class JsonType(FieldType):
    """A mapping that is passed on as JSON, unchanged."""

    def parse(self, value: object) -> dict[str, Any]:
        if not isinstance(value, Mapping):
            raise ValueError(f"must be a mapping of keys, not {shown(value)}")
        _check_json(value, ())
        return dict(value)

    def json_schema(self) -> Schema:
        return {"type": "object"}


class ArgumentsType(JsonType):
    """Further arguments by name: `name: value`, `name: true`, `name: [a, b]`."""

    def parse(self, value: object) -> dict[str, Any]:
        parsed = super().parse(value)
        for name in parsed:
            if not _ARGUMENT_NAME.fullmatch(name):
                raise Misplaced(f"{shown(name)} is not a valid name of an argument", name)
            values = parsed[name] if isinstance(parsed[name], list | tuple) else ()
            for index, item in enumerate(values):
                if item is None or isinstance(item, list | tuple):
                    raise Misplaced(f"must be a word, a number or a mapping, not {shown(item)}", name, index)
        return parsed


def _check_json(value: Any, where: tuple[str | int, ...]) -> None:
    """Raise Misplaced for a value that is not JSON or not fit for a command line."""
    if len(where) > _DEEPEST:
        raise Misplaced(f"is nested more than {_DEEPEST} levels deep", *where)
    if isinstance(value, Mapping):
        for key, item in value.items():
            if not isinstance(key, str) or "\x00" in key:
                raise Misplaced(f"{shown(key)} is not a valid key", *where, str(key))
            _check_json(item, (*where, key))
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            _check_json(item, (*where, index))
    elif isinstance(value, str) and "\x00" in value:
        raise Misplaced("must not contain a NUL character", *where)
    elif isinstance(value, float) and not math.isfinite(value):
        raise Misplaced(f"must be a finite number, not {shown(value)}", *where)


Size = Annotated[int, SizeType("0B")]
Duration = Annotated[float, DurationType()]
Lifetime = Annotated[float, LifetimeType()]
Count = Annotated[int, Whole(1, LARGEST)]
Index = Annotated[int, Whole(0, LARGEST)]
Switch = Annotated[bool, Flag()]
Secret = Annotated[SecretStr, SecretType()]
Dialect = Annotated[Api, ApiType()]
Word = Annotated[str, Text(255)]
PathText = Annotated[str, PathType(4096, what="a path or a name")]
Template = Annotated[str, Text(1_000_000, what="a template")]
Names = Annotated[tuple[str, ...], Strings()]
Json = Annotated[dict[str, Any], JsonType()]
