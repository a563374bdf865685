"""`fleetctl import KIND FILE`: convert other programs' files to parts of a fleet.yaml, with a report of lost fields.

Invariants:
- An importer is a function `import_KIND(path, …)` or `import_KIND(text, shown=…)`, where `shown` is the file's name in
  messages; it returns the text of a fleet.yaml and a report.
- The parts go to standard output or a new file, the report to standard error. Nothing is overwritten; no daemon is needed.
"""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from fleetd.cli.client import EXIT_FAILED, EXIT_OK, EXIT_USAGE, CliError
from fleetd.cli.context import FORMS, say
from fleetd.cli.render import clean
from fleetd.errors import FleetError
from fleetd.units import expand_home

PACKAGE = "fleetd.config.importers"
FILE_MAX_BYTES = 64 * 1024 * 1024
# The module of each kind; it has a function `import_KIND`.
MODULES = {
    "entities": f"{PACKAGE}.entities",
    "llama-swap": f"{PACKAGE}.llama_swap",
    "ollama": f"{PACKAGE}.ollama",
    "pm2": f"{PACKAGE}.pm2.files",
}


@click.command(name="import")
@click.argument("kind", type=click.Choice(list(MODULES)))
@click.argument("file", type=click.Path())
@click.option("-o", "--output", type=click.Path(), metavar="OUT", help="Write to a new file, not stdout.")
@click.option("--instance", multiple=True, metavar="NAME", help="entities: servers for the models.")
@click.option("--env", metavar="PROFILE", help="pm2: environment profile to use.")
def import_(kind: str, file: str, output: str | None, instance: tuple[str, ...], env: str | None) -> int:
    """Convert another program's file.

    FILE is pm2: ecosystem.config.js, .json, .yaml or dump.pm2; llama-swap: config.yaml; ollama: the folder of a store, or
    the output of `ollama list` or of GET /api/tags; - is standard input.

    Writes parts of a fleet.yaml and reports on standard error what could not be converted.
    """
    if output in FORMS:
        raise click.UsageError(f"-o names a file here; for a file named {output}: -o ./{output}")
    store = kind == "ollama" and Path(expand_home(file)).is_dir()
    content = _store_list(file) if store else _read(file)
    name = kind.replace("-", "_")
    convert = getattr(importlib.import_module(MODULES[kind]), f"import_{name}")
    accepted = inspect.signature(convert).parameters
    options: dict[str, Any] = {name: value for name, value in (("instance", instance), ("profile", env)) if value}
    if store and (folder := Path(expand_home(file)).absolute()) != Path.home() / ".ollama" / "models":
        options["models_dir"] = str(folder)
    for name, option in (("instance", "--instance"), ("profile", "--env")):
        if name in options and name not in accepted:
            raise click.UsageError(f"{option} does not apply to {kind}")
    try:
        if "path" in accepted:
            if file == "-":
                raise click.UsageError(f"{kind} needs a file, not standard input")
            imported = convert(Path(expand_home(file)), **options)
        else:
            imported = convert(content, shown=file, **options)
    except FleetError as error:
        raise CliError(str(error), EXIT_USAGE, error.hint) from None
    text = str(imported.text)
    if output is None:
        click.echo(text, nl=not text.endswith("\n"))
    else:
        _write_new(Path(expand_home(output)), text)
    for line in imported.report.lines():
        say(clean(line))
    if kind == "pm2":
        _warn_of_pm2(imported.data)
    return EXIT_OK


def _warn_of_pm2(data: Mapping[str, Any]) -> None:
    """Warn about apps that would run twice."""
    from fleetd.config.importers.pm2.running import running, still_running

    for sentence in still_running(running(), data):
        say(clean(f"warning      {sentence}"))


def _store_list(file: str) -> str:
    """Return the models of a store folder in the form of GET /api/tags. Raises CliError (exit 2)."""
    import json

    from fleetd.models.ollama import inventory

    try:
        found = inventory.read(Path(expand_home(file)))
    except FleetError as error:
        raise CliError(str(error), EXIT_USAGE, error.hint) from None
    for note in found.notes:
        say(clean(note))
    models = [
        {"name": model.name, "details": {"families": ["bert"] if model.embedding else [model.architecture]}}
        for model in found.models
    ]
    return json.dumps({"models": models})


def _read(file: str) -> str:
    """Return the text of the file; `-` is standard input. Raises CliError (exit 2)."""
    try:
        if file == "-":
            raw = sys.stdin.buffer.read(FILE_MAX_BYTES + 1)
        else:
            with Path(expand_home(file)).open("rb") as source:
                raw = source.read(FILE_MAX_BYTES + 1)
        if len(raw) > FILE_MAX_BYTES:
            raise CliError(f"{file}: too large", EXIT_USAGE)
        return raw.decode("utf-8-sig")
    except OSError as error:
        raise CliError(f"{file}: {error.strerror or error}", EXIT_USAGE) from None
    except UnicodeDecodeError:
        raise CliError(f"{file}: not UTF-8 text", EXIT_USAGE) from None


def _write_new(path: Path, text: str) -> None:
    try:
        with path.open("x", encoding="utf-8") as out:
            out.write(text if text.endswith("\n") else text + "\n")
    except FileExistsError:
        raise CliError(f"{path} already exists", EXIT_FAILED, "name a new file; nothing was written") from None
    except OSError as error:
        raise CliError(f"{path}: {error.strerror or error}", EXIT_FAILED) from None


VERBS: tuple[click.Command, ...] = (import_,)
