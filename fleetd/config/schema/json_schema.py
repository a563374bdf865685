"""The JSON Schema of fleet.yaml, for editors and for `fleetd schema`, generated from the models that check the file.

Invariants:
- Every shorthand that the loader accepts is in it: durations, sizes, strings for lists, variables, empty values.
- It may accept more than the loader (it cannot express references, cycles and ports), never less.
"""

from __future__ import annotations

import json
from typing import Any

from pydantic import BaseModel

from fleetd.config.schema.descriptions import KEYS
from fleetd.config.schema.fleet import FleetConfig
from fleetd.config.schema.types import Arguments, CommandType, DurationType, Environment, FieldType, Flag, Size

DIALECT = "https://json-schema.org/draft/2020-12/schema"
_SHARED = {
    "duration": DurationType().json_schema(),
    "size": Size().json_schema(),
    "command": CommandType().json_schema(),
    "arguments": Arguments().json_schema(),
    "environment": Environment().json_schema(),
    "flag": Flag().json_schema(),
}


def json_schema() -> dict[str, Any]:
    """Return the JSON Schema of one fleet.yaml as plain data."""
    schema = FleetConfig.model_json_schema(by_alias=True, ref_template="#/$defs/{model}")
    definitions = schema.pop("$defs")
    models = {model.__name__: model for model in _models(BaseModel)}
    for name, definition in {**definitions, "FleetConfig": schema}.items():
        _finish(definition, models[name])
    schema["properties"]["devices"]["propertyNames"] = {"pattern": "^(host|unified|gpu[0-9]{1,3})$"}
    shared = {name: dict(value) for name, value in _SHARED.items()}
    return {
        "$schema": DIALECT,
        "title": "fleet.yaml of fleetd",
        **_share(schema),
        "$defs": {**_share(definitions), **shared},
    }


def schema_text() -> str:
    """Return the schema as the text of docs/fleet.schema.json."""
    return json.dumps(json_schema(), indent=1, ensure_ascii=False) + "\n"


def _models(base: type[BaseModel]) -> list[type[BaseModel]]:
    below = [model for model in base.__subclasses__() if model.__module__.startswith("fleetd.config.")]
    return [*below, *(deeper for model in below for deeper in _models(model))]


def _finish(definition: dict[str, Any], model: type[BaseModel]) -> None:
    """Add descriptions and defaults; allow empty values for optional keys."""
    definition.pop("title", None)
    definition.pop("description", None)
    texts = {key: text for base in reversed(model.__mro__) for key, text in KEYS.get(base.__name__, {}).items()}
    properties = definition.get("properties", {})
    for name, field in model.model_fields.items():
        key = field.alias or name
        value = {part: content for part, content in properties[key].items() if part not in ("title", "default")}
        if not field.is_required() and not _takes_null(value):
            value = {"anyOf": [*(value["anyOf"] if set(value) == {"anyOf"} else [value]), {"type": "null"}]}
        properties[key] = {"description": texts[key], **value, **_default(field)}


def _default(field: Any) -> dict[str, Any]:
    default = field.default
    if field.is_required() or default is None or isinstance(default, BaseModel):
        return {}
    for kind in field.metadata:
        if isinstance(kind, FieldType):
            default = kind.dump(default)
    return {"default": default} if isinstance(default, str | int | float) else {}


def _takes_null(schema: dict[str, Any]) -> bool:
    return schema.get("type") == "null" or any(_takes_null(part) for part in schema.get("anyOf", ()))


def _share(value: Any) -> Any:
    """Replace what many keys have in common by a reference."""
    if isinstance(value, list):
        return [_share(item) for item in value]
    if not isinstance(value, dict):
        return value
    for name, shared in _SHARED.items():
        if value == shared:
            return {"$ref": f"#/$defs/{name}"}
        parts = value.get("anyOf")
        if parts is not None and parts == [*shared.get("anyOf", [shared]), {"type": "null"}]:
            rest = {key: _share(item) for key, item in value.items() if key != "anyOf"}
            return {**rest, "anyOf": [{"$ref": f"#/$defs/{name}"}, {"type": "null"}]}
    return {key: _share(item) for key, item in value.items()}


if __name__ == "__main__":
    import sys

    sys.stdout.write(schema_text())
