"""The verbs that users of other tools type: each works, or prints the line that names ours."""

from __future__ import annotations

import click
import pytest
from click.testing import CliRunner

from fleetd.cli.fleetctl import cli
from fleetd.cli.foreign import ALIASES, EXAMPLES, FOREIGN, SECTIONS, line_for, nearest

VERBS = cli.list_commands(click.Context(cli))


def typed(*words: str) -> tuple[int, str]:
    """Run fleetctl against no daemon; return the exit code and everything that it printed."""
    ran = CliRunner().invoke(cli, ["--socket", "/nonexistent/fleetd.sock", *words], standalone_mode=False)
    error = ran.exception
    text = ran.output + (error.format_message() if isinstance(error, click.ClickException) else str(error or ""))
    return (error.exit_code if isinstance(error, click.ClickException) else 0), text


# every row of what fingers type: the words, and what the line has to name
ROWS = [
    ("monit", "fleetctl status --watch"),
    ("save", "not needed"),
    ("resurrect", "not needed"),
    ("startup", "fleetctl install-service"),
    ("flush", "rotate"),
    ("env bot", "fleetd render"),
    ("scale bot 3", "replicas"),
    ("reset bot", "fleetctl start bot"),
    ("delete bot", "fleet.yaml"),
    ("kill bot", "fleetctl signal KILL bot"),
    ("update", "fleetctl daemon-reexec"),
    ("sendSignal HUP bot", "fleetctl signal"),
    ("jlist", "fleetctl pm2-jlist"),
    ("list-units", "--failed"),
    ("cat bot", "fleetd render"),
    ("edit bot", "fleet.yaml"),
    ("reset-failed bot", "fleetctl start bot"),
    ("is-active bot", "fleetctl status bot"),
    ("mask bot", "fleetctl stop bot"),
    ("disable bot", "enabled: false"),
    ("daemon-reload", "fleetctl reload"),
    ("list-dependencies bot", "fleetctl status bot"),
    ("journalctl", "fleetctl logs"),
    ("get pods", "fleetctl status"),
    ("rollout undo bot", "--rolling"),
    ("top", "does not exist yet"),
    ("top", "fleetctl status --watch"),
    ("wait bot", "fleetctl start bot"),
    ("cordon bot", "fleetctl drain bot"),
    ("pull qwen", "fleetctl models sync"),
    ("rm qwen", "fleetctl models prune"),
    ("create qwen", "modelfile"),
    ("serve", "fleetd run"),
    ("ui", "fleetctl status --watch"),
    ("running", "fleetctl ps"),
    ("upstream qwen", "fleetctl status qwen"),
    ("reload bot", "fleetctl restart bot --rolling"),
    ("logs bot --previous", "one log holds all runs"),
]


@pytest.mark.parametrize(("words", "named"), ROWS, ids=[f"{words}: {named}" for words, named in ROWS])
def test_foreign_verb_prints_line_that_names_ours(words: str, named: str) -> None:
    code, text = typed(*words.split())
    assert code == 2
    assert named in text


@pytest.mark.parametrize(
    "words",
    [
        "ls",
        "list",
        "describe bot",
        "show bot",
        "logs",
        "logs bot --lines 100",
        "logs bot --tail 5",
        "logs -u bot -f --since yesterday",
        "status --failed",
        "restart bot --rolling",
        "apply -f /etc/hostname",
        "diff -f /etc/hostname",
        "events bot -n 3",
    ],
)
def test_same_fingers_reach_the_daemon(words: str) -> None:
    code, text = typed(*words.split())
    assert "not running" in text, (code, text)


def test_help_is_a_verb_and_knows_aliases() -> None:
    assert "Usage" in typed("help")[1]
    assert "Show the fleet, or NAME in detail." in typed("help", "status")[1]
    assert typed("help", "ls")[1] == typed("help", "status")[1]
    assert "does not exist yet" in typed("help", "top")[1]


def test_tables_name_verbs_that_exist() -> None:
    known = set(VERBS)
    assert {verb for verbs in SECTIONS.values() for verb in verbs} <= known
    assert set(ALIASES.values()) <= known
    assert set(FOREIGN).isdisjoint(known)
    assert set(FOREIGN).isdisjoint(ALIASES)
    assert set(ALIASES).isdisjoint(known)
    for line in FOREIGN.values():
        for words in line.split("fleetctl ")[1:]:
            assert words.split()[0].strip(",.;:)(") in known | {"has"}, line


@pytest.mark.parametrize("verb", [verb for verb in VERBS if verb in EXAMPLES])
def test_help_has_examples_that_parse(verb: str) -> None:
    assert EXAMPLES[verb][0] in typed(verb, "--help")[1]


@pytest.mark.parametrize("word", ["statr", "stpo", "retsart", "sutdown", "stopp", "starrt", "shutdwn", "unlod"])
def test_nearest_never_suggests_a_stop_or_start(word: str) -> None:
    assert nearest(word, VERBS) not in ("stop", "start", "restart", "shutdown", "unload", "drain", "signal")


def test_line_for_takes_the_name_that_was_typed() -> None:
    assert line_for("mask", ["--now", "bot"]) == (line_for("mask", []) or "").replace("NAME", "bot")
    assert line_for("statsu", ["x"]) is None
    assert nearest("statsu", VERBS) == "status"
