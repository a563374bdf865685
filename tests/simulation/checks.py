"""The properties that hold at every moment, checked against the real state of the world.

A violation raises Violation with the last events and commands, newest last.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fleetd.core.data import commands as c
from fleetd.core.data import events as e
from fleetd.core.data.state import RESTING, SERVING, ProcessState, Residency

if TYPE_CHECKING:
    from tests.simulation.world import Client, Run, World

CODES = frozenset({
    "model_not_found", "model_too_large", "queue_full", "queue_timeout", "model_failed", "model_blocked", "draining",
})  # fmt: skip
MEASURED = (e.Loaded, e.ResidentsObserved, e.MemorySampled, e.SpecChanged)


class Violation(AssertionError):
    """A property of the core does not hold."""


def holds(world: World, true: object, message: str) -> None:
    if not true:
        story = "\n  ".join(world.log)
        raise Violation(f"seed {world.seed}, at {world.now:.2f}: {message}\n  {story}")


# -- decisions, before they are carried out -----------------------------------------------------------------------------


def decisions(world: World, event: e.Event, commands: list[c.Command]) -> None:
    world.corrected = world.corrected or isinstance(event, MEASURED)
    for command in commands:
        if isinstance(command, c.Spawn):
            spawn(world, command)
        elif isinstance(command, c.Stop | c.Unload):
            end(world, command)
            ordered = world.run(command.name, command.generation) if isinstance(command, c.Stop) else None
            if ordered is not None:
                ordered.ordered_away = True  # as the next command of this moment finds it
        elif isinstance(command, c.Sweep):
            run = world.run(command.name, command.generation)
            holds(world, run is not None and not run.leader, f"{command}: its leader lives")
        elif isinstance(command, c.Load):
            load(world, command)
        elif isinstance(command, c.Sleep | c.Wake):
            nap(world, command)
        elif isinstance(command, c.Grant):
            grant(world, command)
        elif isinstance(command, c.Reject):
            client = world.clients.get(command.request_id)
            holds(world, client is not None and client.grant is None, f"{command}: no request waits for it")
            holds(world, command.code in CODES, f"{command}: a code that the contract does not know")
            holds(world, len(command.reason) > 5, f"{command}: no reason")
    reservations(world, event)


def spawn(world: World, command: c.Spawn) -> None:
    name = command.name
    alive = [run for run in world.runs.get(name, ()) if run.alive]
    holds(world, not alive, f"{command} while generation {alive and alive[0].generation} lives")
    holds(world, command.generation > world.highest.get(name, 0), f"{command}: the generation does not grow")
    holds(world, name in world.spec.processes, f"{command}: not in the configuration")
    holds(world, name not in world.stopped, f"{command}: stopped by an operator")
    holds(world, not world.missing.get(name), f"{command}: a prerequisite is missing")
    holds(world, not world.shutting_down, f"{command} while shutting down")
    spec = world.spec.processes[name]
    loop = spec.restart.crash_loop
    recent = sum(1 for at in world.deaths.get(name, ()) if at > world.now - loop.window_s)
    holds(world, loop.then != "fail" or recent < loop.count, f"{command} after {recent} deaths: a crash loop")
    for dependency in spec.depends_on:
        other = world.newest(dependency.name)
        if dependency.condition == "ready":
            holds(world, other is not None and other.reported, f"{command}: {dependency.name} never ran")
    if spec.lane is not None:
        for other in world.living():
            same = other.spec.lane == spec.lane and other.name != name
            exclusive = spec.capabilities.exclusive_start or other.spec.capabilities.exclusive_start
            busy = same and exclusive and other.leader and not other.startup_ok
            holds(world, not busy, f"{command} while {other.name} starts on the same lane")
            holds(world, not (same and other.nap), f"{command} while {other.name} is ordered to {other.nap}")


def nap(world: World, command: c.Sleep | c.Wake) -> None:
    """Check that only idle models sleep, only sleepers wake, and nothing else happens meanwhile."""
    run = world.run(command.process, command.generation)
    holds(world, run is not None and run.alive and not run.ordered_away, f"{command}: it does not live")
    assert run is not None
    holds(world, not run.nap, f"{command} while it is ordered to {run.nap}")
    holds(world, run.asleep == isinstance(command, c.Wake), f"{command}: asleep is {run.asleep}")
    holds(world, run.startup_ok, f"{command}: it is still starting")
    if isinstance(command, c.Sleep):
        busy = active(world, command.model, command.process)
        holds(world, not busy, f"{command} while {busy} requests are in flight on it")
        holds(world, not pinned(world, command.model) or world.corrected, f"{command}: it is pinned")
    for other in world.living():
        if other is run or other.spec.lane is None or other.spec.lane != run.spec.lane:
            continue
        holds(world, not other.nap, f"{command} while {other.name} is ordered to {other.nap}")
        starts = other.reported and other.leader and not other.startup_ok and not other.ordered_away
        holds(world, not starts, f"{command} while {other.name} starts on the same lane")


def active(world: World, model: str, process: str, generation: int | None = None) -> int:
    return sum(
        1
        for client in world.clients.values()
        if client.grant is not None
        and client.grant.model == model
        and client.grant.process == process
        and generation in (None, client.grant.generation)
    )


def pinned(world: World, model: str) -> bool:
    spec = world.spec.models.get(model)
    return world.pins.get(model, spec is not None and spec.pin)


def end(world: World, command: c.Stop | c.Unload) -> None:
    """Check that an eviction hits no busy, starting or pinned model."""
    name = command.process if isinstance(command, c.Unload) else command.name
    run = world.run(name, command.generation)
    holds(world, run is not None, f"{command} for a run that never was")
    assert run is not None
    holds(world, run.alive, f"{command}: nothing of it lives")
    model = command.model if isinstance(command, c.Unload) else run.spec.own_model
    if model is None:
        return
    busy = active(world, model, name, command.generation)
    calm_stop(world, command, run)
    for_others = command.reason.startswith(("evicted", "measured", "idle for"))
    if isinstance(command, c.Unload):
        holds(world, not busy, f"{command} while {busy} requests are in flight on it")
    if not for_others:
        return
    holds(world, not busy, f"{command} while {busy} requests are in flight on it")
    holds(world, not pinned(world, model) or world.corrected, f"{command}: it is pinned")
    if isinstance(command, c.Unload):
        holds(world, model not in run.loads, f"{command} while it is loading")
    else:
        ready = run.startup_ok or run.spec.probes.startup is None
        holds(world, ready, f"{command} while it is starting")
    spec = world.spec.models.get(model)
    if command.reason.startswith("idle for") and spec is not None:
        idle_s = world.now - world.last_end.get((model, name, command.generation), 0.0)
        holds(world, idle_s >= spec.ttl_s - 1e-6 or world.corrected, f"{command} after {idle_s:.2f} s")


def calm_stop(world: World, command: c.Stop | c.Unload, run: Run) -> None:
    """Check that nothing stops on an exclusive lane while another process starts."""
    orders = ("evicted", "idle for", "unloaded by", "stopped by", "restarted by", "measured", "older than")
    if run.spec.lane is None or world.shutting_down or not command.reason.startswith(orders) or not run.startup_ok:
        return
    for other in world.living():
        starts = other.spec.lane == run.spec.lane and other is not run and other.reported and not other.startup_ok
        starts = starts and other.leader and not other.ordered_away and other.spec.capabilities.exclusive_start
        holds(world, not starts, f"{command} while {other.name} starts on the same lane")
        dozes = other.nap if other.spec.lane == run.spec.lane and other is not run and not other.ordered_away else ""
        holds(world, not dozes, f"{command} while {other.name} is ordered to {dozes}")


def fulfilled(world: World, client: Client) -> None:
    """Check that an operator's load that left the queue without a rejection is in memory."""
    names = {client.model, world.fleet.state.names.get(client.model, "")}
    spec = world.spec.models.get(client.model)
    names |= {route.to for route in spec.routes} if spec is not None else set()
    names |= {back for name in names if name in world.spec.models for back in world.spec.models[name].fallback}
    loaded = any(
        model.state is Residency.LOADED or model.loads + model.wakes > client.loads.get(model.name, 0)
        for name in names
        if (model := world.fleet.models.get(name)) is not None
    )
    holds(world, loaded, f"the load of {client.model} is reported as done, and nothing is loaded")


def load(world: World, command: c.Load) -> None:
    run = world.run(command.process, command.generation)
    external = not world.spec.processes[command.process].capabilities.owns_process
    holds(world, external or (run is not None and run.alive), f"{command}: the server does not live")
    if run is not None:
        holds(world, run.startup_ok or run.spec.probes.startup is None, f"{command}: the server is still starting")
    holds(world, command.process not in world.stopped, f"{command}: stopped by an operator")


def grant(world: World, command: c.Grant) -> None:
    client = world.clients.get(command.request_id)
    holds(
        world, client is not None and client.grant is None and not client.is_load, f"{command}: no request waits for it"
    )
    holds(world, command.process not in world.stopped, f"{command}: stopped by an operator")
    holds(world, command.process not in world.drained, f"{command}: drained by an operator")
    holds(world, not world.shutting_down, f"{command} while shutting down")
    run = world.run(command.process, command.generation)
    holds(world, run is not None, f"{command}: no such run")
    assert run is not None
    newest = world.newest(command.process)
    holds(world, run is newest, f"{command}: an older generation")
    holds(world, not run.ordered_away, f"{command}: it was ordered to stop")
    holds(world, run.startup_ok or run.spec.probes.startup is None, f"{command}: not ready")
    holds(world, command.model not in run.loads | run.unloads, f"{command}: the model is on its way")
    holds(world, not run.asleep and not run.nap, f"{command}: it sleeps, or is ordered to {run.nap}")
    spec = world.spec.models.get(command.model)
    holds(world, spec is not None, f"{command}: not in the configuration")
    assert spec is not None
    taken = active(world, command.model, command.process, command.generation)
    holds(world, taken < spec.concurrency, f"{command}: all {taken} slots are taken")


def reservations(world: World, event: e.Event) -> None:
    ledger = world.fleet.ledger
    keys = set(ledger.reservations)
    sums: dict[str, int] = {}
    for need in ledger.reservations.values():
        for device, size in need.items():
            sums[device] = sums.get(device, 0) + size
    for device, spec in ledger.devices.items():
        holds(world, sums.get(device, 0) == ledger.reserved_bytes(device), f"the ledger of {device} does not add up")
        over = sums.get(device, 0) > spec.budget_bytes
        fresh = [key for key in keys - world.reserved if device in ledger.reservations[key]]
        found = isinstance(event, e.ResidentsObserved | e.SpecChanged)
        holds(world, not over or world.corrected, f"{device} is over its budget: {ledger.reservations}")
        holds(world, not over or found or not fresh, f"{fresh} was reserved on {device}, which is over its budget")
    if not ledger.excess():
        world.corrected = False
    world.reserved = keys


# -- the state after every event ----------------------------------------------------------------------------------------


def state(world: World) -> None:
    memory(world)
    requests(world)
    for process in world.fleet.processes.values():
        waiting_states(world, process.name)
        known, before = world.restarts.get(process.name, (None, 0))
        before = before if known is process else 0
        holds(world, process.restarts >= before, f"the restarts of {process.name} went down")
        world.restarts[process.name] = (process, process.restarts)
    residencies(world)


def memory(world: World) -> None:
    """Check that real memory is reserved, and fits if all footprints are correct."""
    used: dict[str, int] = {}
    ledger = world.fleet.ledger
    for run in world.living():
        for model, size in run.models.items():
            for device, count in size.items():
                used[device] = used.get(device, 0) + count
            known = (model, run.name) in ledger.reservations
            ours = run.spec.capabilities.owns_process and not run.unobserved
            holds(world, known or not ours, f"{model} is in the memory of {run.name}, and nothing is reserved for it")
            booked = ledger.reservations.get((model, run.name), {})
            short = (
                run.asleep
                and not run.half_way
                and world.honest
                and any(booked.get(d, 0) < count for d, count in size.items())
            )
            holds(
                world, not short or not run.alive, f"{model} sleeps on {run.name} with {size}, and {booked} is reserved"
            )
    given_up = any(run.unobserved and run.name not in world.fleet.state.unobserved for run in world.living())
    if world.honest and not world.corrected and not given_up:
        for device, spec in world.spec.devices.items():
            fits = used.get(device, 0) <= spec.budget_bytes
            holds(world, fits, f"{used.get(device, 0)} bytes in use on {device}, budget {spec.budget_bytes}")


def requests(world: World) -> None:
    state = world.fleet.state
    waiting = {key for key, client in world.clients.items() if client.grant is None}
    holds(world, set(state.queue) == waiting, f"in line: {set(state.queue)}, waiting: {waiting}")
    granted = {key for key, client in world.clients.items() if client.grant is not None}
    holds(world, set(state.granted) == granted, f"granted: {set(state.granted)}, in flight: {granted}")
    for key in waiting:
        client = world.clients[key]
        waited_s = world.now - client.arrived_s
        longest_s = 25.0 if client.is_load else 90.0
        holds(world, waited_s <= longest_s + 1e-6, f"request {key} for {client.model} waits for {waited_s:.1f} s")
    counts: dict[str, int] = {}
    for entry in state.queue.values():
        counts[entry.model] = counts.get(entry.model, 0) + 1
        others = [name for name in entry.fallback if serves(world, name)]
        stuck = others and lost(world, entry.model)
        holds(
            world, not stuck, f"request {entry.request_id} waits for {entry.model}, which is lost, and {others} serve"
        )
    for model in world.fleet.models.values():
        holds(world, model.waiting == counts.get(model.name, 0), f"{model.name} counts {model.waiting} waiting")


def lost(world: World, name: str) -> bool:
    """Return whether every process of the model is in backoff or does not answer."""
    model = world.fleet.models[name]
    states = [world.fleet.processes[holder].state for holder in model.spec.holders if holder in world.fleet.processes]
    return bool(states) and all(state in (ProcessState.BACKOFF, ProcessState.UNHEALTHY) for state in states)


def serves(world: World, name: str) -> bool:
    """Return whether the model is loaded on a ready process with a free slot."""
    model = world.fleet.models.get(world.fleet.state.names.get(name, name))
    return model is not None and any(
        placement.state is Residency.LOADED
        and placement.in_flight < model.spec.concurrency
        and placement.closing is None
        and world.fleet.processes[process].state is ProcessState.READY
        and not world.fleet.processes[process].drained
        for process, placement in model.placements.items()
    )


def waiting_states(world: World, name: str) -> None:
    """Check that every waiting state has a pending answer or a deadline."""
    process = world.fleet.processes[name]
    run = world.run(name, process.generation)
    owns = process.spec.capabilities.owns_process
    if process.state is ProcessState.BACKOFF:
        due_s = process.next_start_s
        holds(world, due_s is not None, f"{name} is in BACKOFF without a next time")
        assert due_s is not None
        backoff, loop = process.spec.restart.backoff, process.spec.restart.crash_loop
        row = max(1, world.row.get(name, 1))
        longest_s = min(backoff.max_s, backoff.initial_s * backoff.factor ** min(row - 1, 30) * (1 + backoff.jitter))
        slow = loop.then == "slow" and (len(world.deaths.get(name, ())) >= loop.count or name in world.hopeless)
        longest_s = max(longest_s, loop.every_s if slow else 0.0)
        if owns:
            pause_s = due_s - process.since_s
            holds(world, pause_s <= longest_s + 1e-6, f"{name} pauses {pause_s:.1f} s after {row} deaths in a row")
    elif (
        process.state is ProcessState.FAILED
        and process.reason.startswith("crashed ")
        and process.spec.restart.crash_loop.then == "fail"
    ):
        deaths = len(world.deaths.get(name, ()))
        holds(
            world,
            name in world.kept_failed or deaths >= process.spec.restart.crash_loop.count,
            f"{name} gave up after {deaths} deaths",
        )
    elif process.state is ProcessState.STOPPING:
        holds(world, run is not None and run.ending > 0, f"{name} is STOPPING, and no stop is pending")
    elif process.state is ProcessState.STARTING:
        starting(world, name, run)
    elif process.state in SERVING and owns:
        holds(world, run is not None and run.reported, f"{name} is {process.state}, and was never spawned")
        if run is not None and run.ready_s is None:
            run.ready_s = world.now
        stuck = process.state is ProcessState.DRAINING and not process.drained and process.leave_s is None
        holds(world, not stuck, f"{name} drains for no reason")


def starting(world: World, name: str, run: Run | None) -> None:
    process = world.fleet.processes[name]
    if not process.spawned:
        holds(world, (name, process.generation) in world.spawning, f"{name} is STARTING, and no spawn is pending")
        return
    holds(world, run is not None and bool(run.probes), f"{name} is STARTING without a probe")
    startup = process.spec.probes.startup
    if (
        run is not None
        and startup is not None
        and startup.deadline_s is not None
        and not run.startup_ok
        and run.spec.capabilities.owns_process
    ):
        late_s = world.now - run.progress_s - startup.deadline_s
        holds(
            world, late_s <= 1e-6 or process.startup_done, f"{name} is still starting {late_s:.1f} s after its deadline"
        )


def residencies(world: World) -> None:
    fleet = world.fleet
    deadline = fleet.next_deadline()
    for model in fleet.models.values():
        for placement in model.placements.values():
            process = fleet.processes[placement.process]
            run = world.run(placement.process, placement.generation)
            exact = active(world, model.name, placement.process, placement.generation)
            if placement.state is Residency.LOADING:
                exact = 0  # requests still in flight belong to an earlier run
            most = active(world, model.name, placement.process)
            said = f"{model.name} on {placement.process} ({placement.state})"
            holds(world, exact <= placement.in_flight <= most, f"{said} counts {placement.in_flight}, really {exact}")
            if placement.state is Residency.UNLOADING and process.spec.own_model is None:
                asked = run is not None and model.name in run.unloads
                going = process.state not in SERVING
                retry = deadline is not None and placement.retry_s > world.now - 1e-6
                holds(world, asked or going or retry, f"{said} and no unload is pending")
            elif placement.state is Residency.LOADING and placement.ordered:
                asked = (
                    run is not None and (model.name in run.loads or placement.step) and run is world.newest(run.name)
                )
                going = process.state not in SERVING
                holds(world, asked or going, f"{said} and no load is pending")
            elif placement.state is Residency.LOADING and process.state in RESTING:
                hope = process.state in (ProcessState.BACKOFF, ProcessState.BLOCKED) and not process.missing
                holds(world, hope, f"{said}, but {process.name} is {process.state}: {process.reason}")
            if placement.state is Residency.LOADED and placement.evicted:
                holds(world, False, f"{said} was evicted with {exact} requests in flight")
