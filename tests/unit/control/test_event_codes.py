"""The table of event codes: complete, free of class names, and equal to docs/reference/events.md."""

from __future__ import annotations

import re
from pathlib import Path
from types import ModuleType

import pytest

from fleetd.control.event_codes import CODES, SHOWN, EventCode
from fleetd.core.data import commands as c
from fleetd.core.data import events as e
from fleetd.core.data import journal as j
from fleetd.daemon.effects.executor import COMMANDS

PAGE = Path(__file__).resolve().parents[3] / "docs" / "reference" / "events.md"


def leaves(module: ModuleType, base: type) -> set[type]:
    """Return the subclasses of `base` in a module that are not a base themselves."""
    found = {one for one in vars(module).values() if isinstance(one, type) and issubclass(one, base)}
    return {one for one in found if not any(other is not one and issubclass(other, one) for other in found)}


@pytest.mark.parametrize(("module", "base"), [(e, e.Event), (c, c.Command), (j, j.JournalNote)])
def test_every_type_of_the_core_has_a_code(module: ModuleType, base: type) -> None:
    assert len(leaves(module, base)) > 10
    assert leaves(module, base) - set(CODES) == set()


def test_every_command_has_a_code() -> None:
    assert set(COMMANDS) - set(CODES) == set()


def test_codes_are_snake_case_words() -> None:
    assert [code for code in EventCode if not re.fullmatch(r"[a-z]+(_[a-z]+)*", code)] == []


def test_every_code_is_used_or_reported_by_the_daemon() -> None:
    assert set(EventCode) - set(CODES.values()) - set(SHOWN) == set()


def rows() -> dict[str, tuple[str, str]]:
    """Return meaning and data keys by code, as the page lists them."""
    found = re.findall(r"^\| `(\w+)` \| (.*?) \| (.*?) \|$", PAGE.read_text("utf-8"), re.MULTILINE)
    return {code: (meaning, data) for code, meaning, data in found}


def test_page_and_table_agree() -> None:
    table = {str(code): (info.meaning, ", ".join(f"`{key}`" for key in info.data)) for code, info in SHOWN.items()}
    assert rows() == table
