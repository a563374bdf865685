"""The daemon's life: start, run, shut down. The composition root.

The rules of this file
- Start: read the file, take the locks, look at the machine, take over what runs, listen, and only then decide anything.
- A start that fails leaves nothing behind: what was opened is closed in reverse order.
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
from fleetd.daemon.api.control import DaemonControlPort
from fleetd.daemon.api.library import Libraries
from fleetd.daemon.api.log_stream import LogSource
from fleetd.daemon.api.status import DaemonFacts
from fleetd.daemon.effects.startup_log import PREFIX
from fleetd.daemon.own_memory import settled
from fleetd.daemon.reload.active import Configuration
from fleetd.daemon.reload.apply import Operations
from fleetd.daemon.reload.messages import Circumstances
from fleetd.daemon.reload.worker_client import FileReading
from fleetd.daemon.sources.triggers import Outside
from fleetd.daemon.wiring import Daemon
from fleetd.errors import HostError
from fleetd.host.host import Host
from fleetd.host.lock import DaemonLocks
from fleetd.host.notify import Notifier
from fleetd.host.state_store import StateStore
from fleetd.host.system.memory import Devices
from fleetd.host.types import HandleRecord, HostPaths
from fleetd.resolver.environment import inherited
from fleetd.resolver.port_assignment import keep_ports
from fleetd.resolver.resolved import Assembly, Surroundings, machine_devices

if TYPE_CHECKING:
    from structlog.typing import FilteringBoundLogger

    from fleetd.control.server import ControlServer
    from fleetd.control.wire import FleetEvent
    from fleetd.daemon.daemon_log import LogSink
    from fleetd.gateway.listener import Gateway
    from fleetd.host.process.worker import WorkerProcess

_DRAIN_S = 5.0
_UNDO_S = 20.0
_BACKLOG = 1024
_PAST_OF_EACH, _PAST_IN_ALL = 64, 1000  # events of earlier daemons that are shown
_CLOCK_STEP_S = 0.02  # file times are taken from a clock that ticks in steps


@dataclass(frozen=True, slots=True)
class RunOptions:
    """`config` is absolute; `reading` reads it since before this module was loaded."""

    config: Path
    reading: WorkerProcess


class App:
    """One run of `fleetd run`."""

    def __init__(self, options: RunOptions, log: FilteringBoundLogger, sink: LogSink) -> None:
        self._options = options
        self._log = log
        self._sink = sink
        self._done = asyncio.Event()
        self._settling = self._reexecuting = False
        self._up = False
        self._early: list[Callable[[], None]] = []  # what was asked before the start was done
        self._began = time.monotonic()
        self._notifier = Notifier()
        self._recorded: set[str] | None = None  # until this daemon knows better
        self._learned: dict[str, dict[str, int]] = {}
        self._devices = Devices()
        self._daemon: Daemon
        self._operations: Operations
        self._gateway: Gateway
        self._control: ControlServer
        self._locks: DaemonLocks

    async def run(self) -> int:
        """Start, serve until told to stop, and clean up. Returns the exit code; raises FleetError when it cannot start."""
        async with AsyncExitStack() as stack:
            async with FileReading(self._options.reading) as reading:
                await self._start(stack, reading)
            settled()
            await self._done.wait()
            if self._reexecuting:
                self._notifier.reloading()  # not stopping: systemd would wait for the end of this very PID
                await self._leave_for_reexec(stack)
            await self._gateway.close(_DRAIN_S)
        self._log.info("stopped", uptime_s=round(time.monotonic() - self._began, 1))
        return 0

    # -- start ----------------------------------------------------------------------------------------------------------

    async def _start(self, stack: AsyncExitStack, reading: FileReading) -> None:
        self._heed_signals(stack)
        taken = reexec.taken_over()
        places = await reading.places()
        paths = HostPaths(places.state, places.run, places.logs)
        if taken is None:
            self._locks = DaemonLocks.acquire(paths.run, paths.state)
        else:
            self._locks = DaemonLocks.inherit(paths.run, paths.state, taken.lock_fds)
        stack.callback(self._locks.release)
        host = Host(paths)
        carried = taken.records if taken is not None else []
        host.expect(carried)
        await host.start()
        stack.push_async_callback(host.close)
        store = StateStore(paths.state)
        _, samples = await asyncio.gather(store.open(), asyncio.to_thread(self._devices.sample))
        left, unreadable = await host.thread(host.load_records, carried)
        self._recorded = {record.name for record in left}
        stack.push_async_callback(store.close)
        self._learned = await store.learned()
        around = Surroundings(tuple(machine_devices(samples)), dict(os.environ), {}, self._learned)
        circumstances = Circumstances(around, frozenset(self._running()), socket.gethostname())
        past = store.last_of_each(_PAST_OF_EACH, _PAST_IN_ALL)
        read, told = await asyncio.gather(reading.finish(circumstances), past)
        await asyncio.to_thread(keep_ports, paths.state, read.assembly.ports)
        assembly = read.assembly
        configuration = Configuration(self._options.config, read, self._around, self._running)
        facts = DaemonFacts(str(self._options.config))
        self._daemon = daemon = Daemon(
            host, store, self._devices, configuration, inherited(os.environ), self._log, facts, self._done.set
        )
        daemon.sampling.devices = {sample.name: sample for sample in samples}
        daemon.starts.know(await store.facts(PREFIX))
        daemon.event_log.restore([cast("FleetEvent", entry.data) for entry in told])
        stack.push_async_callback(self._close_daemon)
        listener = listening(assembly)  # bound, and not accepted from before there is a fleet to ask
        stack.callback(listener.close)
        await self._watch(stack, assembly)
        for place in unreadable:
            self._told_of_adoption(place.name, f"an unreadable record was set aside: {place}")
        for place in store.quarantined:
            self._log.warning("a damaged file was set aside: what it held is lost", path=str(place))
            daemon.event_log.report(
                "daemon",
                None,
                EventCode.STATE_FILE_DAMAGED,
                f"a damaged file was set aside as {place}: what it held is lost",
            )
        await self._take_over(assembly, left, taken.wishes if taken is not None else reexec.Wishes())
        self._recorded = None
        try:
            await self._listen(stack, assembly, paths, listener)
        except BaseException:
            await self._undo()
            raise
        self._look_around()
        self._ready(assembly)
        self._up = True
        if taken is not None and taken.wishes.stop:
            self._stop(False, "asked while the daemon executed itself anew")
        self._catch_up(assembly)

    def _catch_up(self, assembly: Assembly) -> None:
        """Do what was asked, and apply what was saved, since the start began."""
        if assembly.watch and any(changed_since(file, self._options.reading.began) for file in assembly.files):
            self._early.append(self._file_saved)
        for call in self._early:
            call()

    def _running(self) -> set[str]:
        """Return the names of processes that hold their ports now: ours, or those of the daemon before."""
        return set(self._daemon.processes.runs) if self._recorded is None else self._recorded

    def _around(self) -> Surroundings:
        devices = machine_devices(list(self._daemon.sampling.devices.values()))
        return Surroundings(tuple(devices), dict(os.environ), {}, self._learned)

    async def _close_daemon(self) -> None:
        daemon = self._daemon
        daemon.loop.close()
        daemon.probing.close()
        await daemon.configuration.close()
        await daemon.background.close()
        await daemon.tasks.close(grace_s=0.5)
        await daemon.close_http()

    async def _listen(
        self, stack: AsyncExitStack, assembly: Assembly, paths: HostPaths, listener: socket.socket
    ) -> None:
        from fleetd.control import socket as control_socket
        from fleetd.control.server import ControlServer
        from fleetd.daemon.api.metrics import render
        from fleetd.gateway.listener import Gateway
        from fleetd.gateway.options import GatewayOptions

        daemon = self._daemon
        keys = assembly.gateway
        options = GatewayOptions(
            host=keys.host,
            port=keys.port,
            allowed_hosts=keys.allowed_hosts,
            max_body_bytes=keys.max_body_bytes,
            retry_attempts=keys.retry_attempts,
        )
        self._gateway = gateway = Gateway(daemon.port, options)
        daemon.port.heard_s = gateway.last_answer_s
        addresses = await gateway.start([listener])
        stack.push_async_callback(gateway.close)
        host, port = addresses[0]
        daemon.facts.gateway = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        self._operations = Operations(daemon, self._applied, self._stop, self._reexec)
        control = DaemonControlPort(
            daemon.fleet.queries,
            daemon.view,
            daemon.event_log,
            daemon.actions,
            daemon.configuration,
            daemon.processes,
            daemon.probing,
            daemon.requirements,
            LogSource(daemon.host.logs, daemon.host.table),
            self._operations,
            daemon.preparation,
        )

        async def metrics() -> bytes:
            return await asyncio.to_thread(render, await daemon.view.status(), gateway.stats())

        library = Libraries(daemon.fleet.queries, daemon.preparation, daemon.requirements, daemon.http, daemon.tasks)
        self._control = ControlServer(control, paths.run / control_socket.NAME, metrics=metrics, library=library)
        await self._control.start()
        stack.push_async_callback(self._control.close)

    async def _undo(self) -> None:
        """Stop what was begun: a start that fails leaves nothing running."""
        self._daemon.dispatch(ShutdownRequested(force=True))
        try:
            async with asyncio.timeout(_UNDO_S):
                await self._done.wait()
        except TimeoutError:
            self._log.error("not everything could be stopped")

    def _told_of_adoption(self, name: str, sentence: str) -> None:
        self._log.info("adoption", name=name, reason=sentence)
        self._daemon.event_log.report("process", name, EventCode.ADOPTION, sentence)

    async def _take_over(self, assembly: Assembly, left: list[HandleRecord], wishes: reexec.Wishes) -> None:
        """Adopt what runs, then tell the fleet everything at once."""
        daemon = self._daemon
        adoption = await adopt_all(daemon.machine, daemon.processes, assembly.plans, self._told_of_adoption, left)
        absent = await daemon.requirements.look(assembly.plans)
        daemon.requirements.accept(absent)
        adopted, died = tuple(adoption.adopted), tuple(adoption.died)
        daemon.dispatch(
            SpecChanged(
                assembly.spec,
                adoption.raised(daemon.store.remembered),
                adopted,
                absent.processes,
                absent.models,
                died=died,
            )
        )
        daemon.processes.entered()
        daemon.port.spec_changed()
        for name in adoption.changed:
            daemon.dispatch(RestartRequested(name))
        for event in wishes.events([event.name for event in adopted]):
            daemon.dispatch(event)

    async def _watch(self, stack: AsyncExitStack, assembly: Assembly) -> None:
        """Watch files before anything starts: what changes after a program read it is a reason to start it again."""
        self._world = Outside(self._daemon, self._file_saved)
        stack.push_async_callback(self._world.close)
        self._world.follow(assembly)
        await asyncio.sleep(0)  # a watch takes hold with the first step of its task

    def _heed_signals(self, stack: AsyncExitStack) -> None:
        """From now on no signal ends the daemon by itself: it would leave what was begun."""
        actions = signals.SignalActions(stop=self._stop, reload=self._reload, reopen=self._sink.reopen)
        stack.callback(signals.install(asyncio.get_running_loop(), actions))

    def _look_around(self) -> None:
        """Begin to look at the machine, again and again."""
        daemon = self._daemon
        daemon.background.start(daemon.sampling.run(), "sampling")
        daemon.background.start(daemon.requirements.run(), "requirements")
        if self._notifier.watchdog_interval_s is not None:
            daemon.background.start(self._feed_watchdog(self._notifier.watchdog_interval_s), "watchdog")

    async def _feed_watchdog(self, period_s: float) -> None:
        """Tell systemd that the loop turns: it is the loop that says so."""
        while True:
            self._notifier.watchdog()
            await asyncio.sleep(period_s)

    def _ready(self, assembly: Assembly) -> None:
        spec = assembly.spec
        took = time.monotonic() - self._began
        self._log.info(
            "fleetd is up",
            version=__version__,
            name=assembly.name,
            config=str(self._options.config),
            gateway=self._daemon.facts.gateway,
            socket=str(self._control.path),
            processes=len(spec.processes),
            models=len(spec.models),
            took_ms=round(took * 1000),
        )
        for warning in assembly.warnings:
            self._log.warning("configuration", problem=str(warning))
        self._notifier.ready(f"{len(spec.processes)} processes, {len(spec.models)} models")

    # -- while it runs --------------------------------------------------------------------------------------------------

    def _applied(self, assembly: Assembly) -> None:
        self._world.follow(assembly)

    def _file_saved(self) -> None:
        if not self._up:
            self._early.append(self._file_saved)
            return
        self._daemon.tasks.start(self._operations.file_saved(), "apply a saved file")

    def _reload(self) -> None:
        async def reload() -> None:
            self._notifier.reloading()
            try:
                await self._operations.file_saved()
            finally:
                self._notifier.ready()

        if not self._up:
            self._early.append(self._reload)
            return
        self._daemon.tasks.start(reload(), "reload")

    def _stop(self, force: bool, why: str) -> None:
        if not self._up:
            self._early.append(partial(self._stop, force, why))
            return
        if self._done.is_set() and not self._reexecuting:
            return
        daemon = self._daemon
        force = force or daemon.facts.stopping
        self._log.info("shutting down", why=why, forced=force)
        daemon.facts.stopping = True
        self._notifier.stopping(f"shutting down: {why}")
        daemon.event_log.report("daemon", None, EventCode.SHUTDOWN, f"shutting down: {why}")
        daemon.dispatch(ShutdownRequested(force=force))

    def _reexec(self) -> None:
        if not self._settling:
            self._settling = True
            self._daemon.tasks.start(self._settle_for_reexec(), "settle for a re-execution")

    async def _settle_for_reexec(self) -> None:
        """Let everybody have what they were promised, as far as that is soon; a shutdown that comes meanwhile wins."""
        await reexec.settled(self._daemon)
        if not self._daemon.facts.stopping:
            self._reexecuting = True
            self._done.set()

    async def _leave_for_reexec(self, stack: AsyncExitStack) -> None:
        """Hand everything over to a new program in this very process. Does not return when it works.

        Orders end first, then starts; then nothing is decided any more, and no death is taken note of: all that is between
        the last two is left to the new program.
        """
        daemon = self._daemon
        self._log.info("executing itself anew", program=sys.executable)
        daemon.event_log.report("daemon", None, EventCode.REEXEC, "fleetd replaces its program")
        await self._world.close()
        await self._gateway.close(1.0)
        await self._control.close()
        async with daemon.configuration.applying:  # never given back
            await daemon.processes.rest(reexec.REST_S)
            daemon.loop.hold()
            records = await daemon.host.prepare_exec()
            lock_fds = self._locks.keep_over_exec()
            await daemon.store.flush()
            await daemon.configuration.close()
            await signals.hold()
            wishes = reexec.wishes_of(daemon.fleet.queries, daemon.facts.stopping)
            environ, config = self._notifier.environment, daemon.configuration.path
            reexec.execute(lock_fds, records, wishes, environ, config, stack)


def changed_since(file: Path, moment_s: float) -> bool:
    """Return whether a file, or the link that leads to it, may have been replaced or written to since a moment."""
    try:
        return max(file.stat().st_ctime, file.lstat().st_ctime) >= moment_s - _CLOCK_STEP_S
    except OSError:
        return True


def listening(assembly: Assembly) -> socket.socket:
    """Return the gateway's listening socket. Raises HostError when its address cannot be used."""
    address = assembly.gateway
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
            hint="stop the program that holds it, or set gateway.listen in fleet.yaml to another address",
            recoverable=False,
        ) from error
    return found
