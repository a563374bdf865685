"""`fleetctl init [DIR…]`: write a fleet.yaml for this machine.

Invariants:
- Nothing is downloaded or started; a file is overwritten only with --force.
- Without a terminal nothing is asked: what --yes answers is done.
"""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fleetd.cli.client import EXIT_FAILED, EXIT_OK, EXIT_USAGE, CliError, is_locked, socket_candidates
from fleetd.cli.context import Session, forms, say
from fleetd.cli.render import clean
from fleetd.units import expand_home

if TYPE_CHECKING:
    from fleetd.setup.machine import Machine
    from fleetd.setup.proposal import FleetProposal

NOTES_MAX, WARNINGS_MAX = 8, 8


@click.command()
@click.argument("folders", nargs=-1, metavar="[DIR]...", type=click.Path())
@click.option("--yes", "-y", is_flag=True, help="Write the file without a question.")
@click.option("--force", is_flag=True, help="Overwrite an existing file.")
@click.option("--file", "-f", "file", default="fleet.yaml", show_default=True, type=click.Path(), help="File to write.")
@click.option("--print", "only_print", is_flag=True, help="Print the file; write nothing.")
@forms("text", "json")
def init(session: Session, folders: tuple[str, ...], yes: bool, force: bool, file: str, only_print: bool) -> int:
    """Write a fleet.yaml for this machine.

    Finds installed engines, running servers, memory, GPUs, and the models in
    the folders of Ollama, LM Studio, llama.cpp and Hugging Face, and in DIR.
    Downloads nothing.

    \b
    fleetctl init                     write ./fleet.yaml
    fleetctl init ~/models --print    look there too, and print the file
    """
    path = Path(expand_home(file)).absolute()
    if not only_print:
        _check_target(path, force)
    given = [Path(expand_home(folder)).absolute() for folder in folders]
    for folder in given:
        if not folder.is_dir():
            raise CliError(f"not a folder: {str(folder)!r}", EXIT_USAGE)
    from fleetd.errors import ConfigError
    from fleetd.setup import fleet_file, machine
    from fleetd.setup.proposal import propose

    found = machine.look(given, os.environ, _progress(session))
    proposal = propose(found)
    try:
        text, warnings = fleet_file.verified(proposal, os.environ)
    except ConfigError as error:
        raise CliError(f"the proposed file does not pass the check:\n{error}", EXIT_FAILED) from None
    _report(found, proposal, [str(warning) for warning in warnings])
    if only_print:
        session.screen.out.write(text)
        return EXIT_OK
    if not yes and _is_terminal() and not click.confirm(f"Write {path}?", default=True, err=True):
        say("nothing was written")
        return EXIT_FAILED
    try:
        fleet_file.write(path, text, replace=force)
    except FileExistsError:
        raise _exists(path) from None
    except OSError as error:
        raise CliError(f"{path}: {error.strerror or error}", EXIT_FAILED) from None
    steps = next_steps(path, proposal)
    if not session.emit(_document(path, found, proposal, steps)):
        session.screen.raw(str(path))
        say("next:")
        for step in steps:
            say(f"  {step}")
    return EXIT_OK


def _check_target(path: Path, force: bool) -> None:
    if path.is_dir():
        raise CliError(f"{path} is a folder", EXIT_USAGE, "name a file with --file")
    if not force and (path.exists() or path.is_symlink()):
        raise _exists(path)


def _exists(path: Path) -> CliError:
    return CliError(
        f"{path} already exists",
        EXIT_FAILED,
        "overwrite it with --force, or name another with --file; nothing was written",
    )


def _progress(session: Session) -> Any:
    """Return the function that shows what is being looked at: on a terminal only."""
    return say if session.form == "text" and sys.stderr.isatty() else lambda _: None


def _is_terminal() -> bool:
    return sys.stdin is not None and sys.stdin.isatty()


def next_steps(path: Path, proposal: FleetProposal) -> list[str]:
    """Return the two commands to type next."""
    here = path == Path("fleet.yaml").absolute()
    run = "fleetd run" if here else f"fleetd run --config {shlex.quote(str(path))}"
    model = proposal.first_model()
    if model is None:
        return [run, "fleetctl status"]
    return [run, f"fleetctl chat {shlex.quote(model)} hello"]


def _report(found: Machine, proposal: FleetProposal, warnings: list[str]) -> None:
    """Write what was found on standard error."""
    from fleetd.units import show_size

    engines = [f"{one.name}{f' {one.version}' if one.version else ''}" for one in found.programs]
    memory = [f"{one.name} {show_size(one.total_bytes)}" for one in found.devices]
    servers = [f"{one.engine} on port {one.port} ({len(one.models)} models)" for one in found.servers]
    for label, values in (("engines", engines), ("memory", memory), ("running", servers)):
        say(f"{label:<8} {clean(', '.join(values)) or 'none'}")
    say(f"{'models':<8} {len(proposal.models)} in the file, {len(proposal.left_out)} left out")
    for name, why in list(proposal.left_out.items())[:NOTES_MAX]:
        say(clean(f"left out {name}: {why}"))
    _more(len(proposal.left_out) - NOTES_MAX, "in the file")
    for note in found.notes[:NOTES_MAX]:
        say(clean(f"note     {note}"))
    _more(len(found.notes) - NOTES_MAX, "notes")
    for warning in warnings[:WARNINGS_MAX]:
        say(clean(f"warning  {warning}"))
    _more(len(warnings) - WARNINGS_MAX, "warnings; fleetd check shows them")
    for advice in proposal.advice:
        say(clean(f"advice   {advice}"))
    running = next((path for path in socket_candidates(None, os.environ) if is_locked(path)), None)
    if running is not None:
        say(f"advice   a fleetd runs already (socket {running}): fleetctl apply FILE gives it the new file")


def _more(count: int, what: str) -> None:
    if count > 0:
        say(f"         and {count} more {what}")


def _document(path: Path, found: Machine, proposal: FleetProposal, steps: list[str]) -> dict[str, Any]:
    return {
        "schema": "fleetctl/v1",
        "file": str(path),
        "engines": [{"name": one.name, "path": one.path, "version": one.version} for one in found.programs],
        "servers": [{"engine": one.engine, "port": one.port, "models": len(one.models)} for one in found.servers],
        "devices": [{"name": one.name, "kind": one.kind, "total_bytes": one.total_bytes} for one in found.devices],
        "folders": [str(folder) for folder in found.folders],
        "models": list(proposal.models),
        "left_out": [{"name": name, "reason": why} for name, why in proposal.left_out.items()],
        "notes": list(found.notes),
        "advice": proposal.advice,
        "next": steps,
    }


VERBS: tuple[click.Command, ...] = (init,)
