"""The state tables: every allowed and forbidden move."""

from __future__ import annotations

from pathlib import Path

import pytest

from fleetd.core.data.state import (
    PROCESS_MOVES,
    RESIDENCY_MOVES,
    RESTING,
    RUNNING,
    Placement,
    Process,
    ProcessState,
    Residency,
    diagram,
)
from fleetd.errors import InvalidTransition
from tests.support.core import Rig, fleet_spec, process


@pytest.mark.parametrize("start", ProcessState)
@pytest.mark.parametrize("end", ProcessState)
def test_process_moves_follow_the_table(start: ProcessState, end: ProcessState) -> None:
    subject = Process(process("a"), state=start)
    if end in PROCESS_MOVES[start]:
        subject.move(end, 5.0, "why")
        assert (subject.state, subject.since_s, subject.reason) == (end, 5.0, "why")
    else:
        with pytest.raises(InvalidTransition, match=f"process a cannot move from {start} to {end}"):
            subject.move(end, 5.0, "why")
        assert subject.state is start


@pytest.mark.parametrize("start", Residency)
@pytest.mark.parametrize("end", Residency)
def test_placement_moves_follow_the_table(start: Residency, end: Residency) -> None:
    subject = Placement("m", "p", state=start, ordered=True)
    if end in RESIDENCY_MOVES[start]:
        subject.move(end, 5.0, "why")
        assert (subject.state, subject.ordered) == (end, False)
    else:
        with pytest.raises(InvalidTransition, match=f"model m on p cannot move from {start} to {end}"):
            subject.move(end, 5.0, "why")
        assert subject.state is start


def test_move_tables_cover_every_state() -> None:
    assert set(PROCESS_MOVES) == set(ProcessState) == RUNNING | RESTING
    assert not RUNNING & RESTING
    assert set(RESIDENCY_MOVES) == set(Residency)
    for table in (PROCESS_MOVES, RESIDENCY_MOVES):
        reached = {end for ends in table.values() for end in ends}
        assert reached == set(table), "a state that nothing leads to"
        assert all(ends for ends in table.values()), "a state that nothing leads out of"
        assert not any(start in ends for start, ends in table.items()), "a move to itself says nothing"


def test_rest_is_left_only_by_a_start_or_to_rest() -> None:
    for start in RESTING:
        assert PROCESS_MOVES[start] <= RESTING | {ProcessState.STARTING, ProcessState.STOPPING}
    assert {start for start in RESTING if ProcessState.STOPPING in PROCESS_MOVES[start]} == {ProcessState.FAILED}


def test_process_at_rest_has_no_pid() -> None:
    subject = Process(process("a"), state=ProcessState.STOPPING, pid=4, spawned=True)
    subject.move(ProcessState.STOPPED, 0.0, "done")
    assert (subject.pid, subject.spawned) == (None, False)


def test_forbidden_move_reports_the_last_notes() -> None:
    rig = Rig(fleet_spec([process("a")]))
    rig.spawned("a")
    with pytest.raises(InvalidTransition) as caught:
        rig.fleet.state.move(rig.of("a"), ProcessState.BACKOFF, rig.now, "a bug")
    assert any("STARTING" in line and "READY" in line for line in caught.value.story)


def test_diagram_in_the_readme_is_current() -> None:
    text = (Path(__file__).resolve().parents[3] / "fleetd" / "core" / "README.md").read_text("utf-8")
    blocks = [block.split("```")[0].strip().splitlines() for block in text.split("```mermaid\n")[1:]]
    lines = list(diagram())
    cut = lines.index("%% residency")
    assert blocks == [lines[:cut], lines[cut:]]
