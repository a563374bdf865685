"""The queue of requests, and the loads and unloads that it causes."""

from __future__ import annotations

from dataclasses import replace

import pytest

from fleetd.core.data import commands as c
from fleetd.core.data import events as e
from fleetd.core.data.journal import ModelLost, StateChanged, Subject
from fleetd.core.data.specs import (
    Capabilities,
    ExitKind,
    Footprint,
    FootprintSource,
    ModelSpec,
    ProbeKind,
    Probes,
    ProbeSpec,
    Route,
)
from fleetd.core.data.state import ProcessState, Residency
from tests.support.core import G, Rig, fleet_spec, model, own, owners, process, server

S = ProcessState


def swap(rig: Rig, old: str, new: str) -> None:
    """Finish the stop of the old model and the start of the new one."""
    assert rig.state(old) is S.STOPPING
    rig.empty(old)
    rig.spawned(new)


# -- together while it is resident ----------------------------------------------------------------------------------------


def test_requests_a_b_c_a_b_c_cost_two_swaps() -> None:
    rig = Rig(owners("abc", concurrency=1))
    requests = [rig.ask(name) for name in "abcabc"]
    rig.spawned("a")
    for name, following in (("a", "b"), ("b", "c"), ("c", None)):
        for _ in range(2):
            rig.wait(1.0)
            current = [grant for grant in rig.take(c.Grant) if grant.model == name][-1]
            rig.finish(current.request_id)
        if following:
            swap(rig, name, following)
    assert sorted(rig.granted()) == requests
    assert [grant.model for grant in rig.take(c.Grant)] == list("aabbcc")
    assert len(rig.take(c.Spawn)) == 3


def test_requests_for_one_model_share_one_load() -> None:
    rig = Rig(owners("a", concurrency=50, queue_max=100))
    requests = [rig.ask("a") for _ in range(50)]
    assert len(rig.take(c.Spawn)) == 1
    rig.spawned("a")
    assert rig.granted() == requests
    grant = rig.take(c.Grant)[0]
    assert (grant.model, grant.process, grant.generation) == ("a", "a", 1)


def test_grant_reports_wait_and_load_time() -> None:
    rig = Rig(owners("ab"))
    rig.warm("a")
    first = rig.ask("a")
    rig.clear()
    rig.ask("b")
    rig.wait(3.0)
    rig.finish(first)
    rig.wait(1.0)
    rig.empty("a")
    rig.wait(5.0)
    rig.spawned("b")
    grant = rig.take(c.Grant)[-1]
    assert (grant.queued_s, grant.load_s) == (pytest.approx(9.0), pytest.approx(5.0))


def test_wait_is_limited_by_the_fairness_bound() -> None:
    rig = Rig(owners("ab", budget=1, concurrency=2), seed=1)
    rig.warm("a")
    flight = [rig.ask("a"), rig.ask("a")]
    poor = rig.ask("b")
    for _ in range(29):  # a steady stream of overlapping requests for the neighbour
        rig.wait(1.0)
        rig.finish(flight.pop(0))
        flight.append(rig.ask("a"))
        assert flight[-1] in rig.granted()
    rig.wait(1.1)
    late = rig.ask("a")
    assert late not in rig.granted()
    for request in flight:
        rig.finish(request)
    assert late not in rig.granted()
    swap(rig, "a", "b")
    assert poor in rig.granted()
    rig.finish(poor)
    swap(rig, "b", "a")
    assert late in rig.granted()


def test_earlier_request_delays_later_starts_not_grants() -> None:
    spec = fleet_spec(
        [own(n) for n in "abcd"],
        [model("a", size=3), model("b", size=4), model("c", size=1), model("d", size=1)],
        budget=5,
    )
    rig = Rig(spec)
    rig.warm("a")
    rig.warm("d")
    busy = rig.ask("a")
    head = rig.ask("b")
    later = rig.ask("c")
    assert [command.name for command in rig.take(c.Spawn)] == ["a", "d"]
    assert rig.fleet.state.queue[later].reason == "an earlier request waits for the same device"
    warm = rig.ask("d")
    assert warm in rig.granted()
    rig.finish(warm)
    rig.finish(busy)
    rig.empty("a")
    assert rig.take(c.Spawn)[-1].name == "c" or rig.take(c.Spawn)[-1].name == "b"
    assert head in rig.fleet.state.queue


def test_loads_on_different_devices_run_in_parallel() -> None:
    from dataclasses import replace

    from fleetd.core.data.specs import DeviceSpec, Footprint

    spec = fleet_spec(
        [own(n) for n in "abc"], [model("a"), model("b"), replace(model("c"), footprint=Footprint({"gpu1": G}))]
    )
    spec = replace(spec, devices={**spec.devices, "gpu1": DeviceSpec("gpu1", "gpu", G, G)})
    rig = Rig(spec)
    rig.warm("a")
    rig.ask("a")
    rig.ask("b")
    rig.ask("c")
    assert [command.name for command in rig.take(c.Spawn)] == ["a", "c"]


def test_queue_orders_overdue_before_priority_before_age() -> None:
    spec = fleet_spec([own(n) for n in "abc"], [model("a"), model("b", queue_timeout_s=300), model("c", priority=5)])
    rig = Rig(spec)
    rig.warm("a")
    busy = rig.ask("a")
    rig.ask("b")
    rig.wait(5.0)
    important = rig.ask("c")
    rig.finish(busy)
    swap(rig, "a", "c")
    assert important in rig.granted()
    rig.wait(26.0)
    again = rig.ask("c")
    assert again not in rig.granted(), "the old request is overdue: the model of the important ones only drains"
    rig.finish(important)
    swap(rig, "c", "b")


# -- limits and refusals ----------------------------------------------------------------------------------------------------


def test_queues_of_model_and_fleet_are_bounded() -> None:
    rig = Rig(owners("ab", queue_max=2))
    waiting = [rig.ask("a") for _ in range(3)]
    assert rig.rejects() == {waiting[2]: "queue_full"}
    assert 1.0 <= (rig.take(c.Reject)[0].retry_after_s or 0) <= 120.0
    rig = Rig(fleet_spec([own("a"), own("b")], [model("a"), model("b")], max=2))
    waiting = [rig.ask(name) for name in "abb"]
    assert rig.rejects() == {waiting[2]: "queue_full"}


def test_full_queue_still_grants_warm_requests() -> None:
    rig = Rig(fleet_spec([own("a"), own("b")], [model("a"), model("b")], budget=1, max=1))
    rig.warm("a")
    rig.ask("a")
    rig.ask("b")
    warm, retried = rig.ask("a"), rig.ask("a", ("elsewhere",))
    assert {warm, retried} <= set(rig.granted())


def test_timeout_is_rejected_with_the_reason() -> None:
    rig = Rig(owners("ab", queue_timeout_s=5.0))
    rig.warm("a")
    rig.ask("a")
    poor = rig.ask("b")
    rig.wait(5.0)
    assert rig.rejects() == {poor: "queue_timeout"}
    assert "no room within 5.0 s: waiting for a to become idle" in rig.take(c.Reject)[0].reason


def test_cancelled_request_starts_no_load() -> None:
    rig = Rig(owners("ab"))
    rig.warm("a")
    busy = rig.ask("a")
    poor = rig.ask("b")
    rig.send(e.RequestCancelled(poor))
    rig.clear()
    rig.finish(busy)
    assert rig.seen == []
    assert rig.residency("a") is Residency.LOADED


def test_load_without_a_waiting_request_is_not_started() -> None:
    rig = Rig(fleet_spec([server("s")], [model("m", "s")]))
    poor = rig.ask("m")
    assert rig.fleet.ledger.reserved_bytes("gpu0") == G
    rig.send(e.RequestCancelled(poor))
    assert rig.fleet.ledger.reserved_bytes("gpu0") == 0
    rig.spawned("s")
    assert not rig.take(c.Load)


def test_model_over_budget_is_rejected_with_the_numbers() -> None:
    rig = Rig(fleet_spec([own("a")], [model("a", size=4)], budget=2))
    refused = rig.ask("a")
    assert rig.rejects() == {refused: "model_too_large"}
    assert "needs 4.00 GiB on gpu0, whose budget is 2.00 GiB" in rig.take(c.Reject)[0].reason


def test_request_is_rejected_if_all_others_are_pinned() -> None:
    rig = Rig(owners("ab", pin=True))
    rig.warm("a")
    refused = rig.ask("b")
    assert rig.rejects() == {refused: "model_blocked"}
    assert "and a (1.00 GiB) is pinned" in rig.take(c.Reject)[0].reason
    rig.send(e.PinRequested("a", False))
    rig.ask("b")
    swap(rig, "a", "b")


def test_unknown_name_is_rejected_and_shortened() -> None:
    rig = Rig(owners("a"))
    refused = rig.ask("nobody" * 10_000)
    assert rig.rejects() == {refused: "model_not_found"}
    assert len(rig.take(c.Reject)[0].reason) < 400


def test_failed_load_is_rejected_at_once_and_retried_later() -> None:
    rig = Rig(fleet_spec([server("s")], [model("m", "s")]))
    rig.spawned("s")
    waiting = [rig.ask("m"), rig.ask("m")]
    rig.send(e.LoadFailed("m", "s", 1, "unknown architecture"))
    assert rig.rejects() == dict.fromkeys(waiting, "model_failed")
    assert "unknown architecture" in rig.take(c.Reject)[0].reason
    at_once = rig.ask("m")
    assert rig.rejects()[at_once] == "model_failed"
    rig.wait(5.1)
    later = rig.ask("m")
    rig.loaded("m", "s")
    assert later in rig.granted()


def test_final_load_failure_is_retried_only_on_request() -> None:
    rig = Rig(fleet_spec([server("s")], [model("m", "s")]))
    rig.spawned("s")
    rig.ask("m")
    rig.send(e.LoadFailed("m", "s", 1, "no such file", recoverable=False))
    rig.wait(10_000)
    refused = rig.ask("m")
    assert rig.rejects()[refused] == "model_failed"
    rig.request_load("m")
    assert rig.take(c.Load)[-1].model == "m"


def test_failed_start_is_rejected_at_once_and_backs_off() -> None:
    rig = Rig(owners("a"))
    waiting = rig.ask("a")
    rig.spawned("a") if False else rig.exits("a", 1, reason="CUDA error")
    rig.empty("a")
    assert rig.rejects() == {waiting: "model_failed"}
    assert "CUDA error" in rig.take(c.Reject)[0].reason
    assert rig.state("a") is S.STOPPED
    assert rig.fleet.ledger.reserved_bytes("gpu0") == 0


def test_crash_while_serving_restarts_for_waiting_requests() -> None:
    rig = Rig(owners("a", concurrency=1))
    rig.warm("a")
    lost = rig.ask("a")
    waiting = rig.ask("a")
    rig.exits("a")
    rig.finish(lost)
    rig.empty("a")
    rig.wait(1.0)
    rig.spawned("a")
    assert waiting in rig.granted()
    assert rig.of("a").restarts == 1


def test_crash_of_an_engine_is_reported_as_a_lost_model() -> None:
    rig = Rig(owners("a"))
    rig.warm("a")
    rig.exits("a", 139)
    notes = rig.fleet.journal.notes_on("a")
    assert ModelLost("a", "a", "exited with code 139") in notes
    changes = [note for note in notes if isinstance(note, StateChanged) and note.kind is Subject.MODEL]
    assert (changes[-1].before, changes[-1].after) == ("LOADED", "LOADING")
    assert changes[-1].reason == "lost: a died: exited with code 139"


def test_requested_restart_is_not_reported_as_a_lost_model() -> None:
    rig = Rig(owners("a"))
    rig.warm("a")
    rig.send(e.RestartRequested("a"))
    notes = rig.fleet.journal.notes_on("a")
    assert not any(isinstance(note, ModelLost) for note in notes)
    changes = [note for note in notes if isinstance(note, StateChanged) and note.kind is Subject.MODEL]
    assert "lost" not in changes[-1].reason


def test_server_crash_during_a_load_is_rejected_at_once() -> None:
    rig = Rig(fleet_spec([server("s")], [model("m", "s")]))
    rig.spawned("s")
    waiting = rig.ask("m")
    rig.exits("s", 139)
    assert rig.rejects() == {waiting: "model_failed"}
    assert rig.fleet.ledger.reserved_bytes("gpu0") == G, "its set is not empty yet"
    rig.empty("s")
    assert rig.fleet.ledger.reserved_bytes("gpu0") == 0


def test_failed_load_on_dying_server_keeps_memory_until_empty() -> None:
    rig = Rig(fleet_spec([server("s")], [model("m", "s")]))
    rig.spawned("s")
    rig.ask("m")
    rig.send(e.LoadFailed("m", "s", 1, "connection reset"))
    rig.exits("s", 139)
    rig.wait(0.4)
    assert rig.fleet.ledger.reserved_bytes("gpu0") == G
    rig.empty("s")
    assert rig.fleet.ledger.reserved_bytes("gpu0") == 0


def test_load_cut_off_by_a_restart_is_repeated() -> None:
    rig = Rig(fleet_spec([server("s")], [model("m", "s")]))
    rig.spawned("s")
    waiting = rig.ask("m")
    rig.send(e.RestartRequested("s"))
    rig.empty("s")
    rig.spawned("s")
    assert [command.generation for command in rig.take(c.Load)] == [1, 2]
    rig.loaded("m", "s")
    assert waiting in rig.granted()


def test_hanging_load_fails_and_is_unloaded() -> None:
    rig = Rig(fleet_spec([server("s")], [model("m", "s", load_timeout_s=20.0)]))
    rig.spawned("s")
    waiting = rig.ask("m")
    rig.wait(29.0)
    assert not rig.take(c.Unload)
    rig.wait(1.1)
    assert rig.rejects() == {waiting: "model_failed"}
    assert rig.take(c.Unload)
    rig.unloaded("m", "s")
    assert rig.fleet.ledger.reserved_bytes("gpu0") == 0


# -- leaving ----------------------------------------------------------------------------------------------------------------


def test_idle_time_counts_from_the_end_of_the_last_request() -> None:
    rig = Rig(owners("a", ttl_s=10.0))
    rig.warm("a")
    request = rig.ask("a")
    rig.wait(500.0)
    assert rig.residency("a") is Residency.LOADED
    rig.finish(request)
    rig.wait(9.9)
    assert rig.residency("a") is Residency.LOADED
    rig.wait(0.2)
    assert rig.take(c.Stop)[0].reason == "idle for 10 s"


@pytest.mark.parametrize("changes", [{"ttl_s": 0.0}, {"pin": True}])
def test_pinned_and_always_running_models_do_not_expire(changes: dict[str, object]) -> None:
    rig = Rig(owners("a", **changes))
    rig.warm("a")
    rig.wait(100_000.0)
    assert rig.residency("a") is Residency.LOADED


def test_observation_neither_loads_nor_keeps_a_model() -> None:
    rig = Rig(owners("ab", ttl_s=10.0))
    rig.warm("a")
    for _ in range(11):
        rig.wait(1.0)
        rig.send(e.Tick())
        assert rig.fleet.models["b"].state is Residency.ABSENT
    assert rig.take(c.Stop)


def test_request_during_an_unload_waits_and_loads_again() -> None:
    rig = Rig(owners("a", ttl_s=10.0))
    rig.warm("a")
    rig.wait(10.0)
    waiting = rig.ask("a")
    assert rig.state("a") is S.STOPPING
    rig.empty("a")
    assert rig.of("a").generation == 2
    rig.spawned("a")
    assert waiting in rig.granted()


def test_operator_unload_drains_and_grants_nothing_new() -> None:
    rig = Rig(fleet_spec([server("s")], [model("m", "s", preload=True)]))
    rig.spawned("s")
    rig.loaded("m", "s")
    busy = rig.ask("m")
    rig.send(e.UnloadRequested("m"))
    assert not rig.take(c.Unload)
    late = rig.ask("m")
    assert late not in rig.granted()
    rig.send(e.RequestCancelled(late))
    rig.finish(busy)
    assert rig.take(c.Unload)
    rig.unloaded("m", "s")
    rig.wait(10_000)
    assert rig.residency("m") is Residency.ABSENT, "what an operator unloaded does not come back by itself"


def test_operator_unload_cancels_an_operator_load() -> None:
    rig = Rig(fleet_spec([server("s")], [model("m", "s")]))
    load_id = rig.request_load("m")
    rig.send(e.UnloadRequested("m"))
    assert rig.rejects() == {load_id: "model_blocked"}
    rig.spawned("s")
    assert not rig.take(c.Load)


def test_unload_during_a_load_waits_for_its_answer() -> None:
    rig = Rig(fleet_spec([server("s")], [model("m", "s")]))
    rig.spawned("s")
    rig.request_load("m")
    rig.send(e.UnloadRequested("m"))
    assert not rig.take(c.Unload)
    rig.loaded("m", "s")
    assert rig.take(c.Unload)


def test_failing_unload_is_retried_then_restarts_the_server() -> None:
    rig = Rig(fleet_spec([server("s")], [model("m", "s")]))
    rig.spawned("s")
    rig.request_load("m")
    rig.loaded("m", "s")
    rig.send(e.UnloadRequested("m"))
    for attempt in range(3):
        assert len(rig.take(c.Unload)) == attempt + 1
        rig.send(e.UnloadFailed("m", "s", 1, "busy"))
        rig.wait(4.0 if attempt < 2 else 0.0)
    assert "cannot unload m: busy" in rig.take(c.Stop)[0].reason
    rig.empty("s")
    assert rig.residency("m") is Residency.ABSENT


def test_operator_load_ends_silently_or_with_a_rejection() -> None:
    rig = Rig(owners("ab"))
    load_id = rig.request_load("a")
    rig.spawned("a")
    assert (rig.residency("a"), rig.rejects(), rig.granted()) == (Residency.LOADED, {}, [])
    assert load_id not in rig.fleet.state.queue
    unknown = rig.request_load("zzz")
    assert rig.rejects() == {unknown: "model_not_found"}
    rig.send(e.StopRequested("b"))
    stopped = rig.request_load("b")
    assert rig.rejects()[stopped] == "model_blocked"
    assert "stopped by an operator" in rig.take(c.Reject)[-1].reason


def test_operator_stop_rejects_waiting_requests() -> None:
    rig = Rig(owners("a"))
    waiting = rig.ask("a")
    rig.send(e.StopRequested("a"))
    assert rig.rejects() == {waiting: "model_blocked"}


# -- what stays -------------------------------------------------------------------------------------------------------------


def test_higher_priority_drains_a_busy_lower_one() -> None:
    spec = fleet_spec([own(n) for n in "ac"], [model("a", concurrency=2), model("c", priority=5)])
    rig = Rig(spec)
    rig.warm("a")
    busy = rig.ask("a")
    assert busy in rig.granted()
    high = rig.ask("c")
    late = rig.ask("a")
    assert late not in rig.granted(), "what must leave for it gives no more grants, long before the fairness bound"
    rig.finish(busy)
    assert late not in rig.granted()
    swap(rig, "a", "c")
    assert (high in rig.granted(), late in rig.granted()) == (True, False)
    rig.finish(high)
    swap(rig, "c", "a")
    assert late in rig.granted()


def test_equal_priority_waits_for_a_loaded_model() -> None:
    spec = fleet_spec([own(n) for n in "ac"], [model("a", concurrency=2, priority=5), model("c", priority=5)])
    rig = Rig(spec)
    rig.warm("a")
    busy = rig.ask("a")
    rig.ask("c")
    late = rig.ask("a")
    assert {busy, late} <= set(rig.granted())


def test_preload_loads_by_priority_and_evicts_nothing() -> None:
    models = [model("a", "s", preload=True), model("b", "s", preload=True, priority=3), model("c", "s", preload=True)]
    rig = Rig(fleet_spec([server("s")], models, budget=2))
    rig.spawned("s")
    assert [command.model for command in rig.take(c.Load)] == ["a", "b"]


def test_evicted_preload_returns_after_waiting_requests() -> None:
    models = [model("a", "s", preload=True), model("b", "s", preload=True), model("big", "s", size=2, ttl_s=10.0)]
    rig = Rig(fleet_spec([server("s")], models, budget=2))
    rig.spawned("s")
    rig.loaded("a", "s")
    rig.loaded("b", "s")
    request = rig.ask("big")
    assert sorted(command.model for command in rig.take(c.Unload)) == ["a", "b"]
    rig.clear()
    rig.unloaded("a", "s")
    assert not rig.take(c.Load), "half the room is there: it is held for the head of the line"
    rig.unloaded("b", "s")
    assert [command.model for command in rig.take(c.Load)] == ["big"]
    rig.loaded("big", "s")
    rig.finish(request)
    rig.wait(10.0)
    rig.unloaded("big", "s")
    assert sorted(command.model for command in rig.take(c.Load)) == ["a", "b", "big"]


def test_always_running_model_returns_and_never_expires() -> None:
    rig = Rig(fleet_spec([own("a", on_demand=False)], [model("a", ttl_s=1.0)]))
    rig.spawned("a")
    rig.wait(1000.0)
    assert rig.residency("a") is Residency.LOADED
    rig.dies("a")
    rig.wait(1.0)
    rig.spawned("a")
    assert rig.residency("a") is Residency.LOADED


def test_always_running_model_fails_until_started_by_hand() -> None:
    rig = Rig(fleet_spec([own("a", on_demand=False)], [model("a")]))
    rig.spawned("a")
    rig.dies("a", 1, ExitKind.BAD_CONFIG)
    assert (rig.state("a"), rig.residency("a")) == (S.FAILED, Residency.FAILED)
    refused = rig.ask("a")
    assert rig.rejects() == {refused: "model_failed"}
    assert not rig.fleet.ledger.reservations
    rig.send(e.StartRequested("a"))
    rig.spawned("a")
    assert rig.residency("a") is Residency.LOADED


# -- measured memory ----------------------------------------------------------------------------------------------------------


def test_footprint_is_learned_from_the_highest_measurement() -> None:
    rig = Rig(fleet_spec([server("s")], [model("m", "s")], budget=9))
    rig.spawned("s")
    rig.request_load("m")
    rig.loaded("m", "s", 3 * G)
    assert rig.take(c.LearnFootprint)[-1].bytes == {"gpu0": 3 * G}
    assert rig.fleet.ledger.reserved_bytes("gpu0") == 3 * G
    rig.clear()
    rig.send(e.ResidentsObserved("s", 1, {"m": {"gpu0": 2 * G}}))
    assert not rig.take(c.LearnFootprint)
    assert rig.fleet.ledger.reserved_bytes("gpu0") == 3 * G
    assert rig.fleet.models["m"].footprint.bytes == {"gpu0": 3 * G}


def test_declared_footprint_is_raised_by_a_measurement() -> None:
    liar = model("a", footprint=Footprint({"gpu0": G}, FootprintSource.DECLARED))
    rig = Rig(fleet_spec([own("a"), own("b")], [liar, model("b")], budget=3))
    rig.warm("b")
    rig.wait(1.0)
    rig.warm("a")
    rig.clear()
    rig.send(e.MemorySampled("a", 1, 4 * G, {"gpu0": 4 * G}))
    assert rig.take(c.LearnFootprint)[-1].bytes == {"gpu0": 4 * G}
    assert [command.name for command in rig.take(c.Stop)] == ["a"], "the other one's leaving is not needed"
    rig.exits("a", 0)
    rig.empty("a")
    rig.ask("a")
    assert list(rig.rejects().values()) == ["model_too_large"]


def test_lower_measurement_than_the_learned_is_ignored() -> None:
    known = model("a", footprint=Footprint({"gpu0": 2 * G}, FootprintSource.LEARNED))
    rig = Rig(fleet_spec([own("a")], [known], budget=4))
    rig.warm("a")
    rig.send(e.MemorySampled("a", 1, G, {"gpu0": G}))
    assert not rig.take(c.LearnFootprint)
    assert rig.fleet.models["a"].footprint.bytes == {"gpu0": 2 * G}
    rig.send(e.MemorySampled("a", 1, 3 * G, {"gpu0": 3 * G}))
    assert rig.take(c.LearnFootprint)[-1].bytes == {"gpu0": 3 * G}


def test_model_too_large_after_an_edit_is_not_restarted() -> None:
    rig = Rig(owners("a", budget=2))
    rig.warm("a")
    rig.clear()
    grown = fleet_spec([own("a", launch_hash="other")], [model("a", size=3, footprint_hash="other")], budget=2)
    rig.send(e.SpecChanged(grown))
    assert [command.name for command in rig.take(c.Stop)] == ["a"]
    rig.exits("a", 0)
    rig.empty("a")
    rig.wait(60.0)
    assert not rig.take(c.Spawn)
    assert rig.fleet.ledger.reserved_bytes("gpu0") == 0
    rig.ask("a")
    assert list(rig.rejects().values()) == ["model_too_large"]


def test_measurement_with_old_options_is_not_learned() -> None:
    before, after = (
        fleet_spec([server("s")], [model("m", "s", footprint_hash=text)], budget=9) for text in ("before", "after")
    )
    rig = Rig(before)
    rig.spawned("s")
    rig.request_load("m")
    rig.loaded("m", "s", 3 * G)
    rig.send(e.SpecChanged(after))
    rig.clear()
    rig.send(e.ResidentsObserved("s", 1, {"m": {"gpu0": 4 * G}}))
    assert not rig.take(c.LearnFootprint)
    assert rig.fleet.ledger.reserved_bytes("gpu0") == 4 * G, "it is what it takes now"
    assert rig.fleet.models["m"].footprint.bytes == {"gpu0": G}


def test_measurement_over_budget_unloads_the_idle_model() -> None:
    rig = Rig(owners("ab", budget=2))
    rig.warm("a")
    rig.wait(1.0)
    rig.warm("b")
    busy = rig.ask("a")
    rig.send(e.MemorySampled("a", 1, G, {"gpu0": 2 * G}))
    assert [(command.name, command.reason) for command in rig.take(c.Stop)] == [
        ("b", "measured memory exceeds the budget")
    ]
    rig.empty("b")
    rig.wait(5.0)
    assert rig.state("a") is S.READY
    rig.finish(busy)


def test_observed_residents_count_unless_too_old() -> None:
    rig = Rig(fleet_spec([server("s")], [model("m", "s"), model("n", "s")], budget=9))
    rig.spawned("s")
    rig.request_load("m")
    rig.loaded("m", "s")
    rig.send(e.ResidentsObserved("s", 1))  # looked before the load had ended
    assert rig.residency("m") is Residency.LOADED
    rig.wait(6.0)
    rig.send(e.ResidentsObserved("s", 1, {"n": {"gpu0": G}}))
    assert (rig.residency("m"), rig.residency("n")) == (Residency.ABSENT, Residency.LOADED)
    rig.send(e.UnloadRequested("n"))
    rig.unloaded("n", "s")
    rig.send(e.ResidentsObserved("s", 1, {"n": {"gpu0": G}}))  # looked before the unload had ended
    assert rig.residency("n") is Residency.ABSENT


# -- names --------------------------------------------------------------------------------------------------------------------


def pair(**changes: object) -> list[ModelSpec]:
    return [model("a", aliases=("gpt",), **changes), model("b")]


def test_alias_resolves_to_its_model() -> None:
    rig = Rig(fleet_spec([own("a"), own("b")], pair()))
    rig.ask("gpt")
    rig.spawned("a")
    assert rig.take(c.Grant)[0].model == "a"


def test_route_spreads_by_weight_and_skips_unable_targets() -> None:
    chat = ModelSpec("chat", routes=(Route("a", 90), Route("b", 10), Route("a", 0), Route("b", 50, shadow=True)))
    rig = Rig(
        fleet_spec([own("a"), own("b")], [model("a", concurrency=9999), model("b", concurrency=9999), chat], budget=2)
    )
    for name in "ab":
        rig.warm(name)
    rig.clear()
    for _ in range(1000):
        rig.ask("chat")
    share = [grant.model for grant in rig.take(c.Grant)].count("a")
    assert 850 < share < 950
    rig.send(e.StopRequested("a"))
    rig.clear()
    for _ in range(50):
        rig.ask("chat")
    assert {grant.model for grant in rig.take(c.Grant)} == {"b"}


@pytest.mark.parametrize("why", ["absent", "failed", "full", "blocked", "crashed", "starting again"])
def test_fallback_serves_if_the_first_cannot(why: str) -> None:
    names = ("zzz", "b") if why == "absent" else ("b",)
    crashing = why in ("crashed", "starting again")
    rig = Rig(fleet_spec([own("a", on_demand=not crashing), own("b")], pair(fallback=names, queue_max=1), budget=2))
    rig.warm("b")
    if why == "failed":
        rig.ask("a")
        rig.spawned("a")
        rig.dies("a", 1, ExitKind.BAD_CONFIG)
    elif why == "full":
        rig.ask("a")
    elif why == "blocked" or why == "absent":
        rig.send(e.StopRequested("a"))
    elif crashing:
        rig.spawned("a")
        rig.dies("a")
        assert rig.state("a") is ProcessState.BACKOFF
        if why == "starting again":
            rig.wait(60)
            assert rig.state("a") is ProcessState.STARTING
    rig.clear()
    request = rig.ask("a")
    assert [(grant.request_id, grant.model) for grant in rig.take(c.Grant)] == [(request, "b")]


def test_fallback_with_zero_queue_serves_at_once() -> None:
    models = [model("a", fallback=("b",)), model("b", queue_max=0, concurrency=1)]
    rig = Rig(fleet_spec([own("a"), own("b", on_demand=False)], models, budget=2))
    rig.spawned("b")
    rig.send(e.StopRequested("a"))
    served, refused = rig.ask("a"), rig.ask("a")
    assert rig.granted() == [served]
    assert rig.rejects() == {refused: "queue_full"}


def test_requests_use_the_fallback_while_an_engine_is_down() -> None:
    rig = Rig(fleet_spec([own("a", on_demand=False), own("b")], pair(fallback=("b",)), budget=2))
    rig.warm("b")
    rig.clear()
    waiting = rig.ask("a")
    assert rig.granted() == [], "a first start is waited for"
    rig.dies("a")
    assert [(grant.request_id, grant.model) for grant in rig.take(c.Grant)] == [(waiting, "b")]
    rig.wait(60)
    rig.spawned("a")
    rig.clear()
    rig.ask("a")
    assert [grant.model for grant in rig.take(c.Grant)] == ["a"]


def test_on_demand_engine_is_retried_by_the_next_request() -> None:
    rig = Rig(fleet_spec([own("a"), own("b")], pair(fallback=("b",)), budget=2))
    rig.warm("b")
    rig.warm("a")
    rig.dies("a")
    assert rig.state("a") is ProcessState.STOPPED
    rig.clear()
    waiting = rig.ask("a")
    rig.spawned("a")
    assert [(grant.request_id, grant.model) for grant in rig.take(c.Grant)] == [(waiting, "a")]


def test_engine_that_is_down_is_waited_for_without_fallback() -> None:
    rig = Rig(fleet_spec([own("a", on_demand=False), own("b", on_demand=False)], pair(fallback=("b",)), budget=2))
    for name in "ab":
        rig.spawned(name)
        rig.dies(name)
    waiting = rig.ask("a")
    assert rig.rejects() == {}
    rig.wait(60)
    rig.spawned("a")
    assert waiting in rig.granted()


def test_route_skips_an_unresponsive_target() -> None:
    chat = ModelSpec("chat", routes=(Route("m", 99), Route("b", 1)))
    probes = Probes(readiness=ProbeSpec(http="/", failures=1))
    rig = Rig(fleet_spec([server("p", probes=probes), own("b")], [model("m", "p", size=0), model("b"), chat]))
    rig.spawned("p")
    rig.probe("p", ProbeKind.READINESS)
    rig.warm("b")
    rig.ask("m")
    rig.loaded("m", "p")
    rig.probe("p", ProbeKind.READINESS, ok=False)
    assert rig.state("p") is ProcessState.UNHEALTHY
    rig.clear()
    for _ in range(4):
        rig.finish(rig.ask("chat"))
    assert {grant.model for grant in rig.take(c.Grant)} == {"b"}


def test_unresponsive_external_server_is_rejected_at_once() -> None:
    far = server("far", probes=Probes(startup=ProbeSpec(http="/")))
    far = replace(far, capabilities=Capabilities(many_models=True, owns_process=False))
    rig = Rig(fleet_spec([far], [model("m", "far", size=0)]))
    early = rig.ask("m")
    assert rig.rejects() == {}, "the servers were not observed yet"
    rig.probe("far", ProbeKind.STARTUP, ok=False, detail="connection refused")
    late = rig.ask("m")
    assert rig.rejects() == {early: "model_failed", late: "model_failed"}
    assert all("far is STARTING: connection refused" in reject.reason for reject in rig.take(c.Reject))
    rig.probe("far", ProbeKind.STARTUP)
    rig.ask("m")
    rig.loaded("m", "far")
    assert len(rig.granted()) == 1


def test_timeout_is_not_renewed_by_a_fallback() -> None:
    rig = Rig(fleet_spec([own("a"), own("b")], pair(fallback=("b",), queue_timeout_s=5.0), budget=1))
    waiting = rig.ask("a")
    rig.wait(5.1)
    assert rig.rejects() == {waiting: "queue_timeout"}


def test_two_processes_share_requests_and_a_failed_is_avoided() -> None:
    rig = Rig(fleet_spec([server("p"), server("q")], [model("m", "p", "q", size=0, concurrency=2)]))
    for name in "pq":
        rig.spawned(name)
    rig.ask("m")
    rig.loaded("m", "p")
    rig.ask("m")
    rig.ask("m")
    assert [command.process for command in rig.take(c.Load)] == ["p", "q"], (
        "full here: a second copy where there is room"
    )
    rig.loaded("m", "q")
    assert [grant.process for grant in rig.take(c.Grant)] == ["p", "p", "q"]
    rig.clear()
    rig.ask("m", avoid=("q",))
    assert rig.take(c.Grant) == [] or rig.take(c.Grant)[0].process == "p"


def test_unhealthy_process_gets_no_requests() -> None:
    probes = Probes(readiness=ProbeSpec(http="/", failures=1))
    rig = Rig(fleet_spec([server("s", probes=probes)], [model("m", "s")]))
    from fleetd.core.data.specs import ProbeKind

    rig.spawned("s")
    rig.probe("s", ProbeKind.READINESS)
    rig.request_load("m")
    rig.loaded("m", "s")
    rig.probe("s", ProbeKind.READINESS, ok=False)
    waiting = rig.ask("m")
    assert waiting not in rig.granted()
    rig.probe("s", ProbeKind.READINESS)
    assert waiting in rig.granted()


def test_next_model_in_the_queue_is_read_ahead_once() -> None:
    rig = Rig(owners("ab"))
    rig.warm("a")
    rig.ask("a")
    rig.ask("b")
    rig.ask("b")
    rig.wait(10.0)
    assert [command.model for command in rig.take(c.ReadAhead)] == ["b"]


def test_service_and_model_on_one_device_coexist() -> None:
    rig = Rig(fleet_spec([process("web"), own("a")], [model("a")]))
    assert [command.name for command in rig.take(c.Spawn)] == ["web"]


def test_clients_that_leave_together_are_one_event() -> None:
    rig = Rig(owners("ab", budget=1))
    for number in range(1, 6):
        rig.send(e.RequestArrived(number, "a", ()))
    rig.send(e.RequestArrived(6, "b", ()))
    rig.send(e.RequestCancelled(1, (2, 3, 4, 5, 99)))
    assert rig.fleet.models["a"].waiting == 0
    assert list(rig.fleet.state.queue) == [6]
