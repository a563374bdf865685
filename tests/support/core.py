"""A test rig for the core: tests send events by hand and inspect the commands."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from random import Random
from typing import TypeVar

from fleetd.core.data import commands as c
from fleetd.core.data import events as e
from fleetd.core.data.journal import Journal
from fleetd.core.data.specs import (
    Capabilities,
    DeviceSpec,
    ExitKind,
    ExitReport,
    FleetSpec,
    Footprint,
    FootprintSource,
    ModelSpec,
    ProbeKind,
    Probes,
    ProbeSpec,
    ProcessKind,
    ProcessSpec,
    QueueLimits,
    SleepState,
)
from fleetd.core.data.state import Process, ProcessState, Residency
from fleetd.core.fleet import Fleet

G = 2**30
C = TypeVar("C", bound=c.Command)


def process(name: str, **changes: object) -> ProcessSpec:
    return replace(ProcessSpec(name, name, ProcessKind.SERVICE, launch_hash="1"), **changes)  # type: ignore[arg-type]


def own(name: str, **changes: object) -> ProcessSpec:
    """An on-demand process that is its model."""
    return process(name, **{"kind": ProcessKind.INSTANCE, "on_demand": True, "own_model": name, **changes})


def server(name: str, **changes: object) -> ProcessSpec:
    many = Capabilities(many_models=True)
    return process(name, **{"kind": ProcessKind.INSTANCE, "capabilities": many, **changes})


def model(name: str, *holders: str, size: int = 1, **changes: object) -> ModelSpec:
    footprint = Footprint({"gpu0": size * G} if size else {}, FootprintSource.ESTIMATED)
    spec = ModelSpec(name, holders or (name,), footprint=footprint, footprint_hash=name, min_resident_s=0.0)
    return replace(spec, **changes)  # type: ignore[arg-type]


def fleet_spec(
    processes: Iterable[ProcessSpec] = (), models: Iterable[ModelSpec] = (), budget: int = 1, **limits: object
) -> FleetSpec:
    return FleetSpec(
        {spec.name: spec for spec in processes},
        {spec.name: spec for spec in models},
        {"gpu0": DeviceSpec("gpu0", "gpu", 64 * G, budget * G)},
        replace(QueueLimits(), **limits),  # type: ignore[arg-type]
    )


def owners(names: str, budget: int = 1, **changes: object) -> FleetSpec:
    """One on-demand process per letter, each one GiB."""
    return fleet_spec([own(name) for name in names], [model(name, **changes) for name in names], budget)


class Rig:
    """`send` handles one event and keeps its commands; the verbs below are shorthand for events of the current generation."""

    def __init__(self, spec: FleetSpec, seed: int = 1, journal: Journal | None = None, **first: object) -> None:
        self.now = 100.0
        self.fleet = Fleet(FleetSpec(), Random(seed), journal)
        self.seen: list[c.Command] = []
        self.serial = 0
        self.send(e.SpecChanged(spec, **first))  # type: ignore[arg-type]

    def send(self, event: e.Event) -> list[c.Command]:
        commands = self.fleet.handle(event, self.now)
        assert self.fleet.handle(e.Tick(), self.now) == [], "the same state gave a new decision"
        self.seen.extend(commands)
        return commands

    def wait(self, seconds: float) -> list[c.Command]:
        """Let time pass, with a Tick at each deadline."""
        end, commands = self.now + seconds, []
        while (deadline := self.fleet.next_deadline()) is not None and deadline <= end:
            assert deadline > self.now or deadline == self.now
            self.now = deadline
            commands += self.send(e.Tick())
        self.now = end
        return commands

    def take(self, kind: type[C]) -> list[C]:
        """Return the commands of one kind that were seen since the last `clear`."""
        return [command for command in self.seen if isinstance(command, kind)]

    def clear(self) -> None:
        self.seen.clear()

    def of(self, name: str) -> Process:
        return self.fleet.processes[name]

    def state(self, name: str) -> ProcessState:
        return self.of(name).state

    def residency(self, name: str) -> Residency:
        return self.fleet.models[name].state

    # -- processes

    def spawned(self, name: str) -> list[c.Command]:
        return self.send(e.Spawned(name, self.of(name).generation, 1000 + self.of(name).generation))

    def probe(self, name: str, kind: ProbeKind, ok: bool = True, detail: str = "") -> list[c.Command]:
        return self.send(e.ProbeResult(name, self.of(name).generation, kind, ok, detail))

    def exits(
        self, name: str, code: int | None = 1, kind: ExitKind = ExitKind.CRASH, reason: str = ""
    ) -> list[c.Command]:
        return self.send(e.Exited(name, self.of(name).generation, ExitReport(code, kind=kind, reason=reason)))

    def empty(self, name: str, survivors: tuple[int, ...] = ()) -> list[c.Command]:
        return self.send(e.SetEmpty(name, self.of(name).generation, survivors))

    def dies(self, name: str, code: int | None = 1, kind: ExitKind = ExitKind.CRASH) -> list[c.Command]:
        return self.exits(name, code, kind) + self.empty(name)

    # -- models and requests

    def loaded(self, name: str, holder: str, size: int | None = None) -> list[c.Command]:
        measured = {"gpu0": size} if size is not None else {}
        return self.send(e.Loaded(name, holder, self.of(holder).generation, measured))

    def answers(self, name: str, state: SleepState, message: str = "") -> list[c.Command]:
        """Report the engine of a model with its own process as asleep, awake, or broken."""
        return self.send(e.SleepSeen(name, name, self.of(name).generation, state, message))

    def unloaded(self, name: str, holder: str) -> list[c.Command]:
        return self.send(e.Unloaded(name, holder, self.of(holder).generation))

    def ask(self, name: str, avoid: tuple[str, ...] = ()) -> int:
        self.serial += 1
        self.send(e.RequestArrived(self.serial, name, avoid))
        return self.serial

    def request_load(self, name: str) -> int:
        self.serial += 1
        self.send(e.LoadRequested(name, self.serial))
        return self.serial

    def finish(self, request_id: int) -> list[c.Command]:
        return self.send(e.RequestFinished(request_id))

    def granted(self) -> list[int]:
        return [grant.request_id for grant in self.take(c.Grant)]

    def rejects(self) -> dict[int, str]:
        return {reject.request_id: reject.code for reject in self.take(c.Reject)}

    def warm(self, name: str) -> None:
        """Bring an own-process model into memory and leave it idle."""
        request = self.ask(name)
        if request not in self.granted():
            self.spawned(name)
        assert request in self.granted()
        self.finish(request)


HTTP = ProbeSpec(http="/health")
ALL_PROBES = Probes(
    startup=ProbeSpec(http="/", deadline_s=10.0),
    readiness=ProbeSpec(http="/", failures=2),
    liveness=ProbeSpec(http="/", failures=2),
)
