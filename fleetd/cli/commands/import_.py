"""`fleetctl import KIND FILE`: convert other programs' files to parts of a fleet.yaml, with a report of lost fields.

Invariants:
- An importer is a function `import_KIND(path, …)` or `import_KIND(text, shown=…)`, where `shown` is the file's name in
  messages; it returns the text of a fleet.yaml and a report.
- The parts go to standard output or a new file, the report to standard error. Nothing is overwritten; no daemon is needed.
- Every result is checked as `fleetd check` would: the report contains the findings, and the exit code is 1 where it is rejected.
"""

from __future__ import annotations

import importlib
import inspect
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fleetd.cli.client import EXIT_FAILED, EXIT_OK, EXIT_USAGE, CliError
from fleetd.cli.context import FORMS, say
from fleetd.cli.render import clean
from fleetd.errors import ConfigError, FleetError
from fleetd.units import expand_home

if TYPE_CHECKING:
    from fleetd.config.importers.report import Report
    from fleetd.models.formats.gguf import Header

STDOUT_FILE = "fleet.yaml"  # the name that problems have without -o
PACKAGE = "fleetd.config.importers"
FILE_MAX_BYTES = 64 * 1024 * 1024
# The module of each kind; it has a function `import_KIND`.
MODULES = {
    "compose": f"{PACKAGE}.compose.files",
    "entities": f"{PACKAGE}.entities",
    "litellm": f"{PACKAGE}.litellm",
    "llama-swap": f"{PACKAGE}.llama_swap.files",
    "ollama": f"{PACKAGE}.ollama",
    "pm2": f"{PACKAGE}.pm2.files",
    "supervisord": f"{PACKAGE}.supervisord",
    "systemd": f"{PACKAGE}.systemd",
}


@click.command(name="import")
@click.argument("kind", type=click.Choice(list(MODULES)))
@click.argument("file", type=click.Path())
@click.option("-o", "--output", type=click.Path(), metavar="OUT", help="Write to a new file, not stdout.")
@click.option("--instance", multiple=True, metavar="NAME", help="entities, ollama: servers of the models.")
@click.option("--name", metavar="NAME", help="ollama: name of a Modelfile's model.")
@click.option("--quantize", metavar="TYPE", help="entities: quantise f16 and f32 files to TYPE.")
@click.option("--env", metavar="PROFILE", help="pm2: environment profile to use.")
@click.option("--secrets", is_flag=True, help="pm2: let the file read secrets.")
def import_(
    kind: str,
    file: str,
    output: str | None,
    instance: tuple[str, ...],
    name: str | None,
    quantize: str | None,
    env: str | None,
    secrets: bool,
) -> int:
    """Convert another program's file.

    FILE is pm2: ecosystem.config.js, .json, .yaml or dump.pm2; llama-swap: config.yaml or a folder of them; ollama: the
    folder of a store, a Modelfile, or the output of `ollama list` or of GET /api/tags; compose, litellm: the YAML file;
    systemd: a unit; supervisord: its .conf; entities: the JSON file; - is standard input.

    Writes parts of a fleet.yaml and reports on standard error what could not be converted, and what `fleetd check` finds in
    the result. The exit code is 1 if the check rejects it.

    pm2: a JavaScript FILE is a program, and Node executes it. Import only a file that you trust. It sees no secrets of the
    environment; the result refers to them as ${NAME}.
    """
    if output in FORMS:
        raise click.UsageError(f"-o names a file here; for a file named {output}: -o ./{output}")
    stated = {
        "instance": ("--instance", instance),
        "name": ("--name", name),
        "quantize": ("--quantize", quantize),
        "profile": ("--env", env),
        "secrets": ("--secrets", secrets),
    }
    imported = _convert(kind, file, {key: pair for key, pair in stated.items() if pair[1]})
    text = str(imported.text)
    if output is None:
        click.echo(text, nl=not text.endswith("\n"))
    else:
        _write_new(Path(expand_home(output)), text)
    _check(text, Path(expand_home(output or STDOUT_FILE)), imported.report)
    for line in imported.report.lines():
        say(clean(line))
    if kind == "pm2":
        _warn_of_pm2(imported.data)
    return EXIT_OK if imported.report.accepted else EXIT_FAILED


def _convert(kind: str, file: str, stated: Mapping[str, tuple[str, Any]]) -> Any:
    """Return the result of the importer; `stated` maps its arguments to option and value. Raises CliError."""
    store = kind == "ollama" and Path(expand_home(file)).is_dir()
    several = kind == "llama-swap" and Path(expand_home(file)).is_dir()
    content = _store_list(file) if store else "" if several else _read(file)
    convert = getattr(importlib.import_module(MODULES[kind]), f"import_{kind.replace('-', '_')}")
    accepted = inspect.signature(convert).parameters
    for key, (option, _) in stated.items():
        if key not in accepted:
            raise click.UsageError(f"{option} does not apply to {kind}")
    options: dict[str, Any] = {key: value for key, (_, value) in stated.items()}
    if store and (folder := Path(expand_home(file)).absolute()) != Path.home() / ".ollama" / "models":
        options["models_dir"] = str(folder)
    if several:
        file, content, options["more"] = _folder(Path(expand_home(file)))
    looks = {"trained_context": _trained_context, "quantization_of": _quantization_of}
    options |= {key: look for key, look in looks.items() if key in accepted}
    try:
        if "path" not in accepted:
            return convert(content, shown=file, **options)
        if file == "-":
            raise click.UsageError(f"{kind} needs a file, not standard input")
        return convert(Path(expand_home(file)), **options)
    except FleetError as error:
        raise CliError(str(error), EXIT_USAGE, error.hint) from None


def _check(text: str, path: Path, report: Report) -> None:
    """Add to the report what `fleetd check` finds in a text, as the content of `path`."""
    from fleetd.resolver.check import load_and_resolve

    try:
        _, resolved = load_and_resolve(path, os.environ, text)
    except ConfigError as error:
        report.checked([problem.headline for problem in error.problems], ())
    except FleetError as error:
        report.checked([error.sentence], ())
    else:
        report.checked((), [warning.headline for warning in resolved.warnings])


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


def _folder(path: Path) -> tuple[str, str, list[tuple[str, str]]]:
    """Return the first YAML file of a folder, its text, and the others. Raises CliError (exit 2)."""
    found = sorted(one for one in path.iterdir() if one.suffix in (".yaml", ".yml") and one.is_file())
    if not found:
        raise CliError(f"{path}: has no .yaml or .yml file", EXIT_USAGE)
    texts = [(str(one), _read(str(one))) for one in found]
    return texts[0][0], texts[0][1], texts[1:]


def _trained_context(path: str) -> int | None:
    """Return the context length in a GGUF file's header; None if it cannot be read."""
    header = _header(path)
    return header.number("context_length") if header is not None else None


def _quantization_of(path: str) -> str | None:
    """Return the quantisation in a GGUF file's header; None if it cannot be read."""
    header = _header(path)
    return header.quantization if header is not None else None


def _header(path: str) -> Header | None:
    from fleetd.models.formats import gguf

    try:
        return gguf.read(Path(expand_home(os.path.expandvars(path))))
    except (FleetError, OSError, ValueError):
        return None


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
