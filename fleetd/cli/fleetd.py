"""`fleetd`: run the daemon, or check and render a fleet.yaml without one.

    fleetd run [--config FILE]     run in the foreground; SIGTERM drains and stops, SIGHUP reloads
    fleetd check [FILE] [-q]       report all mistakes with their places; exit 2 if there is one
    fleetd render [FILE]           print the normalised configuration and the exact command line of every process
    fleetd schema                  print the JSON Schema of fleet.yaml

Invariants:
- Data on stdout, messages on stderr; never a traceback. Exit codes: 0 ok, 1 failed, 2 usage or configuration, 130 interrupted.
- Imports are in the commands, so `fleetd --version` returns at once.
"""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

from fleetd import __version__
from fleetd.errors import ConfigError, FleetError, HostError
from fleetd.units import counted

if TYPE_CHECKING:
    from fleetd.config.load import LoadedConfig
    from fleetd.resolver.resolved import ResolvedFleet

HANDOVER = "FLEETD_TAKE_OVER"  # set by a daemon that re-executes itself
OK, FAILED, BAD_CONFIG, INTERRUPTED = 0, 1, 2, 130


def default_config(env: Mapping[str, str], advice: str = "name it: FILE") -> Path:
    """Return the first existing fleet.yaml of the search order. Exits without one."""
    home = env.get("XDG_CONFIG_HOME") or str(Path("~/.config").expanduser())
    places = [Path("fleet.yaml"), Path(home) / "fleetd" / "fleet.yaml", Path("/etc/fleetd/fleet.yaml")]
    found = next((place for place in places if place.is_file()), None)
    said = ", ".join(str(place) for place in places)
    return found or fail(f"no configuration file: searched {said}", advice, BAD_CONFIG)


def fail(message: str, hint: str | None, code: int) -> NoReturn:
    """Print an error and a hint on stderr and exit."""
    click.echo(f"fleetd: {message}", err=True)
    if hint:
        click.echo(f"  {hint}", err=True)
    sys.exit(code)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="fleetd", message="%(prog)s %(version)s")
def cli() -> None:
    """Run a fleet of local language models."""


@cli.command()
@click.option(
    "--config", "-c", "config", type=click.Path(path_type=Path), help="The fleet.yaml (default: search order)."
)
@click.option("--log-file", type=click.Path(path_type=Path), help="Log file of the daemon (default: stderr).")
@click.option(
    "--log-level",
    type=click.Choice(["debug", "info", "warning", "error"]),
    default="info",
    show_default=True,
    help="Least severe level to log.",
)
@click.argument("file", type=click.Path(path_type=Path), required=False)
def run(config: Path | None, file: Path | None, log_file: Path | None, log_level: str) -> None:
    """Run the daemon in the foreground.

    FILE is the same as --config FILE.
    """
    if config is not None and file is not None:
        raise click.UsageError("the file is named twice: as FILE and with --config")
    path = (
        config or file or default_config(os.environ, "name one: fleetd run FILE, or fleetctl init to write one")
    ).absolute()
    early = None
    if HANDOVER not in os.environ:  # a re-executed daemon has its locks already
        from fleetd.daemon.reload.prefetch import hold_lock

        early = hold_lock(path)
    from fleetd.daemon.own_memory import use_one_heap

    use_one_heap()
    from fleetd.daemon.reload.prefetch import begin_reading

    try:
        reading = begin_reading(path)  # on another core, while this one imports the daemon
    except HostError as error:
        fail(str(error), error.hint, FAILED)
    import asyncio

    from fleetd.daemon.daemon_log import LogSink, set_up

    try:
        sink = LogSink(log_file)
    except OSError as error:
        fail(f"the log {log_file} cannot be opened: {error.strerror}", None, FAILED)
    log = set_up(sink, log_level)
    from fleetd.daemon.app import App, RunOptions

    async def body() -> int:
        return await App(RunOptions(path, reading, early), log, sink).run()

    try:
        with asyncio.Runner(loop_factory=_loop_factory()) as runner:
            code = runner.run(body())
    except ConfigError as error:
        _show_problems(error)
        sys.exit(BAD_CONFIG)
    except HostError as error:
        fail(str(error), error.hint, FAILED)
    sys.exit(code)


def _loop_factory() -> Any:
    try:
        import uvloop
    except ImportError:
        return None
    return uvloop.new_event_loop


@cli.command()
@click.argument("file", type=click.Path(path_type=Path), required=False)
@click.option("--quiet", "-q", is_flag=True, help="Print only errors.")
def check(file: Path | None, quiet: bool) -> None:
    """Check a fleet.yaml; report all problems.

    All errors at once, each with its place; warnings where there is no error.
    """
    _, resolved = _load_and_resolve(file)
    if quiet:
        return
    for warning in resolved.warnings:
        click.echo(f"warning: {warning}", err=True)
    spec = resolved.spec
    counts = f"{counted(len(spec.processes), 'process', 'es')}, {counted(len(spec.models), 'model')}"
    click.echo(f"{resolved.files[0]}: ok, {counts}")


@cli.command()
@click.argument("file", type=click.Path(path_type=Path), required=False)
@click.option(
    "--output", "-o", type=click.Choice(["yaml", "json"]), default="yaml", show_default=True, help="Output format."
)
def render(file: Path | None, output: str) -> None:
    """Print the resolved configuration.

    The normalised file and the exact command line and environment of every process, with secrets redacted."""
    from fleetd.resolver.render import rendered

    document = rendered(*_load_and_resolve(file))
    if output == "json":
        import json

        click.echo(json.dumps(document, indent=2, ensure_ascii=False))
        return
    import yaml

    click.echo(yaml.safe_dump(document, sort_keys=False, allow_unicode=True, width=120), nl=False)


@cli.command(name="version")
def version_() -> None:
    """Print the version."""
    click.echo(f"fleetd {__version__}")


@cli.command()
def schema() -> None:
    """Print the JSON Schema of fleet.yaml."""
    import json

    from fleetd.config.schema.json_schema import json_schema

    click.echo(json.dumps(json_schema(), indent=2, ensure_ascii=False))


def _load_and_resolve(file: Path | None) -> tuple[LoadedConfig, ResolvedFleet]:
    """Load and resolve a file as the daemon would, without writing anything."""
    gc.disable()  # thousands of entries are created and none is freed before the end
    from fleetd.resolver.check import load_and_resolve

    path = file or default_config(os.environ)
    try:
        return load_and_resolve(path, os.environ)
    except ConfigError as error:
        _show_problems(error)
        sys.exit(BAD_CONFIG)


def _show_problems(error: ConfigError) -> None:
    for problem in error.problems:
        click.echo(str(problem), err=True)
    count = len(error.problems)
    click.echo(counted(count, "problem"), err=True)


def main() -> None:
    """Run the console script."""
    try:
        cli(prog_name="fleetd", standalone_mode=False)
    except click.exceptions.Abort:
        sys.exit(INTERRUPTED)
    except click.ClickException as error:
        error.show()
        sys.exit(BAD_CONFIG)
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.exit(OK)
    except FleetError as error:
        fail(str(error), error.hint, FAILED)
    except Exception as error:  # noqa: BLE001 - the last handler before the user
        fail(f"internal error, please report it: {type(error).__name__}: {error}", None, FAILED)


if __name__ == "__main__":
    main()
