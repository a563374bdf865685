"""The pages of the documentation point to files that exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = [*sorted((ROOT / "docs").rglob("*.md")), *sorted(ROOT.glob("*.md")), *sorted((ROOT / "fleetd").rglob("*.md"))]


def broken_links(text: str, folder: Path) -> list[str]:
    """Return the relative links of a page that lead nowhere, anchors left out."""
    links = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text)
    return [link for link in links if "://" not in link and not (folder / link).exists()]


def missing_modules(text: str) -> list[str]:
    """Return paths such as `core/queue.py` or `engines/NAME/options.py` that no module of fleetd has."""
    named = re.findall(r"`((?:[a-zA-Z_]+/)+[a-z0-9_]+\.py)`", text)
    return [
        name
        for name in named
        if not any((ROOT / "fleetd").glob(name.replace("NAME", "*"))) and not (ROOT / name).exists()
    ]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_page_has_no_broken_link(page: Path) -> None:
    assert broken_links(page.read_text("utf-8"), page.parent) == []


def test_architecture_page_names_existing_modules() -> None:
    assert missing_modules((ROOT / "docs" / "explanation" / "architecture.md").read_text("utf-8")) == []


def test_checks_find_a_broken_link_and_a_missing_module() -> None:
    assert broken_links("[a](nowhere.md) [b](test_docs.py#x) [c](https://x/y)", Path(__file__).parent) == ["nowhere.md"]
    assert missing_modules("`core/nothing.py` `engines/NAME/engine.py` `core/fleet.py`") == ["core/nothing.py"]
