"""`fleetd`: run the daemon, and everything that can be said of a fleet.yaml without one.

    fleetd run [--config FILE]     in the foreground; SIGTERM drains and stops, SIGHUP reads the file again
    fleetd check [FILE] [-q]       every mistake with its place; exit 2 when there is one
    fleetd render [FILE]           the normalised configuration and the exact command line of every process
    fleetd schema                  the JSON Schema of fleet.yaml

The rules of this file
- Data on stdout, messages on stderr; never a traceback. Exit codes: 0 ok, 1 failed, 2 usage or configuration, 130 interrupted.
- Imports happen in the commands: `fleetd --version` answers at once.
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

if TYPE_CHECKING:
    from fleetd.config.load import LoadedConfig
    from fleetd.resolver.resolved import Assembly

OK, FAILED, BAD_CONFIG, INTERRUPTED = 0, 1, 2, 130


def default_config(env: Mapping[str, str]) -> Path:
    """Return the first fleet.yaml of the search order that exists. Exits when there is none."""
    home = env.get("XDG_CONFIG_HOME") or str(Path("~/.config").expanduser())
    places = [Path("fleet.yaml"), Path(home) / "fleetd" / "fleet.yaml", Path("/etc/fleetd/fleet.yaml")]
    found = next((place for place in places if place.is_file()), None)
    said = ", ".join(str(place) for place in places)
    return found or fail(f"there is no configuration: looked for {said}", "name one with --config FILE", BAD_CONFIG)


def fail(message: str, hint: str | None, code: int) -> NoReturn:
    """Say what is wrong on stderr and leave."""
    click.echo(f"fleetd: {message}", err=True)
    if hint:
        click.echo(f"  {hint}", err=True)
    sys.exit(code)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="fleetd", message="%(prog)s %(version)s")
def cli() -> None:
    """One daemon for a fleet of local language models."""


@cli.command()
@click.option("--config", "-c", "config", type=click.Path(path_type=Path), help="fleet.yaml; searched for when absent.")
@click.option("--log-file", type=click.Path(path_type=Path), help="The daemon's own log; stderr when absent.")
@click.option(
    "--log-level", type=click.Choice(["debug", "info", "warning", "error"]), default="info", show_default=True
)
def run(config: Path | None, log_file: Path | None, log_level: str) -> None:
    """Run the daemon in the foreground."""
    path = (config or default_config(os.environ)).absolute()
    from fleetd.daemon.own_memory import use_one_heap

    use_one_heap()
    from fleetd.daemon.reload.prefetch import begin_reading

    try:
        reading = begin_reading(path)  # on another core, while this one loads the daemon
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
        return await App(RunOptions(path, reading), log, sink).run()

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
@click.option("--quiet", "-q", is_flag=True, help="Say nothing when all is well; no warnings.")
def check(file: Path | None, quiet: bool) -> None:
    """Say everything that is wrong with a fleet.yaml."""
    _, assembly = _assembled(file)
    if quiet:
        return
    for warning in assembly.warnings:
        click.echo(f"warning: {warning}", err=True)
    spec = assembly.spec
    click.echo(f"{assembly.files[0]}: ok, {len(spec.processes)} processes, {len(spec.models)} models")


@cli.command()
@click.argument("file", type=click.Path(path_type=Path), required=False)
@click.option("--output", "-o", type=click.Choice(["yaml", "json"]), default="yaml", show_default=True)
def render(file: Path | None, output: str) -> None:
    """Print the normalised configuration and what would be started, exactly; secrets are hidden."""
    from fleetd.resolver.render import rendered

    document = rendered(*_assembled(file))
    if output == "json":
        import json

        click.echo(json.dumps(document, indent=2, ensure_ascii=False))
        return
    import yaml

    click.echo(yaml.safe_dump(document, sort_keys=False, allow_unicode=True, width=120), nl=False)


@cli.command()
def schema() -> None:
    """Print the JSON Schema of fleet.yaml."""
    import json

    from fleetd.config.schema.json_schema import json_schema

    click.echo(json.dumps(json_schema(), indent=2, ensure_ascii=False))


def _assembled(file: Path | None) -> tuple[LoadedConfig, Assembly]:
    """Read and assemble a file as the daemon would, without touching anything."""
    gc.disable()  # thousands of entries are made and none is dropped before the end
    from fleetd.resolver.offline import assembled

    path = file or default_config(os.environ)
    try:
        return assembled(path, os.environ)
    except ConfigError as error:
        _show_problems(error)
        sys.exit(BAD_CONFIG)


def _show_problems(error: ConfigError) -> None:
    for problem in error.problems:
        click.echo(str(problem), err=True)
    count = len(error.problems)
    click.echo(f"{count} problem{'s' if count != 1 else ''}", err=True)


def main() -> None:
    """Entry point of the console script."""
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
    except Exception as error:  # noqa: BLE001 - the last line before a person
        fail(f"unexpected failure, please report it: {type(error).__name__}: {error}", None, FAILED)


if __name__ == "__main__":
    main()
