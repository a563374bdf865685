"""The gateway's access to the fleet. Every request passes here twice, so every step is a dictionary look-up.

Invariants:
- `take` and `finish` bypass the inbox for warm requests; the target they lead to is cached.
- `admit` dispatches one event; the core's Grant or Reject comes back through `granted` and `rejected`, often before `admit`
  has returned. No task, no future, no copy.
- The address of a process is cached as one object until the plans change: the gateway compares by identity.
- A callback that raises costs its own request: the slot is given back at once.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

from fleetd.core.data.commands import Grant, Reject
from fleetd.core.data.events import Event, RequestArrived, RequestCancelled, RequestFinished, SpecChanged
from fleetd.core.data.state import ProcessState
from fleetd.daemon.api.status import Readiness
from fleetd.daemon.context import DaemonContext
from fleetd.engines.base import Api
from fleetd.gateway.port import ModelEntry, OnGrant, OnReject
from fleetd.gateway.target import ModelTarget, Upstream
from fleetd.resolver.launch_plan import LaunchPlan

if TYPE_CHECKING:
    from fleetd.core.data.state import Placement

_APIS: Mapping[Api, frozenset[str]] = {
    Api.OPENAI: frozenset({"openai"}),
    Api.OLLAMA: frozenset({"openai", "ollama"}),
    Api.NONE: frozenset(),
}


_LEAVING_S = 0.01  # clients that leave within this time are withdrawn together


class Warm(Protocol):
    """The part of `loop.FleetLoop` that a warm request needs."""

    def take(self, request_id: int, model: str) -> Placement | None: ...

    def give(self, request_id: int) -> bool: ...


class DaemonFleetPort:
    """Implements gateway.port.FleetPort on a fleet and the current plans."""

    def __init__(self, context: DaemonContext, loop: Warm, request_ids: Iterator[int], readiness: Readiness) -> None:
        self._queries = context.queries
        self._dispatch = context.dispatch
        self._config = context.config
        self._reporter = context.reporter
        self._loop = loop
        self._request_ids = request_ids
        self.ready = readiness.report
        self._waiting: dict[int, tuple[OnGrant, OnReject]] = {}
        self._leaving: list[int] = []
        self._granted: dict[int, str] = {}  # request to process
        self._upstreams: dict[str, Upstream] = {}
        self._targets: dict[tuple[str, str], ModelTarget] = {}
        self._names: dict[str, str] = {}
        self._created = int(time.time())
        self._given: dict[str, float] = {}  # process to its last grant, monotonic

    # -- the gateway's side -------------------------------------------------------------------------------------------

    def take(self, model: str) -> tuple[int, ModelTarget] | None:
        request_id = next(self._request_ids)
        placement = self._loop.take(request_id, model)
        if placement is None:
            return None
        process = placement.process
        self._granted[request_id] = process
        self._given[process] = placement.last_used_s
        target = self._targets.get((placement.model, process))
        if target is None:
            try:
                target = self.target(placement.model, process)
            except KeyError:
                self.finish(request_id, failed=True)
                return None
        return request_id, target

    def target(self, model: str, process: str) -> ModelTarget:
        target = self._targets.get((model, process))
        if target is None:
            target = ModelTarget(model, process, self._upstream(process), self._served_name(model, process))
            self._targets[model, process] = target
        return target

    def admit(self, model: str, on_grant: OnGrant, on_reject: OnReject, avoid: tuple[str, ...] = ()) -> int:
        request_id = next(self._request_ids)
        self._waiting[request_id] = (on_grant, on_reject)
        self._dispatch(RequestArrived(request_id, model, avoid))
        return request_id

    def cancel(self, request_id: int) -> None:
        """Withdraw a request. Those that leave together reach the fleet as one event: each costs no more than its arrival."""
        if self._waiting.pop(request_id, None) is None:
            return
        self._leaving.append(request_id)
        if len(self._leaving) == 1:
            asyncio.get_running_loop().call_later(_LEAVING_S, self._report_leaving)

    def _report_leaving(self) -> None:
        first, *others = self._leaving
        self._leaving = []
        self._dispatch(RequestCancelled(first, tuple(others)))

    def stop_reason(self, process: str) -> str | None:
        found = self._queries.process(process)
        if found is None or found.outcome is not None:
            return None
        if found.state is ProcessState.STOPPING or (found.state is ProcessState.STOPPED and found.crash is None):
            return found.reason
        return None

    def finish(self, request_id: int, failed: bool = False, refused: str = "") -> None:
        process = self._granted.pop(request_id, None)
        if process is None or (not failed and self._loop.give(request_id)):
            return
        self._dispatch(RequestFinished(request_id, failed, refused))

    def _upstream(self, process: str) -> Upstream:
        found = self._upstreams.get(process)
        if found is None:
            found = self._upstreams[process] = upstream_of(self._config.plans[process])
        return found

    def _served_name(self, model: str, process: str) -> str:
        held = self._config.plans[process].held.get(model)
        if held is not None:
            return held.served_as
        found = self._queries.model(model)
        if found is None:
            raise KeyError(model)
        return found.spec.served_as or model

    def models(self) -> Sequence[ModelEntry]:
        return [self._entry(alias, name) for alias, name in self._names.items()]

    def names(self) -> Mapping[str, str]:
        return self._names

    def _entry(self, alias: str, name: str) -> ModelEntry:
        model = self._queries.model(name)
        if model is None:
            return ModelEntry(alias, "ABSENT", created=self._created)
        if model.spec.routes:
            return ModelEntry(alias, "ROUTE", created=self._created)
        placed = next(iter(model.placements), None)
        plan = self._config.plans.get(model.spec.holders[0]) if model.spec.holders else None
        return ModelEntry(
            id=alias,
            state=str(model.state),
            engine=plan.engine_name if plan is not None else None,
            instance=placed,
            memory_bytes=model.footprint.total_bytes,
            created=self._created,
        )

    # -- the daemon's side --------------------------------------------------------------------------------------------

    def granted(self, command: Grant) -> None:
        """Grant a waiting request."""
        callbacks = self._waiting.pop(command.request_id, None)
        if callbacks is None:
            self._dispatch(RequestFinished(command.request_id))
            return
        self._granted[command.request_id] = command.process
        self._given[command.process] = time.monotonic()
        try:
            callbacks[0](command)
        except Exception as error:  # noqa: BLE001 - the gateway's bug must not keep the slot
            self._reporter.delivery_fault("a grant could not be delivered", error)
            self.finish(command.request_id, failed=True)

    def watch_load(self, on_reject: OnReject) -> int:
        """Return a request id for an operator's load; `on_reject` gets a rejection."""
        request_id = next(self._request_ids)
        self._waiting[request_id] = (lambda _: None, on_reject)
        return request_id

    def unwatch_load(self, request_id: int) -> None:
        """Drop the callback of an operator's load; the load continues."""
        self._waiting.pop(request_id, None)

    def rejected(self, command: Reject) -> None:
        """Reject a waiting request."""
        callbacks = self._waiting.pop(command.request_id, None)
        if callbacks is None:
            return
        try:
            callbacks[1](command)
        except Exception as error:  # noqa: BLE001
            self._reporter.delivery_fault("a rejection could not be delivered", error)

    def observe(self, event: Event) -> None:
        """Drop cached targets of replaced plans; keep unchanged objects."""
        if not isinstance(event, SpecChanged):
            return
        plans = self._config.plans
        self._targets.clear()
        for name, old in list(self._upstreams.items()):
            plan = plans.get(name)
            if plan is None or upstream_of(plan) != old:
                del self._upstreams[name]
        names: dict[str, str] = {}
        for spec in self._queries.model_specs():
            for alias in (spec.name, *spec.aliases):
                names[alias] = spec.name
        self._names = names

    def full_since(self, process: str) -> float | None:
        """Return since when all slots of a process are taken (monotonic), or None.

        A server that works on as many requests as it can may leave one more waiting for as long as they take.
        """
        return self._given.get(process) if self._queries.is_full(process) else None

    @property
    def in_flight(self) -> int:
        """Return the number of granted requests."""
        return len(self._granted)


def upstream_of(plan: LaunchPlan) -> Upstream:
    """Return a process' address and dialect. Raises KeyError without a port."""
    if plan.endpoint is None:
        raise KeyError(plan.name)
    from urllib.parse import urlsplit

    parts = urlsplit(plan.endpoint.base_url)
    tls = parts.scheme == "https"
    key = plan.endpoint.api_key
    return Upstream(
        host=parts.hostname or "127.0.0.1",
        port=parts.port or (443 if tls else 80),
        apis=_APIS[plan.api],
        headers=(("Authorization", f"Bearer {key}"),) if key else (),
        base_path=parts.path.rstrip("/"),
        tls=tls,
    )
