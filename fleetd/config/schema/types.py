"""The types of single values in fleet.yaml: how each is read, printed and described to an editor.

Invariants:
- Each type is one object put into `Annotated[...]`: `parse` (any YAML value to Python, ValueError with a sentence),
  `dump` (back to what a person would write) and `json_schema` (every shorthand that `parse` accepts).
- A number or a boolean may come as a string, because `${PORT}` stays a string; nothing else is converted by guess.
"""

from __future__ import annotations

import math
import re
import shlex
import signal
from collections.abc import Mapping
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from pydantic_core import core_schema

from fleetd.units import format_duration, format_percent, format_size, parse_duration, parse_percent, parse_size, shown

Schema = dict[str, Any]
_INT_TEXT = re.compile(r"[-+]?[0-9]{1,18}\Z")
_ENV_NAME = re.compile(r"[^=\x00\s]{1,200}\Z")
DURATION_PATTERN = r"^(0|(?=\d)(\d+(\.\d+)?d)?(\d+(\.\d+)?h)?(\d+(\.\d+)?m)?(\d+(\.\d+)?s)?(\d+(\.\d+)?ms)?|.*\$\{.+)$"
SIZE_PATTERN = r"^(\d+|\d+(\.\d+)?\s*(B|[KMGT]i?B|[KMGT]i)|.*\$\{.+)$"
PERCENT_PATTERN = r"^\d{1,3}(\.\d+)?\s*%$"
VARIABLE_PATTERN = r"\$\{.+"


class Misplaced(ValueError):
    """A mistake below the value: `where` leads to it."""

    def __init__(self, message: str, *where: str | int) -> None:
        super().__init__(message)
        self.where = where


class FieldType:
    """Base of the types; `dump` is overridden where printing differs."""

    def parse(self, value: object) -> Any:
        raise NotImplementedError

    def dump(self, value: Any) -> Any:
        return value

    def json_schema(self) -> Schema:
        raise NotImplementedError

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> core_schema.CoreSchema:
        dump = core_schema.plain_serializer_function_ser_schema(self.dump, when_used="json")
        return core_schema.no_info_plain_validator_function(self.parse, serialization=dump)

    def __get_pydantic_json_schema__(self, schema: Any, handler: Any) -> Schema:
        return self.json_schema()


def _or_variable(schema: Schema) -> Schema:
    return {"anyOf": [schema, {"type": "string", "pattern": VARIABLE_PATTERN}]}


class Whole(FieldType):
    """A whole number between two bounds."""

    def __init__(self, minimum: int, maximum: int) -> None:
        self.minimum, self.maximum = minimum, maximum

    def parse(self, value: object) -> int:
        number: object = value
        if isinstance(value, str) and _INT_TEXT.match(value):
            number = int(value)
        elif isinstance(value, float) and value.is_integer():
            number = round(value)
        if isinstance(number, bool) or not isinstance(number, int):
            raise ValueError(f"must be a whole number, not {shown(value)}")
        if not self.minimum <= number <= self.maximum:
            raise ValueError(f"must be from {self.minimum} to {self.maximum}, not {shown(value)}")
        return number

    def json_schema(self) -> Schema:
        return _or_variable({"type": "integer", "minimum": self.minimum, "maximum": self.maximum})


class Real(FieldType):
    """A number between two bounds."""

    def __init__(self, minimum: float, maximum: float) -> None:
        self.minimum, self.maximum = minimum, maximum

    def parse(self, value: object) -> float:
        number: object = value
        if isinstance(value, str):
            try:
                number = float(value)
            except ValueError:
                number = None
        if isinstance(number, bool) or not isinstance(number, int | float) or not math.isfinite(number):
            raise ValueError(f"must be a number, not {shown(value)}")
        if not self.minimum <= number <= self.maximum:
            raise ValueError(f"must be from {self.minimum:g} to {self.maximum:g}, not {shown(value)}")
        return float(number)

    def json_schema(self) -> Schema:
        return _or_variable({"type": "number", "minimum": self.minimum, "maximum": self.maximum})


class Flag(FieldType):
    """true or false. The words of older YAML are refused with what to write instead."""

    def parse(self, value: object) -> bool:
        if isinstance(value, bool):
            return value
        if isinstance(value, str) and value.lower() in ("true", "false"):
            return value.lower() == "true"
        if isinstance(value, str) and value.lower() in ("yes", "on", "y", "no", "off", "n"):
            meant = "true" if value.lower() in ("yes", "on", "y") else "false"
            raise ValueError(f"must be true or false, not {shown(value)} (write {meant})")
        raise ValueError(f"must be true or false, not {shown(value)}")

    def json_schema(self) -> Schema:
        return _or_variable({"type": "boolean"})


class DurationType(FieldType):
    """Seconds between two bounds; `zero` allows 0 below the lower bound."""

    def __init__(self, minimum: str = "0", maximum: str = "3650d", *, zero: bool = False) -> None:
        self.minimum_s, self.maximum_s, self.zero = parse_duration(minimum), parse_duration(maximum), zero

    def parse(self, value: object) -> float:
        seconds = parse_duration(value)
        if not self.minimum_s <= seconds <= self.maximum_s and not (self.zero and seconds == 0):
            low, high = format_duration(self.minimum_s), format_duration(self.maximum_s)
            also = "0, or " if self.zero else ""
            raise ValueError(f"must be {also}from {low} to {high}, not {shown(value)}")
        return seconds

    def dump(self, value: Any) -> Any:
        return format_duration(value)

    def json_schema(self) -> Schema:
        return {"anyOf": [{"type": "string", "pattern": DURATION_PATTERN}, {"const": 0}]}


class Size(FieldType):
    """Bytes, between two bounds that are written like the value."""

    def __init__(self, minimum: str = "1B", maximum: str = "1024TiB") -> None:
        self.minimum, self.maximum = minimum, maximum
        self._low, self._high = parse_size(minimum), parse_size(maximum)

    def parse(self, value: object) -> int:
        size = parse_size(value)
        if not self._low <= size <= self._high:
            raise ValueError(f"must be from {self.minimum} to {self.maximum}, not {shown(value)}")
        return size

    def dump(self, value: Any) -> Any:
        return format_size(value)

    def json_schema(self) -> Schema:
        return {"anyOf": [{"type": "string", "pattern": SIZE_PATTERN}, {"type": "integer", "minimum": 0}]}


class Budget(NamedTuple):
    """Part of a device: bytes, or a share of its total. Exactly one is set."""

    size_bytes: int | None
    share: float | None

    def of(self, total_bytes: int) -> int:
        """Return the budget in bytes for a device of this size, at most that size."""
        wanted = int(total_bytes * self.share) if self.share is not None else self.size_bytes or 0
        return min(wanted, total_bytes)


class BudgetType(FieldType):
    """A size, or a percentage of the device."""

    def parse(self, value: object) -> Budget:
        if isinstance(value, str) and value.strip().endswith("%"):
            return Budget(None, parse_percent(value))
        return Budget(Size("1MiB").parse(value), None)

    def dump(self, value: Any) -> Any:
        return format_percent(value.share) if value.share is not None else format_size(value.size_bytes)

    def json_schema(self) -> Schema:
        percent = {"type": "string", "pattern": PERCENT_PATTERN}
        return {"anyOf": [percent, *Size().json_schema()["anyOf"]]}


class MemoryType(FieldType):
    """`auto`, bytes, or bytes per device."""

    def parse(self, value: object) -> Any:
        if value == "auto":
            return "auto"
        if not isinstance(value, dict):
            return Size("0B").parse(value)
        if not value:
            raise ValueError("must name at least one device (write auto to have it estimated)")
        parsed = {}
        for device, size in value.items():
            try:
                parsed[DeviceName().parse(device)] = Size("0B").parse(size)
            except ValueError as error:
                raise Misplaced(str(error), device) from None
        return parsed

    def dump(self, value: Any) -> Any:
        if isinstance(value, dict):
            return {device: format_size(size) for device, size in value.items()}
        return value if value == "auto" else format_size(value)

    def json_schema(self) -> Schema:
        size = Size().json_schema()
        devices = {"type": "object", "additionalProperties": size, "minProperties": 1}
        return {"anyOf": [{"const": "auto"}, *size["anyOf"], devices]}


class Text(FieldType):
    """A non-empty string without NUL, of bounded length."""

    def __init__(self, longest: int = 4096, *, pattern: str | None = None, what: str = "a string") -> None:
        self.longest, self.what = longest, what
        self.pattern = re.compile(pattern) if pattern is not None else None

    def parse(self, value: object) -> str:
        if not isinstance(value, str):
            quote = f" (write '{value}')" if isinstance(value, int | float) else ""
            raise ValueError(f"must be {self.what}, not {shown(value)}{quote}")
        if not value:
            raise ValueError(f"must be {self.what}, not an empty string")
        if "\x00" in value:
            raise ValueError("must not contain a NUL character")
        if len(value) > self.longest:
            raise ValueError(f"must be {self.longest} characters at most, not {len(value)}")
        if self.pattern is not None and not self.pattern.fullmatch(value):
            raise ValueError(f"must be {self.what}, not {shown(value)}")
        return value

    def json_schema(self) -> Schema:
        return {"type": "string", "minLength": 1, "maxLength": self.longest}


class DeviceName(FieldType):
    """host, unified or gpuN."""

    _pattern = re.compile(r"host|unified|gpu[0-9]{1,3}")

    def parse(self, value: object) -> str:
        if not isinstance(value, str) or not self._pattern.fullmatch(value):
            raise ValueError(f"must be the name of a device: host, unified, gpu0, gpu1 …, not {shown(value)}")
        return value

    def json_schema(self) -> Schema:
        return _or_variable({"type": "string", "pattern": "^(host|unified|gpu[0-9]{1,3})$"})


def _word(index: int, word: object) -> str:
    if not isinstance(word, str):
        raise Misplaced(f"must be a string, not {shown(word)}", index)
    return word


class CommandType(FieldType):
    """A list of words, or a string that is split like a shell does, without a shell."""

    def parse(self, value: object) -> tuple[str, ...]:
        if isinstance(value, str):
            try:
                words = shlex.split(value)
            except ValueError as error:
                what = "a quote is not closed" if "quotation" in str(error) else "it ends in a backslash"
                raise ValueError(f"cannot be split into words: {what}") from None
        elif isinstance(value, list | tuple):
            words = [_word(index, word) for index, word in enumerate(value)]
        else:
            raise ValueError(f"must be a list of words or a string, not {shown(value)}")
        if not words or not words[0]:
            raise ValueError("must name a program")
        if any("\x00" in word for word in words):
            raise ValueError("must not contain a NUL character")
        return tuple(words)

    def json_schema(self) -> Schema:
        words = {"type": "array", "items": {"type": ["string", "number", "boolean"]}, "minItems": 1}
        return {"anyOf": [{"type": "string", "minLength": 1}, words]}


class Arguments(CommandType):
    """Like a command, but it may be empty."""

    def parse(self, value: object) -> tuple[str, ...]:
        if value in ([], (), ""):
            return ()
        if isinstance(value, list | tuple):
            words = [_word(index, word) for index, word in enumerate(value)]
            return super().parse(["-", *words])[1:]
        return super().parse(f"- {value}")[1:] if isinstance(value, str) else super().parse(value)

    def json_schema(self) -> Schema:
        words = {"type": "array", "items": {"type": ["string", "number", "boolean"]}}
        return {"anyOf": [{"type": "string"}, words]}


class Strings(FieldType):
    """One string, or a list of strings."""

    def __init__(self, item: FieldType | None = None, *, at_least: int = 0, what: str = "a string") -> None:
        self.item = item if item is not None else Text(what=what)
        self.at_least = at_least

    def parse(self, value: object) -> tuple[Any, ...]:
        items = value if isinstance(value, list | tuple) else [value]
        parsed = []
        for index, item in enumerate(items):
            try:
                parsed.append(self.item.parse(item))
            except ValueError as error:
                if isinstance(value, list | tuple):
                    raise Misplaced(str(error), index) from None
                raise
        if len(parsed) < self.at_least:
            raise ValueError(f"must have at least {self.at_least} entry")
        if len(set(parsed)) < len(parsed):
            twice = next(item for item in parsed if parsed.count(item) > 1)
            raise ValueError(f"lists {shown(twice)} twice")
        return tuple(parsed)

    def dump(self, value: Any) -> Any:
        return [self.item.dump(item) for item in value]

    def json_schema(self) -> Schema:
        item = self.item.json_schema()
        return {"anyOf": [item, {"type": "array", "items": item, "minItems": self.at_least}]}


class Environment(FieldType):
    """Variables of a process: every value is the text that was written."""

    def parse(self, value: object) -> dict[str, str]:
        if not isinstance(value, Mapping):
            raise ValueError(f"must be a mapping of variables, such as {{NODE_ENV: production}}, not {shown(value)}")
        for name, text in value.items():
            if not isinstance(name, str) or not _ENV_NAME.match(name):
                raise Misplaced(f"{shown(name)} cannot be the name of a variable", str(name))
            if text is None:
                raise Misplaced(f'has no value (write {name}: "" for an empty one)', name)
            if not isinstance(text, str):
                raise Misplaced(f"must be a string, not {shown(text)}", name)
            if "\x00" in text:
                raise Misplaced("must not contain a NUL character", name)
        return dict(value)

    def json_schema(self) -> Schema:
        return {"type": "object", "additionalProperties": {"type": ["string", "number", "boolean"]}}


class SignalName(FieldType):
    """SIGTERM, TERM or 15; kept as SIGTERM."""

    def parse(self, value: object) -> str:
        known = {one.name: one for one in signal.Signals}
        if isinstance(value, int) and not isinstance(value, bool):
            named = next((one.name for one in signal.Signals if one.value == value), None)
            if named:
                return named
        if isinstance(value, str):
            name = value.upper() if value.upper().startswith("SIG") else f"SIG{value.upper()}"
            if name in known:
                return name
        raise ValueError(f"must be a signal such as SIGTERM or SIGINT, not {shown(value)}")

    def json_schema(self) -> Schema:
        return {"type": ["string", "integer"]}


class Umask(FieldType):
    """An octal mask in quotes, such as "0022"."""

    def parse(self, value: object) -> int:
        if isinstance(value, str) and re.fullmatch(r"(0o)?[0-7]{1,4}", value):
            mask = int(value.removeprefix("0o"), 8)
            if mask <= 0o777:
                return mask
        raise ValueError(f'must be an octal mask such as "0022", not {shown(value)}')

    def dump(self, value: Any) -> Any:
        return f"{value:04o}"

    def json_schema(self) -> Schema:
        return {"type": ["string", "integer"]}


class Address(NamedTuple):
    """Where a listener of fleetd binds."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def is_loopback(self) -> bool:
        return self.host in ("localhost", "::1") or bool(re.fullmatch(r"127\.\d+\.\d+\.\d+", self.host))


class AddressType(FieldType):
    """`127.0.0.1:8484`, `[::1]:8484` or `localhost:8484`; port 0: the system chooses."""

    _pattern = re.compile(r"(?:\[([0-9A-Fa-f:.%]+)\]|([A-Za-z0-9._-]+|\*)?):([0-9]{1,5})")

    def parse(self, value: object) -> Address:
        found = self._pattern.fullmatch(value) if isinstance(value, str) else None
        if found is None:
            raise ValueError(f"must be an address with a port, such as 127.0.0.1:8484, not {shown(value)}")
        port = int(found[3])
        if port > 65535:
            raise ValueError(f"the port must be from 0 to 65535, not {port}")
        host = found[1] or found[2] or ""
        return Address("0.0.0.0" if host in ("", "*") else host, port)

    def dump(self, value: Any) -> Any:
        return str(value)

    def json_schema(self) -> Schema:
        return {"type": "string", "examples": ["127.0.0.1:8484"]}


class HttpUrl(FieldType):
    """http://host[:port][/path] of an external server, without / or /v1 at the end."""

    def parse(self, value: object) -> str:
        if isinstance(value, str) and len(value) <= 2048:
            try:
                parts = urlsplit(value)
                good = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
            except ValueError:
                good = False
            if good and not parts.query and not parts.fragment and not parts.username and " " not in value:
                address = value.rstrip("/")
                if address.endswith("/v1"):
                    raise ValueError(
                        f"must be the address of the server without /v1 (write {address.removesuffix('/v1')})"
                    )
                return address
        raise ValueError(f"must be an address such as http://10.0.0.102:1234, not {shown(value)}")

    def json_schema(self) -> Schema:
        return {"type": "string", "examples": ["http://10.0.0.102:1234"]}


class Choice(FieldType):
    """One of a few words."""

    def __init__(self, *choices: str) -> None:
        self.choices = choices

    def parse(self, value: object) -> str:
        if isinstance(value, str) and value in self.choices:
            return value
        raise ValueError(f"must be {' or '.join(self.choices)}, not {shown(value)}")

    def json_schema(self) -> Schema:
        return {"enum": list(self.choices)}


class PatternType(FieldType):
    """A regular expression, kept as text."""

    def parse(self, value: object) -> str:
        if not isinstance(value, str) or not value or len(value) > 1000:
            raise ValueError(f"must be a regular expression, not {shown(value)}")
        try:
            re.compile(value)
        except (re.error, OverflowError, RecursionError) as error:
            raise ValueError(f"{shown(value)} is not a regular expression: {error}") from None
        return value

    def json_schema(self) -> Schema:
        return {"type": "string", "minLength": 1}
