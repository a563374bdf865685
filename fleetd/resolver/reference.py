"""Generate docs/reference/fleet-yaml.md from the schema, the descriptions, the change effects and the engines' options.

Invariant: a test fails when the page differs from `python -m fleetd.resolver.reference`.
"""

from __future__ import annotations

import json
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from fleetd.config.schema import types as value_types
from fleetd.config.schema.base import Block
from fleetd.config.schema.change_effects import effect_of
from fleetd.config.schema.descriptions import KEYS
from fleetd.config.schema.fleet import FleetConfig
from fleetd.config.schema.model import EngineModel, HeldModel, ModelKeys, RouteModel
from fleetd.config.schema.process import DependsOn, EngineKeys, Instance, PlacedKeys, ProcessKeys, Service
from fleetd.config.schema.unsupported import is_unsupported
from fleetd.engines import option_types, registry
from fleetd.units import format_duration, format_size

COMMAND = "python -m fleetd.resolver.reference > docs/reference/fleet-yaml.md"

_UNBOUNDED = 10_000_000  # a maximum from here on only guards against overflow

# The word for a value type, where its JSON Schema does not say enough.
_WORDS: Mapping[type, str] = {
    value_types.DurationType: "duration",
    value_types.Size: "size",
    value_types.BudgetType: "size or percentage",
    value_types.MemoryType: "`auto`, size, or size per device",
    value_types.CommandType: "command",
    value_types.Arguments: "list of arguments",
    value_types.Environment: "mapping of strings",
    value_types.SignalName: "signal",
    value_types.Umask: "octal string",
    value_types.AddressType: "address:port",
    value_types.HttpUrl: "URL",
    value_types.PatternType: "regular expression",
    value_types.DeviceName: "device",
    value_types.Flag: "boolean",
    value_types.Text: "string",
    DependsOn: "names, or a mapping to `started`, `ready` or `completed`",
    option_types.SecretType: "string (secret)",
    option_types.PathType: "path",
}


@dataclass(frozen=True, slots=True)
class Section:
    """One section: a mapping at `prefix`; `kind` selects its change effects."""

    title: str
    anchor: str
    text: str
    example: str
    model: type[BaseModel]
    prefix: str
    kind: str
    without: type[BaseModel] | None = None  # keys of this base are in another section


SECTIONS: Sequence[Section] = (
    Section(
        "Top level",
        "top-level",
        "The keys of the file itself. `include` adds more files with the same schema.",
        "version: 1\nname: mac-studio\ninclude: [models.d/*.yaml]",
        FleetConfig,
        "",
        "fleet",
    ),
    Section(
        "services.NAME",
        "services",
        "A plain process. The keys below are shared by every process: services, instances, and models with an engine.",
        "services:\n  bot:\n    command: [node, ./dist/index.js]\n    cwd: /srv/bot\n    depends_on: {ollama: ready}",
        Service,
        "services.NAME.",
        "service",
    ),
    Section(
        "instances.NAME",
        "instances",
        "An engine server, which may hold many models. It has every key of a service except that `command` is optional, and:",
        "instances:\n  ollama: {engine: ollama, port: 11434, replicas: 3, options: {num_parallel: 4}}",
        Instance,
        "instances.NAME.",
        "instance",
        PlacedKeys,
    ),
    Section(
        "models.NAME, every model",
        "models",
        "Keys of every model that can be in memory: held by a server (`instance:`) or with a process of its own (`engine:`).",
        "models:\n  everyday: {instance: ollama, ttl: 10m, priority: 5, fallback: [small]}",
        ModelKeys,
        "models.NAME.",
        "engine model",
    ),
    Section(
        "models.NAME with instance",
        "held-models",
        "A model that a server holds.",
        'models:\n  poet: {instance: ollama, served_as: "poet:q8_0", from: /models/poet.gguf, quantize: Q8_0}',
        HeldModel,
        "models.NAME.",
        "held model",
        ModelKeys,
    ),
    Section(
        "models.NAME with engine",
        "engine-models",
        "A model with a process of its own. It has every key of an [instance](#instances) and of [every model](#models), and:",
        "models:\n  coder: {engine: llamacpp, options: {model: /models/coder.gguf, context_length: 8192}}",
        EngineModel,
        "models.NAME.",
        "engine model",
        EngineKeys,
    ),
    Section(
        "models.NAME with route",
        "routes",
        "A name that routes to other models by weight.",
        "models:\n  chat: {route: [{to: coder, weight: 90}, {to: everyday, weight: 10}]}",
        RouteModel,
        "models.NAME.",
        "route",
    ),
)
# Mappings of names: their entries have sections of their own, or are the same as others.
_ENTRIES = frozenset({"services", "instances", "models"})

HEAD = f"""\
# fleet.yaml

Written by `{COMMAND}` from the schema. Do not edit.

Every key with its type, its default, its meaning, and the effect of changing it in a running fleet:

| effect | meaning |
|---|---|
| hot | applies to the running process; nothing restarts |
| restart | the process restarts |
| reload | the held model is created or loaded again |
| scale | replicas are added or removed; the others stay |
| daemon | applies when the daemon starts; until then `status` reports it |

Values: a *duration* is `250ms`, `10s`, `5m`, `1h30m` or `7d`; a *size* is `512MiB`, `14GiB`, `16GB` (decimal) or integer
bytes; a *command* is a list, or a string that is split like a shell splits words. `${{VAR}}`, `${{VAR:-default}}`, `${{VAR:?message}}` and
`$$` work in every value. In `command`, `args` and `env` of a process with a port, `{{port}}`, `{{host}}`, `{{name}}` and
`{{replica}}` are replaced.

`fleetd check` reports all mistakes at once. The rules that span several keys are in [lifecycle rules](lifecycle.md).
"""


def page() -> str:
    """Return the whole page."""
    parts = [HEAD, _contents()]
    for section in SECTIONS:
        parts.append(
            f'## {section.title}<a id="{section.anchor}"></a>\n\n{section.text}\n\n```yaml\n{section.example}\n```\n'
        )
        parts.append(_table(list(_rows(section))))
    parts.append(
        "## Engine options\n\nThe keys of `options`, per engine. A change of an option restarts the process.\n"
    )
    for name in registry.names():
        options = registry.load(name).options
        parts.append(f"### {name}\n")
        rows = [_option_row(key, field) for key, field in options.model_fields.items()]
        parts.append(_table(rows, effects=False) if rows else "No options.\n")
    return "\n".join(parts)


def _contents() -> str:
    links = [f"- [{section.title}](#{section.anchor})" for section in SECTIONS]
    return "\n".join([*links, "- [Engine options](#engine-options)", ""])


@dataclass(frozen=True, slots=True)
class Row:
    path: str
    type: str
    default: str
    meaning: str
    effect: str = ""


def _table(rows: Sequence[Row], effects: bool = True) -> str:
    head = ["key", "type", "default", "meaning", *(["change"] if effects else [])]
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    for row in rows:
        cells = [f"`{row.path}`", row.type, row.default, row.meaning, *([row.effect] if effects else [])]
        lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    return "\n".join([*lines, ""])


def _rows(section: Section) -> Iterator[Row]:
    inherited = set(section.without.model_fields) if section.without is not None else set()
    if section.without is EngineKeys:
        inherited |= set(ModelKeys.model_fields) - {"start"}
        inherited -= {"start"}
    yield from _rows_of(section.model, (), section, inherited)


def _rows_of(model: type[BaseModel], path: tuple[str, ...], section: Section, skip: set[str]) -> Iterator[Row]:
    texts = {key: text for base in reversed(model.__mro__) for key, text in KEYS.get(base.__name__, {}).items()}
    for name, field in model.model_fields.items():
        key = field.alias or name
        if name in skip or (not path and section.kind == "fleet" and key in _ENTRIES):
            continue
        here = (*path, key)
        inner, step = _block_in(field.annotation)
        supported = texts[key] if not _is_unsupported(section, here) else f"{texts[key]} *Not supported yet.*"
        if inner is not None and inner not in (ProcessKeys, ModelKeys):
            deeper = (*here[:-1], here[-1] + step)
            yield Row(_shown(section, deeper), "mapping" if not step.startswith("[") else "list", "", supported, "")
            yield from _rows_of(inner, deeper, section, set())
        else:
            kind = "mapping" if inner is not None else _type(field)
            yield Row(_shown(section, here), kind, _default(field), supported, _effect(section, here))


def _is_unsupported(section: Section, path: tuple[str, ...]) -> bool:
    prefix = tuple("*" if part == "NAME" else part for part in section.prefix.split(".") if part)
    plain = tuple(part for step in path for part in step.replace("[]", ".*").replace(".NAME", ".*").split("."))
    return is_unsupported((*prefix, *plain))


def _shown(section: Section, path: tuple[str, ...]) -> str:
    return section.prefix.split("NAME.", 1)[-1] + ".".join(path) if section.prefix else ".".join(path)


def _effect(section: Section, path: tuple[str, ...]) -> str:
    plain = tuple(step.split(".")[0].replace("[]", "") for step in path)
    return str(effect_of(section.kind, plain))


def _block_in(annotation: Any) -> tuple[type[Block] | None, str]:
    """Return the mapping in an annotation, and the step to it: ``, `.NAME` or `[]`."""
    if isinstance(annotation, type) and issubclass(annotation, Block):
        return annotation, ""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return _block_in(arguments[0])
    if origin in (types.UnionType, typing.Union):
        return next((block for block in map(_block_in, arguments) if block[0] is not None), (None, ""))
    if origin is dict:
        return _block_in(arguments[1])[0], ".NAME"
    if origin is tuple and arguments:
        return _block_in(arguments[0])[0], "[]"
    return None, ""


def _type(field: FieldInfo) -> str:
    kinds = [kind for kind in field.metadata if isinstance(kind, value_types.FieldType)]
    kinds += [kind for kind in _metadata(field.annotation) if isinstance(kind, value_types.FieldType)]
    origin = typing.get_origin(field.annotation)
    if kinds:
        word = word_of(kinds[0])
        return f"list of {word}" if kinds[0] not in field.metadata and origin is tuple else word
    return {dict: "mapping", tuple: "list"}.get(origin, "value") if origin is not None else "value"


def _metadata(annotation: Any) -> Iterator[Any]:
    if typing.get_origin(annotation) is typing.Annotated:
        yield from typing.get_args(annotation)[1:]
    for part in typing.get_args(annotation):
        if typing.get_origin(part) is not None:
            yield from _metadata(part)


def word_of(kind: value_types.FieldType) -> str:
    """Return the words for a value type: `duration`, `integer 1 to 256`, `a, b or c` …"""
    match kind:
        case value_types.Whole(minimum=low, maximum=high):
            if high >= _UNBOUNDED:
                return f"integer from {low}"
            return f"integer {low} to {high}" if low < high else f"`{low}`"
        case value_types.Real(minimum=low, maximum=high):
            return f"number {low:g} to {high:g}"
        case value_types.Choice(choices=choices):
            return " or ".join(f"`{choice}`" for choice in choices)
        case value_types.Strings(item=item):
            return f"{word_of(item)}, or a list"
        case option_types.AnyOf(what=what):
            return what
        case option_types.Several(item=item):
            return f"list of {word_of(item)}"
    for base in type(kind).__mro__:
        if base in _WORDS:
            return _WORDS[base]
    found = kind.json_schema().get("type", "value")
    return " or ".join(found) if isinstance(found, list) else str(found)


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    default = field.default
    for kind in [*field.metadata, *_metadata(field.annotation)]:
        if isinstance(kind, value_types.DurationType) and isinstance(default, int | float):
            return f"`{format_duration(default)}`"
        if isinstance(kind, value_types.Size) and isinstance(default, int):
            return f"`{format_size(default)}`"
        if (
            isinstance(kind, value_types.FieldType)
            and default is not None
            and type(default) not in (str, int, float, bool)
        ):
            default = kind.dump(default)
    if (
        default is None
        or default in ((), [], {})
        or isinstance(default, BaseModel)
        or repr(default) == "PydanticUndefined"
    ):
        return ""
    return f"`{json.dumps(default, default=str)}`" if not isinstance(default, str) else f"`{default}`"


def _option_row(key: str, field: FieldInfo) -> Row:
    return Row(field.alias or key, _type(field), _default(field), _sentence(field.description or ""))


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}." if text and not text.endswith(".") else text


if __name__ == "__main__":
    import sys

    sys.stdout.write(page())
