"""The connection pools of all processes, and which pool the requests for a target use.

Invariants:
- A process whose address changes gets a new pool; the old one serves its requests in progress and then goes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from fleetd.gateway.context import GatewayContext
from fleetd.gateway.target import ModelTarget
from fleetd.gateway.upstream import Pool

_CACHED_TARGETS: Final = 4096


class Pools:
    """One pool per process and address."""

    def __init__(self, context: GatewayContext, on_empty: Callable[[], None]) -> None:
        """`on_empty` is called whenever a pool has lost its last connection."""
        self._context = context
        self._on_empty = on_empty
        self._by_process: dict[str, Pool] = {}
        self._all: set[Pool] = set()  # also those of an earlier address, until their connections are gone
        self.by_target: dict[ModelTarget, Pool] = {}  # a cache: read it first, then call `find`

    @property
    def open_connections(self) -> int:
        """Number of open connections to engines."""
        return sum(pool.open_connections for pool in self._all)

    def find(self, target: ModelTarget) -> Pool:
        """Return the pool for a target; it is created if needed."""
        if len(self.by_target) >= _CACHED_TARGETS:
            self.by_target.clear()
        pool = self.by_target[target] = self._find(target)
        return pool

    def _find(self, target: ModelTarget) -> Pool:
        process, upstream = target.process, target.upstream
        pool = self._by_process.get(process)
        if pool is not None:
            if pool.upstream == upstream:
                return pool
            pool.close_idle()
        pool = self._by_process[process] = Pool(self._context, process, upstream, self._emptied)
        self._all.add(pool)
        return pool

    def _emptied(self, pool: Pool) -> None:
        if self._by_process.get(pool.process) is not pool:
            self._all.discard(pool)
        self._on_empty()

    def last_answer_s(self, process: str) -> float:
        """Return when a process last sent a piece of a 200 answer, monotonic; 0: never."""
        pool = self._by_process.get(process)
        return pool.last_answer_s if pool is not None else 0.0

    def close_idle(self) -> None:
        """Close the connections that have been idle for too long."""
        options = self._context.options
        oldest = self._context.clock - options.upstream_keepalive_s + options.tick_s
        for pool in tuple(self._all):
            pool.close_idle(oldest)

    def close(self) -> None:
        """Close idle connections and stop opening others."""
        for pool in self._all:
            pool.close()
