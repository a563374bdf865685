"""`fleetctl`: inspect and control a running fleetd over its Unix socket.

Invariants:
- Fast start: no import of aiohttp or pydantic; a verb imports what only it needs.
- Data on standard output, messages on standard error, one meaning per exit code, never a traceback.

Exit codes: 0 ok · 1 failed · 2 usage or config invalid · 3 not running or unhealthy · 4 unknown name ·
5 daemon unreachable · 6 wait timed out · 130 interrupted.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Any

import click

from fleetd import __version__
from fleetd.cli.client import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_OK, CliError
from fleetd.cli.context import FORMS, Session
from fleetd.cli.foreign import ALIASES, EXAMPLES, SECTIONS, line_for, nearest
from fleetd.cli.render import clean, close_stdout

PROGRAM = "fleetctl"
# The verbs of each module of `fleetd.cli.commands`, in the order of the help. A module is imported when one of its verbs is used.
VERBS = {
    "inspect": ("status", "ps", "logs", "events", "story", "explain", "dump", "pm2-jlist", "version"),
    "lifecycle": ("start", "stop", "restart", "drain", "undrain", "load", "unload", "pin", "unpin", "signal"),
    "chat": ("chat",),
    "config": ("diff", "apply", "reload", "daemon-reexec", "shutdown"),
    "models": ("models", "volumes"),
    "import_": ("import",),
    "migrate": ("migrate",),
    "audit": ("audit",),
    "init": ("init",),
    "doctor": ("doctor",),
    "setup": ("install-service", "completion"),
}
_MODULE_OF = {verb: module for module, verbs in VERBS.items() for verb in verbs}


class _ReaderLeft(Exception):
    """The reader of standard output has closed it, as `head` does."""


class _Verbs(click.Group):
    """Imports the module of a verb when it is used; knows the aliases and the verbs of other tools.

    Its help lists the verbs in sections; the help of each verb has examples.
    """

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002  (click's signature)
        return list(dict.fromkeys((*_MODULE_OF, *self.commands)))  # not sorted: the most used verbs come first

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Return the verb or the one of an alias, with its examples; None if no module defines it."""
        name = cmd_name if cmd_name in _MODULE_OF else ALIASES.get(cmd_name, cmd_name)
        if name not in self.commands and (module := _MODULE_OF.get(name)):
            for verb in import_module(f"fleetd.cli.commands.{module}").VERBS:
                self.add_command(verb)
        found = super().get_command(ctx, name)
        if found is not None and found.epilog is None and found.name is not None and found.name in EXAMPLES:
            found.epilog = "\b\nExamples:\n" + "\n".join(f"  {line}" for line in EXAMPLES[found.name])
        return found

    def invoke(self, ctx: click.Context) -> Any:
        """Run the verb; detect a closed reader here, since click would return exit code 1 for it."""
        try:
            result = super().invoke(ctx)
            sys.stdout.flush()
        except BrokenPipeError:
            raise _ReaderLeft from None
        return result

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and self.get_command(ctx, args[0]) is None and not args[0].startswith("-"):
            raise click.UsageError(_unknown(args, self.list_commands(ctx)), ctx)
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        known = self.list_commands(ctx)
        placed = {verb for verbs in SECTIONS.values() for verb in verbs}
        others = tuple(verb for verb in known if verb not in placed)
        for title, verbs in (*SECTIONS.items(), ("Other", others)):
            commands = [(verb, self.get_command(ctx, verb)) for verb in verbs if verb in known]
            rows = [(verb, command.get_short_help_str(60)) for verb, command in commands if command is not None]
            if rows:
                with formatter.section(title):
                    formatter.write_dl(rows)


def _unknown(args: list[str], verbs: list[str]) -> str:
    """Return the message for a verb that fleetctl does not have."""
    line = line_for(args[0], args[1:])
    if line is not None:
        return f"There is no verb {args[0]!r}: {line}"
    close = nearest(args[0], verbs)
    return f"Unknown command {args[0][:60]!r}." + (f" Did you mean {close}?" if close else "")


@click.group(cls=_Verbs, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.option("--socket", metavar="PATH", help="Control socket (default: $FLEETD_SOCKET).")
@click.option("-o", "--output", "form", type=click.Choice([*FORMS, "text"]), help="Output format; also after the verb.")
@click.option(
    "--color", type=click.Choice(["auto", "always", "never"]), default="auto", help="Use colour (auto: on a terminal)."
)
@click.version_option(__version__, prog_name=PROGRAM, message="%(prog)s %(version)s")
@click.pass_context
def cli(ctx: click.Context, socket: str | None, form: str | None, color: str) -> None:
    """Inspect and control a running fleetd.

    \b
    Exit codes: 0 ok, 1 failed, 2 usage or config invalid, 3 not running or
    unhealthy, 4 unknown name, 5 daemon unreachable, 6 wait timed out,
    130 interrupted. diff: 0 no differences, 1 differences, 2 error.
    """
    ctx.obj = Session(socket, form, color)


@cli.command(name="help")
@click.argument("verbs", nargs=-1, metavar="[VERB]...")
@click.pass_context
def help_(ctx: click.Context, verbs: tuple[str, ...]) -> int:
    """Show the help of fleetctl or of a verb."""
    group: click.Context = ctx.find_root()
    command: click.Command = group.command
    for verb in verbs:
        found = command.get_command(group, verb) if isinstance(command, click.Group) else None
        if found is None:
            raise click.UsageError(_unknown([verb], cli.list_commands(group)), group)
        command, group = found, click.Context(found, group, found.name)
    click.echo(command.get_help(group))
    return EXIT_OK


def run(arguments: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit code."""
    try:
        code = cli.main(arguments, prog_name=PROGRAM, standalone_mode=False)
    except (_ReaderLeft, BrokenPipeError):
        close_stdout()
        return EXIT_OK
    except click.exceptions.Abort:
        return EXIT_INTERRUPTED
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except CliError as error:
        _tell(error)
        return error.exit_code
    except Exception as error:
        if os.environ.get("FLEETCTL_DEBUG"):
            raise
        text = clean(str(error))[:300]
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.EFBIG):
            click.echo(f"{PROGRAM}: cannot write: {error.strerror}", err=True)
            close_stdout()
            return EXIT_FAILED
        click.echo(
            f"{PROGRAM}: internal error; please report it with `fleetctl dump`: {type(error).__name__}: {text}",
            err=True,
        )
        click.echo("  set FLEETCTL_DEBUG=1 for a traceback", err=True)
        return EXIT_FAILED
    return code if isinstance(code, int) else EXIT_OK


def _tell(error: CliError) -> None:
    lines = [clean(line) for line in str(error).split("\n")]
    if len(lines) > 1:  # problems of a file, each with its line and a caret: unchanged
        click.echo("\n".join(line.rstrip() for line in lines), err=True)
    else:
        click.echo(f"{PROGRAM}: {lines[0]}", err=True)
    if error.hint:
        click.echo(f"  {clean(error.hint)}", err=True)


def main() -> None:
    """Run the console script."""
    code = run()
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        close_stdout()
    except OSError as error:
        click.echo(f"{PROGRAM}: cannot write: {error.strerror}", err=True)
        close_stdout()
        code = code or EXIT_FAILED
    raise SystemExit(code)


if __name__ == "__main__":
    main()
