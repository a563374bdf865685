"""Rendering of journal entries: codes, kinds, texts and data of the event log."""

from __future__ import annotations

import pytest

from fleetd.control.event_codes import SHOWN, EventCode
from fleetd.core.data import commands as c
from fleetd.core.data import events as e
from fleetd.core.data import journal as j
from fleetd.core.data.specs import ExitReport
from fleetd.daemon.api.event_log import EventLog
from fleetd.daemon.api.event_text import EventLine, dump_lines, lines_of


def lines(event: e.Event, *rest: j.JournalNote | c.Command) -> list[EventLine]:
    notes = tuple(one for one in rest if isinstance(one, j.JournalNote))
    commands = tuple(one for one in rest if isinstance(one, c.Command))
    return list(lines_of(j.JournalEntry(1, 2.0, event, commands, notes)))


def test_lines_are_the_event_then_notes_then_commands() -> None:
    found = lines(
        e.Exited("a", 3, ExitReport(None, "SIGKILL")),
        j.StateChanged("a", j.Subject.PROCESS, "READY", "STOPPING", "killed by SIGKILL"),
        c.Sweep("a", 3, "killed by SIGKILL"),
    )
    assert [line.code for line in found] == [EventCode.EXITED, EventCode.STATE_CHANGED, EventCode.SWEEP]
    assert [line.reason for line in found] == ["killed by SIGKILL"] * 3
    assert (found[1].kind, found[1].before, found[1].state) == ("process", "READY", "STOPPING")
    assert found[0].data["signal"] == "SIGKILL"


def test_state_change_of_a_model_names_its_process() -> None:
    (line,) = lines(e.Tick(), j.StateChanged("m", j.Subject.MODEL, "LOADED", "UNLOADING", "idle", "server"))
    assert (line.kind, line.name, dict(line.data)) == ("model", "m", {"process": "server"})


def test_eviction_has_its_bytes_and_cost_as_data() -> None:
    note = j.Evicted("a", "server", "evicted for b", "b", {"gpu0": 2**30}, 1.5)
    (line,) = lines(e.Tick(), note)
    assert line.reason == "evicted for b; frees 1.00 GiB on gpu0"
    assert (line.data["by"], line.data["freed_bytes"], line.data["cost"]) == ("b", {"gpu0": 2**30}, 1.5)


@pytest.mark.parametrize(
    "event", [e.Tick(), e.MemorySampled("a", 1, 5), e.LoadFailed("m", "a", 1, "no"), e.SetEmpty("a", 1)]
)
def test_event_without_news_has_no_line(event: e.Event) -> None:
    assert lines(event) == []


def test_dump_has_codes_and_no_class_names() -> None:
    entry = j.JournalEntry(1, 2.0, e.MemorySampled("a", 1, 5), (c.Persist("a", None, "r"),), ())  # type: ignore[arg-type]
    assert list(dump_lines(entry)) == [
        "2.000 memory_sampled(name=a, generation=1, rss_bytes=5)",
        "2.000   -> persist(name=a, reason=r)",
    ]


def test_event_log_continues_the_numbers_of_the_last_daemon() -> None:
    kept: list[tuple[str, str]] = []
    log = EventLog(lambda kind, name, _: kept.append((kind, name)))
    past = {"seq": 7, "at": "t", "kind": "process", "name": "a", "event": "exited", "reason": ""}
    old = {"seq": 6, "at": "t", "kind": "process", "name": "a", "what": "Exited", "reason": ""}
    log.restore([old, past])  # type: ignore[list-item]
    log.report("model", "m", EventCode.MODEL_MADE, "made")
    assert [event["seq"] for event in log.recent(None, None)] == [7, 8]
    assert kept == [("model", "m")]
    assert all(code in SHOWN for code in ("exited", "model_made"))
