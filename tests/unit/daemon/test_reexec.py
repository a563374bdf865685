"""The command line and the pending orders of a re-execution."""

from __future__ import annotations

from pathlib import Path

import pytest

from fleetd.core.data.events import RestartDue
from fleetd.daemon.reexec import PendingOrders, command_line

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
def test_command_line_names_the_active_file(words: list[str]) -> None:
    assert command_line(words, NEW) == ["-m", "fleetd", "run", "--config", "/etc/n.yaml"]


def test_command_line_keeps_all_other_options() -> None:
    words = ["-X", "dev", "/usr/bin/fleetd", "run", "--log-file", "x.log", "--config", "a", "--log-level", "debug"]
    kept = ["-X", "dev", "/usr/bin/fleetd", "run", "--log-file", "x.log", "--log-level", "debug"]
    assert command_line(words, NEW) == [*kept, "--config", "/etc/n.yaml"]


def test_pending_orders_restart_only_adopted_processes() -> None:
    orders = PendingOrders({"a": "an operator", "gone": "an operator"}, {"b": "a schedule"})
    assert list(orders.events(["a", "b", "c"])) == [
        RestartDue("a", "an operator"),
        RestartDue("b", "a schedule", in_turn=True),
    ]
