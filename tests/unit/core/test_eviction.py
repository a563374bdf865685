"""The eviction planner and the memory ledger, as pure arithmetic over placements."""

from __future__ import annotations

import pytest

from fleetd.core.data.specs import DeviceSpec, Footprint
from fleetd.core.data.state import Model, Placement, Residency, SleepStep
from fleetd.core.models.eviction import Evict, Fits, Never, Plan, Wait, plan
from fleetd.core.models.ledger import Ledger
from fleetd.errors import CapacityError
from tests.support.core import model

NOW = 1000.0


def ledger(**budgets: int) -> Ledger:
    return Ledger({name: DeviceSpec(name, "gpu", 100, budget) for name, budget in budgets.items()})


# -- the ledger ---------------------------------------------------------------------------------------------------------


def test_reserve_raises_if_it_does_not_fit() -> None:
    book = ledger(gpu0=10)
    book.reserve(("a", "p"), {"gpu0": 6})
    assert (book.reserved_bytes("gpu0"), book.free_bytes("gpu0")) == (6, 4)
    with pytest.raises(CapacityError, match="b lacks 1 bytes on gpu0"):
        book.reserve(("b", "p"), {"gpu0": 5})
    with pytest.raises(CapacityError, match="has a reservation already"):
        book.reserve(("a", "p"), {"gpu0": 1})
    book.release(("a", "p"))
    book.release(("a", "p"))
    assert (book.reserved_bytes("gpu0"), book.reservations) == (0, {})


def test_correct_may_exceed_the_budget_and_reports_excess() -> None:
    book = ledger(gpu0=10)
    book.reserve(("a", "p"), {"gpu0": 6})
    book.correct(("a", "p"), {"gpu0": 13})
    assert (book.excess(), book.free_bytes("gpu0")) == ({"gpu0": 3}, 0)
    assert book.lacking({"gpu0": 1}) == {"gpu0": 1}
    book.correct(("a", "p"), {"gpu0": 9})
    assert book.excess() == {}


def test_unknown_device_has_no_limit_and_is_counted() -> None:
    book = ledger(gpu0=10)
    book.reserve(("a", "p"), {"cpu": 10**12})
    assert (book.reserved_bytes("cpu"), book.free_bytes("cpu"), book.lacking({"cpu": 1})) == (10**12, None, {})


# -- the planner ----------------------------------------------------------------------------------------------------------


class Table:
    """Placements by hand: name -> (bytes, changes)."""

    def __init__(self, budget: int = 10, **budgets: int) -> None:
        self.ledger = ledger(gpu0=budget, **budgets)
        self.models: dict[str, Model] = {}

    def put(
        self, name: str, size: int | dict[str, int], state: Residency = Residency.LOADED, busy: int = 0, pin: bool = False,
        priority: int = 0, demand: float = 0.0, load_s: float = 1.0, age_s: float = 999.0, used_s: float = 0.0,
        asleep: dict[str, int] | None = None, **changes: object,
    ) -> Table:  # fmt: skip
        spec = model(name, "p", pin=pin, priority=priority, min_resident_s=30.0, asleep=asleep)
        entry = self.models[name] = Model(spec, demand=demand, demand_s=NOW, load_s=load_s)
        entry.placements["p"] = Placement(
            name,
            "p",
            state,
            in_flight=busy,
            loaded_s=NOW - age_s,
            last_used_s=used_s,
            **changes,  # type: ignore[arg-type]
        )
        self.ledger.correct((name, "p"), {"gpu0": size} if isinstance(size, int) else size)
        return self

    def ask(self, size: int | dict[str, int], awaited: tuple[str, ...] = ()) -> Plan:
        need = {"gpu0": size} if isinstance(size, int) else size
        return plan(need, ("new", "p"), self.models, self.ledger, NOW, {(name, "p") for name in awaited})


def victims(verdict: Plan) -> list[str]:
    assert isinstance(verdict, Evict), verdict
    return sorted(placement.model for placement in verdict.victims)


def test_plan_fits_with_free_memory() -> None:
    assert Table().put("a", 6).ask(4) == Fits()
    assert Table().ask({}) == Fits()


def test_plan_never_fits_and_has_the_numbers() -> None:
    verdict = Table(budget=10 * 2**30).ask(11 * 2**30)
    assert isinstance(verdict, Never)
    assert not verdict.pinned
    assert "needs 11.00 GiB on gpu0, whose budget is 10.00 GiB" in verdict.reason


def test_plan_evicts_nothing_unless_it_frees_enough() -> None:
    table = Table().put("a", 4).put("b", 6, busy=1)
    verdict = table.ask(9)
    assert isinstance(verdict, Wait)
    assert sorted(p.model for p in verdict.drain) == ["a", "b"]


def test_plan_drops_needless_victims() -> None:
    table = Table().put("small", 2, demand=0.0).put("large", 8, demand=9.0)
    assert victims(table.ask(7)) == ["large"]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"priority": 0}, {"priority": 1}),
        ({"age_s": 99.0}, {"age_s": 3.0}),
        ({"load_s": 1.0, "demand": 1.0}, {"load_s": 60.0, "demand": 1.0}),
        ({"demand": 1.0}, {"demand": 9.0}),
        ({"used_s": 10.0}, {"used_s": 20.0}),
        ({"priority": 0, "demand": 99.0}, {"priority": 1}),
    ],
)
def test_plan_evicts_the_cheapest_to_reload(one: dict[str, float], other: dict[str, float]) -> None:
    for first, second in ((one, other), (other, one)):
        table = Table().put("x", 5, **first).put("y", 5, **second)  # type: ignore[arg-type]
        assert victims(table.ask(5)) == (["x"] if first is one else ["y"])


def test_plan_evicts_a_young_model_as_last_resort() -> None:
    assert victims(Table().put("young", 10, age_s=1.0).ask(5)) == ["young"]


def test_plan_spares_pinned_starting_busy_and_awaited() -> None:
    assert isinstance(Table().put("a", 10, state=Residency.LOADING).ask(5), Wait)
    assert Table().put("a", 10, state=Residency.UNLOADING).ask(5) == Wait("memory is being freed")
    assert isinstance(Table().put("a", 10).ask(5, awaited=("a",)), Wait)
    busy = Table().put("a", 10, busy=2).ask(5)
    assert isinstance(busy, Wait)
    assert [p.model for p in busy.drain] == ["a"]
    pinned = Table().put("a", 10, pin=True).ask(5)
    text = "new needs 5 B; 0 B of 10 B are free on gpu0 and a (10 B) is pinned"
    assert pinned == Never(text, pinned=True, hint="fleetctl unpin a")


def test_plan_counts_memory_being_freed() -> None:
    table = Table().put("going", 4, state=Residency.UNLOADING).put("a", 3).put("b", 3)
    assert table.ask(4) == Wait("memory is being freed")
    assert len(victims(table.ask(6))) == 1


def test_plan_needs_room_on_every_device() -> None:
    table = Table(budget=10, host=4).put("a", {"gpu0": 5, "host": 1}).put("b", {"gpu0": 5, "host": 3})
    assert victims(table.ask({"gpu0": 2, "host": 3})) == ["b"]
    assert isinstance(table.ask({"gpu0": 1, "host": 5}), Never)


def test_plan_ignores_devices_with_enough_room() -> None:
    table = Table(budget=10, host=10).put("a", {"host": 9}).put("b", 9)
    assert victims(table.ask({"gpu0": 5, "host": 1})) == ["b"]


def test_plan_prefers_idle_victims_to_busy_ones() -> None:
    table = Table().put("busy", 5, busy=1, priority=-5).put("idle", 5, priority=5)
    assert victims(table.ask(5)) == ["idle"]


def test_plan_breaks_ties_by_name() -> None:
    assert victims(Table().put("b", 5).put("a", 5).ask(5)) == ["a"]


def test_footprint_is_declared_then_learned_then_estimated() -> None:
    from dataclasses import replace

    from fleetd.core.data.specs import FootprintSource

    entry = Model(replace(model("m"), footprint=Footprint({"gpu0": 5, "host": 1})))
    assert dict(entry.footprint.bytes) == {"gpu0": 5, "host": 1}
    entry.learned["gpu0"] = 7
    assert (dict(entry.footprint.bytes), entry.footprint.source) == ({"gpu0": 7, "host": 1}, FootprintSource.LEARNED)
    entry.spec = replace(entry.spec, footprint=Footprint({"gpu0": 6}, FootprintSource.DECLARED))
    assert (dict(entry.footprint.bytes), entry.footprint.source) == ({"gpu0": 7}, FootprintSource.LEARNED), "too small"
    entry.spec = replace(entry.spec, footprint=Footprint({"gpu0": 8, "host": 1}, FootprintSource.DECLARED))
    assert (dict(entry.footprint.bytes), entry.footprint.source) == ({"gpu0": 8, "host": 1}, FootprintSource.DECLARED)
    entry.spec = replace(entry.spec, footprint=Footprint({"gpu0": 9, "host": 1}, FootprintSource.LEARNED))
    assert dict(entry.footprint.bytes) == {"gpu0": 9, "host": 1}, "it was more in an earlier life of the daemon"


# -- sleep ----------------------------------------------------------------------------------------------------------------


def sleepers(verdict: Plan) -> list[str]:
    assert isinstance(verdict, Evict), verdict
    return sorted(placement.model for placement in verdict.sleepers)


LIGHT = {"gpu0": 1, "host": 4}  # asleep: little on the card, the weights on the host


@pytest.mark.parametrize(
    ("held", "need", "host", "expected", "why"),
    [
        ({"gpu0": 8}, {"gpu0": 9}, 4, ["a"], "it frees enough, and its weights find room on the host"),
        ({"gpu0": 8}, {"gpu0": 10}, 4, [], "what it keeps on the card is wanted too"),
        ({"gpu0": 8}, {"gpu0": 9}, 3, [], "the host has no room for its weights"),
        ({"gpu0": 8}, {"gpu0": 9, "host": 1}, 4, [], "the room on the host is for the other"),
        ({"gpu0": 8, "host": 4}, {"gpu0": 9}, 4, ["a"], "it slept before, and holds its room on the host"),
        ({"gpu0": 8, "host": 3}, {"gpu0": 9, "host": 1}, 4, [], "one byte more on the host, and none is left"),
        ({"gpu0": 8, "cpu": 1}, {"gpu0": 9}, 4, ["a"], "a device without a budget is no limit"),
    ],
)  # fmt: skip
def test_victim_sleeps_if_that_frees_enough(
    held: dict[str, int], need: dict[str, int], host: int, expected: list[str], why: str
) -> None:
    verdict = Table(host=host).put("a", held, asleep=LIGHT).ask(need)
    assert victims(verdict) == ["a"]
    assert sleepers(verdict) == expected, why


def test_only_victims_that_can_sleep_sleep() -> None:
    table = Table(budget=20, host=4)
    table.put("a", 10, asleep={"gpu0": 1}).put("b", 6, demand=5.0).put("c", 4, asleep={"gpu0": 1}, demand=9.0)
    verdict = table.ask(18)
    assert victims(verdict) == ["a", "b", "c"]
    assert sleepers(verdict) == ["a", "c"]
    assert sleepers(table.ask(19)) == ["c"], "the dearest to bring back sleeps, if only one may"


def test_victim_is_unloaded_after_a_failed_sleep() -> None:
    table = Table(host=9).put("a", 8, asleep=LIGHT)
    table.models["a"].sleepless_until_s = NOW + 1
    assert (victims(table.ask(9)), sleepers(table.ask(9))) == (["a"], [])
    table.models["a"].sleepless_until_s = NOW
    assert sleepers(table.ask(9)) == ["a"]


def test_model_falling_asleep_is_waited_for() -> None:
    table = Table(host=9).put("a", {"gpu0": 8, "host": 4}, asleep=LIGHT, step=SleepStep.SLEEP, closing="evicted")
    assert table.ask(9) == Wait("memory is being freed")
    assert isinstance(table.ask(10), Wait), "what it keeps can be had once it sleeps"
    table.put("x", 1, Residency.UNLOADING)
    assert isinstance(table.ask(10), Wait)
    assert isinstance(table.put("p", 1, pin=True).ask(10), Never)


def test_sleeper_is_unloaded_for_its_remaining_memory() -> None:
    table = Table(host=9).put("a", LIGHT, Residency.ASLEEP, asleep=LIGHT)
    verdict = table.ask(10)
    assert (victims(verdict), sleepers(verdict)) == (["a"], [])


def test_grow_takes_the_larger_size_and_only_free_memory() -> None:
    book = ledger(gpu0=10, host=5)
    book.reserve(("a", "p"), {"gpu0": 6})
    book.grow(("a", "p"), {"gpu0": 1, "host": 4})
    assert book.reservations[("a", "p")] == {"gpu0": 6, "host": 4}
    with pytest.raises(CapacityError, match="a lacks 1 bytes on gpu0, 1 bytes on host"):
        book.grow(("a", "p"), {"gpu0": 11, "host": 6})
    assert book.reserved_bytes("host") == 4
