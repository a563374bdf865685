"""The bounded record of events, decisions and commands. It holds data; `fleetd.daemon.api.event_text` renders it.

Invariants:
- One entry per handled event that led to a note or a command. A request that was served from memory leaves no entry.
- Of a configuration change only the fact is kept, not its specs.
- A journal with `keep_all` keeps every event unabridged, so that a test can replay it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum

from fleetd.core.data.commands import Command
from fleetd.core.data.events import Event, SpecChanged
from fleetd.core.data.specs import FleetSpec

_PER_SUBJECT = 64
_IN_ALL = 4096
_SUBJECTS = 16384  # clients may ask for any name


class Subject(StrEnum):
    """The kind of a note's subject: a process and its model may share one name."""

    PROCESS = "process"
    MODEL = "model"


# -- notes: decisions and changes that no event or command records ---------------------------------------------------------


@dataclass(frozen=True, slots=True)
class JournalNote:
    """Base of all notes. `name` is the process or the model that the note is about."""

    name: str


@dataclass(frozen=True, slots=True)
class StateChanged(JournalNote):
    """A process, or a model on the process `on`, changed its state."""

    kind: Subject
    before: str
    after: str
    reason: str
    on: str = ""


@dataclass(frozen=True, slots=True)
class PrerequisitesChanged(JournalNote):
    """Required files or volumes went missing; empty `missing`: all are available."""

    kind: Subject
    missing: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class ProcessForgotten(JournalNote):
    """A process that left the configuration was dropped."""


@dataclass(frozen=True, slots=True)
class StartPhaseChanged(JournalNote):
    """A starting engine entered another phase of its start."""

    phase: str


@dataclass(frozen=True, slots=True)
class RunStable(JournalNote):
    """A process stayed up long enough for its backoff to be reset."""

    after_s: float


@dataclass(frozen=True, slots=True)
class RestartTurn(JournalNote):
    """A rolling restart reached this replica."""

    reason: str


@dataclass(frozen=True, slots=True)
class ModelLeaving(JournalNote):
    """A model gets no new requests and is unloaded once it is idle."""

    on: str
    reason: str


@dataclass(frozen=True, slots=True)
class Evicted(JournalNote):
    """A model leaves, or is put to sleep, to free memory.

    `by` is the model that needs the memory, empty if a device is over its budget. `cost` is the expected loading time
    that the eviction causes, in seconds.
    """

    on: str
    reason: str
    by: str = ""
    freed_bytes: Mapping[str, int] = field(default_factory=dict)
    cost: float = 0.0
    sleeps: bool = False


@dataclass(frozen=True, slots=True)
class ModelLost(JournalNote):
    """A model was in memory and its process died."""

    on: str
    reason: str


@dataclass(frozen=True, slots=True)
class LoadRepeated(JournalNote):
    """A server was restarted on request during a load, which is ordered again."""

    on: str


@dataclass(frozen=True, slots=True)
class LaneWait(JournalNote):
    """A load, unload, sleep or wake waits for a start or stop on its lane."""

    reason: str


@dataclass(frozen=True, slots=True)
class ModelLoadFailed(JournalNote):
    reason: str
    final: bool = False


@dataclass(frozen=True, slots=True)
class ModelUnloadFailed(JournalNote):
    on: str
    reason: str
    attempts: int


@dataclass(frozen=True, slots=True)
class SleepCancelled(JournalNote):
    on: str
    reason: str


@dataclass(frozen=True, slots=True)
class SleepStepFailed(JournalNote):
    """A sleep, a wake or a check failed; the model is not put to sleep for `pause_s`."""

    on: str
    step: str
    reason: str
    pause_s: float


@dataclass(frozen=True, slots=True)
class LoadRequestDone(JournalNote):
    """The load that an operator requested is done."""


@dataclass(frozen=True, slots=True)
class PinChanged(JournalNote):
    pinned: bool


@dataclass(frozen=True, slots=True)
class RequestFellBack(JournalNote):
    """A request that `refused_by` could not serve continues with this model."""

    request_id: int
    refused_by: str
    reason: str


@dataclass(frozen=True, slots=True)
class FootprintLearned(JournalNote):
    """A measurement exceeded the known memory of a model, in bytes per device."""

    bytes: Mapping[str, int]
    asleep: bool = False


# -- the record -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class JournalEntry:
    """`serial` counts from 1 for the life of the daemon; `time_s` is monotonic."""

    serial: int
    time_s: float
    event: Event
    commands: tuple[Command, ...] = ()
    notes: tuple[JournalNote, ...] = ()

    def subjects(self) -> set[str]:
        """Return the names of processes and models that this entry is about."""
        names = {note.name for note in self.notes}
        names.update(self.event.names())
        for command in self.commands:
            names.update(command.names())
        return names


class Journal:
    def __init__(self, limit: int = _IN_ALL, keep_all: bool = False) -> None:
        self.entries: deque[JournalEntry] = deque(maxlen=None if keep_all else limit)
        self.keep_all = keep_all
        self.serial = 0
        self.noted = 0  # count of all notes: reconciliation repeats while it grows
        self._by_subject: dict[str, deque[JournalEntry]] = {}
        self._notes: list[JournalNote] = []

    def note(self, note: JournalNote) -> None:
        """Add a note to the entry of the event that is being handled."""
        self.noted += 1
        self._notes.append(note)

    def pending(self) -> tuple[JournalNote, ...]:
        """Return the notes of the event that is being handled."""
        return tuple(self._notes)

    def record(self, now: float, event: Event, commands: Sequence[Command]) -> None:
        notes, self._notes = tuple(self._notes), []
        if not commands and not notes and not self.keep_all and not isinstance(event, SpecChanged):
            return
        if isinstance(event, SpecChanged) and not self.keep_all:
            event = replace(event, spec=FleetSpec(), remembered={}, adopted=())
        self.serial += 1
        entry = JournalEntry(self.serial, now, event, tuple(commands), notes)
        self.entries.append(entry)
        for subject in sorted(entry.subjects()):
            last = self._by_subject.pop(subject, None) or deque(maxlen=_PER_SUBJECT)
            last.append(entry)
            self._by_subject[subject] = last  # the subject that was touched last is dropped last
        while len(self._by_subject) > _SUBJECTS:
            del self._by_subject[next(iter(self._by_subject))]

    def of(self, subject: str) -> tuple[JournalEntry, ...]:
        """Return the last entries about one process or model, oldest first."""
        return tuple(self._by_subject.get(subject, ()))

    def notes_on(self, subject: str) -> tuple[JournalNote, ...]:
        """Return the last notes on a process or model, oldest first, with pending ones."""
        recorded = (note for entry in self.of(subject) for note in entry.notes)
        return tuple(note for note in (*recorded, *self._notes) if note.name == subject)

    def after(self, serial: int) -> tuple[JournalEntry, ...]:
        """Return the entries that are newer than `serial`, oldest first."""
        count = min(self.serial - serial, len(self.entries))
        return tuple(self.entries[index] for index in range(-count, 0))
