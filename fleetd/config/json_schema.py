"""The JSON Schema of fleet.yaml, for editors and for `fleetd schema`. Generated from the same models that check the file.

The rules of this file
- Every shorthand that the loader accepts is in it: durations, sizes, strings for lists, variables, empty values.
- It may accept more than the loader (references, cycles and ports cannot be said in it), never less.
"""

from __future__ import annotations

import json
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import GenerateJsonSchema

from fleetd.config.describe import KEYS
from fleetd.config.schema import FleetConfig

DIALECT = "https://json-schema.org/draft/2020-12/schema"


def json_schema() -> dict[str, Any]:
    """Return the JSON Schema of one fleet.yaml as plain data."""
    schema = FleetConfig.model_json_schema(by_alias=True, ref_template="#/$defs/{model}", schema_generator=_Plain)
    definitions = schema.pop("$defs")
    described = _descriptions()
    for name, definition in {**definitions, "FleetConfig": schema}.items():
        _finish(definition, described.get(name, {}))
    head = {"$schema": DIALECT, "title": "fleet.yaml of fleetd"}
    return {**head, **schema, "$defs": definitions}


def schema_text() -> str:
    """Return the schema as the text of docs/fleet.schema.json."""
    return json.dumps(json_schema(), indent=2, ensure_ascii=False) + "\n"


class _Plain(GenerateJsonSchema):
    """Without titles, which only repeat the keys."""

    def field_title_should_be_set(self, schema: Any) -> bool:
        return False

    def get_title_from_name(self, name: str) -> str:
        return ""


def _finish(definition: dict[str, Any], described: dict[str, str]) -> None:
    definition.pop("title", None)
    definition.pop("description", None)
    required = set(definition.get("required", ()))
    for key, value in definition.get("properties", {}).items():
        value.pop("title", None)
        value.pop("default", None)
        if key not in required and not _takes_null(value):
            value = {"anyOf": [*(value["anyOf"] if set(value) == {"anyOf"} else [value]), {"type": "null"}]}
            definition["properties"][key] = value
        if key in described:
            definition["properties"][key] = {"description": described[key], **value}


def _takes_null(schema: dict[str, Any]) -> bool:
    return schema.get("type") == "null" or any(_takes_null(part) for part in schema.get("anyOf", ()))


def _descriptions() -> dict[str, dict[str, str]]:
    """Return the sentences of every mapping with those it inherits."""
    found: dict[str, dict[str, str]] = {}
    pending: list[type[BaseModel]] = [BaseModel]
    while pending:
        for model in pending.pop().__subclasses__():
            if model.__module__.startswith("fleetd.config."):
                texts = [KEYS.get(base.__name__, {}) for base in reversed(model.__mro__)]
                found[model.__name__] = {key: text for part in texts for key, text in part.items()}
                pending.append(model)
    return found


if __name__ == "__main__":
    import sys

    sys.stdout.write(schema_text())
