"""Processes: starts, probes, stops, drains, dependencies, lanes, prerequisites, adoption, edits, shutdown."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest

from fleetd.core.data import commands as c
from fleetd.core.data import events as e
from fleetd.core.data.journal import LaneWait
from fleetd.core.data.specs import (
    Capabilities,
    CrashLoop,
    Dependency,
    DependencyCondition,
    ExitKind,
    ExitReport,
    ProbeKind,
    Probes,
    ProbeSpec,
    ProcessSpec,
    Remembered,
    RestartMode,
    RestartPolicy,
)
from fleetd.core.data.state import ProcessState, Residency
from fleetd.core.processes.start_gate import will_start
from tests.support.core import ALL_PROBES, G, Rig, fleet_spec, model, own, owners, process, server

S = ProcessState


def probed(**changes: object) -> Rig:
    return Rig(fleet_spec([process("a", probes=ALL_PROBES, **changes)]))


def ready(rig: Rig, name: str = "a") -> None:
    rig.spawned(name)
    rig.probe(name, ProbeKind.STARTUP)
    rig.probe(name, ProbeKind.READINESS)
    assert rig.state(name) is S.READY


# -- probes -------------------------------------------------------------------------------------------------------------


def test_startup_gates_readiness_gates_liveness() -> None:
    rig = probed()
    rig.spawned("a")
    assert [command.probe for command in rig.take(c.StartProbe)] == [ProbeKind.STARTUP]
    rig.probe("a", ProbeKind.STARTUP, ok=False)
    assert rig.state("a") is S.STARTING
    rig.probe("a", ProbeKind.STARTUP)
    assert rig.state("a") is S.STARTING
    assert rig.take(c.StartProbe)[-1].probe is ProbeKind.READINESS
    rig.probe("a", ProbeKind.READINESS)
    assert rig.state("a") is S.READY
    assert rig.take(c.StartProbe)[-1].probe is ProbeKind.LIVENESS


def test_readiness_only_routes_and_ignores_one_blip() -> None:
    rig = probed()
    ready(rig)
    rig.clear()
    rig.probe("a", ProbeKind.READINESS, ok=False, detail="503")
    assert rig.state("a") is S.READY
    rig.probe("a", ProbeKind.READINESS, ok=False, detail="503")
    assert (rig.state("a"), rig.of("a").reason) == (S.UNHEALTHY, "readiness probe: 503")
    for _ in range(50):
        rig.probe("a", ProbeKind.READINESS, ok=False)
    rig.probe("a", ProbeKind.READINESS)
    assert rig.state("a") is S.READY
    assert not rig.take(c.Stop)


def test_liveness_failure_kills_and_counts_as_a_death() -> None:
    rig = probed()
    ready(rig)
    rig.probe("a", ProbeKind.LIVENESS, ok=False, detail="timeout")
    assert rig.state("a") is S.READY
    rig.probe("a", ProbeKind.LIVENESS, ok=False, detail="timeout")
    assert "liveness probe failed 2 times: timeout" in rig.take(c.Stop)[-1].reason
    rig.empty("a")
    assert rig.state("a") is S.BACKOFF
    assert rig.of("a").record.deaths == 1


def test_start_timeout_kills_and_progress_extends_it() -> None:
    rig = probed()
    rig.spawned("a")
    rig.wait(9.0)
    rig.send(e.StartProgress("a", 1, "compiling kernels"))
    rig.wait(9.0)
    assert rig.state("a") is S.STARTING
    rig.wait(1.1)
    assert rig.state("a") is S.STOPPING
    assert "not ready within 10 s (compiling kernels)" in rig.of("a").reason
    rig.empty("a")
    assert rig.state("a") is S.BACKOFF


def test_exit_during_a_start_is_handled_at_once() -> None:
    rig = probed()
    rig.spawned("a")
    rig.exits("a", 3)
    assert (rig.state("a"), rig.of("a").reason) == (S.STOPPING, "exited with code 3")


@pytest.mark.parametrize("gone", ["startup", "readiness"])
def test_removed_probe_no_longer_gates_the_start(gone: str) -> None:
    rig = probed()
    rig.spawned("a")
    if gone == "readiness":
        rig.probe("a", ProbeKind.STARTUP)
    probes = replace(ALL_PROBES, startup=None if gone == "startup" else ALL_PROBES.startup, readiness=None)
    rig.send(e.SpecChanged(fleet_spec([process("a", probes=probes)])))
    assert rig.state("a") is S.READY


def test_new_probes_replace_old_ones_without_a_restart() -> None:
    rig = probed()
    ready(rig)
    rig.clear()
    rig.send(e.SpecChanged(fleet_spec([process("a", probes=replace(ALL_PROBES, readiness=ProbeSpec(tcp=True)))])))
    assert [type(command) for command in rig.seen] == [c.StopProbes, c.StartProbe, c.StartProbe]
    assert rig.state("a") is S.READY


# -- the order of events is not promised ------------------------------------------------------------------------------------


def test_exit_reported_before_its_spawn() -> None:
    rig = Rig(fleet_spec([process("a")]))
    rig.exits("a", 1)
    assert rig.send(e.Spawned("a", 1, 5)) == []
    rig.empty("a")
    assert rig.state("a") is S.BACKOFF


def test_events_of_old_generations_change_nothing() -> None:
    rig = Rig(fleet_spec([process("a", probes=ALL_PROBES)]))
    ready(rig)
    rig.send(e.RestartRequested("a"))
    rig.empty("a")
    ready(rig)
    before = repr(rig.of("a"))
    from fleetd.core.data.specs import ExitReport

    for event in (
        e.Spawned("a", 1, 7), e.SpawnFailed("a", 1, "no"), e.Exited("a", 1, ExitReport(1)), e.SetEmpty("a", 1),
        e.ProbeResult("a", 1, ProbeKind.LIVENESS, False), e.StartProgress("a", 1, "x"), e.MemorySampled("a", 1, 99 * G),
        e.Loaded("m", "a", 1), e.ResidentsObserved("a", 1), e.Exited("nobody", 1, ExitReport(1)),
    ):  # fmt: skip
        assert rig.send(event) == []
    assert repr(rig.of("a")) == before


def test_second_exit_of_a_generation_is_ignored() -> None:
    rig = Rig(fleet_spec([process("a")]))
    rig.spawned("a")
    rig.exits("a")
    assert rig.exits("a") == []
    rig.empty("a")
    assert rig.empty("a") == []
    assert rig.of("a").record.deaths == 1


# -- the operator -----------------------------------------------------------------------------------------------------------


def test_stop_survives_a_daemon_restart_until_a_start() -> None:
    rig = Rig(fleet_spec([process("a")]))
    rig.spawned("a")
    rig.send(e.StopRequested("a"))
    kept = rig.take(c.Persist)[-1].remembered
    assert kept.stopped
    rig.empty("a")
    assert (rig.state("a"), rig.of("a").reason) == (S.STOPPED, "stopped by an operator")
    again = Rig(fleet_spec([process("a")]), remembered={"a": kept})
    assert not again.take(c.Spawn)
    again.send(e.StartRequested("a"))
    assert again.take(c.Spawn)[0].generation == kept.generation + 1
    assert not again.take(c.Persist)[-1].remembered.stopped


STATES = (
    "STARTING unspawned",
    "STARTING",
    "READY",
    "DRAINING",
    "STOPPING",
    "BACKOFF",
    "FAILED",
    "EXITED",
    "STOPPED",
    "BLOCKED",
)


def in_state(name: str) -> Rig:
    policy = RestartPolicy(mode=RestartMode.ON_FAILURE)
    rig = Rig(fleet_spec([process("a", probes=Probes(startup=ProbeSpec(http="/")), restart=policy)]))
    assert rig.state("a") is S.STARTING
    if name != "STARTING unspawned":
        rig.spawned("a")
    if name in ("READY", "DRAINING", "STOPPING", "BACKOFF", "EXITED", "STOPPED", "FAILED"):
        rig.probe("a", ProbeKind.STARTUP)
    if name == "DRAINING":
        rig.send(e.DrainRequested("a"))
    elif name == "STOPPING":
        rig.send(e.StopRequested("a"))
    elif name == "BACKOFF":
        rig.dies("a", 1)
    elif name == "EXITED":
        rig.dies("a", 0)
    elif name == "FAILED":
        rig.dies("a", 1, ExitKind.BAD_CONFIG)
    elif name == "STOPPED":
        rig.send(e.StopRequested("a"))
        rig.empty("a")
    elif name == "BLOCKED":
        rig.send(e.StopRequested("a"))
        rig.empty("a")
        rig.send(e.ProcessPrerequisitesChanged("a", ("/mnt",)))
        rig.send(e.StartRequested("a"))
    assert rig.state("a").value == name.split()[0]
    return rig


def settle(rig: Rig) -> None:
    """Answer every pending command."""
    for _ in range(6):
        if rig.state("a") is S.STARTING and not rig.of("a").spawned:
            rig.spawned("a")
        elif rig.state("a") is S.STARTING:
            rig.probe("a", ProbeKind.STARTUP)
        elif rig.state("a") is S.STOPPING:
            rig.empty("a")


@pytest.mark.parametrize("state", STATES)
def test_restart_in_every_state_ends_in_a_fresh_run(state: str) -> None:
    rig = in_state(state)
    before = rig.of("a").generation
    rig.send(e.RestartRequested("a"))
    if state == "BLOCKED":
        assert rig.state("a") is S.BLOCKED
        rig.send(e.ProcessPrerequisitesChanged("a"))
    settle(rig)
    assert rig.state("a") is S.READY
    assert rig.of("a").generation == before + 1
    assert rig.of("a").record.deaths == 0
    assert not rig.take(c.Persist)[-1].remembered.stopped


@pytest.mark.parametrize("state", STATES)
def test_stop_in_every_state_ends_stopped(state: str) -> None:
    rig = in_state(state)
    rig.send(e.StopRequested("a"))
    settle(rig)
    assert (rig.state("a"), rig.of("a").stopped) == (S.STOPPED, True)
    rig.wait(10_000)
    assert rig.state("a") is S.STOPPED


@pytest.mark.parametrize("state", STATES)
def test_shutdown_in_every_state_ends_at_rest(state: str) -> None:
    rig = in_state(state)
    rig.send(e.ShutdownRequested())
    settle(rig)
    assert len(rig.take(c.Finished)) == 1
    assert rig.state("a") not in {S.STARTING, S.READY, S.STOPPING, S.BACKOFF}


def test_stop_during_a_crash_prevents_the_restart() -> None:
    rig = Rig(fleet_spec([process("a")]))
    rig.spawned("a")
    rig.exits("a")
    rig.send(e.StopRequested("a"))
    rig.empty("a")
    assert (rig.state("a"), rig.of("a").reason) == (S.STOPPED, "stopped by an operator")


def test_drain_and_undrain() -> None:
    rig = Rig(owners("a"))
    rig.warm("a")
    rig.send(e.DrainRequested("a"))
    assert rig.state("a") is S.DRAINING
    refused = rig.ask("a")
    assert rig.rejects()[refused] == "draining"
    rig.send(e.DrainRequested("a", drain=False))
    assert rig.ask("a") in rig.granted()


def test_stop_of_a_drained_process_has_full_drain_time() -> None:
    rig = Rig(owners("a"))
    rig.warm("a")
    rig.ask("a")
    rig.send(e.DrainRequested("a"))
    rig.wait(500.0)
    rig.send(e.StopRequested("a"))
    rig.wait(29.0)
    assert rig.state("a") is S.DRAINING
    rig.wait(1.1)
    assert rig.state("a") is S.STOPPING


def test_stop_waits_for_requests_in_flight() -> None:
    rig = Rig(owners("a"))
    rig.warm("a")
    request = rig.ask("a")
    rig.send(e.StopRequested("a"))
    assert rig.state("a") is S.DRAINING
    assert not rig.take(c.Stop)
    rig.finish(request)
    assert rig.state("a") is S.STOPPING


def test_operator_starts_an_on_demand_server_without_need() -> None:
    rig = Rig(fleet_spec([server("s", on_demand=True)], [model("m", "s")]))
    assert not rig.take(c.Spawn)
    rig.send(e.StartRequested("s"))
    rig.spawned("s")
    rig.wait(10_000)
    assert rig.state("s") is S.READY
    rig.send(e.StopRequested("s"))
    assert rig.state("s") is S.STOPPING


# -- what cannot be killed ----------------------------------------------------------------------------------------------------


def test_survivors_keep_their_memory_and_prevent_a_start() -> None:
    rig = Rig(owners("ab"))
    rig.warm("a")
    rig.exits("a")
    rig.empty("a", survivors=(77,))
    assert rig.state("a") is S.FAILED
    assert "pid 77 survives SIGKILL" in rig.of("a").reason
    assert rig.fleet.ledger.reserved_bytes("gpu0") == G
    refused = rig.ask("a")
    assert refused in rig.rejects()
    rig.clear()
    rig.send(e.StartRequested("a"))
    assert [type(command) for command in rig.seen if not isinstance(command, c.Persist)] == [c.Sweep]
    rig.empty("a")
    assert rig.fleet.ledger.reserved_bytes("gpu0") in (0, G)
    assert rig.take(c.Spawn)
    assert rig.of("a").survivors == ()


def test_survivors_are_swept_again_after_a_minute() -> None:
    rig = Rig(fleet_spec([process("a")]))
    rig.spawned("a")
    rig.exits("a")
    rig.empty("a", survivors=(77,))
    rig.clear()
    rig.wait(59.0)
    assert not rig.seen
    rig.wait(1.1)
    assert rig.take(c.Sweep)
    rig.empty("a")
    assert rig.state("a") is S.STARTING


# -- dependencies and lanes -----------------------------------------------------------------------------------------------------


def chain(condition: DependencyCondition, **changes: object) -> Rig:
    first = process("a", probes=ALL_PROBES, restart=RestartPolicy(mode=RestartMode.ON_FAILURE), **changes)
    return Rig(fleet_spec([first, process("b", depends_on=(Dependency("a", condition),))]))


@pytest.mark.parametrize("condition", DependencyCondition)
def test_dependency_conditions(condition: DependencyCondition) -> None:
    rig = chain(condition)
    assert rig.state("b") is S.BLOCKED
    assert rig.of("b").reason == f"waiting for a to be {condition}"
    rig.spawned("a")
    assert (rig.state("b") is S.STARTING) == (condition is DependencyCondition.STARTED)
    rig.probe("a", ProbeKind.STARTUP)
    rig.probe("a", ProbeKind.READINESS)
    assert (rig.state("b") is S.STARTING) == (condition is not DependencyCondition.COMPLETED)
    rig.dies("a", 0)
    assert rig.state("b") is S.STARTING


def test_wait_for_a_dependency_can_be_cancelled() -> None:
    rig = chain(DependencyCondition.READY)
    rig.send(e.StopRequested("b"))
    assert rig.state("b") is S.STOPPED
    ready(rig)
    assert rig.state("b") is S.STOPPED


def test_dependency_is_judged_by_its_current_generation() -> None:
    rig = chain(DependencyCondition.READY)
    rig.spawned("a")
    rig.probe("a", ProbeKind.STARTUP)
    rig.send(e.RestartRequested("a"))
    rig.empty("a")
    rig.send(e.ProbeResult("a", 1, ProbeKind.READINESS, True))
    assert rig.state("b") is S.BLOCKED
    ready(rig)
    assert rig.state("b") is S.STARTING


@pytest.mark.parametrize("how", ["failed", "stopped", "ended", "absent"])
def test_impossible_dependency_fails_and_recovers(how: str) -> None:
    if how == "absent":
        rig = Rig(fleet_spec([process("b", depends_on=(Dependency("a"),))]))
    else:
        rig = chain(DependencyCondition.READY)
        rig.spawned("a")
        if how == "stopped":
            rig.send(e.StopRequested("a"))
            rig.empty("a")
        else:
            rig.dies("a", 0 if how == "ended" else 1, ExitKind.BAD_CONFIG if how == "failed" else ExitKind.CRASH)
    assert rig.state("b") is S.FAILED
    assert "depends on a, which" in rig.of("b").reason
    if how == "absent":
        rig.send(e.SpecChanged(fleet_spec([process("a"), process("b", depends_on=(Dependency("a"),))])))
        rig.spawned("a")
    else:
        rig.send(e.StartRequested("a"))
        assert rig.state("b") is S.BLOCKED
        ready(rig)
    assert rig.state("b") is S.STARTING


def test_on_demand_model_recovers_with_its_dependency() -> None:
    spec = fleet_spec([process("a"), own("m", depends_on=(Dependency("a"),))], [model("m")])
    rig = Rig(spec)
    rig.spawned("a")
    rig.send(e.StopRequested("a"))
    rig.empty("a")
    refused = rig.ask("m")
    assert rig.rejects()[refused] == "model_blocked"
    rig.send(e.StartRequested("a"))
    rig.spawned("a")
    waiting = rig.ask("m")
    rig.spawned("m")
    assert waiting in rig.granted()


EXCLUSIVE = Capabilities(exclusive_start=True)


def test_starts_and_stops_on_a_lane_take_turns() -> None:
    names = ("a", "b", "c")
    specs = [
        own(name, lane="gpu0", capabilities=EXCLUSIVE, probes=Probes(startup=ProbeSpec(http="/"))) for name in names
    ]
    rig = Rig(fleet_spec(specs, [model(name) for name in names], budget=3))
    for name in names[:2]:
        rig.ask(name)
    assert [command.name for command in rig.take(c.Spawn)] == ["a"]
    assert "waiting for its turn on gpu0: a is STARTING" in rig.of("b").reason
    rig.spawned("a")
    rig.probe("a", ProbeKind.STARTUP)
    assert [command.name for command in rig.take(c.Spawn)] == ["a", "b"]
    rig.finish(1)
    rig.send(e.StopRequested("a"))
    assert rig.state("a") is S.DRAINING
    rig.spawned("b")
    rig.probe("b", ProbeKind.STARTUP)
    assert rig.state("a") is S.STOPPING
    rig.ask("c")
    assert "a is STOPPING" in rig.of("c").reason
    rig.empty("a")
    assert rig.state("c") is S.STARTING


def measuring(budget: int = 8) -> Rig:
    """A server of many models and two engines that measure free memory as they start, on one device."""
    starts = Probes(startup=ProbeSpec(http="/"))
    specs = [own(name, lane="gpu0", capabilities=EXCLUSIVE, probes=starts) for name in "vw"]
    models = [model("v"), model("w"), model("m", "o"), model("n", "o")]
    rig = Rig(fleet_spec([server("o", lane="gpu0"), *specs], models, budget))
    rig.spawned("o")
    return rig


def test_loads_wait_while_a_measuring_engine_starts() -> None:
    rig = measuring()
    rig.ask("m")
    rig.send(e.Loaded("m", "o", 1))
    rig.finish(1)
    rig.clear()
    rig.ask("v")
    rig.spawned("v")
    rig.ask("n")
    rig.send(e.UnloadRequested("m"))
    assert not rig.take(c.Load)
    assert not rig.take(c.Unload)
    assert LaneWait("n", "waiting for its turn on gpu0: v is STARTING") in rig.fleet.journal.notes_on("n")
    rig.probe("v", ProbeKind.STARTUP)
    assert [command.model for command in rig.take(c.Load)] == ["n"]
    assert [command.model for command in rig.take(c.Unload)] == ["m"]


@pytest.mark.parametrize("answer", [e.Loaded("m", "o", 1), e.LoadFailed("m", "o", 1, "broken")])
def test_measuring_engine_waits_for_loads_and_unloads(answer: e.Event) -> None:
    rig = measuring()
    rig.ask("m")
    assert rig.take(c.Load)
    rig.ask("v")
    assert [command.name for command in rig.take(c.Spawn)] == ["o"]
    assert rig.of("v").reason == "waiting for its turn on gpu0: m is LOADING on o"
    rig.send(answer)
    assert [command.name for command in rig.take(c.Spawn)] == ["o", "v"]


def test_eviction_for_a_measuring_engine_waits_its_turn() -> None:
    rig = measuring(budget=2)
    rig.ask("m")
    rig.send(e.Loaded("m", "o", 1))
    rig.finish(1)
    rig.ask("v")
    rig.spawned("v")
    rig.ask("w")
    rig.wait(1.0)
    assert not rig.take(c.Unload)  # v still measures
    rig.probe("v", ProbeKind.STARTUP)
    assert [command.model for command in rig.take(c.Unload)] == ["m"]
    assert rig.of("w").generation == 0
    rig.send(e.Unloaded("m", "o", 1))
    assert rig.state("w") is S.STARTING


def test_start_deadline_counts_from_the_last_progress() -> None:
    slow = Probes(startup=ProbeSpec(http="/", deadline_s=10.0))
    rig = Rig(fleet_spec([process("a", probes=slow)]))
    rig.spawned("a")
    for phase in ("loading weights", "compiling"):
        rig.wait(9.0)
        rig.send(e.StartProgress("a", 1, phase))
        rig.probe("a", ProbeKind.STARTUP, ok=False, detail="connection refused")
        assert rig.of("a").phase == phase
    rig.wait(9.0)
    assert rig.state("a") is S.STARTING
    rig.wait(2.0)
    assert rig.of("a").reason == "not ready within 10 s (compiling; connection refused)"


# -- prerequisites --------------------------------------------------------------------------------------------------------------


def test_missing_volume_blocks_until_it_is_back() -> None:
    rig = Rig(fleet_spec([process("a")]), missing={"a": ("/Volumes/B",)})
    assert not rig.take(c.Spawn)
    assert (rig.state("a"), rig.of("a").reason) == (S.BLOCKED, "missing: /Volumes/B")
    rig.send(e.ProcessPrerequisitesChanged("a"))
    assert rig.state("a") is S.STARTING


def test_missing_volume_blocks_only_after_a_death() -> None:
    rig = Rig(fleet_spec([process("a")]))
    rig.spawned("a")
    rig.send(e.ProcessPrerequisitesChanged("a", ("/Volumes/B",)))
    assert rig.state("a") is S.READY
    rig.dies("a")
    rig.wait(2.0)
    assert rig.state("a") is S.BLOCKED
    rig.send(e.ProcessPrerequisitesChanged("a"))
    assert (rig.state("a"), rig.of("a").restarts) == (S.STARTING, 1)


def test_on_demand_model_without_its_volume_is_blocked() -> None:
    rig = Rig(owners("a"), missing={"a": ("/Volumes/B",)})
    refused = rig.ask("a")
    assert rig.rejects()[refused] == "model_blocked"
    assert "missing: /Volumes/B" in rig.take(c.Reject)[-1].reason
    rig.send(e.ProcessPrerequisitesChanged("a", ("/Volumes/B", "/x")))
    assert rig.state("a") is S.BLOCKED
    rig.send(e.ProcessPrerequisitesChanged("a"))
    assert rig.state("a") is S.STOPPED
    waiting = rig.ask("a")
    rig.spawned("a")
    assert waiting in rig.granted()


# -- limits ---------------------------------------------------------------------------------------------------------------------


def test_memory_over_the_limit_twice_restarts() -> None:
    rig = Rig(fleet_spec([process("a", memory_limit_bytes=G)]))
    rig.spawned("a")
    for size in (2 * G, G, 2 * G):
        rig.send(e.MemorySampled("a", 1, size))
    assert rig.state("a") is S.READY
    rig.send(e.MemorySampled("a", 1, 2 * G))
    assert rig.state("a") is S.STOPPING
    rig.empty("a")
    assert (rig.state("a"), rig.of("a").restarts, rig.of("a").record.deaths) == (S.STARTING, 1, 0)


def test_maximum_age_restarts() -> None:
    rig = Rig(fleet_spec([process("a", max_age_s=100.0)]))
    rig.spawned("a")
    rig.wait(99.0)
    assert rig.state("a") is S.READY
    rig.wait(1.1)
    assert rig.state("a") is S.STOPPING


# -- requests without a connection --------------------------------------------------------------------------------------------


def refuse(rig: Rig, request: int) -> None:
    rig.send(e.RequestFinished(request, True, "no connection (Connection refused)"))


def test_refused_connection_unroutes_until_the_probe_passes() -> None:
    rig = Rig(fleet_spec([own("a", probes=ALL_PROBES)], [model("a")]))
    first = rig.ask("a")
    ready(rig, "a")
    assert first in rig.granted()
    refuse(rig, first)
    assert rig.state("a") is S.UNHEALTHY
    assert "connection refused: no connection" in rig.of("a").reason
    second = rig.ask("a")
    assert second not in rig.granted()
    rig.wait(30.0)
    assert rig.state("a") is S.UNHEALTHY, "its probe owes an answer"
    rig.probe("a", ProbeKind.READINESS)
    assert rig.state("a") is S.READY
    assert second in rig.granted()


def test_refused_connection_without_probe_is_retried_soon() -> None:
    rig = Rig(owners("a"))
    first = rig.ask("a")
    rig.spawned("a")
    refuse(rig, first)
    second = rig.ask("a")
    rig.wait(0.9)
    assert (rig.state("a"), second in rig.granted()) == (S.UNHEALTHY, False)
    rig.wait(0.2)
    assert (rig.state("a"), second in rig.granted()) == (S.READY, True)


def test_refused_connection_of_an_old_run_is_ignored() -> None:
    rig = Rig(fleet_spec([own("a", on_demand=False)], [model("a")]))
    rig.spawned("a")
    first = rig.ask("a")
    rig.dies("a")
    rig.wait(5.0)
    rig.spawned("a")
    refuse(rig, first)
    assert rig.state("a") is S.READY


def test_external_server_refusing_connections_is_skipped() -> None:
    far = {"capabilities": Capabilities(owns_process=False, many_models=True)}
    spec = fleet_spec([server("x", **far), server("y", **far)], [model("m", "x", "y", size=0)])
    rig = Rig(spec)
    for name in ("x", "y"):
        rig.spawned(name)
        rig.send(e.ResidentsObserved(name, 1, {"m": {}}))
    asked = rig.ask("m")
    refuse(rig, asked)
    assert sorted((rig.state("x"), rig.state("y"))) == [S.READY, S.UNHEALTHY]
    again = rig.ask("m")
    assert again in rig.granted()
    refuse(rig, again)
    last = rig.ask("m")
    assert rig.rejects() == {last: "model_failed"}, "fleetd cannot start them: rejected at once"


# -- adoption and memory ----------------------------------------------------------------------------------------------------------


def test_adopted_process_serves_without_a_spawn() -> None:
    rig = Rig(
        owners("a"),
        remembered={"a": Remembered(restarts=3, generation=9)},
        adopted=(e.Adopted("a", 9, 4711, age_s=50.0),),
    )
    assert not rig.take(c.Spawn)
    process = rig.of("a")
    assert (process.state, process.pid, process.restarts, process.started_s) == (S.READY, 4711, 3, rig.now - 50.0)
    assert rig.ask("a") in rig.granted()
    assert rig.fleet.ledger.reserved_bytes("gpu0") == G


def test_adopted_process_that_should_be_stopped_is_stopped() -> None:
    rig = Rig(
        fleet_spec([process("a")]),
        remembered={"a": Remembered(stopped=True, generation=2)},
        adopted=(e.Adopted("a", 2, 1),),
    )
    assert rig.take(c.Stop)[0].generation == 2


def test_adopted_on_demand_server_runs_until_observed() -> None:
    spec = fleet_spec([server("s", on_demand=True)], [model("m", "s")])
    rig = Rig(spec, remembered={"s": Remembered(generation=2)}, adopted=(e.Adopted("s", 2, 1),))
    assert rig.state("s") is S.READY
    rig.send(e.ResidentsObserved("s", 2, {"m": {"gpu0": G}}))
    assert rig.state("s") is S.READY
    assert rig.residency("m") is Residency.LOADED
    idle = Rig(spec, remembered={"s": Remembered(generation=2)}, adopted=(e.Adopted("s", 2, 1),))
    idle.send(e.ResidentsObserved("s", 2))
    assert idle.state("s") is S.STOPPING


def test_failed_process_stays_failed_after_daemon_restart() -> None:
    rig = Rig(fleet_spec([process("a")]), remembered={"a": Remembered(failed="crash loop", restarts=4, generation=5)})
    assert (rig.state("a"), rig.of("a").reason, rig.of("a").restarts) == (S.FAILED, "crash loop", 4)
    assert not rig.take(c.Spawn)
    rig.send(e.StartRequested("a"))
    assert rig.take(c.Spawn)[0].generation == 6


def test_backoff_continues_after_a_daemon_restart() -> None:
    rig = Rig(fleet_spec([process("a")]), remembered={"a": Remembered(deaths=3, generation=5)})
    rig.spawned("a")
    rig.dies("a")
    assert rig.of("a").record.deaths == 4


def test_crash_loop_window_survives_daemon_restarts() -> None:
    spec, kept = fleet_spec([process("a")]), Remembered()
    for death in range(1, 6):
        rig = Rig(spec, remembered={"a": kept})
        rig.spawned("a")
        rig.clear()
        rig.dies("a")
        kept = rig.take(c.Persist)[-1].remembered
        assert len(kept.died_s) == death
        assert (rig.state("a") is S.FAILED) == (death == 5)
    late = Rig(spec, remembered={"a": replace(kept, failed=None, died_s=tuple(time - 3600 for time in kept.died_s))})
    late.spawned("a")
    late.dies("a")
    assert late.state("a") is S.BACKOFF, "deaths of an hour ago are out of the window"


def test_slow_crash_loop_stays_slow_after_daemon_restart() -> None:
    spec = fleet_spec([process("a", restart=RestartPolicy(crash_loop=CrashLoop(count=3, then="slow", every_s=600)))])
    rig = Rig(spec, remembered={"a": Remembered(deaths=5, slow=True)})
    rig.spawned("a")
    rig.dies("a")
    assert (rig.of("a").next_start_s or 0) - rig.now == 600


# -- changes of the configuration ---------------------------------------------------------------------------------------------------


def test_equal_configuration_changes_nothing() -> None:
    rig = Rig(owners("ab"))
    rig.warm("a")
    rig.clear()
    assert rig.send(e.SpecChanged(owners("ab"))) == []


def test_only_launch_fields_restart_a_process() -> None:
    rig = Rig(fleet_spec([process("a")]))
    rig.spawned("a")
    rig.clear()
    rig.send(e.SpecChanged(fleet_spec([process("a", max_age_s=500.0)])))
    assert (rig.seen, rig.state("a")) == ([], S.READY)
    rig.send(e.SpecChanged(fleet_spec([process("a", launch_hash="2")])))
    assert rig.take(c.Stop)[0].reason == "the configuration changed"
    rig.empty("a")
    assert (rig.state("a"), rig.of("a").generation) == (S.STARTING, 2)


def test_scaling_leaves_other_replicas_alone() -> None:
    def pool(count: int) -> list[ProcessSpec]:
        return [process(f"w-{number}", base="w") for number in range(1, count + 1)]

    rig = Rig(fleet_spec(pool(2)))
    rig.spawned("w-1")
    rig.spawned("w-2")
    rig.clear()
    rig.send(e.SpecChanged(fleet_spec(pool(3))))
    assert [command.name for command in rig.take(c.Spawn)] == ["w-3"]
    rig.spawned("w-3")
    rig.clear()
    rig.send(e.SpecChanged(fleet_spec(pool(1))))
    assert [command.name for command in rig.take(c.Stop)] == ["w-2", "w-3"]
    rig.empty("w-2")
    rig.empty("w-3")
    assert sorted(rig.fleet.processes) == ["w-1"]
    assert rig.of("w-1").generation == 1


def test_new_replica_of_a_stopped_entry_is_stopped() -> None:
    rig = Rig(fleet_spec([process("w", base="w")]))
    rig.spawned("w")
    rig.send(e.StopRequested("w"))
    rig.empty("w")
    rig.clear()
    rig.send(e.SpecChanged(fleet_spec([process(f"w-{number}", base="w") for number in (1, 2)])))
    assert not rig.take(c.Spawn)
    assert {kept.name for kept in rig.take(c.Persist) if kept.remembered.stopped} == {"w-1", "w-2"}
    rig.send(e.StartRequested("w-1"))
    rig.send(e.SpecChanged(fleet_spec([process(f"w-{number}", base="w") for number in (1, 2, 3)])))
    assert [command.name for command in rig.take(c.Spawn)] == ["w-1", "w-3"], "one of them runs: so does another"


def test_returning_name_does_not_repeat_generations() -> None:
    rig = Rig(fleet_spec([process("a")]))
    rig.spawned("a")
    rig.send(e.SpecChanged(fleet_spec([])))
    rig.empty("a")
    assert not rig.fleet.processes
    rig.send(e.SpecChanged(fleet_spec([process("a")])))
    assert rig.take(c.Spawn)[-1].generation == 2


def test_removed_model_finishes_its_requests_in_flight() -> None:
    rig = Rig(owners("ab"))
    rig.warm("a")
    request = rig.ask("a")
    rig.send(e.SpecChanged(owners("b")))
    late = rig.ask("a")
    assert rig.rejects()[late] == "model_not_found"
    assert rig.state("a") is S.DRAINING
    assert not rig.take(c.Stop)
    rig.finish(request)
    rig.empty("a")
    assert sorted(rig.fleet.models) == sorted(rig.fleet.processes) == ["b"]
    assert not rig.fleet.ledger.reservations


def test_requests_waiting_for_a_removed_model_are_rejected() -> None:
    rig = Rig(owners("ab"))
    waiting = rig.ask("a")
    rig.send(e.SpecChanged(owners("b")))
    assert rig.rejects()[waiting] == "model_not_found"
    rig.spawned("a")
    rig.empty("a")
    assert sorted(rig.fleet.models) == sorted(rig.fleet.processes) == ["b"]


def test_removed_server_with_pending_loads_is_forgotten() -> None:
    spec = fleet_spec([server("s"), process("x")], [model("m", "s")])
    rig = Rig(spec)
    waiting = rig.ask("m")
    rig.send(e.SpecChanged(fleet_spec([process("x")])))
    assert rig.rejects()[waiting] == "model_not_found"
    rig.spawned("s")
    rig.empty("s")
    assert sorted(rig.fleet.processes) == ["x"]
    assert not rig.fleet.models


def test_edit_retries_a_failed_process() -> None:
    rig = Rig(fleet_spec([process("a")]))
    rig.spawned("a")
    rig.dies("a", 1, ExitKind.BAD_CONFIG)
    rig.send(e.SpecChanged(fleet_spec([process("a", launch_hash="2")])))
    assert rig.state("a") is S.STARTING


def test_disabling_stops_and_enabling_starts() -> None:
    rig = Rig(fleet_spec([process("a", enabled=False)]))
    assert rig.state("a") is S.STOPPED
    rig.send(e.SpecChanged(fleet_spec([process("a")])))
    rig.spawned("a")
    rig.send(e.SpecChanged(fleet_spec([process("a", enabled=False)])))
    rig.empty("a")
    assert (rig.state("a"), rig.of("a").reason) == (S.STOPPED, "disabled in the configuration")


# -- shutdown -------------------------------------------------------------------------------------------------------------------------


def test_will_start_unless_a_dependency_needs_help() -> None:
    layers = [[f"{layer}-{place}" for place in range(8)] for layer in range(200)]
    below: dict[str, list[str]] = {name: before for before, names in pairwise(layers) for name in names}
    spec = [process(name, depends_on=tuple(map(Dependency, below.get(name, ())))) for names in layers for name in names]
    rig = Rig(fleet_spec(spec))
    assert rig.state("199-0") is S.BLOCKED

    def looked(name: str) -> bool:
        return will_start(rig.fleet.state, rig.fleet.supervisor.wanted, rig.of(name))

    assert looked("199-0")
    rig.send(e.ProcessPrerequisitesChanged("0-3", ("/vol (missing)",)))
    assert not looked("199-0")
    assert looked("0-0")


def test_shutdown_stops_in_reverse_dependency_order() -> None:
    rig = Rig(fleet_spec([process("db"), process("web", depends_on=(Dependency("db"),))]))
    rig.spawned("db")
    rig.spawned("web")
    rig.send(e.ShutdownRequested())
    assert [command.name for command in rig.take(c.Stop)] == ["web"]
    rig.empty("web")
    assert [command.name for command in rig.take(c.Stop)] == ["web", "db"]
    assert not rig.take(c.Finished)
    rig.empty("db")
    assert len(rig.take(c.Finished)) == 1
    rig.wait(1000)
    assert len(rig.take(c.Finished)) == 1


def test_forced_shutdown_has_no_grace() -> None:
    rig = Rig(owners("ab", budget=2))
    rig.warm("a")
    rig.ask("a")
    rig.warm("b")
    rig.send(e.ShutdownRequested())
    rig.clear()
    rig.send(e.ShutdownRequested(force=True))
    assert {(command.name, command.force) for command in rig.take(c.Stop)} == {("a", True), ("b", True)}


def test_shutdown_rejects_waiting_and_new_requests() -> None:
    rig = Rig(owners("a"))
    waiting = rig.ask("a")
    rig.send(e.ShutdownRequested())
    late = rig.ask("a")
    assert rig.rejects() == {waiting: "draining", late: "draining"}
    rig.spawned("a")
    rig.empty("a")
    assert rig.take(c.Finished)


def test_loads_wait_until_adopted_servers_are_observed() -> None:
    spec = fleet_spec([server("s"), own("x")], [model("m", "s"), model("n", "s", preload=True), model("x")])
    rig = Rig(spec, remembered={"s": Remembered(generation=2)}, adopted=(e.Adopted("s", 2, 1),))
    waiting = rig.ask("x")
    assert not rig.take(c.Load)
    assert not rig.take(c.Spawn)
    assert "checking which models s has" in rig.fleet.state.queue[waiting].reason
    rig.send(e.ResidentsObserved("s", 2, {"m": {"gpu0": G}}))
    assert [command.model for command in rig.take(c.Unload)] == ["m"], "it takes the room: it is evicted, not forgotten"
    blind = Rig(spec, remembered={"s": Remembered(generation=2)}, adopted=(e.Adopted("s", 2, 1),))
    blind.ask("x")
    blind.wait(10.0)
    assert blind.take(c.Spawn), "a server that cannot report its models delays no request forever"


def test_start_with_a_final_failure_fails_at_once() -> None:
    """A server that answers but is too old is not restarted: a restart gives the same result."""
    rig = Rig(fleet_spec([process("a", probes=Probes(startup=ProbeSpec(http="/", deadline_s=60.0)))]))
    rig.spawned("a")
    rig.send(e.ProbeResult("a", 1, ProbeKind.STARTUP, False, "version 1 is too old", final=True))
    assert rig.state("a") is S.STOPPING
    assert len(rig.take(c.Stop)) == 1
    rig.empty("a")
    assert rig.state("a") is S.FAILED
    assert "version 1 is too old (a retry cannot help)" in rig.of("a").reason
    rig.send(e.StartRequested("a"))
    assert rig.state("a") is S.STARTING


def test_external_server_is_retried_after_any_answer() -> None:
    away = replace(
        process("a", probes=Probes(startup=ProbeSpec(http="/"))), capabilities=Capabilities(owns_process=False)
    )
    rig = Rig(fleet_spec([away]))
    rig.send(e.ProbeResult("a", 1, ProbeKind.STARTUP, False, "version 1 is too old", final=True))
    assert rig.state("a") is S.STARTING
    assert rig.of("a").startup_detail == "version 1 is too old"
    rig.probe("a", ProbeKind.STARTUP)
    assert rig.state("a") is S.READY


def test_restart_for_memory_names_the_limit_in_last_exit() -> None:
    rig = Rig(fleet_spec([process("a", memory_limit_bytes=G)]))
    rig.spawned("a")
    for _ in range(5):
        rig.send(e.MemorySampled("a", rig.of("a").generation, 2 * G))
    assert rig.state("a") is S.STOPPING
    rig.send(e.Exited("a", rig.of("a").generation, ExitReport(None, "SIGTERM")))
    report = rig.of("a").last_exit
    assert report is not None
    assert report.reason == "memory limit exceeded: 2.00 GiB of 1.00 GiB"
