"""docs/reference/fleet-yaml.md is current and names every key of the schema and every option of every engine."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from fleetd.config.schema.descriptions import KEYS
from fleetd.engines import registry
from fleetd.resolver.reference import COMMAND, page

PAGE = Path(__file__).resolve().parents[3] / "docs" / "reference" / "fleet-yaml.md"


def test_reference_page_is_current() -> None:
    assert PAGE.read_text("utf-8") == page(), f"write it again: {COMMAND}"


@pytest.mark.parametrize("name", KEYS)
def test_reference_page_has_every_key(name: str) -> None:
    rows = [line.split("|")[1] for line in page().splitlines() if line.startswith("| `")]
    shown = {step for row in rows for step in re.split(r"[.`\[\] ]", row)}
    sections = {"services", "instances", "models"}
    assert [key for key in KEYS[name] if key not in shown | sections] == []


@pytest.mark.parametrize("name", registry.names())
def test_reference_page_has_every_option(name: str) -> None:
    section = page().split(f"### {name}\n", 1)[1].split("\n### ", 1)[0]
    fields = registry.load(name).options.model_fields
    assert [key for key, field in fields.items() if f"| `{field.alias or key}` |" not in section] == []


def test_reference_page_gives_default_and_effect_of_a_key() -> None:
    row = next(line for line in page().splitlines() if line.startswith("| `restart.backoff.max` |"))
    assert row == "| `restart.backoff.max` | duration | `1m` | Longest delay. | hot |"
