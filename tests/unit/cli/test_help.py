"""Help fits a terminal of 80 columns: short texts, imperative, nothing cut off."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import click
import pytest

from fleetd.cli.fleetctl import VERBS
from fleetd.cli.fleetctl import cli as fleetctl
from fleetd.cli.fleetd import cli as fleetd

COLUMNS, SHORT = 80, 45


def commands(command: click.Command, path: str) -> Iterator[tuple[str, click.Command]]:
    yield path, command
    if isinstance(command, click.Group):
        for name in command.list_commands(click.Context(command)):
            below = command.get_command(click.Context(command), name)
            assert below is not None
            yield from commands(below, f"{path} {name}")


ALL = [*commands(fleetctl, "fleetctl"), *commands(fleetd, "fleetd")]


@pytest.mark.parametrize(("path", "command"), ALL, ids=[path for path, _ in ALL])
def test_help_fits_80_columns_and_cuts_nothing(path: str, command: click.Command) -> None:
    context = click.Context(command, info_name=path, terminal_width=COLUMNS)
    lines = command.get_help(context).splitlines()
    assert [line for line in lines if len(line) > COLUMNS] == []
    assert [line for line in lines if line.endswith("...") and "Usage:" not in line] == []


@pytest.mark.parametrize(("path", "command"), ALL, ids=[path for path, _ in ALL])
def test_help_of_command_and_options_is_short(path: str, command: click.Command) -> None:
    summary = (command.help or "").strip().splitlines()[0]
    assert len(summary) <= SHORT, summary
    options = [option for option in command.params if isinstance(option, click.Option) and not option.hidden]
    assert [
        option.help for option in options if len(option.help or "") > SHORT and "[default:" not in option.help
    ] == []
    assert [option.name for option in options if not option.help and option.name != "version"] == []


def test_verbs_table_names_every_verb_of_every_module() -> None:
    folder = Path(import_module("fleetd.cli.commands").__path__[0])
    modules = {path.stem for path in folder.glob("*.py")} - {"__init__"}
    defined = {
        name: tuple(verb.name for verb in import_module(f"fleetd.cli.commands.{name}").VERBS) for name in modules
    }
    assert defined == VERBS
