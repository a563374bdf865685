"""Load and unload models on servers, read files ahead, and observe what a server holds.

Invariants:
- Every Load is answered by Loaded or LoadFailed, every Unload by Unloaded or UnloadFailed, also when the server dies meanwhile: the
  death of a process cancels its calls at once, not at their timeout.
- A server's list of models is used only if no load or unload ran on it during the request: it would be out of date.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Mapping
from pathlib import Path

from fleetd.core.data.commands import Load, ReadAhead, Unload
from fleetd.core.data.events import Event, Exited, Loaded, LoadFailed, ResidentsObserved, Unloaded, UnloadFailed
from fleetd.daemon.context import DaemonContext
from fleetd.daemon.effects.model_builds import ModelBuilds
from fleetd.engines.base import Endpoint, ModelServer, Resident, ServedModel
from fleetd.errors import EngineError, FleetError
from fleetd.resolver.launch_plan import LaunchPlan

_UNLOAD_TIMEOUT_S = 60.0
_CHUNK_BYTES = 64 * 1024 * 1024


class ModelLoads:
    """Carry out loads and unloads, and report what a server holds."""

    def __init__(self, context: DaemonContext, builds: ModelBuilds) -> None:
        self._builds = builds
        self._config = context.config
        self._dispatch = context.dispatch
        self._http = context.http
        self._tasks = context.tasks
        self._calls: dict[str, set[asyncio.Task[None]]] = {}
        self._changes: dict[str, int] = {}  # loads and unloads started or finished, per process
        self._reading: set[str] = set()
        self._lengths: dict[
            str, dict[str, int]
        ] = {}  # context length by process and model, as the server last reported

    def load(self, command: Load) -> None:
        self.call(command.process, self._load(command), f"load {command.model} on {command.process}")

    def unload(self, command: Unload) -> None:
        self.call(command.process, self._unload(command), f"unload {command.model} from {command.process}")

    def cancel_calls(self, event: Event) -> None:
        """Cancel the calls to a process that exited."""
        if isinstance(event, Exited):
            for task in self._calls.get(event.name, set()).copy():
                task.cancel()

    def call(self, process: str, work: Awaitable[None], title: str) -> None:
        """Run a call that is cancelled when the process exits."""

        async def counted() -> None:
            self._changes[process] = self._changes.get(process, 0) + 1
            try:
                await work
            finally:
                self._changes[process] += 1
                calls.discard(task)

        calls = self._calls.setdefault(process, set())
        task = self._tasks.start(counted(), title)
        calls.add(task)

    def _target(self, model: str, process: str) -> tuple[LaunchPlan, ModelServer, Endpoint, ServedModel]:
        plan = self._config.plans.get(process)
        held = plan.held.get(model) if plan is not None else None
        if plan is None or plan.endpoint is None or held is None:
            raise EngineError(f"{model} is no longer placed on {process} by fleet.yaml", recoverable=False)
        if plan.model_server is None:
            raise EngineError(f"{process} serves one model: it is loaded by starting the process", recoverable=False)
        return plan, plan.model_server, plan.endpoint, held

    async def _load(self, command: Load) -> None:
        model, process, generation = command.model, command.process, command.generation
        spec = self._config.model_specs.get(model)
        timeout_s = spec.load_timeout_s if spec is not None else 300.0
        try:
            plan, server, endpoint, held = self._target(model, process)
            looked = await self._builds.before_load(command, plan, held)
            try:
                measured = await server.load(self._http.session, endpoint, held, timeout_s)
            except EngineError:
                if looked or not self._builds.doubt(process, model):
                    raise
                if not await self._builds.before_load(command, plan, held):
                    raise
                measured = await server.load(self._http.session, endpoint, held, timeout_s)
        except FleetError as error:
            self._dispatch(
                LoadFailed(model, process, generation, self._sentence(process, error), recoverable=error.recoverable)
            )
        except asyncio.CancelledError:
            self._dispatch(LoadFailed(model, process, generation, f"{process} exited while it was loading {model}"))
            raise
        except Exception as error:  # noqa: BLE001 - a command without a result would block the model for ever
            self._dispatch(
                LoadFailed(model, process, generation, f"unexpected failure: {type(error).__name__}: {error}")
            )
        else:
            self._dispatch(Loaded(model, process, generation, on_devices(measured, plan)))
            self._lengths.get(process, {}).pop(model, None)
            await self._residents(plan, server, endpoint)

    async def _unload(self, command: Unload) -> None:
        model, process, generation = command.model, command.process, command.generation
        try:
            _, server, endpoint, held = self._target(model, process)
            await server.unload(self._http.session, endpoint, held, _UNLOAD_TIMEOUT_S)
        except FleetError as error:
            self._dispatch(UnloadFailed(model, process, generation, self._sentence(process, error)))
        except asyncio.CancelledError:
            self._dispatch(UnloadFailed(model, process, generation, f"{process} exited"))
            raise
        except Exception as error:  # noqa: BLE001
            self._dispatch(
                UnloadFailed(model, process, generation, f"unexpected failure: {type(error).__name__}: {error}")
            )
        else:
            self._dispatch(Unloaded(model, process, generation))

    def _sentence(self, process: str, error: FleetError) -> str:
        plan = self._config.plans.get(process)
        return plan.error_text(error) if plan is not None else error.sentence

    async def observe(self, process: str, generation: int) -> None:
        """Query the models of a many-model server and report them to the fleet."""
        plan = self._config.plans.get(process)
        if plan is None or plan.endpoint is None or plan.model_server is None:
            return
        before = self._changes.get(process, 0)
        residents = await self._residents(plan, plan.model_server, plan.endpoint)
        if residents is None or self._changes.get(process, 0) != before or self._calls.get(process):
            return
        found = {name: on_devices(resident.device_bytes, plan) for name, resident in residents.items()}
        self._dispatch(ResidentsObserved(process, generation, found))

    async def _residents(
        self, plan: LaunchPlan, server: ModelServer, endpoint: Endpoint
    ) -> Mapping[str, Resident] | None:
        """Return the models that a server holds; None on an error (see its probes)."""
        try:
            residents = await server.loaded(self._http.session, endpoint)
        except FleetError:
            return None
        names = {server.canonical_name(held.served_as): name for name, held in plan.held.items()}
        found = {names[resident.served_as]: resident for resident in residents if resident.served_as in names}
        self._lengths[plan.name] = {
            name: resident.context_length for name, resident in found.items() if resident.context_length is not None
        }
        return found

    def context_length(self, model: str, process: str) -> int | None:
        """Return the context length that a server reports for a model, or None."""
        return self._lengths.get(process, {}).get(model)

    # -- reading ahead ------------------------------------------------------------------------------------------------

    def read_ahead(self, command: ReadAhead) -> None:
        path = self._source_of(command.model)
        if path is None or path in self._reading or not hasattr(os, "posix_fadvise"):
            return
        self._reading.add(path)
        self._tasks.start(self._read_ahead(path), f"read ahead {command.model}")

    async def _read_ahead(self, path: str) -> None:
        try:
            await asyncio.to_thread(advise_will_need, path)
        except OSError:
            pass  # the load itself reports an error of the file
        finally:
            self._reading.discard(path)

    def _source_of(self, model: str) -> str | None:
        spec = self._config.model_specs.get(model)
        for name in spec.holders if spec is not None else ():
            plan = self._config.plans.get(name)
            if plan is None:
                continue
            held = plan.held.get(model) or plan.own_model
            if held is not None and held.source and Path(held.source).is_file():
                return held.source
        return None


def advise_will_need(path: str) -> None:
    """Ask the kernel to read a file into the page cache. Raises OSError."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        size = os.fstat(fd).st_size
        for offset in range(0, size, _CHUNK_BYTES):
            os.posix_fadvise(fd, offset, min(_CHUNK_BYTES, size - offset), os.POSIX_FADV_WILLNEED)
    finally:
        os.close(fd)


def on_devices(measured: Mapping[str, int], plan: LaunchPlan) -> dict[str, int]:
    """Return a measurement by the fleet's devices; "gpu" is the entry's own.

    On one unified pool everything counts there.
    """
    device = plan.device
    result: dict[str, int] = {}
    for name, size in measured.items():
        target = device if device == "unified" or name in ("gpu", "device") else name
        result[target] = result.get(target, 0) + size
    return result
