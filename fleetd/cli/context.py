"""Shared parts of all verbs: socket, screen, options, and completion of names.

Invariants:
- `-o` and `--color` are accepted before and after the verb; the later one wins.
- A verb declares its output formats; another one is a usage error.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import click

from fleetd.cli.client import Client, CliError, socket_candidates
from fleetd.cli.render import Screen, open_screen
from fleetd.units import parse_duration

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

    _ParamType = click.ParamType[float]
else:
    _ParamType = click.ParamType  # not generic before click 8.2

COMPLETION_S = 0.3
FORMS = ("table", "wide", "json", "yaml", "name")
Verb = TypeVar("Verb", bound=Callable[..., Any])


class Session:
    """One invocation of fleetctl."""

    def __init__(self, socket: str | None, form: str | None, color: str) -> None:
        self.socket, self.form, self.color = socket, form, color
        self._screen: Screen | None = None

    @property
    def client(self) -> Client:
        return Client(socket_candidates(self.socket, os.environ))

    @property
    def screen(self) -> Screen:
        if self._screen is None:
            self._screen = open_screen(self.color, os.environ)
        return self._screen

    def emit(self, document: Mapping[str, Any]) -> bool:
        """Print the document as JSON or YAML if requested; else return False."""
        if self.form == "json":
            self.screen.json(document)
        elif self.form == "yaml":
            self.screen.yaml(dict(document))
        else:
            return False
        return True


def say(message: str) -> None:
    """Write a message to standard error."""
    click.echo(message, err=True)


class Duration(_ParamType):
    """A duration as in fleet.yaml: 250ms, 10s, 5m, 1h30m; a bare number is seconds."""

    name = "duration"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        if isinstance(value, float):
            return value
        text = str(value).strip()
        try:
            bare = text.replace(".", "", 1)
            return float(text) if bare.isascii() and bare.isdigit() else parse_duration(text)
        except ValueError as error:
            self.fail(str(error), param, ctx)


class Since(Duration):
    """A duration, `today`, `yesterday`, or a local time such as 2026-11-30 21:03; as seconds before now."""

    name = "time"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        from datetime import datetime, timedelta

        now = datetime.now()  # noqa: DTZ005 - people type local times
        midnight = now.replace(hour=0, minute=0, second=0, microsecond=0)
        days = {"today": midnight, "yesterday": midnight - timedelta(days=1)}
        moment = days.get(str(value).strip().lower())
        if moment is None and not isinstance(value, float) and any(mark in str(value) for mark in "-:"):
            try:
                moment = datetime.fromisoformat(str(value).strip())
            except ValueError:
                self.fail(f"{value!r} is neither a duration nor a time such as '2026-11-30 21:03'", param, ctx)
            moment = moment.astimezone().replace(tzinfo=None) if moment.tzinfo else moment
        if moment is None:
            return super().convert(value, param, ctx)
        return max(0.0, (now - moment).total_seconds())


def forms(*allowed: str) -> Callable[[Verb], Verb]:
    """Add `-o` with the output formats of a verb; the verb gets its Session as the first argument."""

    def decorate(verb: Verb) -> Verb:
        @functools.wraps(verb)
        def run(output: str | None, color: str | None, **arguments: Any) -> Any:
            session = click.get_current_context().ensure_object(Session)
            session.form = output or session.form or allowed[0]
            session.color = color or session.color
            if session.form not in allowed:
                raise click.UsageError(f"-o {session.form} is not available here; choose from {', '.join(allowed)}")
            return verb(session, **arguments)

        color = click.option("--color", type=click.Choice(["auto", "always", "never"]), hidden=True)
        output = click.option(
            "-o", "--output", type=click.Choice(allowed), help=f"Output format (default: {allowed[0]})."
        )
        return output(color(run))  # type: ignore[return-value]

    return decorate


def _live_names(session: Session, keys: Sequence[str]) -> list[str]:
    client = Client(
        socket_candidates(session.socket, os.environ), connect_s=COMPLETION_S / 3, answer_s=COMPLETION_S * 2 / 3
    )
    names = client.get("/v1/names")
    found: dict[str, None] = {}
    for key in keys:
        entries = names.get(key) or {}
        found.update(dict.fromkeys(entries))
        for other in entries.values():
            found.update(dict.fromkeys([other] if isinstance(other, str) else other))
    return list(found)


def near_name(word: str, names: Sequence[str]) -> str | None:
    """Return the hint with the nearest known name; None if none is near."""
    from difflib import get_close_matches

    close = get_close_matches(word, names, n=1)
    return f"did you mean {close[0]}?" if close else None


def completion_of(*keys: str, also: Iterable[str] = ()) -> Callable[..., list[CompletionItem]]:
    """Return a completion callback for names of `processes` and/or `models`; empty without a daemon."""

    def complete(ctx: click.Context, _param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        from click.shell_completion import CompletionItem

        socket = ctx.find_root().params.get("socket")
        try:
            names = _live_names(Session(socket, None, "never"), keys)
        except (CliError, OSError, ValueError, AttributeError, TypeError):
            names = []
        typed = set(ctx.params.get("names") or ())
        return [CompletionItem(name) for name in (*names, *also) if name.startswith(incomplete) and name not in typed]

    return complete


def names_argument(*keys: str, required: bool = True, also: Iterable[str] = ()) -> Callable[[Verb], Verb]:
    """Add the argument NAME… with completion."""
    metavar = "MODEL" if keys == ("models",) else "NAME"
    return click.argument(
        "names",
        nargs=-1,
        required=required,
        metavar=f"{metavar}..." if required else f"[{metavar}]...",
        shell_complete=completion_of(*keys, also=also),
    )
