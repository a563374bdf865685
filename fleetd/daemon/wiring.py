"""Construct the parts of a running daemon and connect them."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fleetd.core.data import commands as c
from fleetd.core.data.specs import FleetSpec
from fleetd.core.fleet import Fleet
from fleetd.daemon.api.actions import Actions
from fleetd.daemon.api.gateway import DaemonFleetPort
from fleetd.daemon.api.status import DaemonState, Measured, Readiness, StatusView
from fleetd.daemon.async_tools import ChangeSignal, Tasks
from fleetd.daemon.context import DaemonContext, HttpClient, Reporter
from fleetd.daemon.effects.executor import Executor
from fleetd.daemon.effects.hooks import Hooks
from fleetd.daemon.effects.model_builds import ModelBuilds
from fleetd.daemon.effects.model_loads import ModelLoads
from fleetd.daemon.effects.probes import ProbeRunner, Traffic
from fleetd.daemon.effects.processes import Processes
from fleetd.daemon.effects.sleep import Sleepers
from fleetd.daemon.effects.startup_log import StartupLogs
from fleetd.daemon.loop import FleetLoop
from fleetd.daemon.reload.active import ActiveConfiguration
from fleetd.daemon.reload.apply import ConfigApplier
from fleetd.daemon.reload.deferred_env import DeferredEnvironment
from fleetd.daemon.reload.read import ConfigReader
from fleetd.daemon.sources.prerequisites import Prerequisites
from fleetd.daemon.sources.sampler import Sampler
from fleetd.gateway.listener import Gateway
from fleetd.gateway.options import GatewayOptions
from fleetd.host.host import Host
from fleetd.host.state_store import StateStore
from fleetd.host.system.memory import Devices, DeviceSample
from fleetd.resolver.resolved import GatewaySettings


@dataclass(frozen=True, slots=True)
class Resources:
    """The opened resources: host, state on disk, devices with their first samples.

    `learned` are the footprints, and `startup_facts` the facts of starts, that earlier daemons kept.
    """

    host: Host
    store: StateStore
    devices: Devices
    samples: Sequence[DeviceSample]
    learned: Mapping[str, Mapping[str, int]]
    startup_facts: Mapping[str, Any]


class Daemon:
    """The parts. `finished` is called once, after a shutdown stopped everything."""

    def __init__(
        self,
        resources: Resources,
        config: ActiveConfiguration,
        reporter: Reporter,
        state: DaemonState,
        finished: Callable[[], None],
    ) -> None:
        host, store = resources.host, resources.store
        self.host, self.store, self.config, self.reporter, self.state = host, store, config, reporter, state
        self.fleet = Fleet(FleetSpec(), random.Random())
        self._executor = Executor(reporter)
        self.loop = FleetLoop(self.fleet, self._executor, fault=reporter.fleet_fault)
        self.changes = ChangeSignal()
        self.tasks = Tasks(reporter.task_fault)  # each exits by itself
        self.background = Tasks(reporter.task_fault)  # each runs until the daemon exits
        self.http = HttpClient()
        self.context = context = DaemonContext(
            self.fleet.queries, self.loop.dispatch, config, self.tasks, reporter, self.http
        )
        request_ids = itertools.count(1)
        self.prerequisites = Prerequisites(context, DeferredEnvironment(config, self.loop.dispatch))
        self.hooks = Hooks(context, host)
        startup = StartupLogs(context, host.logs, store, resources.startup_facts)
        self.processes = Processes(context, host, self.hooks, self.prerequisites, startup)
        self.builds = ModelBuilds(context, self.prerequisites, self.changes, request_ids)
        self.loads = ModelLoads(context, self.builds)
        self.sleepers = Sleepers(context, self.loads, store)
        self.sampler = Sampler(context, host, self.processes, self.loads, resources.devices, resources.samples)
        readiness = Readiness(self.fleet.queries, state)
        measured = Measured(self.processes, self.sampler, self.loads, self.builds, store)
        self.view = StatusView(context, measured, state, readiness)
        self.port = DaemonFleetPort(context, self.loop, request_ids, readiness)
        self.gateway = Gateway(self.port, gateway_options(config.resolved.gateway))
        self.probes = ProbeRunner(
            context, host, self.processes, Traffic(self.gateway.last_answer_s, self.port.full_since)
        )
        self.actions = Actions(context, self.changes, self.processes, self.port, store.kept)
        self.reader = ConfigReader(config, self.processes, self.sampler, resources.learned)
        self.applier = ConfigApplier(context, self.reader, self.prerequisites, self.actions, host.logs, store)
        self._executor.register(self._handlers(finished))
        self.loop.subscribe(self.processes.log_exit, before_commands=True)
        self.loop.subscribe(
            lambda _: reporter.events.publish_new(self.fleet.queries),
            self.port.observe,
            self.hooks.cancel_unwanted,
            self.loads.cancel_calls,
            self.builds.observe,
            lambda _: self.changes.notify(),
        )

    def _handlers(self, finished: Callable[[], None]) -> Mapping[type[c.Command], Callable[[Any], None]]:
        return {
            c.Spawn: self.processes.spawn,
            c.Stop: self.processes.stop,
            c.Sweep: self.processes.sweep,
            c.StartProbe: self.probes.start,
            c.StopProbes: self.probes.stop,
            c.Load: self.loads.load,
            c.Unload: self.loads.unload,
            c.Sleep: self.sleepers.sleep,
            c.Wake: self.sleepers.wake,
            c.CheckSleep: self.sleepers.look,
            c.Grant: self.port.granted,
            c.Reject: self.port.rejected,
            c.ReadAhead: self.loads.read_ahead,
            c.Persist: lambda command: self.store.remember(command.name, command.remembered),
            c.LearnFootprint: lambda command: self.store.learn(command.footprint_hash, command.model, command.bytes),
            c.Finished: lambda _: finished(),
        }

    async def close(self) -> None:
        """Stop every task; processes keep running."""
        self.loop.close()
        self.probes.close()
        await self.reader.close()
        await self.background.close()
        await self.tasks.close(grace_s=0.5)
        await self.http.close()


def gateway_options(config: GatewaySettings) -> GatewayOptions:
    """Return the options of the gateway; the listening socket is opened by the daemon."""
    return GatewayOptions(
        host=config.host,
        port=config.port,
        allowed_hosts=config.allowed_hosts,
        max_body_bytes=config.max_body_bytes,
        retry_attempts=config.retry_attempts,
    )
