"""Assigned ports: kept per name, apart from each other, outside the ephemeral range."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fleetd.resolver.port_assignment import FIRST, LAST, NoPortLeftError, assign, remember

names = st.lists(st.text("abcdefgh-0123", min_size=1, max_size=8), unique=True, max_size=40)


@given(names, st.sets(st.integers(FIRST, LAST), max_size=20))
def test_assign_gives_different_ports_in_the_range(wanted: list[str], taken: set[int]) -> None:
    ports = assign(wanted, {}, taken)
    assert set(ports) == set(wanted)
    assert len(set(ports.values())) == len(wanted)
    assert all(FIRST <= port <= LAST and port not in taken for port in ports.values())


@given(names, names)
def test_assign_keeps_ports_when_other_names_change(first: list[str], second: list[str]) -> None:
    before = assign(first, {}, ())
    kept = remember({}, before)
    after = assign(second, kept, ())
    assert all(after[name] == before[name] for name in set(first) & set(second))
    again = assign(first, remember(kept, after), ())
    assert again == before


def test_assign_stated_port_wins_over_a_kept_one() -> None:
    ports = assign(["a"], {"a": FIRST}, {FIRST})
    assert ports["a"] != FIRST


def test_assign_kept_port_in_use_is_replaced() -> None:
    ports = assign(["a"], {"a": FIRST + 5}, (), lambda name, port: port != FIRST + 5)
    assert ports["a"] != FIRST + 5


def test_assign_kept_port_outside_the_range_is_replaced() -> None:
    assert FIRST <= assign(["a"], {"a": 40000}, ())["a"] <= LAST


def test_assign_without_kept_ports_is_deterministic() -> None:
    assert assign(["a", "b"], {}, ()) == assign(["a", "b"], {}, ())


def test_assign_depends_on_the_fleet() -> None:
    names = [f"m{number}" for number in range(100)]
    one, other = (assign(names, {}, (), fleet=fleet) for fleet in ("/srv/one", "/srv/other"))
    assert len(set(one.values()) & set(other.values())) < 10


def test_assign_without_free_port_raises() -> None:
    with pytest.raises(NoPortLeftError, match="no free port"):
        assign(["a"], {}, (), lambda name, port: False)


def test_remember_bounds_old_names() -> None:
    kept: dict[str, int] = {}
    for number in range(6000):
        kept = remember(kept, {f"n{number}": FIRST + number})
    assert len(kept) <= 4100
    assert "n5999" in kept
    assert "n0" not in kept


def test_assign_five_thousand_names_is_quick() -> None:
    wanted = [f"model-{number}" for number in range(5000)]
    assert len(set(assign(wanted, {}, ()).values())) == 5000
