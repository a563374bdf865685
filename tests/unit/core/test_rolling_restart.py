"""Rolling restarts: the replicas of one name restart one after the other."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fleetd.core.data import commands as c
from fleetd.core.data import events as e
from fleetd.core.data.specs import CrashLoop, ExitKind, ProbeKind, Probes, ProbeSpec, RestartPolicy
from fleetd.core.data.state import SERVING, ProcessState
from tests.support.core import Rig, fleet_spec, process

S = ProcessState
NAMES = ("a-1", "a-2", "a-3")
STARTUP = Probes(startup=ProbeSpec(http="/", deadline_s=60.0))


def replicas(**more: object) -> Rig:
    rig = Rig(
        fleet_spec([*(process(name, base="a", probes=STARTUP, **more) for name in NAMES), process("b", probes=STARTUP)])
    )
    for name in (*NAMES, "b"):
        rig.spawned(name)
        rig.probe(name, ProbeKind.STARTUP)
    rig.clear()
    return rig


def due(rig: Rig, *names: str) -> None:
    for name in names:
        rig.send(e.RestartDue(name, "schedule", in_turn=True))


def away(rig: Rig) -> list[str]:
    return [name for name in NAMES if rig.state(name) not in SERVING]


def back(rig: Rig, name: str) -> None:
    rig.empty(name)
    rig.spawned(name)
    rig.probe(name, ProbeKind.STARTUP)


def test_replicas_restart_one_after_the_other() -> None:
    rig = replicas()
    due(rig, "a-3", "a-1", "a-2")
    assert away(rig) == ["a-3"]  # the first that was due, no other replica was due then
    back(rig, "a-3")
    assert away(rig) == ["a-1"]
    back(rig, "a-1")
    assert away(rig) == ["a-2"]
    back(rig, "a-2")
    assert away(rig) == []
    assert [rig.of(name).generation for name in NAMES] == [2, 2, 2]
    assert [stop.name for stop in rig.take(c.Stop)] == ["a-3", "a-1", "a-2"]
    assert all("schedule" in stop.reason for stop in rig.take(c.Stop))
    assert not rig.fleet.state.rolling


def test_next_replica_waits_until_the_last_is_ready() -> None:
    rig = replicas()
    due(rig, *NAMES)
    rig.empty("a-1")
    assert rig.state("a-1") is S.STARTING
    rig.spawned("a-1")
    assert away(rig) == ["a-1"]
    rig.probe("a-1", ProbeKind.STARTUP, ok=False, detail="not yet")
    assert away(rig) == ["a-1"]
    rig.probe("a-1", ProbeKind.STARTUP)
    assert away(rig) == ["a-2"]


def test_replica_in_backoff_delays_others_a_failed_does_not() -> None:
    rig = replicas(restart=RestartPolicy(crash_loop=CrashLoop(count=2, window_s=1000.0)))
    due(rig, *NAMES)
    rig.empty("a-1")
    rig.spawned("a-1")
    rig.dies("a-1", 1)
    assert rig.state("a-1") is S.BACKOFF
    assert away(rig) == ["a-1"]
    rig.wait(100.0)
    assert rig.state("a-1") is S.STARTING
    rig.spawned("a-1")
    rig.dies("a-1", 1, ExitKind.BAD_CONFIG)
    assert rig.state("a-1") is S.FAILED
    assert away(rig) == ["a-1", "a-2"]


@pytest.mark.parametrize("how", ["stopped", "removed", "disabled"])
def test_removed_replica_delays_nothing(how: str) -> None:
    rig = replicas()
    due(rig, *NAMES)
    if how == "stopped":
        rig.send(e.StopRequested("a-1"))
    elif how == "removed":
        rig.send(e.SpecChanged(fleet_spec([process(name, base="a", probes=STARTUP) for name in NAMES[1:]])))
    else:
        spec = [process(name, base="a", probes=STARTUP, enabled=name != "a-1") for name in NAMES]
        rig.send(e.SpecChanged(fleet_spec(spec)))
    assert rig.state("a-2") is S.STOPPING
    assert rig.state("a-3") is S.READY


def test_other_names_and_reasons_do_not_wait() -> None:
    rig = replicas()
    due(rig, *NAMES, "b")
    assert rig.state("b") is S.STOPPING
    rig.send(e.RestartDue("a-2", "changed: x.js", revive=True))
    assert (rig.state("a-1"), rig.state("a-2"), rig.state("a-3")) == (S.STOPPING, S.STOPPING, S.READY)
    back(rig, "a-1")
    assert rig.state("a-3") is S.READY
    back(rig, "a-2")
    assert rig.state("a-3") is S.STOPPING
    assert "a-2" not in rig.fleet.state.rolling  # it has restarted: that was its turn


def test_replica_that_does_not_run_is_not_restarted() -> None:
    rig = replicas()
    rig.send(e.StopRequested("a-2"))
    rig.empty("a-2")
    due(rig, *NAMES)
    back(rig, "a-1")
    assert rig.state("a-2") is S.STOPPED
    assert rig.state("a-3") is S.STOPPING


def test_maximum_age_restarts_in_turn() -> None:
    rig = replicas(max_age_s=100.0)
    rig.wait(101.0)
    assert away(rig) == ["a-1"]
    back(rig, "a-1")
    assert away(rig) == ["a-2"]
    assert "older than 100 s" in rig.take(c.Stop)[0].reason


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_schedule_restarts_all_replicas_one_at_a_time(data: st.DataObject) -> None:
    rig = replicas()
    begun = {name: rig.of(name).generation for name in NAMES}
    due(rig, *data.draw(st.permutations(NAMES)))
    for step in range(100):
        assert len(away(rig)) <= 1
        if not away(rig):
            break
        name = away(rig)[0]
        state = rig.state(name)
        if state is S.STOPPING:
            rig.empty(name)
        elif state is S.BACKOFF:
            rig.wait(120.0)
        elif not rig.of(name).spawned:
            rig.spawned(name)
        elif step < 40 and data.draw(st.booleans()):
            rig.dies(name, 1)
        else:
            rig.probe(name, ProbeKind.STARTUP, ok=step >= 40 or data.draw(st.booleans()))
        if rig.state(name) is S.FAILED:
            return
    assert all(rig.of(name).generation > begun[name] for name in NAMES)
    assert not rig.fleet.state.rolling
