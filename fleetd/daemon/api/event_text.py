"""Render journal entries: the only place where events, commands and notes become text.

Invariants:
- Nothing reads this text back; programs read `event`, `state`, `before` and `data`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from fleetd.control.event_codes import SHOWN, EventCode, code_of
from fleetd.core.data import commands as c
from fleetd.core.data import events as e
from fleetd.core.data import journal as j
from fleetd.core.data.specs import describe_exit
from fleetd.units import show_size

# A note reports the same with more context.
_NOTED = (e.StartProgress, e.ProcessPrerequisitesChanged, e.ModelPrerequisitesChanged, e.LoadFailed, e.UnloadFailed)
_LOG_LINES = 10


@dataclass(frozen=True, slots=True)
class EventLine:
    """The parts of a `FleetEvent` that do not depend on the time of the report."""

    kind: str
    name: str | None
    code: EventCode
    reason: str = ""
    before: str | None = None
    state: str | None = None
    data: Mapping[str, Any] = field(default_factory=dict)


def lines_of(entry: j.JournalEntry) -> Iterator[EventLine]:
    """Yield what `fleetctl events` shows of an entry: event, notes, commands."""
    event = entry.event
    survived = not isinstance(event, e.SetEmpty) or event.survivors
    if code_of(event) in SHOWN and not isinstance(event, _NOTED) and survived:
        yield EventLine(*_subject(event), code_of(event), _event_reason(event), data=_given(_event_data(event)))
    for note in entry.notes:
        yield _note_line(note)
    for command in entry.commands:
        if code_of(command) in SHOWN:
            data = _given(_command_data(command))
            yield EventLine(*_subject(command), code_of(command), _command_reason(command), data=data)


def _subject(value: e.Event | c.Command) -> tuple[str, str | None]:
    """Return the kind and the name of what an event or a command is about."""
    names = value.names()
    if not names:
        return "daemon", None
    about_model = isinstance(
        value, e.ModelEvent | c.PlacementCommand | c.ReadAhead | c.LearnFootprint | c.Grant | c.Reject
    )
    return ("model" if about_model else "process"), names[0]


def _given(data: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in data.items() if value is not None and value != "" and value != ()}


# -- events ---------------------------------------------------------------------------------------------------------------


def _event_reason(event: e.Event) -> str:
    match event:
        case e.Exited(report=report):
            return describe_exit(report)
        case e.SpawnFailed(message=message):
            return message
        case e.Spawned(pid=pid, generation=generation) | e.Adopted(pid=pid, generation=generation):
            return f"pid {pid}, generation {generation}"
        case e.RestartDue(reason=reason) | e.StartDue(reason=reason):
            return reason
        case e.DrainRequested(drain=False):
            return "an operator ends the drain"
        case e.SetEmpty(survivors=survivors):
            return f"cannot be killed: {', '.join(map(str, survivors))}"
        case _:
            return "requested by an operator"


def _event_data(event: e.Event) -> Mapping[str, Any]:
    match event:
        case e.Exited(report=report, generation=generation):
            log = list(report.log_tail[-_LOG_LINES:])
            how = {"code": report.code, "signal": report.signal, "oom": report.oom}
            return {**how, "log": log, "generation": generation}
        case e.Spawned(pid=pid, generation=generation):
            return {"pid": pid, "generation": generation}
        case e.SetEmpty(survivors=survivors, generation=generation):
            return {"survivors": list(survivors), "generation": generation}
        case e.SpawnFailed(generation=generation):
            return {"generation": generation}
        case e.DrainRequested(drain=drain):
            return {"drain": drain}
        case e.PinRequested(pin=pin):
            return {"pin": pin}
        case e.ShutdownRequested(force=force):
            return {"force": force}
        case _:
            return {}


# -- commands -------------------------------------------------------------------------------------------------------------


def _command_reason(command: c.Command) -> str:
    match command:
        case c.Spawn() | c.Stop() | c.Sweep() | c.PlacementCommand() | c.Reject() | c.ReadAhead() | c.Finished():
            return command.reason
        case _:
            return ""


def _command_data(command: c.Command) -> Mapping[str, Any]:
    match command:
        case c.Spawn(generation=generation, restarts=restarts):
            return {"generation": generation, "restarts": restarts}
        case c.Stop(generation=generation, force=force):
            return {"generation": generation, "force": force}
        case c.Sweep(generation=generation):
            return {"generation": generation}
        case c.PlacementCommand(process=process):
            return {"process": process}
        case c.Reject(request_id=request_id, code=code, retry_after_s=retry_after_s):
            return {"code": code, "request_id": request_id, "retry_after_s": retry_after_s}
        case _:
            return {}


# -- notes ----------------------------------------------------------------------------------------------------------------


def _note_line(note: j.JournalNote) -> EventLine:
    code = code_of(note)
    if isinstance(note, j.StateChanged):
        on = _given({"process": note.on})
        return EventLine(str(note.kind), note.name, code, note.reason, str(note.before), str(note.after), on)
    kind, reason, data = _note_parts(note)
    return EventLine(str(kind), note.name, code, reason, data=_given(data))


def _note_parts(note: j.JournalNote) -> tuple[j.Subject, str, Mapping[str, Any]]:
    """Return what a note is about, its text, and its data."""
    match note:
        case j.PrerequisitesChanged(missing=missing):
            text = f"missing: {', '.join(missing)}" if missing else "all prerequisites are available"
            return note.kind, text, {"missing": list(missing)}
        case j.StartPhaseChanged():
            return j.Subject.PROCESS, note.phase, {}
        case j.RunStable():
            return j.Subject.PROCESS, f"stable for {note.after_s:g} s", {"after_s": note.after_s}
        case j.RestartTurn():
            return j.Subject.PROCESS, f"its turn to restart: {note.reason}", {}
        case j.ProcessForgotten():
            return j.Subject.PROCESS, "no longer in the configuration", {}
        case _:
            return j.Subject.MODEL, *_model_note_parts(note)


def _model_note_parts(note: j.JournalNote) -> tuple[str, Mapping[str, Any]]:
    match note:
        case j.ModelLeaving() | j.ModelLost() | j.SleepCancelled():
            return note.reason, {"process": note.on}
        case j.Evicted():
            freed = ", ".join(f"{show_size(size)} on {device}" for device, size in note.freed_bytes.items())
            data = {"process": note.on, "by": note.by, "cost": note.cost, "sleeps": note.sleeps}
            text = f"{note.reason}; frees {freed}" if freed else note.reason
            return text, {**data, "freed_bytes": dict(note.freed_bytes)}
        case j.LoadRepeated():
            return f"{note.on} restarted while it loaded the model: loading again", {"process": note.on}
        case j.LaneWait():
            return note.reason, {}
        case j.ModelLoadFailed():
            return note.reason, {"final": note.final}
        case j.ModelUnloadFailed():
            return note.reason, {"process": note.on, "attempts": note.attempts}
        case j.SleepStepFailed():
            text = f"{note.step} failed: {note.reason}; not put to sleep for {note.pause_s:g} s"
            return text, {"process": note.on, "step": note.step, "pause_s": note.pause_s}
        case j.LoadRequestDone():
            return "loaded as requested by an operator", {}
        case j.PinChanged():
            return f"{'pinned' if note.pinned else 'unpinned'} by an operator", {"pinned": note.pinned}
        case j.RequestFellBack():
            text = f"request {note.request_id} falls back from {note.refused_by}: {note.reason}"
            return text, {"request_id": note.request_id, "refused_by": note.refused_by}
        case j.FootprintLearned():
            sizes = ", ".join(f"{show_size(size)} on {device}" for device, size in note.bytes.items())
            how = " asleep" if note.asleep else ""
            return f"highest measured{how}: {sizes}", {"bytes": dict(note.bytes), "asleep": note.asleep}
        case _:
            return "", {}


# -- the whole journal ------------------------------------------------------------------------------------------------------


def dump_lines(entry: j.JournalEntry) -> Iterator[str]:
    """Yield the event, notes and commands of an entry, quiet ones included."""
    yield f"{entry.time_s:.3f} {_fields(entry.event)}"
    for note in entry.notes:
        yield f"{entry.time_s:.3f}   {_fields(note)}"
    for command in entry.commands:
        yield f"{entry.time_s:.3f}   -> {_fields(command)}"


def _fields(value: e.Event | c.Command | j.JournalNote) -> str:
    """Return the code of a value with its non-empty fields."""
    parts = []
    for item in fields(value):
        content = getattr(value, item.name)
        if content in ("", None, (), {}, False) or item.name in ("spec", "remembered", "adopted"):
            continue
        parts.append(f"{item.name}={content}" if isinstance(content, int | float | str) else f"{item.name}={content!r}")
    return f"{code_of(value)}({', '.join(parts)})"
