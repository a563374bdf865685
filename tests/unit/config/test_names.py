"""Names derived for fleet.yaml are valid and free, whatever another program allowed."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fleetd.config.importers.compose.files import import_compose
from fleetd.config.names import free_name, process_name
from fleetd.config.schema.base import PROCESS_NAME


@pytest.mark.parametrize(
    ("text", "name"), [("web", "web"), ("my app@1", "my-app-1"), ("-._x._-", "x"), ("ü", "none"), ("a" * 70, "a" * 63)]
)
def test_process_name_replaces_what_is_invalid(text: str, name: str) -> None:
    assert process_name(text, "none") == name


@given(st.lists(st.text(max_size=80), max_size=20))
def test_derived_names_are_valid_and_unique(texts: list[str]) -> None:
    taken: set[str] = set()
    for text in texts:
        name = free_name(process_name(text, "app"), taken, {"app"})
        assert name not in taken | {"app"}
        assert re.fullmatch(PROCESS_NAME, name)
        taken.add(name)


def test_free_name_counts_and_cuts_for_the_number() -> None:
    assert free_name("a", {"a", "a-2"}) == "a-3"
    assert free_name("a" * 63, {"a" * 63}) == "a" * 61 + "-2"


def test_compose_services_of_one_long_name_are_told_apart() -> None:
    names = ["x" * 63 + end for end in ("a", "b", "c")]
    text = "services:\n" + "".join(f"  {name}: {{image: example/web, command: serve}}\n" for name in names)
    assert list(import_compose(text).data["services"]) == ["x" * 63, "x" * 61 + "-2", "x" * 61 + "-3"]
