"""The JSON Schema says what the loader accepts, is current on disk, and every key has its sentence."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fleetd.config.schema.descriptions import KEYS
from fleetd.config.schema.json_schema import json_schema, schema_text
from fleetd.config.yaml.parser import compose, read_source
from fleetd.config.yaml.transform import plain
from fleetd.errors import ConfigError

ROOT = Path(__file__).parents[3]
EXAMPLES = [
    *sorted((ROOT / "examples").rglob("*.yaml")),
    *ROOT.glob("fleet.yaml"),
    Path(__file__).with_name("contract.yaml"),
]
TYPES: dict[str, Callable[[Any], bool]] = {
    "object": lambda value: isinstance(value, dict),
    "array": lambda value: isinstance(value, list),
    "string": lambda value: isinstance(value, str),
    "integer": lambda value: isinstance(value, int) and not isinstance(value, bool),
    "number": lambda value: isinstance(value, int | float) and not isinstance(value, bool),
    "boolean": lambda value: isinstance(value, bool),
    "null": lambda value: value is None,
}
KNOWN_WORDS = {
    "$schema", "$defs", "$ref", "title", "description", "default", "examples", "type", "anyOf", "oneOf", "const", "enum", "pattern",
    "minLength", "maxLength", "minimum", "maximum", "properties", "required", "additionalProperties", "propertyNames", "items",
    "minItems", "minProperties",
}  # fmt: skip


def matches(schema: dict[str, Any], value: Any, root: dict[str, Any]) -> bool:
    """Validate by the words of JSON Schema that this schema uses; an unknown word fails the test that counts them."""
    if "$ref" in schema and not matches(root["$defs"][schema["$ref"].rsplit("/", 1)[1]], value, root):
        return False
    kinds = schema.get("type", [])
    checks = [
        not kinds or any(TYPES[kind](value) for kind in ([kinds] if isinstance(kinds, str) else kinds)),
        "anyOf" not in schema or any(matches(part, value, root) for part in schema["anyOf"]),
        "oneOf" not in schema or sum(matches(part, value, root) for part in schema["oneOf"]) == 1,
        "const" not in schema or (value == schema["const"] and type(value) is type(schema["const"])),
        "enum" not in schema or value in schema["enum"],
    ]
    if isinstance(value, str):
        checks.append(re.search(schema.get("pattern", ""), value) is not None)
        checks.append(schema.get("minLength", 0) <= len(value) <= schema.get("maxLength", len(value)))
    if TYPES["number"](value):
        checks.append(schema.get("minimum", value) <= value <= schema.get("maximum", value))
    if isinstance(value, list):
        checks.append(len(value) >= schema.get("minItems", 0))
        checks += [matches(schema.get("items", {}), item, root) for item in value]
    if isinstance(value, dict):
        checks += _object(schema, value, root)
    return all(checks)


def _object(schema: dict[str, Any], value: dict[str, Any], root: dict[str, Any]) -> list[bool]:
    properties, others = schema.get("properties", {}), schema.get("additionalProperties", True)
    checks = [key in value for key in schema.get("required", [])]
    checks.append(len(value) >= schema.get("minProperties", 0))
    for key, item in value.items():
        checks.append(matches(schema.get("propertyNames", {}), key, root))
        if key in properties:
            checks.append(matches(properties[key], item, root))
        elif isinstance(others, dict):
            checks.append(matches(others, item, root))
        else:
            checks.append(others)
    return checks


def words(schema: Any) -> set[str]:
    if isinstance(schema, list):
        return {word for part in schema for word in words(part)}
    if not isinstance(schema, dict):
        return set()
    inner = [words(part) for key in ("properties", "$defs") for part in schema.get(key, {}).values()]
    direct = [words(part) for key, part in schema.items() if key not in ("properties", "$defs", "default", "examples")]
    return set(schema).union(*inner, *direct)


def read(text: str, folder: Path) -> Any:
    path = folder / "f.yaml"
    path.write_text(text, encoding="utf-8")
    return plain(compose(read_source(path, "f.yaml")))


def test_schema_file_is_current() -> None:
    assert (ROOT / "docs" / "fleet.schema.json").read_text("utf-8") == schema_text(), (
        "run: python -m fleetd.config.schema.json_schema > docs/fleet.schema.json"
    )


def test_schema_uses_only_keywords_of_this_check() -> None:
    assert words(json_schema()) <= KNOWN_WORDS


def test_schema_every_key_has_one_description() -> None:
    schema = json_schema()
    keys = {key: set(part["properties"]) for key, part in schema["$defs"].items() if "properties" in part}
    keys["FleetConfig"] = set(schema["properties"])
    for part in (*schema["$defs"].values(), schema):
        assert all(
            value["description"].endswith((".", "…", "?", "pull", "ready"))
            for value in part.get("properties", {}).values()
        )
    for name, texts in KEYS.items():
        if name in keys:
            assert set(texts) <= keys[name], name


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_schema_accepts_example(path: Path) -> None:
    schema = json_schema()
    value = plain(compose(read_source(path, path.name)))
    for key, part in value.items():
        assert matches(schema["properties"][key], part, schema), key
    assert matches(schema, value, schema)


ACCEPTED = (
    "version: 1\n",
    "services:\ninstances: ~\n",
    "services: {a: {command: node x, port: '${PORT}', enabled: '${ON:-true}', max_age: '${AGE}', stop: }}\n",
    "services: {a: {command: [node, 8080, true], args: -v, env: {A: 1, B: true, C: x}, env_file: [a, b], umask: 0022}}\n",
    "services: {a: {command: x, depends_on: [b]}}\n",
    "services: {a: {command: x, depends_on: b}}\n",
    "services: {a: {command: x, depends_on: {b: completed}}}\n",
    "services: {a: {command: x, stop: {signal: 15, timeout: 0, command: x y}, hooks: {pre_start: [a, b]}}}\n",
    "services: {a: {command: x, limits: {memory: 1073741824}, max_age: 1h30m, logs: {max_size: 1.5GiB}}}\n",
    "models: {m: {instance: o, memory: auto, ttl: 0}, n: {engine: vllm, memory: 8GiB}, o: {engine: x, memory: {gpu0: 10Gi}}}\n",
    "models: {m: {instance: [a, b], aliases: x, fallback: [y]}, r: {route: [{to: m}, {to: n, weight: 9}]}}\n",
    "devices: {gpu0: {budget: 85%}, host: {budget: 48GB}, gpu1: {budget: 1024000000}}\n",
    "include: a.yaml\n",
    "include: [a.yaml, 'b/*.yaml']\n",
)
REFUSED = (
    "version: 2\n",
    "service: {}\n",
    "services: {a: {}}\n",
    "services: {a: {command: x, port: 0}}\n",
    "services: {a: {command: x, max_age: 10}}\n",
    "services: {a: {command: x, max_age: 10 minutes}}\n",
    "services: {a: {command: x, limits: {memory: 10G}}}\n",
    "services: {a: {command: x, limits: {memory: 85%}}}\n",
    "services: {a: {command: x, restart: {policy: sometimes}}}\n",
    "services: {a: {command: x, enabled: no}}\n",
    "services: {a: {command: x, env: [A=1]}}\n",
    "models: {m: {}}\n",
    "models: {m: {instance: o, engine: vllm}}\n",
    "models: {m: {engine: vllm, from: x}}\n",
    "devices: {gpu: {}}\n",
)


@pytest.mark.parametrize("text", ACCEPTED)
def test_schema_accepts_every_shorthand(text: str, tmp_path: Path) -> None:
    schema = json_schema()
    assert matches(schema, read(text, tmp_path), schema)


@pytest.mark.parametrize("text", REFUSED)
def test_schema_rejects_invalid_value(text: str, tmp_path: Path) -> None:
    schema = json_schema()
    assert not matches(schema, read(text, tmp_path), schema)


def test_loader_rejects_what_the_schema_rejects(tmp_path: Path) -> None:
    """What the schema refuses, the loader refuses too."""
    from fleetd.config.load import load

    for text in REFUSED:
        (tmp_path / "f.yaml").write_text(text)
        with pytest.raises(ConfigError):
            load(tmp_path / "f.yaml", {})
