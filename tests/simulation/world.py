"""A simulated machine: processes that run, crash, hang and use memory, and a daemon that executes the commands of the core.

Invariants:
- Time is virtual and moves only in `advance`. Everything that happens comes out of one seeded random source.
- The world knows what really is: who lives, who holds which memory, which request is where. `checks.py` compares it with the core.
- The shell keeps the contract of `core/commands.py`: every slow command has one answer, sooner or later, in any order.
"""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random

from fleetd.core.data import commands as c
from fleetd.core.data import events as e
from fleetd.core.data.journal import Journal
from fleetd.core.data.specs import ExitReport, FleetSpec, ProbeKind, ProbeSpec, ProcessSpec, Remembered, SleepState
from fleetd.core.data.state import SERVING, ProcessState
from fleetd.core.fleet import Fleet
from tests.simulation import checks

STOP_GRACE_S = 5.0
OWN_FAILURE = ("liveness probe failed", "not ready within", "sleep failed", "wake failed", "check failed")


@dataclass
class Run:
    """One generation of one process: its real state."""

    name: str
    generation: int
    pid: int
    spec: ProcessSpec
    born_s: float
    alive: bool = True  # a process of its set lives
    leader: bool = True
    reported: bool = False  # Spawned was delivered
    startup_ok: bool = False  # delivered
    ready_s: float | None = None  # delivered
    progress_s: float = 0.0
    boots_s: float = 1.0
    sick: bool = False  # liveness fails
    unready: bool = False  # readiness fails
    ignores_term: bool = False
    unkillable: bool = False
    probes: dict[ProbeKind, int] = field(default_factory=dict)
    models: dict[str, dict[str, int]] = field(default_factory=dict)
    loads: set[str] = field(default_factory=set)
    unloads: set[str] = field(default_factory=set)
    asleep: bool = False
    nap: str = ""  # sleep or wake, without an answer
    half_way: bool = False  # the daemon exited before the answer
    ending: int = 0  # Stop and Sweep without an answer
    ordered_away: bool = False
    unobserved: bool = False
    changes: int = 0  # loads and unloads begun or ended


@dataclass
class Client:
    request_id: int
    model: str
    arrived_s: float
    is_load: bool = False
    grant: c.Grant | None = None
    loads: dict[str, int] = field(default_factory=dict)  # of every model, when an operator requested a load


class World:
    """`honest`: every footprint is right, so real memory may never exceed a budget. `calm`: nothing goes wrong."""

    def __init__(self, spec: FleetSpec, seed: int, honest: bool = True, journal: Journal | None = None) -> None:
        self.rng = Random(seed)
        self.seed = seed
        self.honest = honest
        self.calm = False
        self.weather = 1.0 if seed % 2 else 0.2  # rate of random faults
        self.now = 100.0
        self.spec = spec
        self.heap: list[tuple[float, int, bool, Callable[[], None]]] = []
        self.serial = 0
        self.epoch = 0  # daemons so far
        self.runs: dict[str, list[Run]] = {}
        self.clients: dict[int, Client] = {}  # waiting or granted
        self.ended: set[int] = set()
        self.outcomes: dict[str, int] = {}
        self.grants: dict[str, list[float]] = defaultdict(list)
        self.disk: dict[str, Remembered] = {}
        self.missing: dict[str, tuple[str, ...]] = {}
        self.missing_models: dict[str, tuple[str, ...]] = {}
        self.stopped: set[str] = set()
        self.drained: set[str] = set()
        self.pins: dict[str, bool] = {}
        self.spawning: dict[tuple[str, int], bool] = {}
        self.highest: dict[str, int] = {}
        self.deaths: dict[str, list[float]] = {}
        self.kept_failed: set[str] = set()  # FAILED before the daemon restarted
        self.row: dict[str, int] = {}  # deaths since the last stable run
        self.hopeless: set[str] = set()  # could not be started, and a retry cannot help
        self.last_end: dict[tuple[str, str, int], float] = {}
        self.past: list[tuple[str, int, e.Event]] = []
        self.crashy: dict[str, int] = {}  # starts that will crash
        self.restarts: dict[str, tuple[object, int]] = {}
        self.shutting_down = self.finished = False
        self.reserved: set[tuple[str, str]] = set()
        self.corrected = False
        self.steps = 0
        self.log: list[str] = []
        self.fleet = Fleet(FleetSpec(), Random(seed), journal)
        self.deliver(e.SpecChanged(spec))
        self.later(3.0, self._observe_all, shell=True)

    # -- time -------------------------------------------------------------------------------------------------------------

    def later(self, delay_s: float, act: Callable[[], None], shell: bool = False) -> None:
        """Schedule a call; `shell` calls are dropped with the daemon."""
        self.serial += 1
        epoch = self.epoch

        def guarded() -> None:
            if not shell or epoch == self.epoch:
                act()

        heapq.heappush(self.heap, (self.now + delay_s, self.serial, shell, guarded))

    def say(self, delay_s: float, event: e.Event) -> None:
        self.later(delay_s, lambda: self.deliver(event), shell=True)

    def advance(self, seconds: float) -> None:
        end = self.now + seconds
        while True:
            deadline = self.fleet.next_deadline()
            first = self.heap[0][0] if self.heap else None
            if deadline is not None and deadline <= end and (first is None or deadline <= first):
                self.now = max(self.now, deadline)
                self.deliver(e.Tick())
                after = self.fleet.next_deadline()
                checks.holds(self, after is None or after > self.now, f"the deadline {after} does not move on")
            elif first is not None and first <= end:
                self.now = max(self.now, first)
                heapq.heappop(self.heap)[3]()
            else:
                break
        self.now = end

    def deliver(self, event: e.Event) -> None:
        """Send the core one event, execute its commands, and check everything."""
        self.steps += 1
        if self.rng.random() < 0.5:
            deadline = self.fleet.next_deadline()
            if deadline is None or deadline > self.now:
                early = self.fleet.handle(e.Tick(), self.now)
                checks.holds(self, not early, f"something was due that no deadline named: {early}")
        self._note(event)
        self.log.append(f"{self.now:.2f} {event!r:.300}")
        del self.log[:-60]
        commands = self.fleet.handle(event, self.now)
        for command in commands:
            self.log.append(f"{self.now:.2f}     {command!r:.200}")
        checks.decisions(self, event, commands)
        for command in commands:
            self._carry_out(command)
        for key in [k for k, client in self.clients.items() if client.is_load and k not in self.fleet.state.queue]:
            checks.fulfilled(self, self.clients.pop(key))
            self.ended.add(key)
        again = self.fleet.handle(e.Tick(), self.now) if self.rng.random() < 0.7 else []
        checks.holds(self, not again, f"the same state gave a new decision: {again}")
        checks.state(self)

    def _note(self, event: e.Event) -> None:
        """Record what the daemon knows once it has reported it."""
        generation = getattr(event, "generation", None)
        name = getattr(event, "name", None) or getattr(event, "process", None)
        if generation is None or name is None or isinstance(event, e.Adopted):
            return
        self.past.append((name, generation, event))
        del self.past[:-300]
        run = self.run(name, generation)
        if isinstance(event, e.Spawned | e.SpawnFailed):
            self.spawning.pop((name, generation), None)
        if isinstance(event, e.SpawnFailed):
            self.count_death(name)
            if not event.recoverable:
                self.hopeless.add(name)
        if run is None:
            return
        if isinstance(event, e.Spawned):
            run.reported, run.progress_s = True, self.now
        elif isinstance(event, e.StartProgress):
            run.progress_s = self.now
        elif isinstance(event, e.ProbeResult) and event.probe is ProbeKind.STARTUP and event.ok:
            run.startup_ok = True
        elif isinstance(event, e.Exited) and not run.ordered_away:
            self.count_death(name)
        elif isinstance(event, e.SetEmpty):
            run.ending -= 1
        elif isinstance(event, e.Loaded | e.LoadFailed):
            run.loads.discard(event.model)
        elif isinstance(event, e.Unloaded | e.UnloadFailed):
            run.unloads.discard(event.model)
        elif isinstance(event, e.ResidentsObserved):
            run.unobserved = False

    def count_death(self, name: str) -> None:
        """Count a death of the restart policy."""
        run = self.run(name, self.highest.get(name, 0))
        stable = (
            run is not None and run.ready_s is not None and self.now - run.ready_s >= run.spec.restart.stable_after_s
        )
        self.row[name] = 1 if stable else self.row.get(name, 0) + 1
        self.deaths.setdefault(name, []).append(self.now)

    def forgive(self, name: str) -> None:
        self.row.pop(name, None)
        self.deaths.pop(name, None)
        self.kept_failed.discard(name)
        self.hopeless.discard(name)
        process = self.fleet.processes.get(name)
        if process is not None and process.outcome is not None:  # dead, and counted when its set is empty
            self.row[name], self.deaths[name] = 1, [self.now]

    def forgive_failed(self, name: str) -> None:
        """Let an edit retry a failed process."""
        process = self.fleet.processes.get(name)
        if process is None or process.state in (ProcessState.FAILED, ProcessState.EXITED):
            self.forgive(name)

    # -- processes ----------------------------------------------------------------------------------------------------------

    def run(self, name: str, generation: int) -> Run | None:
        return next((run for run in self.runs.get(name, ()) if run.generation == generation), None)

    def newest(self, name: str) -> Run | None:
        runs = self.runs.get(name)
        return runs[-1] if runs else None

    def living(self) -> list[Run]:
        return [run for runs in self.runs.values() for run in runs if run.alive]

    def chance(self, probability: float) -> bool:
        return not self.calm and self.rng.random() < probability * self.weather

    def soon(self) -> float:
        return self.rng.choice((0.0, 0.0, 0.01, 0.1, 0.4))

    def _carry_out(self, command: c.Command) -> None:
        getattr(self, f"_do_{type(command).__name__.lower()}")(command)

    def _do_spawn(self, command: c.Spawn) -> None:
        name, generation = command.name, command.generation
        self.highest[name] = generation
        self.spawning[(name, generation)] = True
        spec = self.spec.processes[name]
        if self.chance(0.05):
            self.say(self.soon(), e.SpawnFailed(name, generation, "no such file", recoverable=self.rng.random() < 0.7))
            return
        run = Run(name, generation, 1000 + self.serial, spec, self.now)
        run.boots_s = self.rng.choice((0.1, 1.0, 4.0)) if not self.chance(0.08) else 1e9
        run.ignores_term, run.unkillable = self.chance(0.2), self.chance(0.03)
        if spec.own_model is not None:
            run.models[spec.own_model] = self.truth(spec.own_model)
        self.runs[name] = [*self.runs.get(name, [])[-3:], run]
        if name in self.crashy and not self.calm:
            self.crashy[name] -= 1
            if not self.crashy[name]:
                del self.crashy[name]
            self.later(self.rng.choice((0.0, 0.05, 0.5)), lambda: self.dies(run, ExitReport(1, reason="bug")))
        elif self.chance(0.08):
            code = self.rng.choice((0, 1, 137))
            self.later(self.rng.uniform(0, 60), lambda: self.dies(run, ExitReport(code, reason="by itself")))
        elif name == "job" and self.rng.random() < 0.7:
            self.later(2.0, lambda: self.dies(run, ExitReport(0, reason="done")))
        self.say(self.soon(), e.Spawned(name, generation, run.pid))

    def truth(self, model: str) -> dict[str, int]:
        """Return the real memory of a model."""
        need = dict(self.spec.models[model].footprint.bytes) if model in self.spec.models else {}
        if self.honest or self.rng.random() < 0.6:
            return need
        return {device: int(size * self.rng.choice((0.7, 1.2, 1.6))) for device, size in need.items()}

    def dies(self, run: Run, report: ExitReport) -> None:
        """End the leader; its descendants may live until they are swept."""
        if not run.leader:
            return
        run.leader = False
        for model in sorted(run.loads):
            self.say(self.soon(), e.LoadFailed(model, run.name, run.generation, f"{run.name} ended"))
        for model in sorted(run.unloads):
            self.say(self.soon(), e.UnloadFailed(model, run.name, run.generation, f"{run.name} ended"))
        self._nap_breaks(run)
        self._break_streams(run)
        self.say(self.soon() / 4, e.Exited(run.name, run.generation, report))

    def _break_streams(self, run: Run) -> None:
        for client in list(self.clients.values()):
            grant = client.grant
            if grant is not None and (grant.process, grant.generation) == (run.name, run.generation):
                self.later(self.soon(), lambda key=client.request_id: self.finish(key, failed=True), shell=True)  # type: ignore[misc]

    def _do_stop(self, command: c.Stop) -> None:
        run = self.run(command.name, command.generation)
        assert run is not None
        run.ordered_away = True
        if command.reason.startswith(OWN_FAILURE):
            self.count_death(run.name)
        run.ending += 1
        polite_s = 0.2 if not run.ignores_term else STOP_GRACE_S
        self.later(0.1 if command.force else self.rng.uniform(0, polite_s), lambda: self._kill(run), shell=True)

    def _do_sweep(self, command: c.Sweep) -> None:
        run = self.run(command.name, command.generation)
        assert run is not None
        run.ending += 1
        run.ordered_away = True
        self.later(self.soon(), lambda: self._kill(run), shell=True)

    def _kill(self, run: Run) -> None:
        empty = e.SetEmpty(run.name, run.generation, (run.pid,) if run.unkillable and run.alive else ())
        if empty.survivors:
            self.later(100.0 if self.calm else 200.0, lambda: self._thaw(run))
            run.leader = False
        else:
            first = run.leader and self.rng.random() < 0.6
            if run.leader:
                run.leader = False
                report = e.Exited(run.name, run.generation, ExitReport(None, "SIGTERM"))
                self.say(0.0 if first else 0.3, report)
            self.vanish(run)
        self._nap_breaks(run)
        self._break_streams(run)
        for model in sorted(run.loads):
            late_s = self.rng.choice((0.0, 0.4, 6.0))
            self.say(late_s, e.LoadFailed(model, run.name, run.generation, f"{run.name} ended"))
        for model in sorted(run.unloads):
            self.say(self.soon(), e.UnloadFailed(model, run.name, run.generation, f"{run.name} ended"))
        self.say(0.0, empty)

    def _thaw(self, run: Run) -> None:
        run.unkillable = False
        self.vanish(run)

    def vanish(self, run: Run) -> None:
        run.alive = run.leader = False
        run.models.clear()
        run.probes.clear()

    # -- probes -----------------------------------------------------------------------------------------------------------------

    def _do_startprobe(self, command: c.StartProbe) -> None:
        run = self.run(command.name, command.generation)
        spec = self.spec.processes[command.name]
        if run is None:  # an external server is assumed to run
            run = Run(command.name, command.generation, 0, spec, self.now, reported=True)
            run.boots_s = 0.5
            self.runs[command.name] = [*self.runs.get(command.name, [])[-3:], run]
        self.serial += 1
        run.probes[command.probe] = self.serial
        token = self.serial
        probe = getattr(spec.probes, command.probe.value)
        checks.holds(self, probe is not None, f"{command} for a process without that probe")
        self.later(self.rng.uniform(0, 0.3), lambda: self._probe(run, command.probe, probe, token), shell=True)

    def _do_stopprobes(self, command: c.StopProbes) -> None:
        run = self.run(command.name, command.generation)
        if run is not None:
            run.probes.clear()

    def _probe(self, run: Run, kind: ProbeKind, spec: ProbeSpec, token: int) -> None:
        if run.probes.get(kind) != token:
            return
        booted = run.leader and (self.now >= run.born_s + run.boots_s or self.calm)
        ok = booted and not (run.sick if kind is ProbeKind.LIVENESS else run.unready and kind is ProbeKind.READINESS)
        self.say(self.soon() / 8, e.ProbeResult(run.name, run.generation, kind, ok, "" if ok else "no answer"))
        if kind is ProbeKind.STARTUP and not ok and self.chance(0.2):
            self.say(0.0, e.StartProgress(run.name, run.generation, "loading"))
        if not (kind is ProbeKind.STARTUP and ok):
            self.later(spec.period_s, lambda: self._probe(run, kind, spec, token), shell=True)

    # -- models -----------------------------------------------------------------------------------------------------------------

    def _do_load(self, command: c.Load) -> None:
        run = self.run(command.process, command.generation)
        if run is None:
            run = self.newest(command.process) or Run(
                command.process, command.generation, 0, self.spec.processes[command.process], self.now, reported=True
            )
            self.runs.setdefault(command.process, []).append(run)
            run.generation = command.generation
        model = command.model
        checks.holds(self, model not in run.loads, f"{command} while a load of it is not answered")
        run.loads.add(model)
        run.changes += 1
        if not run.leader:
            self.say(self.soon(), e.LoadFailed(model, run.name, run.generation, f"{run.name} is gone"))
            return
        run.models[model] = self.truth(model)
        hangs = self.chance(0.06)
        fails = hangs or self.chance(0.08)
        timeout_s = self.spec.models[model].load_timeout_s if model in self.spec.models else 25.0
        delay_s = timeout_s if hangs else self.rng.choice((0.1, 1.0, 5.0))
        self.later(delay_s, lambda: self._load_ends(run, model, fails), shell=True)

    def _load_ends(self, run: Run, model: str, fails: bool) -> None:
        if not run.leader:
            return  # its death answered already
        run.changes += 1
        if fails:
            run.models.pop(model, None)
            self.deliver(e.LoadFailed(model, run.name, run.generation, "cannot load", self.rng.random() < 0.8))
        else:
            measured = run.models.get(model, {}) if self.rng.random() < 0.7 else {}
            self.deliver(e.Loaded(model, run.name, run.generation, dict(measured)))

    def _do_unload(self, command: c.Unload) -> None:
        run = self.run(command.process, command.generation)
        assert run is not None
        checks.holds(self, command.model not in run.unloads, f"{command} while an unload of it is not answered")
        checks.holds(self, command.model not in run.loads, f"{command} while its load is not answered")
        run.unloads.add(command.model)
        run.changes += 1
        if not run.leader:
            self.say(self.soon(), e.UnloadFailed(command.model, run.name, run.generation, f"{run.name} is gone"))
            return
        self.later(self.rng.choice((0.1, 0.5, 2.0)), lambda: self._unload_ends(run, command.model), shell=True)

    def _unload_ends(self, run: Run, model: str) -> None:
        if not run.leader:
            return
        run.changes += 1
        if self.chance(0.1):
            self.deliver(e.UnloadFailed(model, run.name, run.generation, "busy"))
        else:
            run.models.pop(model, None)
            self.deliver(e.Unloaded(model, run.name, run.generation))

    # -- sleep ------------------------------------------------------------------------------------------------------------------

    def _do_sleep(self, command: c.Sleep) -> None:
        self._nap(command, "sleep", self.asleep_truth(command.model))

    def _do_wake(self, command: c.Wake) -> None:
        self._nap(command, "wake", self.truth(command.model))

    def _do_checksleep(self, command: c.CheckSleep) -> None:
        run = self.run(command.process, command.generation)
        assert run is not None
        state = SleepState.ASLEEP if run.asleep else SleepState.AWAKE
        if not run.leader or self.chance(0.1) or (run.asleep and run.half_way):
            state = SleepState.FAILED
        self.say(self.soon(), e.SleepSeen(command.model, command.process, command.generation, state, "asked"))

    def asleep_truth(self, model: str) -> dict[str, int]:
        need = dict(self.spec.models[model].asleep or {}) if model in self.spec.models else {}
        if self.honest or self.rng.random() < 0.6:
            return need
        return {device: int(size * self.rng.choice((0.7, 1.2, 1.6))) for device, size in need.items()}

    def _nap(self, command: c.Sleep | c.Wake, kind: str, target: dict[str, int]) -> None:
        """Use the larger size meanwhile; a failure keeps it, and a hang is reported late or never."""
        run = self.run(command.process, command.generation)
        assert run is not None
        run.nap = kind
        if not run.leader:
            self._nap_breaks(run)
            return
        held = run.models.get(command.model, {})
        run.models[command.model] = {d: max(held.get(d, 0), target.get(d, 0)) for d in {**held, **target}}
        hangs, fails = self.chance(0.06), self.chance(0.1)
        if hangs and self.rng.random() < 0.5:
            return
        delay_s = 25.0 if hangs else self.rng.choice((0.1, 0.5, 3.0))
        self.later(delay_s, lambda: self._nap_ends(run, command.model, hangs or fails, target), shell=True)

    def _nap_ends(self, run: Run, model: str, fails: bool, target: dict[str, int]) -> None:
        if not run.leader or not run.nap:
            return
        kind, run.nap, run.half_way = run.nap, "", False
        if fails:
            wrong = SleepState.ASLEEP if kind == "wake" else SleepState.AWAKE
            state = self.rng.choice((SleepState.FAILED, wrong))
            self.deliver(e.SleepSeen(model, run.name, run.generation, state, "it went wrong"))
            return
        run.asleep = kind == "sleep"
        if run.asleep:
            run.models[model] = target
        state = SleepState.ASLEEP if run.asleep else SleepState.AWAKE
        self.deliver(e.SleepSeen(model, run.name, run.generation, state))

    def _nap_breaks(self, run: Run) -> None:
        if run.nap and run.spec.own_model is not None:
            run.nap = ""
            gone = e.SleepSeen(run.spec.own_model, run.name, run.generation, SleepState.FAILED, f"{run.name} ended")
            self.say(self.soon(), gone)

    def _observe_all(self) -> None:
        """Report the models of all servers, as the daemon does; the answer may be a little old."""
        for name, spec in list(self.spec.processes.items()):
            process = self.fleet.processes.get(name)
            run = self.newest(name)
            if process is None or run is None or process.state not in SERVING or run.generation != process.generation:
                continue
            if spec.own_model is not None:
                self._sample(run)
            elif spec.capabilities.many_models and run.leader and not run.loads and not run.unloads:
                held = {model: dict(size) for model, size in run.models.items()}
                event, changes = e.ResidentsObserved(name, run.generation, held), run.changes
                self.later(
                    self.rng.choice((0.0, 0.0, 2.0)),
                    lambda a=run, b=event, d=changes: self._observed(a, b, d),
                    shell=True,
                )  # type: ignore[misc]
        self.later(3.0, self._observe_all, shell=True)

    def _observed(self, run: Run, event: e.ResidentsObserved, changes: int) -> None:
        if self.rng.random() < 0.5 and run.changes != changes:
            return  # the daemon may drop it; the core must accept it
        self.deliver(event)

    def _sample(self, run: Run) -> None:
        if run.leader and run.spec.own_model is not None:
            held = run.models.get(run.spec.own_model, {})
            rss = 50 * 2**30 if self.chance(0.02) else 2**30
            self.deliver(e.MemorySampled(run.name, run.generation, rss, dict(held)))

    # -- requests ---------------------------------------------------------------------------------------------------------------

    def ask(self, model: str, avoid: tuple[str, ...] = ()) -> int:
        self.serial += 1
        request_id = self.serial
        self.clients[request_id] = Client(request_id, model, self.now)
        self.deliver(e.RequestArrived(request_id, model, avoid))
        return request_id

    def request_load(self, model: str) -> int:
        self.serial += 1
        request_id = self.serial
        self.clients[request_id] = Client(request_id, model, self.now, is_load=True)
        self.clients[request_id].loads = {name: model.loads + model.wakes for name, model in self.fleet.models.items()}
        self.deliver(e.LoadRequested(model, request_id))
        return request_id

    def cancel(self, request_id: int) -> None:
        client = self.clients.get(request_id)
        if client is not None and client.grant is None and not client.is_load:
            del self.clients[request_id]
            self.ended.add(request_id)
            self.deliver(e.RequestCancelled(request_id))

    def finish(self, request_id: int, failed: bool = False, refused: str = "") -> None:
        client = self.clients.get(request_id)
        if client is not None and client.grant is not None:
            del self.clients[request_id]
            self.ended.add(request_id)
            self.last_end[(client.grant.model, client.grant.process, client.grant.generation)] = self.now
            self.deliver(e.RequestFinished(request_id, failed, refused))

    def _do_grant(self, command: c.Grant) -> None:
        client = self.clients[command.request_id]
        client.grant = command
        self.grants[command.model].append(self.now)
        self.outcomes["granted"] = self.outcomes.get("granted", 0) + 1
        run = self.run(command.process, command.generation)
        lasts_s = self.rng.choice((0.05, 0.5, 2.0, 10.0)) if not self.chance(0.04) else 60.0
        failed = run is not None and not run.leader
        refused = "no connection" if self.chance(0.5 if failed else 0.01) else ""
        failed = failed or bool(refused)
        lasts_s = self.soon() if failed else lasts_s
        self.later(lasts_s, lambda: self.finish(command.request_id, failed, refused), shell=True)

    def _do_reject(self, command: c.Reject) -> None:
        del self.clients[command.request_id]
        self.ended.add(command.request_id)
        self.outcomes[command.code] = self.outcomes.get(command.code, 0) + 1

    # -- other -----------------------------------------------------------------------------------------------------------------

    def _do_readahead(self, command: c.ReadAhead) -> None:
        pass

    def _do_persist(self, command: c.Persist) -> None:
        self.disk[command.name] = command.remembered

    def _do_learnfootprint(self, command: c.LearnFootprint) -> None:
        pass

    def _do_finished(self, _command: c.Finished) -> None:
        self.finished = True

    def down(self, process: str) -> bool:
        state = self.fleet.processes[process].state
        return state in (ProcessState.FAILED, ProcessState.EXITED)
