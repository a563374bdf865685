"""Commands to deeds: one row per command of the core.

The rules of this file
- `start` never waits: what takes time is a task, and its result comes back as an event.
- Grant and Reject are the hot path: a dictionary look-up and a call, no task, no log line.
- An exception out of a row is a bug of the shell; it is reported and costs that command only.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fleetd.core.data import commands as c


class Executor:
    """Carries out commands by a table from their type. `say(command)` is told of each that is not a request's own."""

    def __init__(
        self,
        table: dict[type[c.Command], Callable[[Any], None]],
        say: Callable[[c.Command], None],
        fault: Callable[[c.Command, Exception], None],
    ) -> None:
        missing = [kind.__name__ for kind in COMMANDS if kind not in table]
        if missing:
            raise TypeError(f"no row for {', '.join(missing)}")
        self._table = table
        self._say = say
        self._fault = fault

    def start(self, command: c.Command) -> None:
        """Begin to carry out one command."""
        kind = type(command)
        try:
            self._table[kind](command)
        except Exception as error:  # noqa: BLE001 - the other commands of this step must still be started
            self._fault(command, error)
        if kind is not c.Grant:
            self._say(command)


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
