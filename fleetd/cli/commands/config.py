"""Verbs that change the whole fleet: diff, apply, reload, daemon-reexec, shutdown.

Invariants:
- `apply` carries out exactly the plan that it showed: the request contains its hash.
- `diff` exits with 0 for no difference, 1 for differences, 2 for an error.
"""

from __future__ import annotations

import functools
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from fleetd.cli import progress
from fleetd.cli.client import (
    EXIT_FAILED,
    EXIT_OK,
    EXIT_TIMEOUT,
    EXIT_USAGE,
    Client,
    CliError,
    RequestRefused,
    Unreachable,
    is_locked,
)
from fleetd.cli.commands.lifecycle import exit_code_of, show_results, waiting
from fleetd.cli.context import Duration, Session, forms, say
from fleetd.cli.views.plan import plan_changes
from fleetd.units import expand_home

POLL_S = 0.1
TEXT_MAX_BYTES = 4 * 1024 * 1024


def _where(file: str | None) -> dict[str, str]:
    """Return the request fields that name the file: none, an absolute path, or the text of standard input."""
    if file is None:
        return {}
    if file == "-":
        raw = sys.stdin.buffer.read(TEXT_MAX_BYTES + 1)
        if len(raw) > TEXT_MAX_BYTES:
            raise CliError("standard input is too large for a fleet.yaml", EXIT_USAGE)
        try:
            return {"text": raw.decode("utf-8")}
        except UnicodeDecodeError:
            raise CliError("standard input is not UTF-8", EXIT_USAGE) from None
    path = Path(expand_home(file)).absolute()
    try:
        with path.open("rb"):
            pass
    except OSError as error:
        raise CliError(f"{file}: {error.strerror or error}", EXIT_USAGE) from None
    return {"path": str(path)}


def _file_argument(verb: Callable[..., Any]) -> Callable[..., Any]:
    """Add FILE, which may also be written as -f FILE."""

    @functools.wraps(verb)
    def run(*arguments: Any, file: str | None, filename: str | None, **options: Any) -> Any:
        if file is not None and filename is not None:
            raise click.UsageError("the file is named twice: as FILE and with -f")
        return verb(*arguments, file=file or filename, **options)

    option = click.option("-f", "--filename", metavar="FILE", type=click.Path(), help="The same as FILE.")
    return click.argument("file", required=False, type=click.Path())(option(run))


@click.command()
@_file_argument
@forms("text", "json", "yaml")
def diff(session: Session, file: str | None) -> int:
    """Show what `apply` would change.

    FILE is a file other than the daemon's own, or - for standard input.

    The exit code is 0 for no difference, 1 for differences, 2 for an error.
    """
    try:
        answered = session.client.post("/v1/plan", _where(file))
    except RequestRefused as error:
        raise CliError(str(error), EXIT_USAGE, error.hint) from None
    changes = answered["plan"]["changes"]
    if not session.emit(answered) and changes:
        plan_changes(session.screen, answered["plan"])
    return EXIT_FAILED if changes else EXIT_OK


@click.command()
@_file_argument
@click.option("--dry-run", is_flag=True, help="Show the plan; change nothing.")
@click.option("--wait", is_flag=True, help="Wait for all changed processes.")
@click.option("--timeout", type=Duration(), default="5m", show_default=True, help="Longest wait (then exit code 6).")
@click.option("-y", "--yes", is_flag=True, help="Do not ask for confirmation.")
@forms("text", "json", "yaml")
def apply(session: Session, file: str | None, dry_run: bool, wait: bool, timeout: float, yes: bool) -> int:
    """Apply a fleet.yaml to the running fleet.

    Shows the plan, asks for confirmation, and changes only what differs.

    FILE is a file other than the daemon's own; it becomes the daemon's file.
    """
    if file == "-":
        raise click.UsageError("apply needs a file: the daemon reads it again when it restarts")
    client, where = session.client, _where(file)
    planned = client.post("/v1/plan", where)
    plan = planned["plan"]
    if dry_run or not plan["changes"]:
        if where and not dry_run:  # the same fleet from another file, which becomes the daemon's own
            client.post("/v1/apply", {**where, "wait": False, "expect_hash": plan["config_hash"]})
        if not session.emit({"schema": planned["schema"], "plan": plan, "results": []}):
            plan_changes(session.screen, plan)
        return EXIT_OK
    if session.form == "text":
        plan_changes(session.screen, plan)
    if not yes:
        _ask()
    body = {**where, "wait": wait, "timeout_s": timeout, "expect_hash": plan["config_hash"]}
    with progress.progress("apply", progress.of_processes(client), timeout if wait else None):
        applied = client.post("/v1/apply", body, wait_s=timeout if wait else 0.0)
    return show_results(session, applied)


def _ask() -> None:
    if not sys.stdin.isatty():
        raise CliError("refusing to apply without confirmation: stdin is not a terminal", EXIT_USAGE, "use -y")
    if not click.confirm("Apply this?", err=True):
        raise CliError("nothing was changed", EXIT_FAILED)


@click.command(name="reload")
@click.argument("names", nargs=-1, metavar="")
@forms("text", "json", "yaml")
def reload_(session: Session, names: tuple[str, ...]) -> int:
    """Apply the daemon's file without asking."""
    if names:
        first = names[0][:60]
        raise click.UsageError(
            f"reload reads fleet.yaml again and takes no name; to restart {first}: fleetctl restart {first} --rolling"
        )
    applied = session.client.post("/v1/reload", wait_s=30.0)
    if not session.emit(applied):
        plan_changes(session.screen, applied["plan"])
    return exit_code_of(applied.get("results") or [])


@click.command(name="daemon-reexec")
@click.option("--timeout", type=Duration(), default="30s", show_default=True, help="Longest wait (then exit code 6).")
@forms("text", "json", "yaml")
def reexec(session: Session, timeout: float) -> int:
    """Re-execute the daemon after an upgrade.

    Processes keep their PIDs and logs. The daemon waits some seconds for starts and stops in progress.
    """
    client = session.client
    before = client.get("/v1/status")["daemon"]
    asked = time.monotonic()
    client.post("/v1/reexec")
    while time.monotonic() - asked < timeout:
        time.sleep(POLL_S)
        passed = time.monotonic() - asked
        try:
            daemon = client.get("/v1/status")["daemon"]
        except (Unreachable, RequestRefused):
            continue
        if daemon["uptime_s"] < max(before["uptime_s"], passed):
            if not session.emit({"schema": "fleetctl/v1", "daemon": daemon}):
                session.screen.line(f"fleetd {daemon['version']} runs as pid {daemon['pid']}")
            return EXIT_OK
    raise CliError(f"the daemon did not return within {timeout:g} s", EXIT_TIMEOUT)


@click.command()
@click.option("--force", is_flag=True, help="Kill at once; do not drain.")
@waiting
@forms("text", "json", "yaml")
def shutdown(session: Session, force: bool, wait: bool, timeout: float) -> int:
    """Stop all processes, then the daemon.

    Drains first and stops in reverse order of dependency.
    """
    client = session.client
    path = _answering(client)
    answered = client.post("/v1/shutdown", {"force": force})
    if wait:
        with progress.progress("shutdown", progress.of_shutdown(client), timeout):
            _await_end(Client([path]), path, time.monotonic() + timeout)
    if not session.emit(answered):
        say("fleetd has stopped" if wait else "fleetd is stopping")
    return EXIT_OK


def _answering(client: Client) -> Path:
    """Return the socket of a running daemon. Raises Unreachable."""
    connection, path = client.connect()
    connection.close()
    return path


def _await_end(client: Client, path: Path, deadline: float) -> None:
    """Wait until the socket is closed and the daemon's lock is free, so that a new daemon can start."""
    while time.monotonic() < deadline:
        try:
            _answering(client)
        except Unreachable:
            if not is_locked(path):
                return
        time.sleep(POLL_S)
    raise CliError("the daemon is still stopping", EXIT_TIMEOUT, "use `fleetctl shutdown --force` to kill at once")


VERBS = (diff, apply, reload_, reexec, shutdown)
