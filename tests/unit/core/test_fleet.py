"""The core as a whole: replay, the shortcut for warm requests, deadlines, the journal, and the cost of an event."""

from __future__ import annotations

import sys
from collections.abc import Callable
from random import Random
from types import FrameType

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fleetd.core.data import commands as c
from fleetd.core.data import events as e
from fleetd.core.data.journal import Evicted, Journal
from fleetd.core.data.specs import FleetSpec, ProbeSpec
from fleetd.core.fleet import Fleet
from fleetd.core.processes.health import Verdict
from tests.simulation.actions import act, reexec
from tests.simulation.specs import random_fleet
from tests.simulation.world import World
from tests.support.core import Rig, fleet_spec, model, own, owners, process

# -- verdicts -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("results", "verdicts"),
    [
        ("x", "?"), ("xx", "??"), ("xxx", "??x"), ("o", "?"), ("oo", "?o"), ("xxo", "???"), ("ooxxx", "?ooox"),
        ("ooxxoxx", "?oooooo"), ("xxxoo", "??xxo"), ("oxoxox", "??????"),
    ],
)  # fmt: skip
def test_verdict_needs_results_in_a_row(results: str, verdicts: str) -> None:
    spec, verdict, seen = ProbeSpec(tcp=True, failures=3, successes=2), Verdict(), ""
    for result in results:
        before = verdict.good
        changed = verdict.add(spec, result == "o", "")
        assert changed == (verdict.good is not before)
        seen += {None: "?", True: "o", False: "x"}[verdict.good]
    assert seen == verdicts


# -- replay -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(6))
def test_recorded_journal_replays_to_the_same_commands(seed: int) -> None:
    world = World(random_fleet(Random(seed)), seed, journal=Journal(keep_all=True))
    rng = Random(seed)
    for _ in range(60):
        act(world, rng, without=(reexec,))  # a restart of the daemon begins another machine
    entries = list(world.fleet.journal.entries)
    assert len(entries) > 300
    again = Fleet(FleetSpec(), Random(seed), Journal(keep_all=True))
    for entry in entries:
        assert again.handle(entry.event, entry.time_s) == list(entry.commands), entry
    assert [entry.notes for entry in again.journal.entries] == [entry.notes for entry in entries]


# -- the warm path ------------------------------------------------------------------------------------------------------------


class SlowFleet(Fleet):
    """The core without its shortcuts."""

    def __init__(self, rng: Random) -> None:
        super().__init__(FleetSpec(), rng)
        self.admission.take = lambda _request_id, _name, _now: None  # type: ignore[method-assign]
        self._finish_warm = lambda _request_id, _now: False  # type: ignore[method-assign]


def plain(commands: list[c.Command]) -> list[object]:
    """Drop the reason of grants: the shortcut has none."""
    return [
        (command.request_id, command.model, command.process, command.generation, command.queued_s, command.load_s)
        if isinstance(command, c.Grant)
        else command
        for command in commands
    ]


KINDS = st.sampled_from(("ask", "ask", "finish", "finish", "wait", "cancel"))


@settings(deadline=None, max_examples=60)
@given(
    st.integers(0, 10**6),
    st.lists(
        st.tuples(KINDS, st.integers(0, 99)),
        max_size=80,
    ),
)
def test_shortcut_gives_the_same_answers(seed: int, steps: list[tuple[str, int]]) -> None:
    spec = owners("abc", budget=2, concurrency=2, ttl_s=5.0, aliases=())
    fast, slow = Fleet(FleetSpec(), Random(seed)), SlowFleet(Random(seed))
    now, serial, flight, waiting = 100.0, 0, [], []

    def send(event: e.Event) -> None:
        commands = fast.handle(event, now)
        assert plain(commands) == plain(slow.handle(event, now))
        deadlines = (fast.next_deadline(), slow.next_deadline())
        assert deadlines[0] == deadlines[1] or (
            deadlines[0] is not None and (deadlines[1] is None or deadlines[0] <= deadlines[1])
        )
        for command in commands:
            if isinstance(command, c.Grant):
                flight.append(command.request_id)
            elif isinstance(command, c.Spawn):
                send(e.Spawned(command.name, command.generation, 5))
            elif isinstance(command, c.Stop):
                send(e.SetEmpty(command.name, command.generation))

    send(e.SpecChanged(spec))
    for kind, number in steps:
        if kind == "wait":
            end = now + number / 10
            while (deadline := fast.next_deadline()) is not None and deadline <= end:
                now = deadline
                send(e.Tick())
            now = end
        elif kind == "finish" and flight:
            send(e.RequestFinished(flight.pop(number % len(flight))))
        elif kind == "cancel" and waiting:
            request = waiting.pop()
            if request not in flight:
                send(e.RequestCancelled(request))
        else:
            serial += 1
            waiting.append(serial)
            send(e.RequestArrived(serial, "abc"[number % 3]))


def test_finish_without_waiting_requests_starts_idle_time() -> None:
    rig = Rig(owners("a", ttl_s=10.0))
    rig.warm("a")
    rig.fleet.next_deadline()
    rig.fleet.handle(e.RequestArrived(77, "a"), rig.now + 8.0)
    rig.fleet.handle(e.RequestFinished(77), rig.now + 9.0)
    deadline = rig.fleet.next_deadline()
    assert deadline is not None
    rig.now = deadline
    rig.send(e.Tick())
    rig.wait(10.0)
    assert rig.take(c.Stop)


def test_finish_of_an_unknown_request_does_nothing() -> None:
    rig = Rig(owners("a"))
    assert rig.send(e.RequestFinished(5)) == []
    assert rig.send(e.RequestCancelled(5)) == []


# -- the journal ------------------------------------------------------------------------------------------------------------------


def test_journal_of_a_model_has_the_eviction() -> None:
    rig = Rig(owners("ab"))
    rig.warm("a")
    rig.ask("b")
    evicted = [note for note in rig.fleet.journal.notes_on("a") if isinstance(note, Evicted)]
    assert [(note.on, note.reason, note.by) for note in evicted] == [("a", "evicted for b", "b")]
    commands = [command for entry in rig.fleet.journal.of("a") for command in entry.commands]
    assert c.Stop("a", 1, "evicted for b") in commands


def test_journal_is_bounded_for_any_requested_names() -> None:
    rig = Rig(owners("a"))
    journal = rig.fleet.journal
    rig.warm("a")
    for number in range(20_000):
        rig.fleet.handle(e.RequestArrived(number + 10, f"nobody-{number}"), rig.now)
        if number % 1000 == 0:
            rig.send(e.DrainRequested("a", number % 2000 == 0))
    assert len(journal.entries) <= 4096
    assert len(journal._by_subject) <= 16384
    assert journal.of("a"), "unknown names do not push out existing ones"


# -- cost -------------------------------------------------------------------------------------------------------------------------


def calls_of(act: Callable[[], object]) -> int:
    """Count calls of Python functions: a measure of work that does not depend on the machine."""
    count = 0

    def tracer(_frame: FrameType, event: str, _argument: object) -> None:
        nonlocal count
        count += event == "call"

    before = sys.getprofile()
    sys.setprofile(tracer)
    try:
        act()
    finally:
        sys.setprofile(before)
    return count


def crowd(count: int) -> Rig:
    names = [f"m{number:04}" for number in range(count)]
    rig = Rig(fleet_spec([own(name) for name in names] + [process("web")], [model(name) for name in names], budget=8))
    rig.spawned("web")
    for name in names[:8]:
        rig.warm(name)
    return rig


EVENTS: tuple[tuple[str, Callable[[Rig], e.Event]], ...] = (
    ("tick", lambda rig: e.Tick()),
    ("request that evicts", lambda rig: e.RequestArrived(9001, "m0777")),
    ("unknown name", lambda rig: e.RequestArrived(9002, "nobody")),
    ("cancel", lambda rig: e.RequestCancelled(9001)),
    ("sample", lambda rig: e.MemorySampled("m0001", 1, 5)),
    ("start", lambda rig: e.StartRequested("m0900")),
    ("stop", lambda rig: e.StopRequested("m0003")),
    ("pin", lambda rig: e.PinRequested("m0004")),
    ("unload", lambda rig: e.UnloadRequested("m0005")),
    ("prerequisites", lambda rig: e.ProcessPrerequisitesChanged("m0006", ("/x",))),
)


def test_event_cost_does_not_grow_with_the_fleet() -> None:
    small, large = crowd(1000), crowd(5000)
    for name, make in EVENTS:
        cheap = calls_of(lambda make=make: (small.fleet.handle(make(small), small.now), small.fleet.next_deadline()))  # type: ignore[misc]
        dear = calls_of(lambda make=make: (large.fleet.handle(make(large), large.now), large.fleet.next_deadline()))  # type: ignore[misc]
        assert dear <= cheap * 1.1 + 20, f"{name}: {cheap} calls among 1000, {dear} among 5000"
        assert dear < 2500, f"{name}: {dear} calls"


def test_used_on_demand_processes_cost_nothing_later() -> None:
    rig = crowd(300)
    before = calls_of(lambda: rig.fleet.handle(e.Tick(), rig.now))
    for number in range(20, 220):
        rig.clear()
        request = rig.ask(f"m{number:04}")
        for stop in rig.take(c.Stop):
            rig.empty(stop.name)
        rig.spawned(f"m{number:04}")
        rig.finish(request)
    after = calls_of(lambda: rig.fleet.handle(e.Tick(), rig.now))
    assert after <= before * 1.5 + 50
    assert len(rig.fleet.state.awake) <= 20


def test_warm_request_takes_few_calls() -> None:
    rig = Rig(owners("a"))
    rig.warm("a")
    request = calls_of(lambda: rig.fleet.handle(e.RequestArrived(50, "a"), rig.now))
    finish = calls_of(lambda: rig.fleet.handle(e.RequestFinished(50), rig.now))
    assert request <= 12
    assert finish <= 15


def test_deadlines_advance_with_every_tick() -> None:
    rig = Rig(owners("ab", preload=True))
    rig.warm("a")
    for _ in range(200):
        deadline = rig.fleet.next_deadline()
        if deadline is None:
            break
        assert deadline > rig.now
        rig.now = deadline
        rig.send(e.Tick())
    else:
        pytest.fail("the machine asks for time for ever")


def test_fleet_from_constructor_equals_fleet_from_event() -> None:
    spec = fleet_spec([process("a"), process("b")])
    given_first = Fleet(spec, Random(1)).handle(e.Tick(), 5.0)
    as_event = Fleet(FleetSpec(), Random(1)).handle(e.SpecChanged(spec), 5.0)
    assert given_first == as_event
