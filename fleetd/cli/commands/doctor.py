"""`fleetctl doctor`: find what keeps a fleet from running, with the command that helps.

Invariants:
- It works without a daemon, with a hung one, without a fleet.yaml and with an invalid one, and always ends.
- Exit code 0: no FAIL; 1: a FAIL. Nothing is changed.
"""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fleetd.cli.client import (
    EXIT_FAILED,
    EXIT_OK,
    EXIT_USAGE,
    Client,
    CliError,
    NotRunning,
    RequestRefused,
    Unreachable,
    is_locked,
    socket_candidates,
)
from fleetd.cli.context import Session, forms
from fleetd.cli.render import clean
from fleetd.units import expand_home

if TYPE_CHECKING:
    from fleetd.setup.doctor.facts import DaemonFact

CONNECT_S, ANSWER_S = 1.0, 2.0
COLOURS = {"PASS": "32", "WARN": "33", "FAIL": "31"}


@click.command()
@click.option("--config", "-c", type=click.Path(), help="The fleet.yaml (default: the daemon's).")
@click.option("--quiet", "-q", is_flag=True, help="Print only WARN and FAIL.")
@forms("text", "json")
def doctor(session: Session, config: str | None, quiet: bool) -> int:
    """Find what keeps a fleet from running.

    Prints PASS, WARN or FAIL per check, each problem with the command that
    fixes it. Needs no daemon and no fleet.yaml. Changes nothing.

    \b
    Exit codes: 0 no FAIL, 1 a FAIL.
    """
    if config is not None and not Path(expand_home(config)).exists():
        raise CliError(f"no such file: {config!r}", EXIT_USAGE)
    from fleetd.setup.doctor.gather import gather
    from fleetd.setup.doctor.report import document, examine

    daemon = daemon_fact(session)
    path = Path(expand_home(config)).absolute() if config is not None else _config(daemon.config)
    findings = examine(gather(path, os.environ, daemon))
    report = document(findings)
    if not session.emit(report):
        _print(session, report, quiet)
    return EXIT_OK if report["ok"] else EXIT_FAILED


def daemon_fact(session: Session) -> DaemonFact:
    """Ask the daemon for its state; one that hangs costs seconds."""
    from fleetd.setup.doctor.facts import DaemonFact

    candidates = socket_candidates(session.socket, os.environ)
    socket = str(candidates[0])
    try:
        status = Client(candidates, connect_s=CONNECT_S, answer_s=ANSWER_S).get("/v1/status")
    except NotRunning as error:
        held = next((path for path in candidates if is_locked(path)), None)
        if held is None:
            return DaemonFact("stopped", socket)
        return DaemonFact("silent", str(held), _holder(held), problem=str(error))
    except Unreachable as error:
        held = next((path for path in candidates if path.exists()), candidates[0])
        state = "denied" if "permission denied" in str(error) else "silent"
        return DaemonFact(state, str(held), _holder(held), problem=str(error))
    except RequestRefused as error:
        return DaemonFact("silent", socket, problem=str(error))
    found = status.get("daemon") or {}
    return DaemonFact(
        "running",
        socket,
        found.get("pid"),
        found.get("version"),
        config=found.get("config"),
        config_error=found.get("config_error"),
        store_problem=found.get("store_problem"),
    )


def _holder(socket: Path) -> int | None:
    """Return the pid in the lock next to a socket."""
    try:
        text = socket.with_name("fleetd.lock").read_text()[:32].strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None


def _config(of_daemon: str | None) -> Path | None:
    """Return the fleet.yaml to look at: the running daemon's, else the first of the search order."""
    if of_daemon is not None:
        return Path(of_daemon)
    own = Path(os.environ.get("XDG_CONFIG_HOME") or Path("~/.config").expanduser())
    places = [Path("fleet.yaml").absolute(), own / "fleetd/fleet.yaml", Path("/etc/fleetd/fleet.yaml")]
    return next((place for place in places if place.is_file()), None)


def _print(session: Session, report: dict[str, Any], quiet: bool) -> None:
    screen = session.screen
    for finding in report["findings"]:
        verdict = finding["verdict"]
        if quiet and verdict == "PASS":
            continue
        mark = screen.paint(verdict, COLOURS[verdict])
        screen.out.write(f"{mark}  {finding['check']:<18} {clean(finding['text'])}\n")
        if finding["fix"]:
            screen.out.write(f"      {'fix:':>18} {clean(finding['fix'])}\n")
    counts = Counter(report["counts"])
    screen.out.write(f"{counts['fail']} FAIL, {counts['warn']} WARN, {counts['pass']} PASS\n")


VERBS: tuple[click.Command, ...] = (doctor,)
