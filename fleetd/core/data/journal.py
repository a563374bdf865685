"""What happened and what was decided, bounded.

The rules of this file
- One entry per handled event that led to anything, with its commands; kept as values, rendered only when somebody asks.
- Warm grants are not entered, save in a recording journal: they would push out what explains the fleet. Counters stand for them.
- Of a change of the whole fleet only the fact is kept: thousands of edits of a large fleet are no reason to keep each of them.
- A recording journal (`keep_all`) keeps every event from the first one, so that a test can replay it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace

from fleetd.core.data.commands import Command
from fleetd.core.data.events import Event, SpecChanged
from fleetd.core.data.specs import FleetSpec

_PER_SUBJECT = 64
_IN_ALL = 4096
_SUBJECTS = 16384  # clients may ask for any name


@dataclass(frozen=True, slots=True)
class Entry:
    """`serial` counts from 1 for the life of the daemon; `time_s` is monotonic."""

    serial: int
    time_s: float
    event: Event
    commands: tuple[Command, ...] = ()
    notes: tuple[str, ...] = ()

    def subjects(self) -> set[str]:
        """Return the names of processes and models that this entry is about."""
        names: set[str] = set()
        for value in (self.event, *self.commands):
            for key in ("name", "model", "process"):
                name = getattr(value, key, None)
                if isinstance(name, str):
                    names.add(name)
        names.update(note.split(":", 1)[0] for note in self.notes)
        return names


class Journal:
    def __init__(self, limit: int = _IN_ALL, keep_all: bool = False) -> None:
        self.entries: deque[Entry] = deque(maxlen=None if keep_all else limit)
        self.keep_all = keep_all
        self.serial = 0
        self.noted = 0  # notes ever made: how reconciliation sees that something was decided
        self._by_subject: dict[str, deque[Entry]] = {}
        self._notes: list[str] = []

    def note(self, subject: str, text: str) -> None:
        """Add a sentence to the entry of the event that is being handled."""
        self.noted += 1
        self._notes.append(f"{subject}: {text}")

    def pending(self) -> tuple[str, ...]:
        """Return the notes of the event that is being handled."""
        return tuple(self._notes)

    def record(self, now: float, event: Event, commands: Sequence[Command]) -> None:
        notes, self._notes = tuple(self._notes), []
        if not commands and not notes and not self.keep_all and not isinstance(event, SpecChanged):
            return
        if isinstance(event, SpecChanged) and not self.keep_all:
            event = replace(event, spec=FleetSpec(), remembered={}, adopted=())
        self.serial += 1
        entry = Entry(self.serial, now, event, tuple(commands), notes)
        self.entries.append(entry)
        for subject in sorted(entry.subjects()):
            last = self._by_subject.pop(subject, None) or deque(maxlen=_PER_SUBJECT)
            last.append(entry)
            self._by_subject[subject] = last  # last touched, last forgotten
        while len(self._by_subject) > _SUBJECTS:
            del self._by_subject[next(iter(self._by_subject))]

    def of(self, subject: str) -> tuple[Entry, ...]:
        """Return the last entries about one process or model, oldest first."""
        return tuple(self._by_subject.get(subject, ()))

    def after(self, serial: int) -> tuple[Entry, ...]:
        """Return the entries that are newer than `serial`, oldest first."""
        count = min(self.serial - serial, len(self.entries))
        return tuple(self.entries[index] for index in range(-count, 0))

    def story(self, subject: str) -> tuple[str, ...]:
        """Return those entries as sentences."""
        return tuple(line for entry in self.of(subject) for line in sentences(entry, subject))


def sentences(entry: Entry, subject: str | None = None) -> Iterator[str]:
    """Yield one line for the event, one per command and note, of one entry; only those about `subject` when given."""
    yield f"{entry.time_s:.3f} {describe(entry.event)}"
    for note in entry.notes:
        if subject is None or note.startswith(f"{subject}:"):
            yield f"{entry.time_s:.3f}   {note}"
    for command in entry.commands:
        if subject is None or subject in {getattr(command, key, None) for key in ("name", "model", "process")}:
            yield f"{entry.time_s:.3f}   -> {describe(command)}"


def describe(value: Event | Command) -> str:
    """Say an event or a command in one line: its name, and its fields that are not empty."""
    parts = []
    for item in fields(value):
        content = getattr(value, item.name)
        if content in ("", None, (), {}, False) or item.name in ("spec", "remembered", "adopted"):
            continue
        parts.append(f"{item.name}={content}" if isinstance(content, int | float | str) else f"{item.name}={content!r}")
    return f"{type(value).__name__}({', '.join(parts)})"
