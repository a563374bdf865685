"""Condense the events of one name for people: one crash is one line, and what fleetd did inside it is left out.

Invariants:
- Pure functions of the events. `story --all` and `-o json` show every event.
- Nothing reads the text of a reason; codes, states and `data` decide.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

Event = Mapping[str, Any]

# steps of something that another line says
_STEPS = frozenset(
    {"spawn", "spawned", "sweep", "stop", "load", "unload", "sleep", "wake", "check_sleep", "read_ahead"}
)
_LOST = frozenset({"model_lost", "load_failed"})
_DOWN = frozenset({"BACKOFF", "STOPPED", "FAILED", "EXITED", "BLOCKED"})


def condensed(events: Sequence[Event]) -> list[dict[str, Any]]:
    """Return the events as the lines of a story; equal lines in a row become one with a count."""
    lines: list[dict[str, Any]] = []
    keys: list[object] = []
    for event in _lines(events):
        key = (event["event"], event.get("key", event.get("reason")), event.get("state"))
        if keys and keys[-1] == key:
            lines[-1]["count"] = lines[-1].get("count", 1) + 1
            lines[-1]["last_at"] = event["at"]
            continue
        lines.append(event)
        keys.append(key)
    for line in lines:
        line.pop("key", None)
        if line.get("count"):
            line["reason"] = f"{line.get('reason', '')} ({line['count']} times)"
    return lines


def _lines(events: Sequence[Event]) -> Iterator[dict[str, Any]]:
    crash: dict[str, Any] | None = None
    states: dict[Any, str] = {}
    over_at = ""  # when the last crash was settled: what its model reports at that moment belongs to it
    for event in events:
        code, name, state = event.get("event"), event.get("name"), str(event.get("state") or "")
        if code in _STEPS:
            continue
        if code == "exited":
            requested = states.get(name) == "STOPPING"
            if _failed(event) and not requested:
                crash = {**event, "event": "crashed", "reason": _how(event), "key": _how(event)}
                continue
            if requested:
                continue
        if code == "state_changed" and event.get("kind") == "process":
            states[name] = state
            if crash is not None:
                if state not in _DOWN:
                    continue
                yield {**crash, "reason": f"{crash['reason']}; {_next(event)}"}
                crash, over_at = None, str(event.get("at"))
                continue
        elif _of_crash(event) and (crash is not None or event.get("at") == over_at):
            continue
        yield dict(event)
    if crash is not None:
        yield crash


def _of_crash(event: Event) -> bool:
    """Return whether a model reports what the crash of its process does to it."""
    code = event.get("event")
    moved = code == "state_changed" and event.get("state") != "LOADED"
    return event.get("kind") == "model" and (code in _LOST or moved)


def _failed(event: Event) -> bool:
    data = event.get("data") or {}
    return bool(data.get("signal") or data.get("oom") or data.get("code"))


def _how(event: Event) -> str:
    data = event.get("data") or {}
    how = "out of memory" if data.get("oom") else str(data.get("signal") or f"exit code {data.get('code')}")
    why = next((str(line) for line in reversed(data.get("log") or ()) if str(line).strip()), "")
    return f"{how} ({why.strip()[:200]})" if why else how


def _next(event: Event) -> str:
    """Return what follows the crash, from the state that the process entered."""
    state = event.get("state")
    if state == "STOPPED":
        return "next try when asked for"
    if state == "BACKOFF":
        return "it starts again after a pause"
    if state == "FAILED":
        return "fleetd has given up"
    return f"now {state}"
