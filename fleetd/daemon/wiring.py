"""Everything of a running daemon, wired together: the fleet, its loop, its hands, its two listeners.

The rules of this file
- Wiring and nothing else: who knows whom. What each part does is in its own file.
- Closures hand out the *current* assembly, so that an applied change reaches every part at once.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any

from fleetd.control.event_codes import SHOWN, EventCode, code_of
from fleetd.control.port import ActOptions
from fleetd.core.data import commands as c
from fleetd.core.data.events import (
    Event,
    Exited,
    ModelRequirementsChanged,
    RequestArrived,
    RequestCancelled,
    RequestFinished,
    UnloadRequested,
)
from fleetd.core.data.specs import FleetSpec, describe_exit
from fleetd.core.fleet import Fleet
from fleetd.daemon.api.actions import Actions
from fleetd.daemon.api.event_log import EventLog
from fleetd.daemon.api.gateway import DaemonFleetPort
from fleetd.daemon.api.status import DaemonFacts, StatusView
from fleetd.daemon.async_tools import Tasks
from fleetd.daemon.effects.executor import Executor
from fleetd.daemon.effects.machine import HostMachine
from fleetd.daemon.effects.model_builds import Doing, Preparation
from fleetd.daemon.effects.model_loads import Residency
from fleetd.daemon.effects.probes import Probing
from fleetd.daemon.effects.processes import Processes
from fleetd.daemon.effects.sleep import Sleepers
from fleetd.daemon.effects.startup_log import Starts
from fleetd.daemon.loop import FleetLoop
from fleetd.daemon.reload.active import Configuration
from fleetd.daemon.reload.deferred_env import LateEnvironment
from fleetd.daemon.sources.prerequisites import Requirements
from fleetd.daemon.sources.sampler import Sampling
from fleetd.daemon.waiting import Changes
from fleetd.host.host import Host
from fleetd.host.state_store import StateStore
from fleetd.host.system.memory import Devices
from fleetd.resolver.launch_plan import LaunchPlan

if TYPE_CHECKING:
    from aiohttp import ClientSession
    from structlog.typing import FilteringBoundLogger

_TAKE_OUT_S = 60.0
_HOT = (RequestArrived, RequestFinished, RequestCancelled)


class Daemon:
    """The parts. `finished` is called once, when nothing of the fleet runs any more after a shutdown."""

    def __init__(
        self,
        host: Host,
        store: StateStore,
        devices: Devices,
        configuration: Configuration,
        parent_env: Mapping[str, str],
        log: FilteringBoundLogger,
        facts: DaemonFacts,
        finished: Any,
    ) -> None:
        self.host, self.store, self.configuration, self.log, self.facts = host, store, configuration, log, facts
        self._finished = finished
        self._session: ClientSession | None = None
        self._serial = 0
        self.event_log = EventLog(store.record)
        self.changes = Changes()
        self.tasks = Tasks(self._task_failed)  # each ends by itself
        self.background = Tasks(self._task_failed)  # each runs until the end
        self.machine = HostMachine(host, parent_env)
        host.logs.tell_lost = self._complain
        self.fleet = Fleet(FleetSpec(), random.Random())
        self.requirements = Requirements(
            self.dispatch, self.plans, self.fleet.queries, configuration.assembly.paths.state
        )
        self.requirements.read_again = LateEnvironment(
            configuration, self.dispatch, lambda: (self.requirements.missing, self.requirements.missing_models)
        ).read
        self.starts = Starts(
            self.machine, self.fleet.queries, self.dispatch, self.model_specs, store, self.tasks, self._complain
        )
        self.processes = self._processes(parent_env)
        self.preparation = Preparation(
            self.http,
            self.dispatch,
            self.plans,
            self.fleet.queries,
            self.requirements,
            lambda: configuration.assembly.paths.state,
            self.tasks,
            self._told_of_model,
            Doing(self._take_out, self._bring_back),
        )
        self.residency = Residency(self.http, self.dispatch, self.plans, self.model_specs, self.tasks, self.preparation)
        self.sleepers = Sleepers(self.http, self.dispatch, self.plans, self.model_specs, self.residency.call, store)
        self.sampling = Sampling(
            self.machine,
            self.processes,
            self.residency,
            self.fleet.queries,
            self.dispatch,
            devices,
            self.processes.inner_pid,
        )
        self.view = self._view()
        self.port = DaemonFleetPort(self.fleet.queries, self.dispatch, self.plans, self.view.ready, self._port_failed)
        self.probing = self._probing()
        self.actions = Actions(self.fleet.queries, self.dispatch, self.changes, self.processes, self.port, store.kept)
        self.loop = FleetLoop(
            self.fleet,
            self._executor(),
            announce=self._log_exit,
            observe=self._observe,
            fault=self._fleet_failed,
        )
        self.port.warm = self.loop

    def _view(self) -> StatusView:
        return StatusView(
            self.fleet.queries,
            lambda: self.configuration.assembly,
            self.processes,
            self.sampling,
            self.facts,
            self.preparation,
            lambda: self.store.problem,
        )

    def _probing(self) -> Probing:
        return Probing(
            self.machine,
            self.http,
            self.dispatch,
            self.processes,
            lambda name: self.plans().get(name),
            self.port,
            self.fleet.queries.may_be_asleep,
        )

    def _processes(self, parent_env: Mapping[str, str]) -> Processes:
        return Processes(
            self.machine,
            self.dispatch,
            self.plans,
            self.tasks,
            parent_env,
            self._complain,
            lambda name, sentence: self.event_log.report("process", name, EventCode.HOOK, sentence),
            self._unwanted,
            self.requirements.fresh,
            self.starts,
        )

    # -- what the parts ask for ---------------------------------------------------------------------------------------

    def plans(self) -> Mapping[str, LaunchPlan]:
        return self.configuration.assembly.plans

    def model_specs(self) -> Mapping[str, Any]:
        return self.configuration.assembly.spec.models

    def dispatch(self, event: Event) -> None:
        """Hand an event to the fleet."""
        self.loop.dispatch(event)

    def http(self) -> ClientSession:
        """Return the client for everything outside the data plane."""
        if self._session is None:
            from aiohttp import ClientSession, ClientTimeout, TCPConnector

            connector = TCPConnector(limit=0, keepalive_timeout=10.0, enable_cleanup_closed=False)
            self._session = ClientSession(connector=connector, timeout=ClientTimeout(total=600.0), trust_env=False)
        return self._session

    async def close_http(self) -> None:
        if self._session is not None:
            await self._session.close()

    # -- commands -------------------------------------------------------------------------------------------------------

    def _executor(self) -> Executor:
        def spawn(command: c.Spawn) -> None:
            plan = self.plans().get(command.name)
            if plan is not None:
                self.host.logs.set_policy(command.name, plan.execution.logs)
            self.processes.spawn(command)

        def nothing(_: c.Command) -> None:
            return

        return Executor(
            {
                c.Spawn: spawn,
                c.Stop: self.processes.stop,
                c.Sweep: self.processes.sweep,
                c.StartProbe: self.probing.start,
                c.StopProbes: self.probing.stop,
                c.Load: self.residency.load,
                c.Unload: self.residency.unload,
                c.Sleep: self.sleepers.sleep,
                c.Wake: self.sleepers.wake,
                c.CheckSleep: self.sleepers.look,
                c.Grant: self.port.granted,
                c.Reject: self.port.rejected,
                c.ReadAhead: self.residency.read_ahead,
                c.Persist: lambda command: self.store.remember(command.name, command.remembered),
                c.LearnFootprint: lambda command: self.store.learn(
                    command.footprint_hash, command.model, command.bytes
                ),
                c.Finished: lambda _: self._finished(),
            },
            say=self._say,
            fault=self._command_failed,
        )

    @cached_property
    def _quiet(self) -> frozenset[type[c.Command]]:
        """What is not worth a line of the log for people: it belongs to another line that is."""
        return frozenset({c.Persist, c.StartProbe, c.StopProbes, c.ReadAhead})

    def _say(self, command: c.Command) -> None:
        kind = type(command)
        say = self.log.debug if kind in self._quiet else self.log.info
        fields = {
            key: value
            for key in ("name", "model", "process", "generation", "request_id", "code", "reason")
            if (value := getattr(command, key, None)) not in (None, "")
        }
        say(str(code_of(command)), **fields)

    # -- steps ----------------------------------------------------------------------------------------------------------

    def _observe(self, event: Event, _commands: list[c.Command], _now: float) -> None:
        """See each step: tell the feed what the journal has, wake who waits, end calls to the dead."""
        queries = self.fleet.queries
        entries = queries.journal_after(self._serial)
        for entry in entries:
            self._serial = entry.serial
            self.event_log.publish(entry)
        if not entries and isinstance(event, _HOT):
            return
        self.processes.hooks.break_off()
        if isinstance(event, Exited):
            self.residency.process_died(event.name)
        if isinstance(event, ModelRequirementsChanged) and not event.missing:
            self.preparation.volume_back(event.model)
        else:
            self.preparation.happened()
        self.changes.happened()

    def _log_exit(self, event: Event, _commands: list[c.Command], _now: float) -> None:
        """Log an exit, before the commands that follow from it."""
        if not isinstance(event, Exited):
            return
        report = event.report
        if not (report.log_tail or report.code or report.signal):
            return
        process = self.fleet.queries.process(event.name)
        ordered = process is not None and process.outcome is None
        log = self.log.info if ordered else self.log.warning
        log(
            str(code_of(event)),
            name=event.name,
            generation=event.generation,
            code=report.code,
            signal=report.signal,
            reason=describe_exit(report),
            last_lines=list(report.log_tail[-5:]),
        )

    # -- models as code -----------------------------------------------------------------------------------------------

    def _told_of_model(self, name: str, code: EventCode, sentence: str) -> None:
        log = self.log.warning if SHOWN[code].warning else self.log.info
        log(str(code), model=name, reason=sentence)
        self.event_log.report("model", name, code, sentence)

    async def _take_out(self, name: str) -> None:
        """Unload a model that is to be made anew; go on after a while even so."""
        self.dispatch(UnloadRequested(name))
        await self.changes.wait_for(lambda: True if not self._is_placed(name) else None, _TAKE_OUT_S)

    def _is_placed(self, name: str) -> bool:
        model = self.fleet.queries.model(name)
        return model is not None and bool(model.placements)

    async def _bring_back(self, name: str) -> None:
        if self.fleet.queries.model(name) is not None:
            await self.actions.act("load", [name], ActOptions(wait=False))

    def _unwanted(self, name: str) -> bool:
        process = self.fleet.queries.process(name)
        return process is None or not self.fleet.queries.is_wanted(process)

    def _complain(self, name: str, sentence: str) -> None:
        self.log.warning(str(EventCode.WARNING), name=name, reason=sentence)
        self.event_log.report("process", name, EventCode.WARNING, sentence)

    def _task_failed(self, name: str, error: BaseException) -> None:
        self.log.error("a task failed", task=name, exc_info=error)

    def _port_failed(self, what: str, error: Exception) -> None:
        self.log.error(what, exc_info=error)

    def _fleet_failed(self, event: Event, error: Exception) -> None:
        self.log.error("the fleet could not handle an event", event_seen=repr(event), exc_info=error)
        self.event_log.report("daemon", None, EventCode.INTERNAL_ERROR, f"{code_of(event)}: {error}")

    def _command_failed(self, command: c.Command, error: Exception) -> None:
        self.log.error("a command could not be started", command=repr(command), exc_info=error)
