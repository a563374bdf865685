"""The story of a name: one crash is one line."""

from __future__ import annotations

from typing import Any

from fleetd.cli.story import condensed


def event(code: str, at: int = 0, kind: str = "process", **more: Any) -> dict[str, Any]:
    return {"seq": at, "at": f"2026-11-30T21:03:{at:02}.000Z", "kind": kind, "name": "bot", "event": code, **more}


def moved(before: str, state: str, at: int = 0, kind: str = "process", reason: str = "why") -> dict[str, Any]:
    return event("state_changed", at, kind, before=before, state=state, reason=reason)


CRASH = [
    event("exited", 6, data={"code": 3, "log": ["starting", "CUDA error: out of memory"]}),
    moved("READY", "STOPPING", 6),
    event("sweep", 6),
    event("model_lost", 6, "model"),
    moved("LOADED", "LOADING", 6, "model"),
    moved("STOPPING", "STOPPED", 6),
    moved("LOADING", "ABSENT", 6, "model"),
]


def test_crash_is_one_line_with_cause_and_what_follows() -> None:
    (line,) = condensed(CRASH)
    assert (line["event"], line["at"]) == ("crashed", CRASH[0]["at"])
    assert line["reason"] == "exit code 3 (CUDA error: out of memory); next try when asked for"


def test_equal_crashes_become_one_line_with_a_count() -> None:
    once = [
        event("exited", 1, data={"signal": "SIGSEGV"}),
        moved("READY", "STOPPING", 1),
        moved("STOPPING", "BACKOFF", 1),
        event("spawn", 2),
        event("spawned", 2),
    ]
    (line,) = condensed(once * 15)
    assert line["count"] == 15
    assert line["reason"].startswith("SIGSEGV; it starts again after a pause")
    assert line["reason"].endswith("(15 times)")


def test_requested_stop_is_no_crash() -> None:
    events = [
        event("stop_requested", 1),
        moved("READY", "STOPPING", 1),
        event("stop", 1),
        event("exited", 2, data={"signal": "SIGTERM"}),
        moved("STOPPING", "STOPPED", 2),
    ]
    assert [line["event"] for line in condensed(events)] == ["stop_requested", "state_changed", "state_changed"]


def test_crash_that_is_not_settled_yet_is_shown() -> None:
    assert [line["event"] for line in condensed(CRASH[:2])] == ["crashed"]
