"""Verbs that act on names: start, stop, restart, drain, undrain, signal; load, unload, pin, unpin.

Invariants:
- With an unknown name nothing is done.
- A failure of any name is exit 1; otherwise a timed-out wait is exit 6.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import click

from fleetd.cli import progress
from fleetd.cli.client import EXIT_FAILED, EXIT_OK, EXIT_TIMEOUT
from fleetd.cli.context import Duration, Session, forms, names_argument, say
from fleetd.cli.render import GREEN, RED, YELLOW, Cell, Column, clean, table
from fleetd.control.wire import MODEL_VERBS, ResultCode

_COLOURS = {"ok": GREEN, "accepted": GREEN, "failed": RED, "timeout": YELLOW}


def show_results(session: Session, answered: dict[str, Any]) -> int:
    """Print one line per name, and return the exit code."""
    results = answered.get("results") or []
    if not session.emit(answered) and results:
        columns = [Column("NAME", shrink=True), Column("RESULT"), Column("STATE", 2), Column("REASON", 1, shrink=True)]
        rows = [
            [
                Cell(str(row.get("name"))),
                Cell(str(row.get("result")), _COLOURS.get(str(row.get("result")))),
                Cell(str(row.get("state") or "-")),
                Cell(str(row.get("reason") or "")),
            ]
            for row in results
        ]
        table(session.screen, columns, rows)
    for warning in dict.fromkeys(str(row["warning"]) for row in results if row.get("warning")):
        say(f"fleetctl: warning: {clean(warning)}")
    return exit_code_of(results)


def exit_code_of(results: Sequence[dict[str, Any]]) -> int:
    """Return 1 when any failed, else 6 when any timed out, else 0; failures are also printed on stderr."""
    found = {str(row.get("result")) for row in results}
    for row in results:
        if row.get("result") == ResultCode.FAILED:
            say(f"fleetctl: {clean(row.get('name'))}: {clean(row.get('reason') or 'failed')}")
        if row.get("hint"):
            say(f"  hint: {clean(row['hint'])}")
    if ResultCode.FAILED in found or found - set(ResultCode):
        return EXIT_FAILED
    return EXIT_TIMEOUT if ResultCode.TIMEOUT in found else EXIT_OK


def act(session: Session, verb: str, names: Sequence[str], wait: bool, timeout_s: float, **extra: Any) -> int:
    """Request one action on all names and show the results."""
    kind = "models" if verb in MODEL_VERBS else "processes"
    body = {"names": list(names), "wait": wait, "timeout_s": timeout_s, **extra}
    of = progress.of_models if kind == "models" else progress.of_processes
    with progress.progress(f"{verb} {' '.join(names)}", of(session.client, names), timeout_s):
        answered = session.client.post(f"/v1/{kind}/{verb}", body, wait_s=timeout_s if wait else 0.0)
    return show_results(session, answered)


def waiting(verb: Callable[..., Any]) -> Callable[..., Any]:
    """Add --wait/--no-wait and --timeout."""
    timeout = click.option(
        "--timeout", type=Duration(), default="5m", show_default=True, help="Longest wait (then exit code 6)."
    )
    wait = click.option(
        "--wait/--no-wait", default=True, show_default=True, help="Wait for the result, or return at once."
    )
    return wait(timeout(verb))


def _slow(name: str, keys: str, text: str, also: Sequence[str] = ()) -> click.Command:
    @click.command(name=name, help=text, short_help=text.split("\n", maxsplit=1)[0])
    @names_argument(keys, also=also)
    @waiting
    @forms("table", "json", "yaml")
    def verb(session: Session, names: tuple[str, ...], wait: bool, timeout: float) -> int:
        return act(session, name, names, wait, timeout)

    return verb


def _quick(name: str, keys: str, text: str) -> click.Command:
    @click.command(name=name, help=text, short_help=text.split("\n", maxsplit=1)[0])
    @names_argument(keys)
    @forms("table", "json", "yaml")
    def verb(session: Session, names: tuple[str, ...]) -> int:
        return act(session, name, names, wait=True, timeout_s=10.0)

    return verb


@click.command()
@names_argument("processes", also=("all",))
@click.option("--rolling", is_flag=True, help="Restart replicas one after the other.")
@waiting
@forms("table", "json", "yaml")
def restart(session: Session, names: tuple[str, ...], rolling: bool, wait: bool, timeout: float) -> int:
    """Stop and start processes.

    NAME is a process, a glob ('ai-*'), the base name of replicas, or all. all and globs pass over processes that do not run.
    """
    return act(session, "restart", names, wait, timeout, **({"rolling": True} if rolling else {}))


@click.command(name="signal")
@click.argument("sig", metavar="SIG")
@names_argument("processes", also=("all",))
@forms("table", "json", "yaml")
def signal_(session: Session, sig: str, names: tuple[str, ...]) -> int:
    """Send a signal to main processes.

    SIG is a name or a number: HUP, SIGUSR1, 10.
    """
    return act(session, "signal", names, wait=True, timeout_s=10.0, signal=sig)


_NAMES = "NAME is a process, a glob ('ai-*'), the base name of replicas, or all."
VERBS = (
    _slow("start", "processes", f"Start processes and wait until ready.\n\n{_NAMES}", ("all",)),
    _slow("stop", "processes", f"Stop processes; they stay stopped.\n\n{_NAMES}", ("all",)),
    restart,
    _slow("drain", "processes", "Take processes out of routing.\n\nWaits for their requests in flight."),
    _quick("undrain", "processes", "Put processes back into routing."),
    _slow("load", "models", "Load models into memory now."),
    _slow("unload", "models", "Unload models after their requests."),
    _quick(
        "pin", "models", "Keep models in memory.\n\nA pinned model is never evicted, and never unloaded for being idle."
    ),
    _quick("unpin", "models", "Allow eviction of pinned models again."),
    signal_,
)
