"""docs/reference/exit-codes.md lists exactly the exit codes of both programs."""

from __future__ import annotations

import re
from pathlib import Path

from fleetd.cli import client, fleetd

PAGE = Path(__file__).resolve().parents[3] / "docs" / "reference" / "exit-codes.md"


def codes_in(section: str) -> set[int]:
    text = PAGE.read_text("utf-8").split(f"## {section}\n", 1)[1].split("\n## ", 1)[0]
    return {int(code) for code in re.findall(r"^\| (\d+) \|", text, re.MULTILINE)}


def test_exit_codes_page_lists_the_codes_of_fleetctl() -> None:
    assert codes_in("fleetctl") == {value for name, value in vars(client).items() if name.startswith("EXIT_")}


def test_exit_codes_page_lists_the_codes_of_fleetd() -> None:
    assert codes_in("fleetd") == {fleetd.OK, fleetd.FAILED, fleetd.BAD_CONFIG, fleetd.INTERRUPTED}
