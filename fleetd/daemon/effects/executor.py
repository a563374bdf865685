"""Dispatch each core command to its handler.

Invariants:
- `start` never waits: a slow handler starts a task, and the result returns as an event.
- Grant is the hot path: a dictionary look-up and a call, no task, no log line.
- An exception out of a handler is a bug: it is reported, and the other commands are still started.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from fleetd.control.event_codes import code_of
from fleetd.core.data import commands as c
from fleetd.daemon.context import Reporter

_LOGGED_FIELDS = ("name", "model", "process", "generation", "request_id", "code", "reason")
_DEBUG_ONLY = frozenset({c.Persist, c.StartProbe, c.StopProbes, c.ReadAhead})  # another line of the log covers them

COMMANDS: tuple[type[c.Command], ...] = (
    c.Spawn,
    c.Stop,
    c.Sweep,
    c.StartProbe,
    c.StopProbes,
    c.Load,
    c.Unload,
    c.Sleep,
    c.Wake,
    c.CheckSleep,
    c.Grant,
    c.Reject,
    c.ReadAhead,
    c.Persist,
    c.LearnFootprint,
    c.Finished,
)


class Executor:
    """Start commands by a table from their type, and log them."""

    def __init__(self, reporter: Reporter) -> None:
        self._reporter = reporter
        self._handlers: Mapping[type[c.Command], Callable[[Any], None]] = {}

    def register(self, handlers: Mapping[type[c.Command], Callable[[Any], None]]) -> None:
        """Set all handlers before the first event. Raises TypeError if one is missing."""
        missing = [kind.__name__ for kind in COMMANDS if kind not in handlers]
        if missing:
            raise TypeError(f"no handler for {', '.join(missing)}")
        self._handlers = handlers

    def start(self, command: c.Command) -> None:
        """Start one command."""
        kind = type(command)
        try:
            self._handlers[kind](command)
        except Exception as error:  # noqa: BLE001 - the other commands of this step must still be started
            self._reporter.command_fault(command, error)
        if kind is not c.Grant:
            self._log(command)

    def _log(self, command: c.Command) -> None:
        kind = type(command)
        log = self._reporter.log.debug if kind in _DEBUG_ONLY else self._reporter.log.info
        fields = {key: value for key in _LOGGED_FIELDS if (value := getattr(command, key, None)) not in (None, "")}
        log(str(code_of(command)), **fields)
