"""docs/reference/cli.md, written from the help of `fleetctl`.

Invariant: a test fails when the page differs from `python -m fleetd.cli.docgen`.
"""

from __future__ import annotations

import os
import sys

import click

from fleetd.cli.fleetctl import cli

COLUMNS = 100
HEAD = """\
# fleetctl

Written by `python -m fleetd.cli.docgen > docs/reference/cli.md` from the program's own help. Do not edit.

`fleetctl` talks to a running `fleetd` over its Unix socket: `--socket PATH`, else `$FLEETD_SOCKET`, else
`~/.fleetd/run/fleetd.sock`, else `/run/fleetd/fleetd.sock`. Data goes to standard output, messages to standard error.
JSON documents carry `"schema": "fleetctl/v1"`; times are UTC in RFC 3339, memory is in bytes. Streams (`logs`, `events`)
are one JSON document per line. Colour is used on a terminal only, and not where `NO_COLOR` is set.

| exit code | means |
|---|---|
| 0 | ok; `diff`: no differences; `status NAME`: running |
| 1 | the operation failed; `diff`: differences |
| 2 | usage or configuration invalid; `diff`: error |
| 3 | `status NAME`: not running, or unhealthy |
| 4 | unknown name |
| 5 | the daemon cannot be reached |
| 6 | the wait timed out; what was asked goes on |
| 130 | interrupted |
"""


def page() -> str:
    """Return the whole page."""
    names = cli.context_settings["help_option_names"]
    root = click.Context(
        cli, info_name="fleetctl", terminal_width=COLUMNS, max_content_width=COLUMNS, help_option_names=names
    )
    parts = [HEAD, _block(cli.get_help(root))]
    for name in cli.list_commands(root):
        command = cli.get_command(root, name)
        assert command is not None
        context = click.Context(command, root, info_name=name, terminal_width=COLUMNS, max_content_width=COLUMNS)
        parts.append(f"## fleetctl {name}\n\n{_block(command.get_help(context))}")
        parts += _below(command, context)
    return "\n".join(parts)


def _below(command: click.Command, context: click.Context) -> list[str]:
    """Return the parts of a verb's own verbs."""
    if not isinstance(command, click.Group):
        return []
    found = []
    for name in command.list_commands(context):
        verb = command.get_command(context, name)
        assert verb is not None
        inner = click.Context(verb, context, info_name=name, terminal_width=COLUMNS, max_content_width=COLUMNS)
        found.append(f"### {inner.command_path}\n\n{_block(verb.get_help(inner))}")
    return found


def _block(text: str) -> str:
    lines = "\n".join(line.rstrip() for line in text.splitlines())
    return f"```text\n{lines}\n```\n"


if __name__ == "__main__":
    os.environ.pop("FLEETD_SOCKET", None)
    sys.stdout.write(page())
