"""Sleep and wake of models, and the ledger meanwhile."""

from __future__ import annotations

from dataclasses import replace

import pytest

from fleetd.core.data import commands as c
from fleetd.core.data import events as e
from fleetd.core.data.specs import (
    Capabilities,
    ExitKind,
    FleetSpec,
    ProbeKind,
    Probes,
    ProbeSpec,
    Remembered,
    SleepState,
)
from fleetd.core.data.state import ProcessState, Residency, SleepStep
from fleetd.core.models.measurement import SETTLED_S
from fleetd.core.models.sleep import ANSWER_GRACE_S, SLEEPLESS_S
from tests.support.core import G, Rig, fleet_spec, model, own, process

ASLEEP, AWAKE, FAILED = SleepState
S, R = ProcessState, Residency
CAN = Capabilities(can_sleep=True, exclusive_start=True, exit_zero_is_failure=True)
KEPT = {"gpu0": 1 * G, "host": 2 * G}


def spec(names: str = "ab", *more: object, budget: int = 10, **changes: object) -> FleetSpec:
    """Models of eight GiB on a card of ten, each its own process; asleep they keep one, and two on the host."""
    processes = [own(name, lane="gpu0", capabilities=CAN) for name in names]
    models = [model(name, size=8, asleep=KEPT, **changes) for name in names]
    return fleet_spec([*processes, *more], models, budget)  # type: ignore[list-item]


def held(rig: Rig, name: str) -> dict[str, int]:
    found = rig.fleet.ledger.reservations.get((name, name), {})
    return {device: size // G for device, size in found.items()}


def swapped(**changes: object) -> tuple[Rig, int]:
    """`a` sleeps, `b` is loaded and idle. Returns the request that b was loaded for."""
    rig = Rig(spec(**changes))  # type: ignore[arg-type]
    rig.warm("a")
    request = rig.ask("b")
    rig.answers("a", ASLEEP)
    rig.spawned("b")
    assert request in rig.granted()
    rig.finish(request)
    rig.clear()
    return rig, request


# -- down and up ----------------------------------------------------------------------------------------------------------


def test_victim_sleeps_and_wakes_in_the_same_process() -> None:
    rig = Rig(spec())
    rig.warm("a")
    request = rig.ask("b")
    (order,) = rig.take(c.Sleep)
    assert (order.model, order.process, order.generation, order.reason) == ("a", "a", 1, "evicted for b")
    assert held(rig, "a") == {"gpu0": 8, "host": 2}, "both footprints on the way down"
    assert not [spawn for spawn in rig.take(c.Spawn) if spawn.name == "b"], "its memory is not free yet"
    assert rig.residency("a") is R.LOADED
    rig.answers("a", ASLEEP)
    assert (rig.residency("a"), rig.state("a"), held(rig, "a")) == (R.ASLEEP, S.READY, {"gpu0": 1, "host": 2})
    rig.spawned("b")
    assert request in rig.granted()
    rig.finish(request)
    rig.clear()
    again = rig.ask("a")
    assert [order.model for order in rig.take(c.Sleep)] == ["b"]
    rig.answers("b", ASLEEP)
    (wake,) = rig.take(c.Wake)
    assert (wake.model, wake.generation) == ("a", 1)
    assert (rig.residency("a"), held(rig, "a")) == (R.LOADING, {"gpu0": 8, "host": 2})
    assert again not in rig.granted()
    rig.wait(2.0)
    rig.answers("a", AWAKE)
    assert again in rig.granted()
    assert held(rig, "a") == {"gpu0": 8, "host": 2}, "what its sleep took on the host, it keeps"
    assert not rig.take(c.Spawn)
    assert not rig.take(c.Stop)
    entry = rig.fleet.models["a"]
    assert (entry.loads, entry.sleeps, entry.wakes, entry.evictions, entry.wake_s) == (1, 1, 1, 0, pytest.approx(2.0))


def test_no_grant_after_the_decision_to_sleep() -> None:
    rig = Rig(spec())
    rig.warm("a")
    rig.ask("b")
    late = rig.ask("a")
    assert late not in rig.granted()
    rig.answers("a", ASLEEP)
    assert late not in rig.granted()


def test_busy_model_is_not_put_to_sleep() -> None:
    rig = Rig(spec())
    rig.warm("a")
    busy = rig.ask("a")
    rig.ask("b")
    assert not rig.take(c.Sleep)
    rig.finish(busy)
    assert len(rig.take(c.Sleep)) == 1


def test_pinned_model_is_not_put_to_sleep() -> None:
    rig = Rig(spec(pin=True))
    rig.warm("a")
    request = rig.ask("b")
    assert not rig.take(c.Sleep)
    assert rig.rejects()[request] == "model_blocked"


def test_requests_for_a_sleeper_share_one_wake() -> None:
    rig, _ = swapped()
    requests = [rig.ask("a") for _ in range(3)]
    rig.answers("b", ASLEEP)
    assert len(rig.take(c.Wake)) == 1
    rig.answers("a", AWAKE)
    assert rig.granted() == requests


def test_request_for_a_model_falling_asleep_waits_for_wake() -> None:
    rig = Rig(spec())
    rig.warm("a")
    request = rig.ask("b")
    load_id = rig.request_load("a")
    assert load_id in rig.fleet.state.queue, "it is no longer there for anybody"
    rig.answers("a", ASLEEP)
    rig.spawned("b")
    rig.finish(request)
    rig.answers("b", ASLEEP)
    rig.answers("a", AWAKE)
    assert load_id not in rig.fleet.state.queue
    assert load_id not in rig.rejects()


def test_pin_cancels_a_sleep_not_yet_ordered() -> None:
    whole = spec("ab")
    starting = own("x", lane="gpu0", on_demand=False, own_model=None)
    rig = Rig(whole)
    rig.warm("a")
    rig.send(e.SpecChanged(FleetSpec({**whole.processes, "x": starting}, whole.models, whole.devices)))
    rig.ask("b")
    assert not rig.take(c.Sleep), "its lane is taken by a start"
    assert rig.fleet.models["a"].placements["a"].step is SleepStep.SLEEP
    rig.send(e.PinRequested("a", True))
    rig.spawned("x")
    rig.wait(1.0)
    assert not rig.take(c.Sleep)
    assert rig.residency("a") is R.LOADED
    assert held(rig, "a") == {"gpu0": 8}, "what it would have taken on the host is free again"
    assert rig.ask("a") in rig.granted()


def test_operator_unload_ends_sleepers() -> None:
    rig, _ = swapped()
    rig.send(e.UnloadRequested("a"))
    assert [stop.name for stop in rig.take(c.Stop)] == ["a"]
    rig.empty("a")
    assert (rig.residency("a"), held(rig, "a")) == (R.ABSENT, {})
    rig.clear()
    rig.ask("a")
    assert [order.model for order in rig.take(c.Sleep)] == ["b"]
    rig.send(e.UnloadRequested("b"))
    assert [stop.name for stop in rig.take(c.Stop)] == ["b"]
    rig.answers("b", ASLEEP)
    assert rig.residency("b") is R.UNLOADING, "an answer that comes too late"


def test_idle_sleeper_is_unloaded_at_its_ttl() -> None:
    rig, _ = swapped(ttl_s=60.0)
    rig.wait(61.0)
    assert {stop.name: stop.reason for stop in rig.take(c.Stop)} == {"a": "idle for 60 s", "b": "idle for 60 s"}


def test_preloaded_sleeper_is_woken_when_there_is_room() -> None:
    rig, _ = swapped(preload=True, ttl_s=0.0)
    assert not rig.take(c.Wake)
    rig.send(e.UnloadRequested("b"))
    rig.empty("b")
    assert [wake.model for wake in rig.take(c.Wake)] == ["a"]


# -- one thing at a time on a lane ------------------------------------------------------------------------------------------


def test_sleep_and_start_wait_for_each_other() -> None:
    rig = Rig(spec("abc", budget=18))
    rig.warm("a")
    request = rig.ask("b")
    assert rig.state("b") is S.STARTING
    third = rig.ask("c")
    assert not rig.take(c.Sleep), "b is between launch and ready"
    rig.spawned("b")
    assert request in rig.granted()
    assert [order.model for order in rig.take(c.Sleep)] == ["a"]
    rig.answers("a", ASLEEP)
    rig.spawned("c")
    assert third in rig.granted()


@pytest.mark.parametrize("kind", ["a start", "a stop"])
def test_nothing_starts_or_stops_during_a_sleep(kind: str) -> None:
    other = own("x", lane="gpu0")
    whole = spec("ab", other)
    whole = FleetSpec(whole.processes, {**whole.models, "x": model("x", size=0)}, whole.devices, whole.queue)
    rig = Rig(whole)
    if kind == "a stop":
        rig.warm("x")
    rig.warm("a")
    rig.ask("b")
    assert rig.take(c.Sleep)
    rig.clear()
    if kind == "a start":
        rig.ask("x")
        assert not rig.take(c.Spawn)
        assert "a is ordered to sleep" in rig.of("x").reason
    else:
        rig.send(e.StopRequested("x"))
        assert not rig.take(c.Stop)
    rig.answers("a", ASLEEP)
    assert [stop.name for stop in rig.take(c.Stop)] == (["x"] if kind == "a stop" else [])
    assert rig.take(c.Spawn) or kind == "a stop"


# -- what goes wrong ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("state", [FAILED, AWAKE])
def test_failed_sleep_kills_and_counts_as_a_death(state: SleepState) -> None:
    rig = Rig(spec())
    rig.warm("a")
    request = rig.ask("b")
    rig.answers("a", state, "it went wrong")
    (stop,) = rig.take(c.Stop)
    assert (stop.name, stop.force) == ("a", True)
    assert "sleep failed: it went wrong" in stop.reason
    assert held(rig, "a") == {"gpu0": 8, "host": 2}, "until its memory was seen to be free"
    rig.empty("a")
    assert rig.of("a").record.deaths == 1
    assert (rig.residency("a"), held(rig, "a")) == (R.ABSENT, {})
    rig.spawned("b")
    assert request in rig.granted()


def test_failed_sleep_leads_to_unloads_for_a_while() -> None:
    rig = Rig(spec(ttl_s=0.0))
    rig.warm("a")
    rig.ask("b")
    rig.answers("a", FAILED, "no")
    rig.empty("a")
    rig.spawned("b")
    rig.finish(rig.granted()[-1])
    rig.ask("a")
    rig.answers("b", ASLEEP)
    rig.wait(30.0)
    rig.spawned("a")
    rig.finish(rig.granted()[-1])
    rig.clear()
    rig.ask("b")
    assert not rig.take(c.Sleep)
    assert [stop.name for stop in rig.take(c.Stop)] == ["a"]
    rig.empty("a")
    rig.answers("b", AWAKE)
    rig.finish(rig.granted()[-1])
    rig.wait(SLEEPLESS_S)
    rig.ask("a")
    rig.answers("b", ASLEEP)
    rig.spawned("a")
    rig.finish(rig.granted()[-1])
    rig.clear()
    rig.ask("b")
    assert [order.model for order in rig.take(c.Sleep)] == ["a"]


@pytest.mark.parametrize("answer", ["failed", "still asleep", "none"])
def test_failed_wake_kills_and_starts_cold(answer: str) -> None:
    rig, _ = swapped(load_timeout_s=20.0)
    request = rig.ask("a")
    rig.answers("b", ASLEEP)
    rig.clear()
    if answer == "none":
        rig.wait(20.0 + ANSWER_GRACE_S)
    else:
        rig.answers("a", FAILED if answer == "failed" else ASLEEP)
    (stop,) = rig.take(c.Stop)
    assert stop.force
    assert "wake failed" in stop.reason
    rig.empty("a")
    assert (rig.state("a"), rig.residency("a")) == (S.BACKOFF, R.LOADING)
    rig.wait(1.0)
    assert [spawn.generation for spawn in rig.take(c.Spawn)] == [2]
    rig.spawned("a")
    assert request in rig.granted()
    assert held(rig, "a") == {"gpu0": 8}, "a new run has taken nothing for a sleep"
    assert rig.of("a").restarts == 1


def test_sleep_without_an_answer_fails() -> None:
    rig = Rig(spec(sleep_timeout_s=5.0))
    rig.warm("a")
    rig.ask("b")
    rig.wait(5.0 + ANSWER_GRACE_S)
    assert [stop.force for stop in rig.take(c.Stop)] == [True]


def test_dead_sleeper_is_unloaded_and_counted() -> None:
    rig, _ = swapped()
    rig.dies("a", None, ExitKind.OOM)
    assert (rig.residency("a"), held(rig, "a"), rig.state("a")) == (R.ABSENT, {}, S.STOPPED)
    assert rig.of("a").record.deaths == 1
    rig.wait(5.0)
    assert not rig.take(c.Spawn), "no request for it"


def test_death_while_waking_starts_cold() -> None:
    rig, _ = swapped()
    request = rig.ask("a")
    rig.answers("b", ASLEEP)
    rig.dies("a")
    rig.answers("a", FAILED, "a ended")  # the call breaks too
    rig.wait(1.0)
    rig.spawned("a")
    assert request in rig.granted()


def test_probe_during_sleep_or_wake_kills_nothing() -> None:
    liveness = Probes(liveness=ProbeSpec(completion=True, failures=1, timeout_s=2.0))
    whole = spec()
    processes = {name: own(name, lane="gpu0", capabilities=CAN, probes=liveness) for name in whole.processes}
    rig = Rig(FleetSpec(processes, whole.models, whole.devices, whole.queue))
    rig.warm("a")
    rig.ask("b")
    rig.probe("a", ProbeKind.LIVENESS, ok=False)
    assert rig.state("a") is S.READY
    rig.answers("a", ASLEEP)
    rig.wait(2.0)
    rig.probe("a", ProbeKind.LIVENESS, ok=False)  # began before
    assert rig.state("a") is S.READY
    rig.wait(0.1)
    rig.probe("a", ProbeKind.LIVENESS, ok=False)
    assert rig.state("a") is S.STOPPING, "a sleeper answers its probe"


# -- orders, edits, and the daemon's own restart ------------------------------------------------------------------------------


def test_restarted_sleeper_returns_when_there_is_room() -> None:
    rig, _ = swapped()
    rig.send(e.RestartRequested("a"))
    assert [stop.name for stop in rig.take(c.Stop)] == ["a"]
    rig.empty("a")
    assert not rig.take(c.Spawn)
    rig.send(e.UnloadRequested("b"))
    rig.empty("b")
    assert [spawn.name for spawn in rig.take(c.Spawn)] == ["a"]


def test_edit_of_the_sleeping_size_reaches_the_ledger() -> None:
    rig, _ = swapped()
    more = {"gpu0": 2 * G}
    models = [model(name, size=8, asleep=more) for name in "ab"]
    rig.send(e.SpecChanged(fleet_spec(spec().processes.values(), models, 10)))
    assert held(rig, "a") == {"gpu0": 2}
    assert held(rig, "b") == {"gpu0": 8}


def test_model_that_cannot_sleep_is_unloaded() -> None:
    rig = Rig(fleet_spec([own(name) for name in "ab"], [model(name, size=8) for name in "ab"], 10))
    rig.warm("a")
    rig.ask("b")
    assert not rig.take(c.Sleep)
    assert [stop.name for stop in rig.take(c.Stop)] == ["a"]


def adopted(*states: SleepState) -> Rig:
    """Start a daemon that adopts `a` and `b` and learns the state of each."""
    found = tuple(e.Adopted(name, 3, 50 + number) for number, name in enumerate("ab"[: len(states)]))
    rig = Rig(spec(), adopted=found, remembered={one.name: Remembered(generation=3) for one in found})
    assert {look.model for look in rig.take(c.CheckSleep)} == {one.name for one in found}
    for one, state in zip(found, states, strict=True):
        rig.answers(one.name, state, "no answer")
    return rig


def test_adopted_sleeper_is_found_asleep() -> None:
    rig = adopted(ASLEEP, AWAKE)
    assert (rig.residency("a"), rig.residency("b")) == (R.ASLEEP, R.LOADED)
    assert (held(rig, "a"), held(rig, "b")) == ({"gpu0": 1, "host": 2}, {"gpu0": 8, "host": 2})
    assert not rig.take(c.Stop), "only the unknown size exceeded the budget"
    request = rig.ask("a")
    assert [order.model for order in rig.take(c.Sleep)] == ["b"]
    rig.answers("b", ASLEEP)
    rig.answers("a", AWAKE)
    assert request in rig.granted()


def test_adopted_engine_gets_nothing_until_it_is_asked() -> None:
    rig = Rig(spec(), adopted=(e.Adopted("a", 3, 50),), remembered={"a": Remembered(generation=3)})
    first, second = rig.ask("a"), rig.ask("b")
    assert not rig.take(c.Grant)
    assert not rig.take(c.Sleep)
    rig.answers("a", ASLEEP)
    assert [wake.model for wake in rig.take(c.Wake)] == ["a"]
    rig.answers("a", AWAKE)
    assert rig.granted() == [first]
    rig.finish(first)
    assert second not in rig.granted()
    assert [order.model for order in rig.take(c.Sleep)] == ["a"]


def test_adopted_engine_without_an_answer_is_killed() -> None:
    rig = adopted(FAILED)
    (stop,) = rig.take(c.Stop)
    assert stop.force
    assert "check failed: no answer" in stop.reason
    rig.empty("a")
    assert (rig.residency("a"), held(rig, "a")) == (R.ABSENT, {}), "whether it has room to start cold is to be seen"


def test_adopted_engine_dead_before_its_answer_stays_down() -> None:
    found = (e.Adopted("a", 3, 50),)
    rig = Rig(spec(), adopted=found, remembered={"a": Remembered(generation=3)})
    assert rig.take(c.CheckSleep)
    rig.dies("a")
    assert (rig.residency("a"), held(rig, "a")) == (R.ABSENT, {}), "it may have been asleep, and held far less"
    assert not rig.fleet.state.unobserved


def test_starting_adopted_engine_delays_loads_briefly() -> None:
    whole = spec("ab", budget=18)
    slow = own("a", lane="gpu0", capabilities=CAN, probes=Probes(startup=ProbeSpec(http="/health", deadline_s=600.0)))
    whole = FleetSpec({**whole.processes, "a": slow, "c": own("c")}, {**whole.models, "c": model("c")}, whole.devices)
    rig = Rig(whole, adopted=(e.Adopted("a", 3, 50),), remembered={"a": Remembered(generation=3)})
    request = rig.ask("c")
    assert not rig.take(c.Spawn)
    rig.wait(10.1)
    rig.spawned("c")
    assert request in rig.granted()
    assert held(rig, "a") == {"gpu0": 8, "host": 2}
    rig.probe("a", ProbeKind.STARTUP)
    rig.answers("a", AWAKE)
    assert rig.residency("a") is R.LOADED


def test_sleeping_replica_is_woken_by_evicting_others() -> None:
    replicas = [replace(own(f"a-{number}", lane="gpu0", capabilities=CAN), own_model="a") for number in (1, 2)]
    models = [model("a", "a-1", "a-2", size=4, asleep=KEPT, concurrency=1), model("b", size=7)]
    rig = Rig(fleet_spec([*replicas, own("b", lane="gpu0", capabilities=CAN)], models, 9))
    first = rig.ask("a")
    rig.spawned("a-1")
    second = rig.ask("a")  # the first is full: one more
    rig.spawned("a-2")
    for request in (first, second):
        rig.finish(request)
    rig.finish(large := rig.ask("b"))
    assert {order.process for order in rig.take(c.Sleep)} == {"a-1"}, "one after the other on one lane"
    for name in ("a-1", "a-2"):
        rig.send(e.SleepSeen("a", name, 1, ASLEEP))
    rig.spawned("b")
    assert large in rig.granted()
    rig.finish(large)
    again = rig.ask("a")
    rig.empty("b")
    assert [wake.process for wake in rig.take(c.Wake)] == ["a-1"]
    rig.send(e.SleepSeen("a", "a-1", 1, AWAKE))
    assert again in rig.granted()


# -- measured -----------------------------------------------------------------------------------------------------------------


def test_sleeping_size_is_learned_from_a_recent_sample() -> None:
    rig, _ = swapped()
    sample = e.MemorySampled("a", 1, G, {"gpu0": 8 * G})
    rig.wait(SETTLED_S - 1.0)
    rig.send(sample)
    assert (rig.take(c.LearnFootprint), held(rig, "a")) == ([], {"gpu0": 1, "host": 2})
    rig.wait(2.0)
    rig.send(e.MemorySampled("a", 1, G, {"gpu0": 2 * G}))
    (learned,) = rig.take(c.LearnFootprint)
    assert (learned.footprint_hash, learned.bytes) == ("a:asleep", {"gpu0": 2 * G})
    assert held(rig, "a") == {"gpu0": 2, "host": 2}


def test_sleeper_over_the_budget_is_unloaded() -> None:
    rig, _ = swapped()
    rig.wait(SETTLED_S + 1.0)
    rig.clear()
    rig.send(e.MemorySampled("a", 1, G, {"gpu0": 3 * G}))
    assert [stop.name for stop in rig.take(c.Stop)] == ["a"]


def test_process_without_sleep_is_not_asked() -> None:
    rig = Rig(fleet_spec([process("s")]), adopted=(e.Adopted("s", 2, 9),), remembered={"s": Remembered(generation=2)})
    assert not rig.take(c.CheckSleep)
    assert rig.state("s") is S.READY
