"""Random actions on the fleet, one per function, and the way to a calm end.

Each action takes the world and a random source; `ACTIONS` weighs them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from random import Random

from fleetd.core.data import events as e
from fleetd.core.data.journal import Journal
from fleetd.core.data.specs import ExitReport, FleetSpec
from fleetd.core.data.state import SERVING, ProcessState, Residency
from fleetd.core.fleet import Fleet
from tests.simulation.checks import holds
from tests.simulation.specs import random_fleet
from tests.simulation.world import Run, World

NAMES = ("m1", "m2", "m3", "big", "f1", "va", "vb", "vc", "lc", "ld", "gpt", "any", "huge", "nobody")


def process_name(world: World, rng: Random) -> str:
    return rng.choice(sorted(world.spec.processes))


def living(world: World, rng: Random) -> Run | None:
    runs = [run for run in world.living() if run.leader and run.spec.capabilities.owns_process]
    return rng.choice(runs) if runs else None


def pause(world: World, rng: Random) -> None:
    world.advance(rng.choice((0.0, 0.05, 0.5, 2.0, 8.0, 30.0)))


def ask(world: World, rng: Random) -> None:
    name = rng.choice(NAMES)
    avoid = (process_name(world, rng),) if rng.random() < 0.1 else ()
    world.ask(name, avoid)


def ask_many(world: World, rng: Random) -> None:
    for _ in range(rng.randint(2, 10)):
        world.ask(rng.choice(NAMES[:11]))


def cancel(world: World, rng: Random) -> None:
    waiting = [key for key, client in world.clients.items() if client.grant is None]
    if waiting:
        world.cancel(rng.choice(waiting))


def request_load(world: World, rng: Random) -> None:
    world.request_load(rng.choice(NAMES))


def unload(world: World, rng: Random) -> None:
    world.deliver(e.UnloadRequested(rng.choice(NAMES)))


def pin(world: World, rng: Random) -> None:
    name, pinned = rng.choice(NAMES[:10]), rng.random() < 0.4
    if name in world.spec.models:  # a removed model keeps no pin for its return
        world.pins[name] = pinned
    world.deliver(e.PinRequested(name, pinned))


def start(world: World, rng: Random, name: str | None = None) -> None:
    name = name or process_name(world, rng)
    world.stopped.discard(name)
    world.drained.discard(name)
    world.forgive(name)
    world.deliver(e.StartRequested(name))


def stop(world: World, rng: Random) -> None:
    name = process_name(world, rng)
    world.stopped.add(name)
    world.deliver(e.StopRequested(name))


def restart(world: World, rng: Random, name: str | None = None) -> None:
    name = name or process_name(world, rng)
    world.stopped.discard(name)
    world.drained.discard(name)
    world.forgive(name)
    world.deliver(e.RestartRequested(name))


def restart_due(world: World, rng: Random) -> None:
    world.deliver(e.RestartDue(process_name(world, rng), "schedule", in_turn=rng.random() < 0.5))


def drain(world: World, rng: Random) -> None:
    name = process_name(world, rng)
    away = rng.random() < 0.5
    (world.drained.add if away else world.drained.discard)(name)
    world.deliver(e.DrainRequested(name, away))
    for model in sorted(world.spec.models):
        if name in world.spec.models[model].holders:
            world.ask(model)


def crash(world: World, rng: Random) -> None:
    run = living(world, rng)
    if run is not None:
        world.dies(run, ExitReport(rng.choice((0, 1, None)), reason="crashed"))


def crash_loop(world: World, rng: Random) -> None:
    """Make a process die at every start: random steps hardly reach that."""
    run = living(world, rng)
    if run is None:
        return
    world.crashy[run.name] = rng.randint(1, 8)
    world.dies(run, ExitReport(1, reason="crashed"))
    for _ in range(rng.randint(1, 12)):
        world.advance(rng.choice((1.0, 3.0)))


def flapping(world: World, rng: Random) -> None:
    """Make a process die after each stable run."""
    run = living(world, rng)
    for _ in range(rng.randint(1, 5)):
        if run is None:
            return
        world.advance(rng.choice((8.0, 11.0, 14.0)))
        world.dies(run, ExitReport(1, reason="flaps"))
        world.advance(3.0)
        run = world.newest(run.name)
        run = run if run is not None and run.leader else None


def sicken(world: World, rng: Random) -> None:
    run = living(world, rng)
    if run is not None:
        run.sick = rng.random() < 0.5


def unready(world: World, rng: Random) -> None:
    run = living(world, rng)
    if run is not None:
        run.unready = not run.unready


def unplug(world: World, rng: Random) -> None:
    name = process_name(world, rng)
    missing = () if world.missing.get(name) else ("/mnt/models",)
    world.missing[name] = missing
    world.deliver(e.ProcessPrerequisitesChanged(name, missing))


def lose(world: World, rng: Random) -> None:
    """Make a server drop a model by itself."""
    runs = [run for run in world.living() if run.spec.capabilities.many_models and run.models]
    if runs:
        run = rng.choice(runs)
        free = sorted(set(run.models) - run.loads - run.unloads)
        if free:
            del run.models[rng.choice(free)]
            run.changes += 1


def ghost(world: World, rng: Random) -> None:
    """Send an event of an old generation late, or twice."""
    old = [event for name, generation, event in world.past if generation < world.highest.get(name, 0)]
    if old:
        event = rng.choice(old)
        commands = world.fleet.handle(event, world.now)
        holds(world, not commands, f"{event} of a dead generation led to {commands}")


def busy_neighbour(world: World, rng: Random) -> None:
    """Request one model all the time; another that does not fit next to it must get its turn."""
    loved, poor = rng.choice((("va", "big"), ("big", "va"), ("m2", "big"), ("lc", "ld"), ("ld", "lc")))
    want = world.ask(poor)
    for _ in range(90):
        if want not in world.clients:
            break
        world.ask(loved)
        world.advance(0.5)


def take_turns(world: World, rng: Random) -> None:
    """Request sleeping models in turn: each falls asleep for the next and wakes for its own request."""
    names = rng.sample(("va", "vb", "big", "vc"), 3)
    for _ in range(rng.randint(2, 6)):
        for name in names:
            want = world.ask(name)
            for _ in range(30):
                if want not in world.clients or world.clients[want].grant is not None:
                    break
                world.advance(rng.choice((0.5, 2.0)))


def cut_off(world: World, rng: Random) -> None:
    """Restart, kill or unload exactly what is loading or streaming."""
    loading = [run.name for run in world.living() if run.loads]
    if not loading:
        world.request_load(rng.choice(("m1", "m2", "m3", "big")))
        world.advance(0.05)
        loading = [run.name for run in world.living() if run.loads]
    streaming = [client.grant.process for client in world.clients.values() if client.grant is not None]
    waited_for = [client.model for client in world.clients.values() if client.grant is None]
    doomed = world.newest(rng.choice(sorted(loading))) if loading and rng.random() < 0.3 else None
    if doomed is not None:
        world.dies(doomed, ExitReport(None, "SIGSEGV"))
    elif loading and rng.random() < 0.5:
        restart(world, rng, rng.choice(sorted(loading)))
    elif streaming and rng.random() < 0.8:
        restart(world, rng, rng.choice(sorted(streaming)))
    elif waited_for:
        world.deliver(e.UnloadRequested(rng.choice(waited_for)))
    world.advance(rng.choice((1.0, 9.0)))


def come_and_go(world: World, rng: Random) -> None:
    """Remove a name from the configuration, and add it again before or after it is gone."""
    spec = world.spec
    name = process_name(world, rng)
    processes = {key: value for key, value in spec.processes.items() if key != name}
    own = spec.processes[name].own_model
    change(world, replace(spec, processes=processes, models={k: v for k, v in spec.models.items() if k != own}))
    world.advance(rng.choice((0.0, 1.0, 20.0)))
    change(world, spec)


def lose_files(world: World, rng: Random) -> None:
    """Unplug the drive of a model, or plug it in again."""
    name = rng.choice(("m1", "m2", "m3", "big"))
    missing = () if world.missing_models.get(name) else ("/mnt/drive",)
    world.missing_models[name] = missing
    world.deliver(e.ModelPrerequisitesChanged(name, missing))


def edit(world: World, rng: Random) -> None:
    """Change the configuration: a limit, a launch, a name."""
    spec = world.spec
    processes, models = dict(spec.processes), dict(spec.models)
    name = rng.choice(sorted(processes))
    kind = rng.randrange(6)
    if kind == 0:
        processes[name] = replace(processes[name], launch_hash=str(rng.randrange(1000)))
    elif kind == 1:
        processes[name] = replace(processes[name], enabled=not processes[name].enabled)
    elif kind == 2:
        model = rng.choice(sorted(models))
        models[model] = replace(models[model], ttl_s=rng.choice((5.0, 40.0)), concurrency=rng.choice((2, 3)))
    elif kind == 3:
        model = rng.choice(sorted(models))
        del models[model]
        own = processes.get(model)
        if own is not None and own.own_model == model:
            del processes[model]
    elif kind == 4:
        full = random_fleet(Random(world.seed))
        for key in full.processes.keys() - processes.keys():
            processes[key] = full.processes[key]
        for key in full.models.keys() - models.keys():
            models[key] = full.models[key]
    else:
        probes = processes[name].probes
        processes[name] = replace(processes[name], probes=replace(probes, readiness=None, liveness=probes.liveness))
    for key in [key for key in processes if key not in models and processes[key].own_model is not None]:
        del processes[key]
    change(world, replace(spec, processes=processes, models=models))


def change(world: World, spec: FleetSpec) -> None:
    old, world.spec = world.spec, spec
    for name, process in spec.processes.items():
        if old.processes.get(name) != process:
            world.forgive_failed(name)
    for name in old.processes.keys() - spec.processes.keys():
        world.stopped.discard(name)
        world.drained.discard(name)
    for name in old.models.keys() - spec.models.keys():
        world.pins.pop(name, None)
    missing = {name: world.missing.get(name, ()) for name in spec.processes}
    world.deliver(e.SpecChanged(spec, missing=missing, missing_models=dict(world.missing_models)))


def reexec(world: World, _rng: Random) -> None:
    """Restart the daemon: living children are adopted, the rest comes from disk."""
    world.epoch += 1
    adopted = []
    for runs in world.runs.values():
        for run in runs:
            if not run.alive:
                continue
            remembered = world.disk.get(run.name)
            proven = (
                remembered is not None
                and remembered.generation == run.generation
                and run.leader
                and not run.ordered_away
            )
            if not proven or run.name not in world.spec.processes or not run.spec.capabilities.owns_process:
                world.vanish(run)
                continue
            run.reported, run.startup_ok, run.ready_s, run.progress_s = True, False, None, world.now
            run.unobserved = run.spec.capabilities.many_models
            run.ending, run.loads, run.unloads = 0, set(), set()
            if run.nap:  # the pending command continues, or not
                run.asleep, run.nap, run.half_way = world.rng.random() < 0.5, "", True
            run.probes.clear()
            adopted.append(e.Adopted(run.name, run.generation, run.pid, world.now - run.born_s))
    world.ended |= set(world.clients)
    world.clients.clear()
    world.spawning.clear()
    world.drained.clear()
    world.pins.clear()
    world.reserved.clear()
    world.kept_failed = {name for name, kept in world.disk.items() if kept.failed}
    world.row = {name: kept.deaths for name, kept in world.disk.items()}
    world.deaths = {name: list(kept.died_s) for name, kept in world.disk.items()}
    world.restarts.clear()
    world.stopped = {name for name, kept in world.disk.items() if kept.stopped and name in world.spec.processes}
    world.fleet = Fleet(FleetSpec(), Random(world.serial), Journal())
    remembered = dict(world.disk)
    missing = {name: world.missing.get(name, ()) for name in world.spec.processes}
    world.deliver(e.SpecChanged(world.spec, remembered, tuple(adopted), missing, dict(world.missing_models)))
    for name, kept in remembered.items():
        process = world.fleet.processes.get(name)
        holds(
            world, process is None or process.restarts >= kept.restarts, f"{name} forgot its {kept.restarts} restarts"
        )
    world.later(1.0, world._observe_all, shell=True)


ACTIONS: tuple[tuple[Callable[[World, Random], None], int], ...] = (
    (pause, 40), (ask, 40), (ask_many, 8), (cancel, 8), (request_load, 4), (unload, 3), (pin, 3), (start, 6), (stop, 3), (restart, 3),
    (restart_due, 1), (drain, 4), (crash, 5), (crash_loop, 2), (flapping, 1), (sicken, 2), (unready, 2), (unplug, 3), (lose, 2),
    (ghost, 8), (busy_neighbour, 2), (take_turns, 3), (cut_off, 6), (come_and_go, 1), (lose_files, 2), (edit, 3), (reexec, 1),
)  # fmt: skip


def act(world: World, rng: Random, without: tuple[Callable[[World, Random], None], ...] = ()) -> None:
    """Perform one action, chosen by weight."""
    kinds, weights = zip(*(entry for entry in ACTIONS if entry[0] not in without), strict=True)
    rng.choices(kinds, weights)[0](world, rng)


def calm_down(world: World) -> None:
    """Stop all faults and start everything; then the fleet must reach its configuration."""
    rng = world.rng
    world.calm = True
    world.crashy.clear()
    for run in world.living():
        run.sick = run.unready = run.ignores_term = run.unkillable = False
    for name in sorted(world.spec.processes):
        if world.missing.get(name):
            world.missing[name] = ()
            world.deliver(e.ProcessPrerequisitesChanged(name, ()))
    for name in sorted(world.missing_models):
        if world.missing_models[name]:
            world.missing_models[name] = ()
            world.deliver(e.ModelPrerequisitesChanged(name))
    for name in sorted(world.pins):
        world.pins[name] = False
        world.deliver(e.PinRequested(name, False))
    world.advance(150.0)
    holds(world, not world.clients, f"still there after 150 s: {world.clients}")
    for name in sorted(world.spec.processes):
        start(world, rng, name)
    world.advance(320.0)
    converged(world)
    everybody_is_served(world)
    nobody_starves(world)


def converged(world: World) -> None:
    for name, process in world.fleet.processes.items():
        spec = process.spec
        said = f"{name} is {process.state}: {process.reason}"
        if not spec.enabled:
            holds(world, process.state is ProcessState.STOPPED, f"{said}, and is disabled")
        elif spec.own_model is not None:
            model = world.fleet.models[spec.own_model]
            up = process.state is ProcessState.READY
            loaded = model.state is Residency.LOADED
            holds(
                world,
                up == loaded and (up or process.state is ProcessState.STOPPED),
                f"{said}, its model is {model.state}",
            )
        elif spec.depends_on and any(not dependable(world, d.name) for d in spec.depends_on):
            continue
        else:
            good = process.state is ProcessState.READY or (name == "job" and process.state is ProcessState.EXITED)
            holds(world, good, said)
    for name in world.fleet.state.due:
        model = world.fleet.models[name]
        lack = world.fleet.ledger.lacking(model.footprint.bytes)
        able = any(world.spec.processes[p].enabled for p in model.spec.holders if p in world.spec.processes)
        holds(world, lack or model.failure_final or not able, f"{name} is due, and there is room")


def dependable(world: World, name: str) -> bool:
    process = world.fleet.processes.get(name)
    return process is not None and process.spec.enabled and (name != "job" or process.state is ProcessState.EXITED)


def everybody_is_served(world: World) -> None:
    """Request each model in turn: each is granted, or rejected at once for a lasting reason."""
    for name in sorted(world.spec.models):
        spec = world.spec.models[name]
        before = world.outcomes.get("granted", 0)
        request_id = world.ask(name)
        world.advance(90.0)
        holds(world, request_id not in world.clients, f"the request for {name} waits for ever")
        granted = world.outcomes.get("granted", 0) > before
        able = [p for p in spec.holders if p in world.spec.processes and world.spec.processes[p].enabled]
        fits = not world.fleet.ledger.never_fits(world.fleet.models[name].footprint.bytes)
        pins = any(model.pinned for model in world.fleet.models.values())
        if able and fits and not pins and not spec.routes:
            holds(world, granted, f"the request for {name} was refused in a calm fleet: {world.outcomes}")


NEIGHBOURS = (
    ("lc", ("ld",)), ("va", ("m1", "m2")), ("big", ("m1", "m3")), ("big", ("vb", "m2")), ("m2", ("va", "vb")), ("va", ("big",)),
)  # fmt: skip
SLOWEST_S = 10.0 + 5.0 + 5.0 + 2.0  # a request in flight, a start, a load, a stop


def nobody_starves(world: World) -> None:
    """Check that a request gets the room of busy neighbours within the fairness bound."""
    for poor, loved in NEIGHBOURS:
        names = (poor, *loved)
        holders = [p for name in names if name in world.spec.models for p in world.spec.models[name].holders]
        there = all(name in world.spec.models for name in names)
        up = all(p in world.spec.processes and world.spec.processes[p].enabled for p in holders)
        pins = any(model.pinned for model in world.fleet.models.values())
        if not there or not up or pins or world.fleet.ledger.never_fits(world.fleet.models[poor].footprint.bytes):
            continue
        for name in loved:
            world.ask(name)
        world.advance(15.0)
        granted = len(world.grants[poor])
        want = world.ask(poor)
        bound_s = world.spec.queue.max_wait_s + SLOWEST_S
        for _ in range(int(bound_s * 2)):
            if want not in world.clients or world.clients[want].grant is not None:
                break
            for name in loved:
                world.ask(name)
            world.advance(0.5)
        holds(world, len(world.grants[poor]) > granted, f"{poor} waits behind {loved} for more than {bound_s:g} s")
        world.advance(60.0)


def shut_down(world: World) -> None:
    world.shutting_down = True
    world.deliver(e.ShutdownRequested())
    world.advance(60.0)
    holds(world, world.finished or world.living(), "the shutdown does not end")
    holds(
        world,
        world.finished,
        f"the shutdown does not end: {[p for p in world.fleet.processes.values() if p.state in SERVING]}",
    )
    holds(
        world,
        not [run for run in world.living() if run.spec.capabilities.owns_process],
        "something lives after the shutdown",
    )
