"""The whole fleet as JSON for `GET /v1/status`, read from memory, never from the machine.

Invariants:
- Status is advisory: no decision depends on it.
- Times of the core are monotonic; here they become UTC.
"""

from __future__ import annotations

import asyncio
import os
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar

from fleetd import __version__
from fleetd.control.wire import (
    DaemonStatus,
    DeviceStatus,
    FleetStatus,
    HostStatus,
    LastExit,
    ModelStatus,
    ProcessStatus,
    rfc3339,
)
from fleetd.core.data.state import RUNNING, Model, Process, ProcessState, Residency
from fleetd.daemon.context import DaemonContext
from fleetd.daemon.effects.model_builds import ModelBuilds
from fleetd.daemon.effects.model_loads import ModelLoads
from fleetd.daemon.effects.processes import Processes
from fleetd.daemon.effects.run import Run
from fleetd.daemon.sources.sampler import Sampler
from fleetd.host.state_store import StateStore
from fleetd.host.system.load import machine_load, own_rss_bytes
from fleetd.resolver.launch_plan import LaunchPlan

if TYPE_CHECKING:
    from fleetd.core.queries import FleetQueries


Entry = TypeVar("Entry")
Row = TypeVar("Row")

_WARNINGS_SHOWN = 5
_SLICE = 200  # entries: a few milliseconds


@dataclass(slots=True)
class DaemonState:
    """The daemon's own state: start (monotonic), gateway, shutdown, full folders."""

    started: float = field(default_factory=time.monotonic)
    gateway: str | None = None
    stopping: bool = False
    disk_problems: Mapping[str, str] = field(default_factory=dict)


class Readiness:
    """Compare the fleet with fleet.yaml."""

    def __init__(self, queries: FleetQueries, state: DaemonState) -> None:
        self._queries = queries
        self._state = state

    def report(self) -> tuple[bool, Sequence[str]]:
        """Return whether the fleet is in its desired state, and each deviation."""
        reasons = []
        for process in self._queries.processes():
            spec = process.spec
            if spec.on_demand or not spec.enabled or process.stopped or process.removed:
                continue
            if process.state not in (ProcessState.READY, ProcessState.EXITED):
                advice = self._queries.process_advice(process, time.monotonic())
                hint = f" (hint: {advice.hint})" if advice.hint else ""
                reasons.append(f"{process.name} is {process.state}: {advice.reason}{hint}")
        reasons += [
            f"{model.name} is {model.state}" + (f": {model.failure}" if model.failure else "")
            for model in self._queries.models()
            if model.spec.preload and model.state is not Residency.LOADED
        ]
        reasons += self._state.disk_problems.values()
        if self._state.stopping:
            reasons.append("the fleet is shutting down")
        return not reasons, reasons


@dataclass(frozen=True, slots=True)
class Measured:
    """The measurements and records that the core does not have."""

    processes: Processes
    sampler: Sampler
    loads: ModelLoads
    builds: ModelBuilds
    store: StateStore


class StatusView:
    """Render the status from the fleet, the active configuration and the last samples."""

    def __init__(self, context: DaemonContext, measured: Measured, state: DaemonState, readiness: Readiness) -> None:
        self._config = context.config
        self._queries = context.queries
        self._builds = measured.builds
        self._loads = measured.loads
        self._processes = measured.processes
        self._sampler = measured.sampler
        self._store = measured.store
        self._state = state
        self._readiness = readiness

    async def status(self) -> FleetStatus:
        """Return the whole fleet, rendered in slices so that requests are served."""
        now = time.monotonic()
        self._sampler.requested()
        ready, _ = self._readiness.report()
        queued = self._queries.queued()
        return {
            "name": self._config.resolved.name,
            "ready": ready,
            "daemon": self._daemon(now),
            "devices": self.devices(),
            "processes": await _in_slices(lambda process: self.process(process, now), self._in_order()),
            "models": await _in_slices(lambda model: self.model(model, now, queued), self._models_in_order()),
            "host": self._host(),
        }

    def _in_order(self) -> list[Process]:
        order = {name: index for index, name in enumerate(self._config.resolved.spec.processes)}
        return sorted(self._queries.processes(), key=lambda process: order.get(process.name, len(order)))

    def _models_in_order(self) -> list[Model]:
        order = {name: index for index, name in enumerate(self._config.resolved.spec.models)}
        return sorted(self._queries.models(), key=lambda model: order.get(model.name, len(order)))

    def _daemon(self, now: float) -> DaemonStatus:
        return {
            "pid": os.getpid(),
            "version": __version__,
            "uptime_s": round(now - self._state.started, 3),
            "config": str(self._config.path),
            "config_hash": self._config.resolved.config_hash,
            "rss_bytes": own_rss_bytes(),
            "config_error": self._config.error,
            "restart_needed": list(self._config.restart_needed),
            "gateway": self._state.gateway,
            "store_problem": self._store.problem,
            "stopping": self._state.stopping,
            "disk_problems": list(self._state.disk_problems.values()),
            "config_warnings": self._config_warnings(),
        }

    def _config_warnings(self) -> list[str]:
        """Return the first warnings of the running configuration, each as one line."""
        warnings = self._config.resolved.warnings
        more = len(warnings) - _WARNINGS_SHOWN
        shown = [warning.headline for warning in warnings[:_WARNINGS_SHOWN]]
        return [*shown, f"{more} more: fleetd check {self._config.path}"] if more > 0 else shown

    def _host(self) -> HostStatus:
        load = machine_load()
        return {
            "hostname": socket.gethostname(),
            "cpus": os.cpu_count() or 1,
            "cpu_percent": load.cpu_percent,
            "load1": os.getloadavg()[0],
            "memory_total_bytes": load.memory_total_bytes,
            "memory_used_bytes": load.memory_used_bytes,
        }

    def devices(self) -> list[DeviceStatus]:
        use = self._queries.device
        return [
            {
                "name": name,
                "kind": spec.kind,
                "total_bytes": spec.total_bytes,
                "budget_bytes": spec.budget_bytes,
                "reserved_bytes": use(name).reserved_bytes,
                "used_bytes": sample.used_bytes if (sample := self._sampler.devices.get(name)) is not None else None,
                "utilization": sample.utilization if sample is not None else None,
                "temperature_c": sample.temperature_c if sample is not None else None,
            }
            for name, spec in self._config.resolved.spec.devices.items()
        ]

    def process(self, process: Process, now: float) -> ProcessStatus:
        spec = process.spec
        run = self._processes.run_of(process.name, process.generation)
        ended = run is not None and run.dead  # the fleet gets the exit once its last lines are read
        running = process.state in RUNNING and process.spawned and not ended
        state = ProcessState.STOPPING if ended and process.state in RUNNING else process.state
        advice = self._queries.process_advice(process, now)
        status: ProcessStatus = {
            "name": process.name,
            "kind": str(spec.kind),
            "engine": spec.engine,
            "state": str(state),
            "desired": "up" if self._queries.is_wanted(process) else "down",
            "reason": self._reason(process, advice.reason)
            if state is process.state
            else "exited; its last log lines are being read",
            "pid": process.pid if running else None,
            "generation": process.generation,
            "port": spec.port,
            "restarts": process.restarts,
            "uptime_s": round(_age_s(process, run, now), 3) if running else None,
            "cpu_percent": run.cpu_percent if running and run is not None else None,
            "rss_bytes": run.usage.rss_bytes if running and run is not None and run.sampled_at else None,
            "next_start_s": round(max(0.0, process.next_start_s - now), 3)
            if process.state is ProcessState.BACKOFF and process.next_start_s is not None
            else None,
            "last_exit": last_exit(process, now),
            "base": spec.base,
            "device_bytes": self._queries.reserved(self._queries.placements_on(process.name)),
            "in_flight": self._queries.in_flight(process.name),
            "draining": process.drained,
            "hint": advice.hint,
            "problem": advice.problem,
            "state_age_s": round(max(0.0, now - process.since_s), 3) if process.since_s else 0.0,
        }
        return status

    def _reason(self, process: Process, reason: str) -> str:
        """Return a state's reason: a start's phase, an external server's answer."""
        external = not process.spec.capabilities.owns_process
        detail = process.phase or (process.startup_detail if external else "")
        if process.state is not ProcessState.STARTING or not detail:
            return reason
        return f"waiting for it: {detail}" if external else f"starting: {detail}"

    def model(self, model: Model, now: float, queued: Mapping[str, int]) -> ModelStatus:
        spec = model.spec
        plans = self._config.resolved.plans
        plan = plans.get(spec.holders[0]) if spec.holders else None
        advice = self._queries.model_advice(model, now)
        status: ModelStatus = {
            "name": model.name,
            "state": "ROUTE" if spec.routes else str(model.state),
            "engine": plan.engine_name if plan is not None else None,
            "instances": [
                name for name, placement in model.placements.items() if placement.state is not Residency.UNLOADING
            ],
            "device_bytes": self._queries.reserved(model.placements.values()),
            "footprint": None if spec.routes else str(model.footprint.source),
            "pinned": model.pinned,
            "priority": spec.priority,
            "in_flight": model.in_flight,
            "queued": queued.get(model.name, 0),
            "loads": model.loads,
            "evictions": model.evictions,
            "sleeps": model.sleeps,
            "wakes": model.wakes,
            "last_used": wall(model.last_used_s, now),
            "ttl_left_s": self._ttl_left(model, now),
            "load_s": round(model.load_s, 4) if model.load_s is not None else None,
            "wake_s": round(model.wake_s, 4) if model.wake_s is not None else None,
            "ttl_s": spec.ttl_s,
            "context_length": self._context_length(model, plan),
            "reason": advice.reason,
            "hint": advice.hint,
            "problem": advice.problem,
            "aliases": list(spec.aliases),
            "routes": [{"to": route.to, "weight": route.weight, "shadow": route.shadow} for route in spec.routes],
        }
        loading = next((p for p in model.placements.values() if p.state is Residency.LOADING), None)
        if loading is not None:
            progress = self._queries.load_progress(loading, now)
            run = self._processes.runs.get(loading.process) if loading.process == model.name else None
            status["loading"] = {
                "elapsed_s": round(progress.elapsed_s, 1),
                "limit_s": progress.limit_s,
                "detail": progress.detail,
                "rss_bytes": run.usage.rss_bytes if run is not None and run.sampled_at else None,
                "needs_bytes": sum(model.footprint.bytes.values()) or None,
            }
        note = self._builds.notes.get(model.name)
        if note is not None:
            status["store"] = note.document()
            if not model.placements and not model.failure and note.state in ("making", "failed"):
                status["reason"] = note.detail
        return status

    def _context_length(self, model: Model, plan: LaunchPlan | None) -> int | None:
        """Return the value that its server reports; else the default of its entry."""
        for name, placement in model.placements.items():
            reported = self._loads.context_length(model.name, name) if placement.state is Residency.LOADED else None
            if reported is not None:
                return reported
        return plan.context_length if plan is not None else None

    def _ttl_left(self, model: Model, now: float) -> float | None:
        deadline = self._queries.ttl_deadline(model)
        return round(max(0.0, deadline - now), 1) if deadline is not None else None


def _age_s(process: Process, run: Run | None, now: float) -> float:
    """Return the age of its process; hooks before it do not count."""
    return run.handle.uptime_s if run is not None and run.handle is not None else now - process.started_s


async def _in_slices(render: Callable[[Entry], Row], entries: Sequence[Entry]) -> list[Row]:
    rows: list[Row] = []
    for entry in entries:
        if rows and not len(rows) % _SLICE:
            await asyncio.sleep(0)
        rows.append(render(entry))
    return rows


def wall(moment_s: float | None, now: float) -> str | None:
    """Return a monotonic moment as UTC."""
    return rfc3339(time.time() - (now - moment_s)) if moment_s else None


def last_exit(process: Process, now: float) -> LastExit | None:
    """Return the last exit of the process."""
    report = process.last_exit
    if report is None:
        return None
    at = wall(process.last_exit_s, now) or rfc3339(time.time())
    return {"code": report.code, "signal": report.signal, "oom": report.oom, "at": at, "reason": report.reason}
