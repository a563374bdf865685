"""The rule of membership on tables: no real process is asked."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fleetd.host.process.cgroup import Cgroup
from fleetd.host.process.process_set import Lineage, SetScanner, TokenCache, members, read_token
from fleetd.host.process.table import TableEntry, parse_stat

LEADER = TableEntry(pid=100, ppid=50, pgid=100, sid=100, start=1000, dead=False)
LINEAGE = Lineage(pid=100, start=1000, token="mine")


def entry(
    pid: int, ppid: int = 1, pgid: int | None = None, sid: int | None = None, start: int = 1001, dead: bool = False
) -> TableEntry:
    return TableEntry(pid, ppid, pid if pgid is None else pgid, pid if sid is None else sid, start, dead)


def found(entries: list[TableEntry], tokens: Mapping[int, str] | None = None, **options: object) -> set[int]:
    given_tokens = tokens or {}
    lineage = options.pop("lineage", LINEAGE)
    return set(
        members(lineage, {e.pid: e for e in entries}, lambda e: given_tokens.get(e.pid), **options)  # type: ignore[arg-type]
    )


CASES = {
    "leader alone": ([LEADER], {}, {100}),
    "a child": ([LEADER, entry(101, ppid=100)], {}, {100, 101}),
    "a grandchild in its own session": ([LEADER, entry(101, 100), entry(102, 101)], {}, {100, 101, 102}),
    "same group, parent gone": ([LEADER, entry(101, pgid=100, sid=100)], {}, {100, 101}),
    "same session, own group": ([LEADER, entry(101, sid=100)], {}, {100, 101}),
    "double fork with the token": ([LEADER, entry(101)], {101: "mine"}, {100, 101}),
    "another run's token": ([LEADER, entry(101)], {101: "theirs"}, {100}),
    "a stranger": ([LEADER, entry(101)], {}, {100}),
    "a zombie": ([LEADER, entry(101, ppid=100, dead=True)], {}, {100}),
    "older than the leader": ([LEADER, entry(99, ppid=1, sid=100, start=999)], {}, {100}),
    "leader dead, worker left in the group": ([entry(101, pgid=100, sid=100)], {}, {101}),
    "leader dead, tree of an orphan with the token": ([entry(101), entry(102, ppid=101)], {101: "mine"}, {101, 102}),
    "the leader's number given out again": (
        [LEADER._replace(start=5000), entry(101, ppid=100, sid=100, start=5001)],
        {},
        set(),
    ),
    "recycled number, but an old member by token": ([LEADER._replace(start=5000), entry(101)], {101: "mine"}, {101}),
}


@pytest.mark.parametrize("name", CASES)
def test_who_belongs(name: str) -> None:
    entries, tokens, expected = CASES[name]
    assert found(entries, tokens) == expected


def test_seen_members_stay_known_without_parent_session_or_token() -> None:
    lineage = Lineage(100, 1000, "mine", seen={101: 1001})
    assert found([entry(101)], lineage=lineage) == {101}
    assert found([entry(101, start=7777)], lineage=lineage) == set()  # its number belongs to somebody else now


def test_cgroup_members_belong_whatever_they_did() -> None:
    assert found([LEADER, entry(101)], grouped={101}) == {100, 101}


def test_the_daemon_and_its_ancestors_are_spared() -> None:
    assert found([LEADER, entry(50, sid=100), entry(51, ppid=50)], spare={50}) == {100}


def test_scopes() -> None:
    table = [LEADER, entry(101, ppid=100, pgid=100, sid=100), entry(102, ppid=100)]
    assert found(table, scope="leader") == {100}
    assert found(table, scope="group") == {100, 101}
    assert found(table, scope="set") == {100, 101, 102}
    assert found(table[1:], scope="leader") == set()


@given(
    st.dictionaries(
        st.integers(2, 40), st.tuples(st.integers(1, 40), st.integers(2, 40), st.integers(900, 1100), st.booleans())
    )
)
def test_members_exclude_dead_and_older_include_children(
    rows: dict[int, tuple[int, int, int, bool]],
) -> None:
    table = {pid: TableEntry(pid, ppid, pgid, pgid, start, dead) for pid, (ppid, pgid, start, dead) in rows.items()}
    lineage = Lineage(20, 1000, "mine")
    result = members(lineage, table, lambda _: None)
    for pid, start in result.items():
        assert table[pid].start == start
        assert not table[pid].dead
    for pid, row in table.items():
        if row.ppid in result and not row.dead:
            assert pid in result


class FakeTable:
    """A process table that a test writes; signals are kept."""

    def __init__(self, entries: list[TableEntry], environments: Mapping[int, bytes] | None = None) -> None:
        self.entries = {e.pid: e for e in entries}
        self.environments = dict(environments or {})
        self.sent: list[tuple[int, int]] = []

    def snapshot(self) -> dict[int, TableEntry]:
        return dict(self.entries)

    def entry(self, pid: int) -> TableEntry | None:
        return self.entries.get(pid)

    def environment(self, pid: int) -> bytes | None:
        return self.environments.get(pid)

    def send(self, pid: int, start: int, signal: int) -> bool:
        current = self.entries.get(pid)
        if current is None or current.start != start:
            return False
        self.sent.append((pid, signal))
        return True


def test_scan_reads_tokens_and_signals_identities() -> None:
    table = FakeTable([LEADER, entry(101)], {101: b"A=1\0FLEETD_SPAWN=mine\0B=2\0"})
    scanner, lineage = SetScanner(table), Lineage(100, 1000, "mine")
    targets = scanner.scan(lineage)
    assert targets == {100: 1000, 101: 1001}
    assert lineage.seen == targets
    table.entries[101] = entry(101, start=9999)  # the number is given out again between look and signal
    scanner.signal(targets, 9)
    assert table.sent == [(100, 9)]


@pytest.mark.parametrize(
    ("block", "token"),
    [
        (b"FLEETD_SPAWN=abc\0X=1\0", "abc"),
        (b"X=1\0FLEETD_SPAWN=abc\0", "abc"),
        (b"X=FLEETD_SPAWN=abc\0", None),
        (b"XFLEETD_SPAWN=abc\0", None),
        (b"", None),
        (None, None),
    ],
)
def test_read_token(block: bytes | None, token: str | None) -> None:
    assert read_token(block) == token


def test_stat_of_a_command_with_brackets_and_spaces() -> None:
    line = b"42 (a) b (c) Z 1 7 8 0 -1 0 0 0 0 0 30 12 0 0 20 0 1 0 555 4096 10 0"
    parsed = parse_stat(line)
    assert parsed is not None
    assert (parsed.pid, parsed.ppid, parsed.pgid, parsed.sid, parsed.start, parsed.dead) == (42, 1, 7, 8, 555, True)
    assert parsed.cpu_ticks == 42
    assert parse_stat(b"") is None


def test_a_cgroup_that_is_gone_is_empty(tmp_path: object) -> None:
    group = Cgroup(tmp_path / "none")  # type: ignore[operator]
    assert group.pids() == frozenset()
    assert group.oom_kills() == 0
    group.remove()


def test_a_child_seen_before_its_exec_is_looked_at_again() -> None:
    environments = {7: b"HOME=/\0"}
    table = SimpleNamespace(environment=environments.get)
    now = [100.0]
    cache = TokenCache(table, lambda: now[0])
    young = entry(7)
    assert cache.token_of(young) is None
    environments[7] = b"HOME=/\0FLEETD_SPAWN=t1\0"
    assert cache.token_of(young) == "t1"
    other = entry(8)
    assert cache.token_of(other) is None
    now[0] += 3.0
    assert cache.token_of(other) is None  # old enough: believed from now on
    environments[8] = b"FLEETD_SPAWN=t2\0"
    assert cache.token_of(other) is None
