"""The daemon's life: start, run, shut down or re-execute. The composition root.

Invariants:
- Start order: read the file, take the locks, inspect the machine, adopt what runs, listen; decisions begin only then.
- A failed start leaves nothing behind: what was opened is closed in reverse order.
- The run ends with Finished, or with an execv into a new program.
"""

from __future__ import annotations

import asyncio
import os
import socket
import sys
import time
from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, cast

from fleetd import __version__
from fleetd.control.event_codes import EventCode
from fleetd.core.data.events import RestartRequested, ShutdownRequested, SpecChanged
from fleetd.daemon import reexec, signals
from fleetd.daemon.adoption import adopt_all
from fleetd.daemon.api.control import DaemonControlPort, Inspected, Lifecycle
from fleetd.daemon.api.event_log import EventLog
from fleetd.daemon.api.library import Libraries
from fleetd.daemon.api.log_stream import LogSource
from fleetd.daemon.api.status import DaemonState
from fleetd.daemon.context import Reporter
from fleetd.daemon.effects.startup_log import PREFIX
from fleetd.daemon.own_memory import freeze
from fleetd.daemon.reload.active import ActiveConfiguration
from fleetd.daemon.reload.messages import ReadInputs
from fleetd.daemon.reload.worker_client import FileReading
from fleetd.daemon.sources.disk_space import DiskSpace
from fleetd.daemon.sources.triggers import Triggers
from fleetd.daemon.wiring import Daemon, Resources
from fleetd.errors import ApiError, HostError
from fleetd.host.host import Host
from fleetd.host.lock import DaemonLock, DaemonLocks
from fleetd.host.notify import Notifier
from fleetd.host.state_store import StateStore
from fleetd.host.system.memory import Devices
from fleetd.host.types import HandleRecord, HostPaths
from fleetd.resolver.environment import inherited
from fleetd.resolver.port_assignment import keep_ports
from fleetd.resolver.resolved import ResolvedFleet, Surroundings, machine_devices
from fleetd.units import counted

if TYPE_CHECKING:
    from structlog.typing import FilteringBoundLogger

    from fleetd.control.server import ControlServer
    from fleetd.control.wire import FleetEvent
    from fleetd.daemon.daemon_log import LogSink
    from fleetd.host.process.worker import WorkerProcess

_DRAIN_S = 5.0
_UNDO_S = 20.0
_BACKLOG = 1024
_PAST_OF_EACH, _PAST_IN_ALL = 64, 1000  # events of earlier daemons that are shown
_CLOCK_STEP_S = 0.02  # file times are taken from a clock that ticks in steps
_REEXEC_DELAY_S = 0.05  # for the answer to the client


@dataclass(frozen=True, slots=True)
class RunOptions:
    """`config` is absolute; `reading` is the worker that already reads it.

    `early` is the lock of the run folder, if that folder could be guessed.
    """

    config: Path
    reading: WorkerProcess
    early: DaemonLock | None = None


class App:
    """One run of `fleetd run`."""

    def __init__(self, options: RunOptions, log: FilteringBoundLogger, sink: LogSink) -> None:
        self._options = options
        self._log = log
        self._sink = sink
        self._state = DaemonState()
        self._done = asyncio.Event()
        self._settling = self._reexecuting = False
        self._up = False
        self._deferred: list[Callable[[], None]] = []  # requests that came before the start was done
        self._notifier = Notifier()
        self._daemon: Daemon
        self._triggers: Triggers
        self._control: ControlServer
        self._locks: DaemonLocks

    async def run(self) -> int:
        """Serve until a shutdown and clean up; return the exit code. Raises FleetError."""
        async with AsyncExitStack() as stack:
            async with FileReading(self._options.reading) as reading:
                await self._start(stack, reading)
            freeze()
            await self._done.wait()
            if self._reexecuting:
                self._notifier.reloading()  # not stopping: systemd would wait for this very PID to exit
                await self._leave_for_reexec(stack)
            await self._daemon.gateway.close(_DRAIN_S)
        self._log.info("stopped", uptime_s=round(time.monotonic() - self._state.started, 1))
        return 0

    # -- start ----------------------------------------------------------------------------------------------------------

    async def _start(self, stack: AsyncExitStack, reading: FileReading) -> None:
        self._install_signals(stack)
        handover = reexec.handover()
        carried = handover.records if handover is not None else []
        places = await reading.places()
        paths = HostPaths(places.state, places.run, places.logs)
        self._lock(stack, paths, handover)
        store = StateStore(paths.state)
        reporter = Reporter(self._log, EventLog(store.record))
        host = Host(paths, report_lost_log=reporter.warn)
        host.expect(carried)
        await host.start()
        stack.push_async_callback(host.close)
        devices = Devices()
        _, samples = await asyncio.gather(store.open(), asyncio.to_thread(devices.sample))
        records, unreadable = await host.thread(host.load_records, carried)
        stack.push_async_callback(store.close)
        learned = await store.learned()
        around = Surroundings(tuple(machine_devices(samples)), dict(os.environ), {}, learned)
        inputs = ReadInputs(around, frozenset(record.name for record in records), socket.gethostname())
        read, past = await asyncio.gather(reading.finish(inputs), store.last_of_each(_PAST_OF_EACH, _PAST_IN_ALL))
        resolved = read.resolved
        await asyncio.to_thread(keep_ports, paths.state, resolved.ports)
        config = ActiveConfiguration(self._options.config, read, inherited(os.environ))
        reporter.events.restore([cast("FleetEvent", entry.data) for entry in past])
        resources = Resources(host, store, devices, samples, learned, await store.facts(PREFIX))
        self._daemon = daemon = Daemon(resources, config, reporter, self._state, self._done.set)
        stack.push_async_callback(daemon.close)
        listener = listening(resolved)  # bound now, but not accepted from before the fleet is ready to answer
        stack.callback(listener.close)
        await self._watch(stack, resolved)
        for place in unreadable:
            reporter.adoption(place.name, f"an unreadable record was set aside: {place}")
        for place in store.quarantined:
            reporter.damaged_file(str(place))
        orders = handover.orders if handover is not None else reexec.PendingOrders()
        await self._take_over(resolved, records, orders)
        try:
            await self._listen(stack, paths, listener)
        except BaseException:
            await self._undo()
            raise
        self._start_background()
        self._report_ready(resolved)
        self._up = True
        if orders.stop:
            self._stop(False, "requested during the re-execution")
        self._catch_up(resolved)

    def _lock(self, stack: AsyncExitStack, paths: HostPaths, handover: reexec.Handover | None) -> None:
        if handover is None:
            self._locks = DaemonLocks.acquire(paths.run, paths.state, self._options.early)
        else:
            self._locks = DaemonLocks.inherit(paths.run, paths.state, handover.lock_fds)
        stack.callback(self._locks.release)

    def _catch_up(self, resolved: ResolvedFleet) -> None:
        """Apply what was saved, and do what was requested, during the start."""
        if resolved.watch and any(changed_since(file, self._options.reading.began) for file in resolved.files):
            self._deferred.append(self._file_saved)
        for call in self._deferred:
            call()

    async def _listen(self, stack: AsyncExitStack, paths: HostPaths, listener: socket.socket) -> None:
        from fleetd.control import socket as control_socket
        from fleetd.control.server import ControlServer
        from fleetd.daemon.api.metrics import render

        daemon = self._daemon
        addresses = await daemon.gateway.start([listener])
        stack.push_async_callback(daemon.gateway.close)
        host, port = addresses[0]
        self._state.gateway = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        logs = LogSource(daemon.host.logs, daemon.host.table)
        inspected = Inspected(daemon.view, daemon.processes, daemon.probes, daemon.prerequisites, daemon.builds, logs)
        lifecycle = Lifecycle(self._stop, self._order_reexec)
        control = DaemonControlPort(daemon.context, inspected, daemon.actions, daemon.applier, lifecycle)

        async def metrics() -> bytes:
            return await asyncio.to_thread(render, await daemon.view.status(), daemon.gateway.stats())

        library = Libraries(daemon.context, daemon.builds, daemon.prerequisites)
        self._control = ControlServer(control, paths.run / control_socket.NAME, metrics=metrics, library=library)
        await self._control.start()
        stack.push_async_callback(self._control.close)

    async def _undo(self) -> None:
        """Stop what was started: a failed start leaves nothing running."""
        self._daemon.loop.dispatch(ShutdownRequested(force=True))
        try:
            async with asyncio.timeout(_UNDO_S):
                await self._done.wait()
        except TimeoutError:
            self._log.error("some processes could not be stopped")

    async def _take_over(
        self, resolved: ResolvedFleet, records: list[HandleRecord], orders: reexec.PendingOrders
    ) -> None:
        """Adopt what runs, then report everything to the fleet in one event."""
        daemon = self._daemon
        dispatch = daemon.loop.dispatch
        adoption = await adopt_all(daemon.host, daemon.processes, daemon.config, daemon.reporter.adoption, records)
        missing = await daemon.prerequisites.check(resolved.plans)
        daemon.prerequisites.accept(missing)
        adopted, died = tuple(adoption.adopted), tuple(adoption.died)
        remembered = adoption.with_restarts(daemon.store.remembered)
        dispatch(SpecChanged(resolved.spec, remembered, adopted, missing.processes, missing.models, died=died))
        daemon.processes.adopted()
        for name in adoption.changed:
            dispatch(RestartRequested(name))
        for event in orders.events([event.name for event in adopted]):
            dispatch(event)

    async def _watch(self, stack: AsyncExitStack, resolved: ResolvedFleet) -> None:
        """Watch files before a start: a later change restarts a program that read them."""
        self._triggers = Triggers(self._daemon.context, self._daemon.background, self._file_saved)
        stack.push_async_callback(self._triggers.close)
        self._triggers.follow(resolved)
        self._daemon.config.subscribe(self._triggers.follow)
        await asyncio.sleep(0)  # a watch begins with the first step of its task

    def _install_signals(self, stack: AsyncExitStack) -> None:
        """Handle signals from now on: their default would exit without undoing the start."""
        actions = signals.SignalActions(stop=self._stop, reload=self._reload, reopen=self._sink.reopen)
        stack.callback(signals.install(asyncio.get_running_loop(), actions))

    def _start_background(self) -> None:
        daemon = self._daemon
        daemon.background.start(daemon.sampler.run(), "sampling")
        daemon.background.start(daemon.prerequisites.run(), "prerequisites")
        paths = daemon.config.resolved.paths
        space = DiskSpace({"log": paths.logs, "state": paths.state}, self._state, daemon.reporter)
        daemon.background.start(space.run(), "disk space")
        if self._notifier.watchdog_interval_s is not None:
            daemon.background.start(self._feed_watchdog(self._notifier.watchdog_interval_s), "watchdog")

    async def _feed_watchdog(self, period_s: float) -> None:
        """Report to systemd from the event loop, so that a blocked loop is detected."""
        while True:
            self._notifier.watchdog()
            await asyncio.sleep(period_s)

    def _report_ready(self, resolved: ResolvedFleet) -> None:
        spec = resolved.spec
        took_s = time.monotonic() - self._state.started
        if self._sink.is_terminal:
            counts = f"{counted(len(spec.processes), 'process', 'es')}, {counted(len(spec.models), 'model')}"
            self._log.info(
                f"fleetd is up: {counts}, gateway {self._state.gateway} (Ctrl-C stops it; next: fleetctl status)"
            )
        log = self._log.debug if self._sink.is_terminal else self._log.info
        log(
            "fleetd is up",
            version=__version__,
            name=resolved.name,
            config=str(self._options.config),
            gateway=self._state.gateway,
            socket=str(self._control.path),
            processes=len(spec.processes),
            models=len(spec.models),
            took_ms=round(took_s * 1000),
        )
        for warning in resolved.warnings:
            self._log.warning("configuration", problem=str(warning))
        self._notifier.ready(f"{counted(len(spec.processes), 'process', 'es')}, {counted(len(spec.models), 'model')}")

    # -- while it runs --------------------------------------------------------------------------------------------------

    def _file_saved(self) -> None:
        if not self._up:
            self._deferred.append(self._file_saved)
            return
        self._daemon.tasks.start(self._daemon.applier.file_saved(), "apply a saved file")

    def _reload(self) -> None:
        async def reload() -> None:
            self._notifier.reloading()
            try:
                await self._daemon.applier.file_saved()
            finally:
                self._notifier.ready()

        if not self._up:
            self._deferred.append(self._reload)
            return
        self._daemon.tasks.start(reload(), "reload")

    def _stop(self, force: bool, reason: str) -> None:
        if not self._up:
            self._deferred.append(partial(self._stop, force, reason))
            return
        if self._done.is_set() and not self._reexecuting:
            return
        daemon = self._daemon
        force = force or self._state.stopping
        self._log.info("shutting down", why=reason, forced=force)
        self._state.stopping = True
        self._notifier.stopping(f"shutting down: {reason}")
        daemon.reporter.events.report("daemon", None, EventCode.SHUTDOWN, f"shutting down: {reason}")
        daemon.loop.dispatch(ShutdownRequested(force=force))

    # -- re-execution ---------------------------------------------------------------------------------------------------

    async def _order_reexec(self) -> None:
        """Begin a re-execution. Raises ConfigError or ApiError if it could not start."""
        if self._state.stopping:
            raise ApiError(409, "locked", "The daemon is shutting down.")
        await self._daemon.applier.check_restart()
        asyncio.get_running_loop().call_later(_REEXEC_DELAY_S, self._begin_reexec)

    def _begin_reexec(self) -> None:
        if not self._settling:
            self._settling = True
            self._daemon.tasks.start(self._settle_for_reexec(), "settle for a re-execution")

    async def _settle_for_reexec(self) -> None:
        """Wait a while for starts and stops to complete; a shutdown takes precedence."""
        await reexec.settle(self._daemon)
        if not self._state.stopping:
            self._reexecuting = True
            self._done.set()

    async def _leave_for_reexec(self, stack: AsyncExitStack) -> None:
        """Pass everything to a new program in this process. Does not return when it works.

        First orders and then starts cease; then nothing is decided any more, and no exit is recorded: the new program
        handles what happens in between.
        """
        daemon = self._daemon
        self._log.info("re-executing", program=sys.executable)
        daemon.reporter.events.report("daemon", None, EventCode.REEXEC, "fleetd replaces its program")
        await self._triggers.close()
        await daemon.gateway.close(1.0)
        await self._control.close()
        async with daemon.config.applying:  # never released
            await daemon.processes.rest(reexec.REST_S)
            daemon.loop.hold()
            records = await daemon.host.prepare_exec()
            lock_fds = self._locks.keep_over_exec()
            await daemon.store.flush()
            await daemon.reader.close()
            await signals.hold()
            orders = reexec.pending_orders(daemon.fleet.queries, self._state.stopping)
            reexec.execute(lock_fds, records, orders, self._notifier.environment, daemon.config.path, stack)


def changed_since(file: Path, moment_s: float) -> bool:
    """Return whether a file or its link may have changed since a moment."""
    try:
        return max(file.stat().st_ctime, file.lstat().st_ctime) >= moment_s - _CLOCK_STEP_S
    except OSError:
        return True


def listening(resolved: ResolvedFleet) -> socket.socket:
    """Return the gateway's listening socket. Raises HostError if it cannot bind."""
    address = resolved.gateway
    family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
    found = socket.socket(family, socket.SOCK_STREAM)
    try:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind((address.host, address.port))
        found.listen(_BACKLOG)
    except OSError as error:
        found.close()
        raise HostError(
            f"the gateway cannot listen on {address.host}:{address.port}: {error.strerror or error}",
            hint="stop the program that uses it, or set gateway.listen in fleet.yaml to another address",
            recoverable=False,
        ) from error
    return found
