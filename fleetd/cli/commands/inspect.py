"""Read-only verbs: status, ps, logs, events, story, explain, dump, pm2-jlist, version."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from fnmatch import fnmatchcase
from typing import Any

import click

from fleetd.cli.client import EXIT_NOT_RUNNING, EXIT_OK, EXIT_UNKNOWN, Client, CliError, RequestRefused, Unreachable
from fleetd.cli.context import FORMS, Session, Since, completion_of, forms, names_argument, near_name, say
from fleetd.cli.problems import is_problem
from fleetd.cli.render import PREFIX_COLOURS, clean
from fleetd.cli.views import detail, tables
from fleetd.cli.views.lines import event_line, log_line
from fleetd.control.wire import OWN_STREAM, SCHEMA, document

WATCH_S = 1.0
_LINES = 50
_MOST_LINES = 100_000
_EVER_S = 365 * 86_400.0


@click.command()
@names_argument("processes", "models", required=False)
@click.option("-w", "--watch", is_flag=True, help="Refresh every second until Ctrl-C.")
@click.option("--failed", is_flag=True, help="Show only what has a problem.")
@forms(*FORMS)
def status(session: Session, names: tuple[str, ...], watch: bool, failed: bool) -> int:
    """Show the fleet, or NAME in detail.

    With NAME the exit code is 0 for running, 3 for not running or unhealthy, 4 for unknown.
    """
    if not watch:
        return _status_once(session, names, failed)
    return _watch(session, names, failed)


def _status_once(session: Session, names: tuple[str, ...], failed: bool = False) -> int:
    client = session.client
    if len(names) == 1 and not failed and not any(mark in names[0] for mark in "*?["):
        found = _detail(client, names[0])
        if found is not None:
            return _show_detail(session, found)
    whole = client.get("/v1/status")
    if names:
        whole = _only(whole, names)
    if failed:
        whole = {
            **whole,
            **{key: [row for row in whole[key] if is_problem(row)] for key in ("processes", "models")},
        }
    if session.emit(whole):
        pass
    elif session.form == "name":
        for name in dict.fromkeys(row["name"] for row in (*whole["processes"], *whole["models"])):
            session.screen.raw(name)
    else:
        tables.fleet(session.screen, whole, wide=session.form == "wide")
    rows = [*whole["processes"], *whole["models"]]
    return EXIT_OK if not names or all(_runs(row) for row in rows) else EXIT_NOT_RUNNING


def _runs(row: Mapping[str, Any]) -> bool:
    return row.get("state") in tables.GOOD_STATES or bool(row.get("routes"))


def _detail(client: Client, name: str) -> dict[str, Any] | None:
    """Return the detail of a process or model; None for neither (it may be the base name of replicas)."""
    for kind in ("processes", "models"):
        try:
            return client.get(f"/v1/{kind}/{name}")
        except RequestRefused as error:
            if error.code not in ("unknown_name", "unknown_route"):
                raise
    return None


def _show_detail(session: Session, found: Mapping[str, Any]) -> int:
    kind = "process" if "process" in found else "model"
    row = found[kind]
    if session.emit(found):
        pass
    elif session.form == "name":
        session.screen.raw(row["name"])
    else:
        (detail.one_process if kind == "process" else detail.one_model)(session.screen, found)
    return EXIT_OK if _runs(row) else EXIT_NOT_RUNNING


def _only(whole: Mapping[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    """Return the status reduced to the given names. Raises CliError (exit 4) for unknown names."""

    def means(pattern: str, row: Mapping[str, Any]) -> bool:
        exact = pattern in ("all", row["name"], row.get("base")) or pattern in (row.get("aliases") or ())
        return exact or (any(mark in pattern for mark in "*?[") and fnmatchcase(row["name"], pattern))

    rows = [*whole["processes"], *whole["models"]]
    unknown = [name for name in names if name != "all" and not any(means(name, row) for row in rows)]
    if unknown:
        listed = ", ".join(repr(name) for name in unknown)
        raise CliError(f"unknown name: {listed}", EXIT_UNKNOWN, near_name(unknown[0], [row["name"] for row in rows]))

    def chosen(key: str) -> list[Any]:
        return [row for row in whole[key] if any(means(name, row) for name in names)]

    return {**whole, "processes": chosen("processes"), "models": chosen("models")}


def _watch(session: Session, names: tuple[str, ...], failed: bool) -> int:
    """Print every second until Ctrl-C; on a terminal in place, from the top, until q."""
    if not (sys.stdout.isatty() and session.form in ("table", "wide")):
        while True:
            _status_once(session, names, failed)
            sys.stdout.flush()
            time.sleep(WATCH_S)
    from fleetd.cli.full_screen import FullScreen

    with FullScreen(session.screen) as full:
        while True:
            try:
                _status_once(session, names, failed)
            except Unreachable as error:
                session.screen.line(str(error))
            full.show()
            if full.quits_within(WATCH_S):
                return EXIT_OK


@click.command()
@forms("table", "json", "yaml", "name")
def ps(session: Session) -> int:
    """Show loaded models.

    Shows device, bytes, requests and TTL of each.
    """
    rows = [row for row in session.client.get("/v1/models")["models"] if _in_memory(row)]
    if session.emit(document({"models": rows})):
        return EXIT_OK
    if session.form == "name":
        for row in rows:
            session.screen.raw(row["name"])
    elif rows:
        tables.loaded(session.screen, rows)
    else:
        say("no model is loaded")
    return EXIT_OK


def _in_memory(row: Mapping[str, Any]) -> bool:
    return row.get("state") not in ("ABSENT", "FAILED", None) and not row.get("routes")


@click.command()
@names_argument("processes", required=False, also=("all",))
@click.option("-f", "--follow", is_flag=True, help="Follow new lines until Ctrl-C.")
@click.option(
    "-n",
    "--lines",
    "--tail",
    type=click.IntRange(0, _MOST_LINES),
    help=f"Last lines to print.  [default: {_LINES}]",
)
@click.option("--since", type=Since(), help="Only lines of the last 10m, 2h, …")
@click.option("--grep", help="Only lines matching a regular expression.")
@click.option("-u", "--unit", "units", multiple=True, hidden=True, help="The same as NAME, as in journalctl.")
@click.option("-p", "--previous", is_flag=True, hidden=True, help="Not needed: one log holds all runs.")
@forms("text", "json")
def logs(
    session: Session,
    names: tuple[str, ...],
    follow: bool,
    lines: int | None,
    since: float | None,
    grep: str | None,
    units: tuple[str, ...],
    previous: bool,
) -> int:
    """Show logs of processes; without NAME of all.

    With several processes each line has its name. --since needs lines with times (logs.capture: pipe). It is a duration,
    today, yesterday, or a time such as 2026-11-30 21:03.
    """
    if previous:
        raise click.UsageError("not needed: one log holds all runs of a process, with a mark at each exit")
    names = (*names, *units) or ("all",)
    if "fleetd" in names:
        say("fleetctl: fleetd itself logs to its standard error, or to --log-file: journalctl -u fleetd")
        names = tuple(name for name in names if name != "fleetd")
        if not names:
            return EXIT_UNKNOWN
    if grep is not None:
        try:
            re.compile(grep)
        except (re.error, RecursionError, OverflowError) as error:
            raise click.UsageError(f"--grep is not a regular expression: {error}") from None
    client, screen = session.client, session.screen
    lines = lines if lines is not None else _LINES if since is None else _MOST_LINES
    source = client.stream(f"/v1/logs/{','.join(names)}", lines=lines, since_s=since, grep=grep, follow=follow)
    several = len(names) > 1 or any(mark in names[0] for mark in "*?[") or names[0] == "all"
    colours: dict[str, str] = {}
    width = 0
    for line in source:
        if line.get("stream") == OWN_STREAM:
            say(f"fleetctl: {clean(line.get('name'))}: {clean(line.get('line'))}")
        elif session.form == "json":
            screen.json(line, indent=None)
        else:
            name = str(line.get("name"))
            several = several or name != names[0]
            width = max(width, min(24, len(name)))
            colour = colours.setdefault(name, PREFIX_COLOURS[len(colours) % len(PREFIX_COLOURS)])
            log_line(screen, line, (name, width, colour) if several else None)
        if follow:
            sys.stdout.flush()
    return EXIT_OK


@click.command()
@names_argument("processes", "models", required=False)
@click.option("-f", "--follow", is_flag=True, help="Follow new events until Ctrl-C.")
@click.option("-n", "--lines", type=click.IntRange(0, _MOST_LINES), help="Last events to print.")
@click.option("--since", type=Since(), help="Only events of the last 10m, 2h, …")
@forms("text", "json")
def events(session: Session, names: tuple[str, ...], follow: bool, lines: int | None, since: float | None) -> int:
    """Show events, oldest first.

    With NAME only those about it: a process, a model, or a glob.
    """
    client = session.client
    if lines is None:
        source = _about(client.stream("/v1/events", since_s=since, follow=follow), names)
    else:
        source = _last_events(client, names, lines, _EVER_S if since is None else since, follow)
    for event in source:
        if session.form == "json":
            session.screen.json(event, indent=None)
        else:
            event_line(session.screen, event)
        if follow:
            sys.stdout.flush()
    return EXIT_OK


def _last_events(
    client: Client, names: tuple[str, ...], lines: int, since_s: float, follow: bool
) -> Iterator[dict[str, Any]]:
    """Yield the last events about the names, then new ones."""
    past = list(client.stream("/v1/events", since_s=since_s, follow=False))
    chosen = list(_about(past, names))
    yield from chosen[len(chosen) - min(lines, len(chosen)) :]
    if follow:
        after = past[-1]["seq"] if past else None
        yield from _about(client.stream("/v1/events", after=after, since_s=None if past else 0.0, follow=True), names)


def _about(events_: Iterable[dict[str, Any]], names: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    """Yield the events about the names, globs and bases of replicas; all for no name."""
    for event in events_:
        name = str(event.get("name") or "")
        if not names or any(fnmatchcase(name, one) or name == one for one in names):
            yield event


@click.command()
@click.argument("name", shell_complete=completion_of("processes", "models"))
@click.option("-a", "--all", "whole", is_flag=True, help="Show every event and command.")
@forms("text", "json", "yaml")
def story(session: Session, name: str, whole: bool) -> int:
    """Show the history of a process or model.

    What happened to it with the reasons, oldest first; a crash is one line. --all and -o json show every step.
    """
    told = session.client.get(f"/v1/story/{name}")
    if not session.emit(told):
        from fleetd.cli.story import condensed

        for event in told["events"] if whole else condensed(told["events"]):
            event_line(session.screen, event, with_name=event.get("name") != name)
        if not told["events"]:
            session.screen.line(f"no events for {name} since fleetd started")
    return EXIT_OK


@click.command()
@click.argument("model", shell_complete=completion_of("models"))
@forms("text", "json", "yaml")
def explain(session: Session, model: str) -> int:
    """Explain why a model is or is not loaded.

    Shows its size, the budget, candidates and victims.
    """
    explained = session.client.get(f"/v1/explain/{model}")
    if not session.emit(explained):
        detail.explanation(session.screen, explained)
    return EXIT_OK


@click.command()
@forms("json", "yaml")
def dump(session: Session) -> int:
    """Print the data for a bug report.

    Status, configuration and journal, with secrets redacted.
    """
    session.emit(session.client.get("/v1/dump"))
    return EXIT_OK


@click.command(name="pm2-jlist")
@forms("json")
def pm2_jlist(session: Session) -> int:
    """Print processes in the form of `pm2 jlist`."""
    from fleetd.cli.pm2 import jlist

    session.screen.json(jlist(session.client.get("/v1/status"), time.time()), indent=None)
    return EXIT_OK


@click.command()
@forms("text", "json", "yaml")
def version(session: Session) -> int:
    """Print the versions of fleetctl and fleetd."""
    from fleetd import __version__

    try:
        daemon = session.client.get("/v1/status")["daemon"]["version"]
    except (Unreachable, RequestRefused):
        daemon = None
    if not session.emit({"schema": SCHEMA, "fleetctl": __version__, "fleetd": daemon}):
        session.screen.line(f"fleetctl {__version__}")
        session.screen.line(f"fleetd {daemon}" if daemon else "fleetd is not running")
    return EXIT_OK


VERBS = (status, ps, logs, events, story, explain, dump, pm2_jlist, version)
