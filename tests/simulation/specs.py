"""The fleets that the simulation runs: small, and with one of everything.

Footprints are a few units of one GiB, budgets are such that never all models fit.
"""

from __future__ import annotations

from dataclasses import replace
from random import Random

from fleetd.core.data.specs import (
    Backoff,
    Capabilities,
    CrashLoop,
    Dependency,
    DependencyCondition,
    DeviceSpec,
    FleetSpec,
    Footprint,
    FootprintSource,
    ModelSpec,
    Probes,
    ProbeSpec,
    ProcessKind,
    ProcessSpec,
    QueueLimits,
    RestartMode,
    RestartPolicy,
    Route,
)

GIB = 2**30
RESTART = RestartPolicy(
    backoff=Backoff(initial_s=0.5, factor=2.0, max_s=20.0, jitter=0.25),
    stable_after_s=10.0,
    crash_loop=CrashLoop(count=4, window_s=60.0),
)
STARTUP = ProbeSpec(http="/health", period_s=1.0, deadline_s=20.0)
READINESS = ProbeSpec(http="/health", period_s=4.0, failures=2)
LIVENESS = ProbeSpec(completion=True, period_s=6.0, failures=2)


def service(name: str, **changes: object) -> ProcessSpec:
    spec = ProcessSpec(name, name, ProcessKind.SERVICE, restart=RESTART, launch_hash="1")
    return replace(spec, **changes)  # type: ignore[arg-type]


def server(name: str, **changes: object) -> ProcessSpec:
    """Return a server for many models."""
    spec = service(
        name, kind=ProcessKind.INSTANCE, engine="many", capabilities=Capabilities(many_models=True), drain_timeout_s=5.0
    )
    return replace(spec, probes=Probes(startup=STARTUP, readiness=READINESS), **changes)  # type: ignore[arg-type]


def own(name: str, **changes: object) -> ProcessSpec:
    """Return a process with one model of its own."""
    spec = service(name, kind=ProcessKind.INSTANCE, engine="one", own_model=name, on_demand=True, drain_timeout_s=3.0)
    return replace(spec, probes=Probes(startup=STARTUP, liveness=LIVENESS), **changes)  # type: ignore[arg-type]


def model(name: str, holders: tuple[str, ...] = (), gpu: int = 0, host: int = 0, **changes: object) -> ModelSpec:
    need = {device: size * GIB for device, size in (("gpu0", gpu), ("host", host)) if size}
    spec = ModelSpec(
        name,
        holders or (name,),
        served_as=name,
        footprint=Footprint(need, FootprintSource.ESTIMATED),
        footprint_hash=name,
        ttl_s=40.0,
        min_resident_s=5.0,
        concurrency=2,
        queue_max=6,
        queue_timeout_s=90.0,
        load_timeout_s=25.0,
    )
    return replace(spec, **changes)  # type: ignore[arg-type]


def random_fleet(rng: Random) -> FleetSpec:
    """One of everything, with a few variations."""
    slow = RestartPolicy(
        backoff=RESTART.backoff, crash_loop=CrashLoop(count=3, window_s=30.0, then="slow", every_s=50.0)
    )
    once = RestartPolicy(mode=RestartMode.ON_FAILURE, backoff=RESTART.backoff, crash_loop=RESTART.crash_loop)
    exclusive = Capabilities(exclusive_start=True, exit_zero_is_failure=True, can_sleep=True)
    processes = [
        service("db", probes=Probes(readiness=READINESS, liveness=LIVENESS)),
        service("job", restart=once),
        service("web", depends_on=(Dependency("db"), Dependency("job", DependencyCondition.COMPLETED))),
        service("slow", restart=slow, depends_on=(Dependency("db", DependencyCondition.STARTED),)),
        server("pool-1"),
        server("pool-2", on_demand=rng.random() < 0.5),
        server("far", capabilities=Capabilities(many_models=True, owns_process=False)),
        own("va", lane="gpu0", capabilities=exclusive),
        own("vb", lane="gpu0", capabilities=exclusive, on_demand=rng.random() < 0.6),
        own("vc", lane="gpu0"),
        own("lc", max_age_s=200.0 if rng.random() < 0.3 else None),
        own("ld", memory_limit_bytes=40 * GIB),
    ]
    models = [
        model("m1", ("pool-1", "pool-2"), gpu=3, preload=rng.random() < 0.5, aliases=("gpt",)),
        model("m2", ("pool-1", "pool-2"), gpu=4, host=1, fallback=("m1",)),
        model("m3", ("pool-2",), gpu=2, priority=rng.choice((0, 0, 5))),
        model("big", ("pool-1",), gpu=9),
        model("f1", ("far",)),
        model("va", gpu=5, asleep={"gpu0": GIB, "host": 2 * GIB}),  # its weights go to the host
        model("vb", gpu=4, host=2, fallback=("vc",), pin=rng.random() < 0.2, asleep={"gpu0": GIB, "host": GIB}),
        model("vc", gpu=2),
        model("lc", host=3, fallback=("ld",), ttl_s=15.0),
        model("ld", host=4, gpu=1),
        model("huge", ("pool-1",), gpu=50),
        model("any", (), routes=(Route("m1", 3), Route("lc", 1), Route("f1", 1))),
    ]
    return FleetSpec(
        {spec.name: spec for spec in processes},
        {spec.name: replace(spec, holders=() if spec.routes else spec.holders) for spec in models},
        {
            "gpu0": DeviceSpec("gpu0", "gpu", 12 * GIB, 10 * GIB),
            "host": DeviceSpec("host", "host", 12 * GIB, rng.choice((6, 8)) * GIB),
        },
        QueueLimits(max=24, max_wait_s=20.0),
    )
