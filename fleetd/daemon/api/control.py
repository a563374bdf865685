"""The control API's access to the daemon: implements control.port.ControlPort.

Invariants:
- A query reads memory only. A change is an event to the fleet, an apply, or a shutdown.
- Every error is a FleetError with a sentence; secrets are redacted here.
"""

from __future__ import annotations

import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fleetd.control.port import ApplyOptions, Names
from fleetd.control.selection import process_hint
from fleetd.control.wire import (
    Applied,
    FleetEvent,
    LogLine,
    ModelDetail,
    ProcessDetail,
    rfc3339,
)
from fleetd.core.data.specs import ProbeKind
from fleetd.daemon.api.actions import Actions
from fleetd.daemon.api.event_text import dump_lines
from fleetd.daemon.api.explain import explain
from fleetd.daemon.api.log_stream import LogSource, read_logs
from fleetd.daemon.api.status import StatusView
from fleetd.daemon.context import DaemonContext
from fleetd.daemon.effects.model_builds import ModelBuilds
from fleetd.daemon.effects.probes import ProbeRunner
from fleetd.daemon.effects.processes import Processes
from fleetd.daemon.reload.apply import ConfigApplier
from fleetd.daemon.sources.prerequisites import Prerequisites, is_about
from fleetd.errors import ApiError

_LAST = 10


@dataclass(frozen=True, slots=True)
class Lifecycle:
    """Stop and re-execution: `stop(force, reason)`, and `reexec()`, which may raise."""

    stop: Callable[[bool, str], None]
    reexec: Callable[[], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class Inspected:
    """The parts that the control API reads."""

    status: StatusView
    processes: Processes
    probes: ProbeRunner
    prerequisites: Prerequisites
    builds: ModelBuilds
    logs: LogSource


class DaemonControlPort:
    """Answer the requests of `fleetctl`."""

    def __init__(
        self,
        context: DaemonContext,
        inspected: Inspected,
        actions: Actions,
        applier: ConfigApplier,
        lifecycle: Lifecycle,
    ) -> None:
        self._config = context.config
        self._events = context.reporter.events
        self._queries = context.queries
        self._builds = inspected.builds
        self._logs = inspected.logs
        self._prerequisites = inspected.prerequisites
        self._probes = inspected.probes
        self._processes = inspected.processes
        self._view = inspected.status
        self._lifecycle = lifecycle
        self.act = actions.act
        self.apply = applier.apply
        self.devices = self._view.devices
        self.plan = applier.plan
        self.status = self._view.status

    # -- looking --------------------------------------------------------------------------------------------------------

    def names(self) -> Names:
        models = self._queries.models()
        return Names(
            {process.name: process.spec.base for process in self._queries.processes()},
            {model.name: model.spec.aliases for model in models},
            {model.name: tuple(route.to for route in model.spec.routes) for model in models if model.spec.routes},
        )

    def process(self, name: str) -> ProcessDetail:
        process = self._queries.process(name)
        if process is None:
            raise unknown(name)
        now = time.monotonic()
        plan = self._config.plans.get(name)
        detail: ProcessDetail = {
            "process": self._view.process(process, now),
            "models": [self._view.model(model, now, self._queries.queued()) for model in self._queries.models_of(name)],
            "events": self._events.of(name, _LAST),
            "log": [LogLine(name=name, at=at, line=line, stream=None) for at, line in self._logs.last(name, _LAST)],
            "log_path": self._logs.path(name),
            "depends_on": {dependency.name: str(dependency.condition) for dependency in process.spec.depends_on},
            "probes": self._probe_answers(name),
            "tree": self._tree(name),
        }
        if plan is not None:
            missing = set(self._prerequisites.reported.processes.get(name, ()))
            detail["command"] = plan.shown_argv()
            detail["cwd"] = plan.execution.cwd
            detail["source"] = f"{plan.source[0]}:{plan.source[1]}"
            detail["requires"] = {path: not any(is_about(one, path) for one in missing) for path in plan.requires}
        return detail

    def _probe_answers(self, name: str) -> dict[str, Any]:
        found = {}
        for kind in ProbeKind:
            answer = self._probes.answers.get((name, kind))
            if answer is not None:
                found[str(kind)] = {"ok": answer[1].ok, "at": rfc3339(answer[0]), "detail": answer[1].detail}
        return found

    def _tree(self, name: str) -> list[dict[str, Any]]:
        run = self._processes.runs.get(name)
        return self._logs.tree(run.usage.pids) if run is not None else []

    def model(self, name: str) -> ModelDetail:
        model = self._queries.find_model(name)
        if model is None:
            raise unknown(name)
        file, line = self._config.resolved.sources.get(("model", model.name), ("", 0))
        holder = next(iter(model.placements), None) or next(iter(model.spec.holders), None)
        return {
            "model": self._view.model(model, time.monotonic(), self._queries.queued()),
            "events": self._events.of(model.name, _LAST),
            "log": [LogLine(name=holder, at=at, line=line, stream=None) for at, line in self._logs.last(holder, _LAST)]
            if holder
            else [],
            "source": f"{file}:{line}" if file else None,
            "served_as": model.spec.served_as,
        }

    def events(self, since_s: float | None, after: int | None, follow: bool) -> AsyncIterator[FleetEvent]:
        since = time.time() - since_s if since_s is not None else None
        return self._events.follow(since, after, follow)

    def logs(
        self, names: Sequence[str], lines: int, since_s: float | None, grep: str | None, follow: bool
    ) -> AsyncIterator[LogLine]:
        try:
            pattern = re.compile(grep) if grep else None
        except re.error as error:
            raise ApiError(400, "invalid_request", f"grep: {grep!r} is not a regular expression: {error}") from error
        return read_logs(self._logs, names, lines, since_s, pattern, follow)

    def story(self, name: str) -> Sequence[FleetEvent]:
        known = self._queries.canonical_name(name) or name
        if self._queries.process(known) is not None or self._queries.model(known) is not None:
            return self._events.of(known)
        replicas = [process.name for process in self._queries.processes() if process.spec.base == name]
        if not replicas:
            raise unknown(name)
        return sorted((event for one in replicas for event in self._events.of(one)), key=lambda event: event["seq"])

    def explain(self, model: str) -> Mapping[str, Any]:
        found = self._queries.find_model(model)
        if found is None:
            hint = process_hint(model, self.names(), "explain")
            if hint is None and "." in model:
                hint = "keys of fleet.yaml are explained in docs/reference/fleet-yaml.md and by: fleetd schema"
            raise ApiError(404, "unknown_name", f"There is no model named {model!r}.", hint=hint)
        note = self._builds.notes.get(found.name)
        return explain(self._queries, found, time.monotonic(), note.document() if note is not None else None)

    async def dump(self) -> Mapping[str, Any]:
        journal = [line for entry in self._queries.journal() for line in dump_lines(entry)]
        return {
            "at": rfc3339(time.time()),
            "status": await self.status(),
            "config": self.config(),
            "journal": journal,
            "events": self._events.recent(0.0, None),
        }

    def config(self) -> Mapping[str, Any]:
        return {
            "file": str(self._config.path),
            "config_hash": self._config.resolved.config_hash,
            "config": self._config.shown(),
        }

    # -- changing -------------------------------------------------------------------------------------------------------

    async def reload(self) -> Applied:
        return await self.apply(None, ApplyOptions(wait=False))

    async def reexec(self) -> None:
        await self._lifecycle.reexec()

    async def shutdown(self, force: bool) -> None:
        self._lifecycle.stop(force, "fleetctl shutdown")


def unknown(name: str) -> ApiError:
    """Return the error for a name that the fleet does not have."""
    return ApiError(404, "unknown_name", f"There is no process and no model named {name!r}.")
