"""Read access to the fleet for everything outside `fleetd.core`: status, explain, the gateway, metrics, the daemon.

Invariants:
- No query changes the fleet or its journal.
- Objects that a query returns are live: read them at once, do not keep or change them.
- Outside `fleetd.core`, `Fleet.queries` is the only way to read a fleet (`tests/guards/test_core_access.py`).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum

from fleetd.core import advice
from fleetd.core.advice import Advice, LoadStatus
from fleetd.core.data.fleet_state import FleetState
from fleetd.core.data.journal import Evicted, JournalEntry, ModelLeaving, ModelLost
from fleetd.core.data.specs import ModelSpec
from fleetd.core.data.state import Model, Placement, Process, ProcessState, Residency
from fleetd.core.models.candidates import best_process, bytes_to_wake, sleeping_placement
from fleetd.core.models.eviction import Evict, Fits, Never, plan
from fleetd.core.models.measurement import SETTLED_S
from fleetd.core.models.retention import ttl_deadline
from fleetd.core.processes.reconcile import ProcessSupervisor
from fleetd.core.processes.start_gate import will_start


class Outlook(StrEnum):
    """The decision for a model if a request for it arrived now."""

    NO_PROCESS = "no process"
    FITS = "fits"
    EVICTS = "evicts"
    WAITS = "waits"
    NEVER = "never"


@dataclass(frozen=True, slots=True)
class LoadForecast:
    """How a model would get into memory now; `leaving` would have to leave for it."""

    outlook: Outlook
    process: str = ""
    wakes: bool = False  # it is asleep and would be woken, not loaded
    leaving: tuple[str, ...] = ()
    put_to_sleep: frozenset[str] = frozenset()  # those of `leaving` that would only be put to sleep
    reason: str = ""


@dataclass(frozen=True, slots=True)
class DeviceUse:
    """Reservations of a device in bytes; no limit: `budget_bytes`, `free_bytes` None."""

    name: str
    budget_bytes: int | None
    reserved_bytes: int
    free_bytes: int | None


class FleetQueries:
    """Answers questions about one fleet."""

    def __init__(self, state: FleetState, supervisor: ProcessSupervisor) -> None:
        self._state = state
        self._supervisor = supervisor

    # -- processes ----------------------------------------------------------------------------------------------------

    def process(self, name: str) -> Process | None:
        return self._state.processes.get(name)

    def processes(self) -> Collection[Process]:
        return self._state.processes.values()

    def process_names(self) -> Collection[str]:
        return self._state.processes.keys()

    def generation(self, name: str) -> int:
        """Return the current generation of a process; 0 for an unknown name."""
        process = self._state.processes.get(name)
        return process.generation if process is not None else 0

    def is_wanted(self, process: Process) -> bool:
        """Return whether the process should run now."""
        return self._supervisor.wanted(process)

    def can_start(self, process: Process) -> bool:
        """Return whether a BLOCKED process will start without help."""
        return will_start(self._state, self._supervisor.wanted, process)

    def in_flight(self, process: str) -> int:
        """Return the number of requests in flight on a process."""
        return sum(placement.in_flight for placement in self._state.placements_on(process))

    def is_full(self, process: str) -> bool:
        """Return whether a model on the process uses all of its slots."""
        return any(
            placement.in_flight >= self._state.models[placement.model].spec.concurrency
            for placement in self._state.placements_on(process)
        )

    def may_be_asleep(self, process: str) -> bool:
        """Return whether a model on the process is, or may be, asleep."""
        return any(placement.sleeps for placement in self._state.placements_on(process))

    def is_settled_asleep(self, process: str, now: float) -> bool:
        """Return whether a model has slept long enough for a sample to show its size."""
        return any(
            placement.state is Residency.ASLEEP and now - placement.since_s >= SETTLED_S
            for placement in self._state.placements_on(process)
        )

    def pending_restarts(self) -> dict[str, str]:
        """Return the reason for every process that is being stopped or restarted, by name."""
        return {
            name: process.restart_wanted or process.reason
            for name, process in self._state.processes.items()
            if process.restart_wanted is not None or process.state is ProcessState.STOPPING
        }

    def rolling_restarts(self) -> dict[str, str]:
        """Return the reason for every process that waits for its turn to restart, by name."""
        return dict(self._state.rolling)

    def process_advice(self, process: Process, now: float) -> Advice:
        """Return what to show a person about a process."""
        return advice.of_process(self._state, process, now)

    def model_advice(self, model: Model, now: float) -> Advice:
        """Return what to show a person about a model."""
        return advice.of_model(self._state, model, now)

    def load_progress(self, placement: Placement, now: float) -> LoadStatus:
        """Return how far the load of a placement is."""
        return advice.load_progress(self._state, placement, now)

    def loading_detail(self, placement: Placement, now: float) -> str:
        """Return how long a load takes already, what its engine answers, and its limit."""
        return advice.loading_detail(self._state, placement, now)

    # -- models -------------------------------------------------------------------------------------------------------

    def model(self, name: str) -> Model | None:
        """Return a model by its own name."""
        return self._state.models.get(name)

    def models(self) -> Collection[Model]:
        return self._state.models.values()

    def model_specs(self) -> Collection[ModelSpec]:
        """Return the models of the current configuration."""
        return self._state.spec.models.values()

    def canonical_name(self, name: str) -> str | None:
        """Return the model that a name or an alias means; None for an unknown one."""
        return self._state.names.get(name)

    def find_model(self, name: str) -> Model | None:
        """Return a model by its name or an alias."""
        return self._state.models.get(self._state.names.get(name, name))

    def queued(self) -> Mapping[str, int]:
        """Return the number of waiting requests per model."""
        return {model.name: model.waiting for model in self._state.models.values()}

    def placements_on(self, process: str) -> Iterator[Placement]:
        return self._state.placements_on(process)

    def models_of(self, process: str) -> list[Model]:
        """Return the models that are on a process or may be, by name."""
        names = {placement.model for placement in self._state.placements_on(process)}
        names |= {model.name for model in self._state.models.values() if process in model.spec.holders}
        return [self._state.models[name] for name in sorted(names)]

    def ttl_deadline(self, model: Model) -> float | None:
        """Return when the idle model is unloaded, in monotonic seconds; None: not now."""
        times = (ttl_deadline(self._state, placement) for placement in model.placements.values())
        return min((time for time in times if time is not None), default=None)

    # -- memory -------------------------------------------------------------------------------------------------------

    def reserved(self, placements: Iterable[Placement]) -> dict[str, int]:
        """Return the bytes per device that placements have reserved together."""
        total: dict[str, int] = {}
        for placement in placements:
            for device, size in self._state.ledger.reservations.get(placement.key, {}).items():
                total[device] = total.get(device, 0) + size
        return total

    def limited_devices(self) -> Collection[str]:
        """Return the names of the devices that have a budget."""
        return self._state.ledger.devices.keys()

    def device(self, name: str) -> DeviceUse:
        ledger = self._state.ledger
        spec = ledger.devices.get(name)
        budget_bytes = spec.budget_bytes if spec is not None else None
        return DeviceUse(name, budget_bytes, ledger.reserved_bytes(name), ledger.free_bytes(name))

    def forecast(self, model: Model, now: float) -> LoadForecast | None:
        """Return what a request would cause now; None: it is loaded, or blocked."""
        state = self._state
        asleep = sleeping_placement(state, model)
        if model.missing or (model.placements and asleep is None):
            return None
        process = best_process(state, model) if asleep is None else state.processes[asleep.process]
        if process is None:
            return LoadForecast(Outlook.NO_PROCESS)
        need = model.footprint.bytes if asleep is None else bytes_to_wake(state, asleep)
        verdict = plan(need, (model.name, process.name), state.resident(), state.ledger, now)
        wakes = asleep is not None
        if isinstance(verdict, Fits):
            return LoadForecast(Outlook.FITS, process.name, wakes)
        if isinstance(verdict, Evict):
            names = tuple(victim.model for victim in verdict.victims)
            return LoadForecast(
                Outlook.EVICTS, process.name, wakes, names, frozenset(victim.model for victim in verdict.sleepers)
            )
        if isinstance(verdict, Never):
            return LoadForecast(Outlook.NEVER, process.name, wakes, reason=verdict.reason)
        busy = tuple(victim.model for victim in verdict.drain)
        return LoadForecast(Outlook.WAITS, process.name, wakes, busy, reason=verdict.reason)

    # -- journal ------------------------------------------------------------------------------------------------------

    def journal(self) -> tuple[JournalEntry, ...]:
        """Return the journal, oldest entry first."""
        return tuple(self._state.journal.entries)

    def reason_left(self, model: str) -> str | None:
        """Return why a model last began to leave memory; None: not in the journal."""
        notes = reversed(self._state.journal.notes_on(model))
        return next((note.reason for note in notes if isinstance(note, ModelLeaving | Evicted | ModelLost)), None)

    def survivors(self, process: str) -> tuple[int, ...]:
        """Return the PIDs of a process set that could not be killed."""
        found = self._state.processes.get(process)
        return found.survivors if found is not None else ()

    def journal_after(self, serial: int) -> tuple[JournalEntry, ...]:
        """Return the journal entries that are newer than `serial`, oldest first."""
        return self._state.journal.after(serial)
