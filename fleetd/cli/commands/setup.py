"""Verbs for the installation: completion and install-service."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import click

from fleetd.cli.client import EXIT_FAILED, EXIT_OK, EXIT_USAGE, CliError
from fleetd.cli.context import Session, forms, say
from fleetd.units import expand_home

SHELLS = ("bash", "zsh", "fish")


@click.command()
@click.argument("shell", type=click.Choice(SHELLS))
@click.pass_context
def completion(ctx: click.Context, shell: str) -> int:
    """Print the completion script of a shell.

    Completes names of the running fleet.

    \b
    bash: eval "$(fleetctl completion bash)"   in ~/.bashrc
    zsh:  eval "$(fleetctl completion zsh)"    in ~/.zshrc, after compinit
    fish: fleetctl completion fish > ~/.config/fish/completions/fleetctl.fish
    """
    from click.shell_completion import get_completion_class

    found = get_completion_class(shell)
    if found is None:
        raise CliError(f"no completion for {shell}", EXIT_FAILED)
    writer = found(ctx.find_root().command, {}, "fleetctl", "_FLEETCTL_COMPLETE")
    # Render the template directly: `source()` would start the shell to check its version.
    click.echo(writer.source_template % writer.source_vars())
    return EXIT_OK


@click.command(name="install-service")
@click.option("--user", "own", is_flag=True, help="Install for your session, without root.")
@click.option("--print", "only_print", is_flag=True, help="Print the file; install nothing.")
@click.option("--config", type=click.Path(), help="The fleet.yaml (default: as fleetd run).")
@click.option("--run-as", metavar="USER", help="User of the service (default: sudo's caller).")
@click.option("--platform", type=click.Choice(["systemd", "launchd"]), help="Default: that of this machine.")
@forms("text")
def install_service(
    session: Session, own: bool, only_print: bool, config: str | None, run_as: str | None, platform: str | None
) -> int:
    """Install a systemd or launchd service."""
    from fleetd.cli import service_files

    user = None if own else run_as or os.environ.get("SUDO_USER") or _current_user()
    file_given = _config(config)
    service = service_files.ServiceSettings(
        fleetd=_program("fleetd", "fleetd"),
        fleetctl=_program("fleetctl", "fleetd.cli.fleetctl"),
        config=str(file_given),
        path=os.environ.get("PATH", os.defpath),
        user=user,
        home=_home_of(user),
        socket=_socket(file_given, _home_of(user)),
    )
    make = (
        service_files.launchd if (platform or service_files.native_platform()) == "launchd" else service_files.systemd
    )
    file = make(service)
    there = Path(service.config).is_file()
    if only_print:
        if not there:
            say(f"warning: missing file {service.config}: the service would not start")
        session.screen.out.write(file.text)
        return EXIT_OK
    if not there:
        raise CliError(f"no such file: {service.config}", EXIT_USAGE, "name it with --config")
    try:
        service_files.write(file)
    except OSError as error:
        hint = "use sudo, or --user for a user service" if isinstance(error, PermissionError) else None
        raise CliError(f"{file.destination}: {error.strerror or error}", EXIT_FAILED, hint) from None
    session.screen.raw(str(file.destination))
    say("installed; now run:")
    for command in file.commands:
        say(f"  {command}")
    return EXIT_OK


def _current_user() -> str:
    import pwd

    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        return str(os.getuid())


def _home_of(user: str | None) -> Path:
    import pwd

    if user is None:
        return Path.home()
    try:
        return Path(pwd.getpwnam(user).pw_dir)
    except KeyError:
        raise CliError(f"unknown user {user!r}", EXIT_USAGE) from None


def _program(name: str, module: str) -> tuple[str, ...]:
    """Return the command of a console script: next to this Python, on PATH, or run by this Python."""
    beside = Path(sys.executable).parent / name
    if beside.is_file():
        return (str(beside),)
    found = shutil.which(name)
    return (str(Path(found).absolute()),) if found else (sys.executable, "-m", module)


def _socket(config: Path, home: Path) -> str | None:
    """Return the socket of a daemon with this file; None for a default path. An invalid file is a warning here."""
    from fleetd.config.load import load
    from fleetd.errors import ConfigError

    if not config.is_file():
        return None
    try:
        loaded = load(config, {**os.environ, "HOME": str(home)})
    except ConfigError as error:
        say(f"warning: {config} is invalid: {str(error).splitlines()[0]}")
        return None
    written = loaded.config.paths.run
    folder = home / written[2:] if written.startswith("~/") else loaded.resolve(("paths", "run"), written)
    found = folder / "fleetd.sock"
    return None if found == home / ".fleetd/run/fleetd.sock" else str(found)


def _config(given: str | None) -> Path:
    if given is not None:
        return Path(expand_home(given)).absolute()
    configured = os.environ.get("XDG_CONFIG_HOME")
    own = Path(configured) if configured else Path.home() / ".config"
    places = [Path("fleet.yaml").absolute(), own / "fleetd/fleet.yaml", Path("/etc/fleetd/fleet.yaml")]
    return next((place for place in places if place.is_file()), places[1])


VERBS: tuple[click.Command, ...] = (install_service, completion)
