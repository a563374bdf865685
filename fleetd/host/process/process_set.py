"""Which processes belong to one run of one service, however far they fled.

Invariants:
- The set is cgroup ∪ process group ∪ session ∪ descendants ∪ carriers of the run's token ∪ members seen before.
- A member is (pid, start time). Nothing older than the leader is a member; a recycled leader pid voids group and session.
- `members` is pure: a snapshot in, identities out. It runs off the loop.
"""

from __future__ import annotations

import os
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field

from fleetd.host.process.cgroup import Cgroup
from fleetd.host.process.table import ProcessTable, Snapshot, TableEntry
from fleetd.host.types import KillScope

TOKEN_VARIABLE = "FLEETD_SPAWN"  # noqa: S105 (a label in the environment, not a secret)
PROBE_VARIABLE = "FLEETD_PROBE"  # says whose probe it is
INSTANCE_VARIABLE = "FLEETD_INSTANCE"  # NAME:GENERATION
STATE_VARIABLE = "FLEETD_STATE"  # where the daemon that spawned it keeps its records
_YOUNG_S = 2.0
_TOKEN_MARK = TOKEN_VARIABLE.encode() + b"="


@dataclass(slots=True)
class Lineage:
    """The identity of a process set. `seen` keeps members (pid → start time)."""

    pid: int
    start: int
    token: str
    cgroup: Cgroup | None = None
    seen: dict[int, int] = field(default_factory=dict)


class TokenCache:
    """The token in each process' environment, read once per (pid, start time).

    That there is none is believed only of a process known for `_YOUNG_S`: between fork and exec a child shows its parent's
    environment.
    """

    def __init__(self, table: ProcessTable, clock: Callable[[], float] = time.monotonic) -> None:
        self._table = table
        self._clock = clock
        self._tokens: dict[tuple[int, int], str | None] = {}
        self._young: dict[tuple[int, int], float] = {}  # first seen, without a token so far

    def token_of(self, entry: TableEntry) -> str | None:
        key = (entry.pid, entry.start)
        if key in self._tokens:
            return self._tokens[key]
        if len(self._tokens) + len(self._young) > 20_000:
            self._tokens.clear()
            self._young.clear()
        token = read_token(self._table.environment(entry.pid))
        now = self._clock()
        if token is not None or now >= self._young.setdefault(key, now) + _YOUNG_S:
            self._young.pop(key, None)
            self._tokens[key] = token
        return token


def read_token(environment: bytes | None) -> str | None:
    """Return the token of an environment block, None without one."""
    if not environment:
        return None
    start = 0 if environment.startswith(_TOKEN_MARK) else environment.find(b"\0" + _TOKEN_MARK) + 1
    if start == 0 and not environment.startswith(_TOKEN_MARK):
        return None
    value = environment[start + len(_TOKEN_MARK) :]
    return value.split(b"\0", 1)[0].decode("ascii", "replace")


def strays(table: ProcessTable, place: str, known: Collection[str]) -> dict[str, str]:
    """Return unrecorded sets of this daemon: token → NAME:GENERATION."""
    found: dict[str, str] = {}
    for _, environment in carriers(table, STATE_VARIABLE, place):
        token = environment.get(TOKEN_VARIABLE)
        if token is not None and token not in known:
            found.setdefault(token, environment.get(INSTANCE_VARIABLE, ""))
    return found


def carriers(table: ProcessTable, variable: str, value: str) -> Iterator[tuple[TableEntry, dict[str, str]]]:
    """Yield live processes with this variable, and their whole environment."""
    wanted = os.fsencode(f"{variable}={value}")
    for entry in table.snapshot().values():
        pairs = [] if entry.dead else (table.environment(entry.pid) or b"").split(b"\0")
        if wanted in pairs:
            yield entry, dict(os.fsdecode(pair).partition("=")[::2] for pair in pairs)


def members(
    lineage: Lineage,
    snapshot: Snapshot,
    token_of: Callable[[TableEntry], str | None],
    *,
    scope: str = KillScope.SET,
    grouped: Collection[int] = (),
    spare: Collection[int] = (),
) -> dict[int, int]:
    """Return the live members as pid → start time.

    `grouped` are the pids of the set's cgroup; `spare` are pids that never belong (the daemon and its ancestors).
    """
    holder = snapshot.get(lineage.pid)
    recycled = holder is not None and holder.start != lineage.start
    if scope == KillScope.LEADER:
        alive = holder is not None and not recycled and not holder.dead
        return {lineage.pid: lineage.start} if alive else {}
    found: dict[int, int] = {}
    for entry in snapshot.values():
        if entry.dead or entry.start < lineage.start or entry.pid in spare:
            continue
        if scope == KillScope.GROUP:
            if not recycled and entry.pgid == lineage.pid:
                found[entry.pid] = entry.start
        elif (
            (not recycled and lineage.pid in (entry.pgid, entry.sid))
            or entry.pid in grouped
            or lineage.seen.get(entry.pid) == entry.start
            or token_of(entry) == lineage.token
        ):
            found[entry.pid] = entry.start
    if scope != KillScope.GROUP:
        _add_descendants(found, snapshot, spare)
    return found


def _add_descendants(found: dict[int, int], snapshot: Snapshot, spare: Collection[int]) -> None:
    children: dict[int, list[TableEntry]] = defaultdict(list)
    for entry in snapshot.values():
        children[entry.ppid].append(entry)
    open_pids = list(found)
    while open_pids:
        for child in children.get(open_pids.pop(), ()):
            if child.pid not in found and child.pid not in spare and not child.dead:
                found[child.pid] = child.start
                open_pids.append(child.pid)


def family(snapshot: Snapshot, pid: int) -> dict[int, int]:
    """Return a process and everything that descends from it, as pid → start time."""
    entry = snapshot.get(pid)
    if entry is None or entry.dead:
        return {}
    found = {pid: entry.start}
    _add_descendants(found, snapshot, ())
    return found


def ancestors(snapshot: Snapshot, pid: int) -> frozenset[int]:
    """Return pid and everything above it."""
    found = {0, 1, pid}
    entry = snapshot.get(pid)
    while entry is not None and entry.ppid not in found:
        found.add(entry.ppid)
        entry = snapshot.get(entry.ppid)
    return frozenset(found)


class SetScanner:
    """Looks up process sets. All methods block for about a millisecond."""

    def __init__(self, table: ProcessTable) -> None:
        self.table = table
        self._tokens = TokenCache(table)

    def scan(self, lineage: Lineage, scope: str = KillScope.SET) -> dict[int, int]:
        """Return the live members and remember them in the lineage."""
        return self.scan_all([lineage], scope)[0]

    def scan_all(self, lineages: Collection[Lineage], scope: str = KillScope.SET) -> list[dict[int, int]]:
        """Do the same for many sets in one pass over the table."""
        return [found for found, _ in self.scan_entries(lineages, scope)]

    def scan_entries(
        self, lineages: Collection[Lineage], scope: str = KillScope.SET
    ) -> list[tuple[dict[int, int], Snapshot]]:
        """Return for each set its members, and the one snapshot they were found in."""
        snapshot = self.table.snapshot()
        spare = ancestors(snapshot, os.getpid())
        results: list[tuple[dict[int, int], Snapshot]] = []
        for lineage in lineages:
            grouped = lineage.cgroup.pids() if lineage.cgroup is not None else ()
            found = members(lineage, snapshot, self._tokens.token_of, scope=scope, grouped=grouped, spare=spare)
            if scope == KillScope.SET:
                lineage.seen = dict(found)
            results.append((found, snapshot))
        return results

    def signal(self, targets: dict[int, int], signal: int) -> None:
        """Signal each member by identity."""
        for pid, start in targets.items():
            self.table.send(pid, start, signal)
