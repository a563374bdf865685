"""`fleetctl models`: the servers' model stores compared with fleet.yaml. `fleetctl volumes`: the drives of the fleet.

Invariants:
- `models diff` exits with 0 for no difference, 1 for differences, 2 for an error, as `diff` does.
- A sync continues when fleetctl is interrupted; only `scan` needs no daemon.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from fleetd.cli.client import EXIT_FAILED, EXIT_OK, EXIT_USAGE, CliError, RequestRefused
from fleetd.cli.context import Session, completion_of, forms, say
from fleetd.cli.progress import clear_line, progress
from fleetd.cli.render import BOLD, DIM, GREEN, RED, YELLOW, Cell, Column, clean, shorten, size, table
from fleetd.units import expand_home

_SIGNS = {
    "create": ("+", GREEN),
    "update": ("~", YELLOW),
    "delete": ("-", RED),
    "missing": ("!", RED),
    "blocked": ("!", YELLOW),
}
_SAME = ("none", "foreign")


@click.group(name="models")
def models() -> None:
    """Compare and sync the servers' model stores.

    fleetd creates held models (from, quantize, modelfile) before their first load; these verbs show the differences
    and create the models now.
    """


@models.command(name="diff")
@forms("text", "json", "yaml")
def diff_(session: Session) -> int:
    """Show stores that differ from fleet.yaml.

    The exit code is 0 for no difference, 1 for differences, 2 for an error.
    """
    try:
        found = session.client.get("/v1/library")
    except RequestRefused as error:
        raise CliError(str(error), EXIT_USAGE, error.hint) from None
    broken = [store for store in found["stores"] if store.get("error")]
    if not session.emit(found):
        for store in found["stores"]:
            _store(session, store)
    for store in broken:
        say(f"fleetctl: {clean(store['store'])} could not be compared: {clean(store['error'])}")
    if broken:
        return EXIT_USAGE
    return EXIT_FAILED if found["differences"] else EXIT_OK


def _store(session: Session, store: Mapping[str, Any]) -> None:
    different = [step for step in store["steps"] if step["change"] not in _SAME]
    screen = session.screen
    if not different and not store.get("error"):
        screen.line(f"{store['store']}: {len(store['steps'])} models, nothing to do")
        return
    screen.line(screen.paint(f"{store['store']} ({', '.join(store['instances'])})", BOLD))
    for step in different:
        sign, colour = _SIGNS.get(step["change"], ("?", None))
        screen.line(screen.paint(f"  {sign} {step['name']}: {step['change']}, {step['reason']}", colour))
        if step.get("failure"):
            screen.line(f"      last attempt: {step['failure']}")


@models.command(name="sync")
@click.argument("names", nargs=-1, metavar="[MODEL]...", shell_complete=completion_of("models"))
@forms("text", "json")
def sync(session: Session, names: tuple[str, ...]) -> int:
    """Create models that differ from fleet.yaml.

    Shows the progress; only changed models are created. With -o json each step is one JSON document per line.
    """
    client = session.client
    number = client.post("/v1/library/sync", {"names": list(names)})["sync"]
    last: dict[str, Any] = {"failed": 0}
    shown = ""
    in_place = sys.stderr.isatty()
    with progress("models sync", lambda: _making_text(last)):
        for item in client.stream(f"/v1/syncs/{number}"):
            last = item
            if session.form == "json":
                session.screen.json(item, indent=None)
                continue
            text = _step_text(item)
            if text and text != shown and not (in_place and item["what"] == "making"):
                shown = text
                clear_line()
                (say if item["what"] == "making" else session.screen.line)(text)
                sys.stdout.flush()
    return EXIT_FAILED if last.get("failed") or last.get("what") != "done" else EXIT_OK


def _making_text(item: Mapping[str, Any]) -> str:
    """Return what a sync does now, with the bytes where they are known."""
    if item.get("what") != "making":
        return ""
    done, total = item.get("done_bytes"), item.get("total_bytes")
    share = f" {size(done)} of {size(total)}" if done is not None and total else ""
    return f"{item.get('name') or item.get('store')}: {item.get('detail', '')}{share}"


def _step_text(item: Mapping[str, Any]) -> str:
    if item["what"] == "done":
        return f"{item['made']} made, {item['unchanged']} unchanged, {item['failed']} failed"
    where = item.get("name") or item.get("store")
    return clean(f"{item['what']:7} {where}: {item.get('detail', '')}")


@models.command(name="show")
@click.argument("name", metavar="MODEL", shell_complete=completion_of("models"))
@forms("text", "json", "yaml")
def show(session: Session, name: str) -> int:
    """Show the Modelfile and source of a model."""
    found = session.client.get(f"/v1/library/{name}")
    if session.emit(found):
        return EXIT_OK
    screen = session.screen
    screen.line(screen.paint(f"# {found['model']}, served as {found['served_as']}", BOLD))
    for label, text in _facts(found):
        screen.line(screen.paint(f"# {label:9} {text}", DIM))
    if found.get("modelfile"):
        screen.line("")
        for line in str(found["modelfile"]).rstrip("\n").split("\n"):
            screen.line(line)
    else:
        say(f"fleetctl: no Modelfile: {clean(found.get('modelfile_error'))}")
    return EXIT_OK


def _facts(found: Mapping[str, Any]) -> list[tuple[str, str]]:
    source = str(found.get("from") or "as in the store")
    if "size_bytes" in found:
        source += f" ({size(found['size_bytes'])})" if found["size_bytes"] is not None else " (missing)"
    rows = [("from", source)]
    if found.get("digest"):
        how = f"in place, a link to {found['link_to']}" if found.get("link_to") else size(found.get("stored_bytes"))
        rows.append(("digest", f"{found['digest']} ({how})"))
    elif found.get("present") is False:
        rows.append(("digest", "not in the store"))
    made = found.get("made")
    rows.append(("made", f"by fleetd, {made['made']}" if made else "not by fleetd"))
    rows.append(("store", f"{found['store']} ({', '.join(found['instances'])})"))
    if found.get("state"):
        rows.append(("state", f"{found['state']['state']}: {found['state']['detail']}"))
    loaded = ", ".join(f"{row['state'].lower()} on {row['process']}" for row in found["loaded"])
    rows.append(("loaded", loaded or "nowhere"))
    return [(label, clean(text)) for label, text in rows]


@models.command(name="prune")
@click.option("-y", "--yes", is_flag=True, help="Do not ask for confirmation.")
@click.option("--dry-run", is_flag=True, help="Show what would be deleted.")
@forms("text", "json", "yaml")
def prune(session: Session, yes: bool, dry_run: bool) -> int:
    """Delete models removed from fleet.yaml.

    Deletes only models that fleetd created; targets of links are kept.
    """
    client = session.client
    planned = client.post("/v1/library/prune", {"dry_run": True}, wait_s=60.0)
    doomed = [row for row in planned["doomed"] if row["name"]]
    broken = [row for row in planned["doomed"] if not row["name"]]
    for row in broken:
        say(f"fleetctl: {clean(row['store'])} could not be compared: {clean(row['reason'])}")
    if dry_run or not doomed:
        if not session.emit(planned):
            _doomed(session, doomed)
        return EXIT_FAILED if broken else EXIT_OK
    if session.form == "text":
        _doomed(session, doomed)
    if not yes:
        _ask(len(doomed))
    done = client.post("/v1/library/prune", {"dry_run": False}, wait_s=300.0)
    failed = [row for row in done["results"] if row["result"] != "ok"]
    if not session.emit(done):
        session.screen.line(f"{len(done['results']) - len(failed)} deleted")
    for row in failed:
        say(f"fleetctl: {clean(row['name'] or row['store'])}: {clean(row['reason'])}")
    return EXIT_FAILED if failed else EXIT_OK


def _doomed(session: Session, rows: list[dict[str, Any]]) -> None:
    for row in rows:
        session.screen.line(session.screen.paint(f"  - {row['name']} in {row['store']}", RED))
    if not rows:
        session.screen.line("nothing to delete")


def _ask(count: int) -> None:
    import sys

    if not sys.stdin.isatty():
        raise CliError("refusing to delete without confirmation: stdin is not a terminal", EXIT_USAGE, "use -y")
    if not click.confirm(f"Delete {count} model{'s' if count > 1 else ''}?", err=True):
        raise CliError("nothing was deleted", EXIT_FAILED)


@models.command(name="scan")
@click.argument("folder", metavar="DIR", type=click.Path())
@click.option("--instance", metavar="NAME", help="Server to hold them (default: none).")
@forms("text", "json", "yaml")
def scan(session: Session, folder: str, instance: str | None) -> int:
    """Propose entries for models below a folder.

    Reads only file headers; needs no daemon. Without --instance each model gets a process of its own.
    """
    from fleetd.errors import FleetError
    from fleetd.models import scan as scanning

    try:
        found = scanning.scan(Path(expand_home(folder)).absolute())
    except FleetError as error:
        raise CliError(str(error), EXIT_USAGE, error.hint) from None
    entries = scanning.entries(found.models, instance)
    rows = [
        {
            "key": one.key,
            "kind": one.kind,
            "path": str(one.path),
            "size_bytes": one.size_bytes,
            "architecture": one.architecture,
            "context_length": one.context_length,
            "entry": entries[one.key],
        }
        for one in found.models
    ]
    document = {"schema": "fleetctl/v1", "models": rows, "notes": list(found.notes)}
    if not session.emit(document):
        from fleetd.config.importers.emit import to_yaml

        comments = {
            f"models.{row['key']}": [f"{size(row['size_bytes'])} {row['architecture']}".strip()] for row in rows
        }
        click.echo(to_yaml({"models": entries}, comments) if entries else "# no models found\n", nl=False)
    for note in found.notes:
        say(f"fleetctl: {clean(note)}")
    return EXIT_OK


@click.group(name="volumes", invoke_without_command=True)
@forms("table", "json", "yaml")
def volumes(session: Session) -> int:
    """Show the drives that the fleet needs.

    A process on a missing drive is BLOCKED until the same drive returns. Another drive at the same path is rejected until it
    is accepted.
    """
    if click.get_current_context().invoked_subcommand is not None:
        return EXIT_OK
    found = session.client.get("/v1/volumes")
    if not session.emit(found):
        columns = [
            Column("VOLUME", shrink=True),
            Column("STATE", shrink=True),
            Column("IDENTITY", 2),
            Column("NEEDED BY", 1),
        ]
        rows = [
            [
                Cell(row["path"]),
                Cell(row["problem"] or "mounted", RED if row["problem"] else GREEN),
                Cell(row["identity"] or "-"),
                Cell(shorten(", ".join(row["needed_by"]), 60)),
            ]
            for row in found["volumes"]
        ]
        table(session.screen, columns, rows)
    return EXIT_OK


@volumes.command(name="accept")
@click.argument("path", type=click.Path())
@forms("text", "json", "yaml")
def accept(session: Session, path: str) -> int:
    """Accept the drive mounted at PATH."""
    found = session.client.post("/v1/volumes/accept", {"path": str(Path(path).absolute())})
    if not session.emit(found):
        say(f"{path}: accepted the mounted volume")
    return EXIT_OK


VERBS: tuple[click.Command, ...] = (models, volumes)
