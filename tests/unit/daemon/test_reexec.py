"""What crosses a re-execution, without one."""

from __future__ import annotations

from pathlib import Path

import pytest

from fleetd.core.data.events import RestartDue
from fleetd.daemon.reexec import Wishes, command_line

NEW = Path("/etc/n.yaml")


@pytest.mark.parametrize(
    "words",
    [
        ["-m", "fleetd", "run"],
        ["-m", "fleetd", "run", "--config", "fleet.yaml"],
        ["-m", "fleetd", "run", "--config=fleet.yaml"],
        ["-m", "fleetd", "run", "-c", "fleet.yaml"],
        ["-m", "fleetd", "run", "-cfleet.yaml"],
    ],
)
def test_the_new_program_is_given_the_file_of_now(words: list[str]) -> None:
    assert command_line(words, NEW) == ["-m", "fleetd", "run", "--config", "/etc/n.yaml"]


def test_all_else_of_the_command_line_stays() -> None:
    words = ["-X", "dev", "/usr/bin/fleetd", "run", "--log-file", "x.log", "--config", "a", "--log-level", "debug"]
    kept = ["-X", "dev", "/usr/bin/fleetd", "run", "--log-file", "x.log", "--log-level", "debug"]
    assert command_line(words, NEW) == [*kept, "--config", "/etc/n.yaml"]


def test_only_what_was_adopted_is_restarted_again() -> None:
    wishes = Wishes({"a": "an operator", "gone": "an operator"}, {"b": "a schedule"})
    assert list(wishes.events(["a", "b", "c"])) == [
        RestartDue("a", "an operator"),
        RestartDue("b", "a schedule", in_turn=True),
    ]
