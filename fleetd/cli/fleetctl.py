"""`fleetctl`: inspect and control a running fleetd over its Unix socket.

Invariants:
- Fast start: no import of aiohttp or pydantic; a verb imports what only it needs.
- Data on standard output, messages on standard error, one meaning per exit code, never a traceback.

Exit codes: 0 ok · 1 failed · 2 usage or config invalid · 3 not running or unhealthy · 4 unknown name ·
5 daemon unreachable · 6 wait timed out · 130 interrupted.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Any

import click

from fleetd.cli.client import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_OK, CliError
from fleetd.cli.context import FORMS, Session
from fleetd.cli.render import clean, close_stdout

PROGRAM = "fleetctl"
# The verbs of each module of `fleetd.cli.commands`, in the order of the help. A module is imported when one of its verbs is used.
VERBS = {
    "inspect": ("status", "ps", "logs", "events", "story", "explain", "dump", "pm2-jlist", "version"),
    "lifecycle": ("start", "stop", "restart", "drain", "undrain", "load", "unload", "pin", "unpin", "signal"),
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
    """Imports the module of a verb when it is used; suggests the nearest name for a mistyped one."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002  (click's signature)
        return list(_MODULE_OF)  # not sorted: the most used verbs come first

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Return the verb, or None if no module defines it."""
        if cmd_name not in self.commands and (name := _MODULE_OF.get(cmd_name)):
            for verb in import_module(f"fleetd.cli.commands.{name}").VERBS:
                self.add_command(verb)
        return super().get_command(ctx, cmd_name)

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
            from difflib import get_close_matches

            close = get_close_matches(args[0], self.list_commands(ctx), n=1)
            hint = f" Did you mean {close[0]}?" if close else ""
            raise click.UsageError(f"Unknown command {args[0][:60]!r}.{hint}", ctx)
        return super().resolve_command(ctx, args)


@click.group(cls=_Verbs, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.option("--socket", metavar="PATH", help="Control socket (default: $FLEETD_SOCKET).")
@click.option("-o", "--output", "form", type=click.Choice([*FORMS, "text"]), help="Output format; also after the verb.")
@click.option(
    "--color", type=click.Choice(["auto", "always", "never"]), default="auto", help="Use colour (auto: on a terminal)."
)
@click.pass_context
def cli(ctx: click.Context, socket: str | None, form: str | None, color: str) -> None:
    """Inspect and control a running fleetd.

    \b
    Exit codes: 0 ok, 1 failed, 2 usage or config invalid, 3 not running or
    unhealthy, 4 unknown name, 5 daemon unreachable, 6 wait timed out,
    130 interrupted. diff: 0 no differences, 1 differences, 2 error.
    """
    ctx.obj = Session(socket, form, color)


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
        click.echo(f"{PROGRAM}: internal error, or an invalid response: {type(error).__name__}: {text}", err=True)
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
