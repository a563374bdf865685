"""The restart policy: backoff, crash loops, and what counts as a death."""

from __future__ import annotations

from dataclasses import replace
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fleetd.core.data import commands as c
from fleetd.core.data import events as e
from fleetd.core.data.specs import Backoff, CrashLoop, ExitKind, ExitReport, RestartMode, RestartPolicy, describe_exit
from fleetd.core.data.state import ProcessState
from fleetd.core.processes.restart_policy import (
    Again,
    Decision,
    Done,
    GiveUp,
    RestartRecord,
    after_death,
    delay_s,
)
from tests.support.core import Rig, fleet_spec, process

CRASH = ExitReport(1)
PLAIN = RestartPolicy(backoff=Backoff(1.0, 2.0, 8.0, 0.0), crash_loop=CrashLoop(count=100))


def decide(
    policy: RestartPolicy,
    report: ExitReport = CRASH,
    record: RestartRecord | None = None,
    now: float = 0.0,
    zero: bool = False,
) -> Decision:
    return after_death(policy, record or RestartRecord(), report, zero_is_failure=zero, now=now, rng=Random(1))


@pytest.mark.parametrize(
    ("mode", "code", "zero", "expected"),
    [
        (RestartMode.ALWAYS, 0, False, Again), (RestartMode.ALWAYS, 1, False, Again), (RestartMode.ALWAYS, None, False, Again),
        (RestartMode.ON_FAILURE, 0, False, Done), (RestartMode.ON_FAILURE, 1, False, Again), (RestartMode.ON_FAILURE, None, False, Again),
        (RestartMode.ON_FAILURE, 0, True, Again), (RestartMode.ON_FAILURE, 3, False, Done),
        (RestartMode.NEVER, 0, False, Done), (RestartMode.NEVER, 1, False, GiveUp), (RestartMode.NEVER, 0, True, GiveUp),
        (RestartMode.NEVER, None, False, GiveUp),
    ],
)  # fmt: skip
def test_decision_after_a_death(mode: RestartMode, code: int | None, zero: bool, expected: type) -> None:
    assert isinstance(decide(replace(PLAIN, mode=mode, success_codes=(0, 3)), ExitReport(code), zero=zero), expected)


def test_bad_configuration_is_not_retried() -> None:
    record = RestartRecord()
    decision = decide(PLAIN, ExitReport(1, kind=ExitKind.BAD_CONFIG, reason="no such option"), record)
    assert isinstance(decision, GiveUp)
    assert "no such option" in decision.reason
    assert record.deaths == 0
    patient = replace(PLAIN, crash_loop=CrashLoop(then="slow", every_s=600.0))
    slow = decide(patient, ExitReport(127, kind=ExitKind.BAD_CONFIG, reason="no such program"), record)
    assert isinstance(slow, Again), "who asks for slow tries is not given up: a program may come back"
    assert (slow.delay_s, record.deaths, record.slow) == (600.0, 1, True)
    never = replace(patient, mode=RestartMode.NEVER)
    assert isinstance(decide(never, ExitReport(127, kind=ExitKind.BAD_CONFIG)), GiveUp)


def test_backoff_doubles_up_to_its_limit() -> None:
    record = RestartRecord()
    delays = [decision.delay_s for _ in range(6) if isinstance(decision := decide(PLAIN, record=record), Again)]
    assert delays == [1.0, 2.0, 4.0, 8.0, 8.0, 8.0]


@given(
    st.floats(0.001, 10),
    st.floats(1.0, 1e6),
    st.floats(0.001, 600),
    st.floats(0, 1),
    st.integers(1, 10_000),
    st.integers(),
)
def test_jitter_stays_within_bounds(
    initial: float, factor: float, top: float, jitter: float, deaths: int, seed: int
) -> None:
    delay = delay_s(Backoff(initial, factor, top, jitter), deaths, Random(seed))
    plain = delay_s(Backoff(initial, factor, top, 0.0), deaths, Random(seed))
    assert plain * (1 - jitter) - 1e-9 <= delay <= min(top, plain * (1 + jitter)) + 1e-9


@pytest.mark.parametrize("gap", [0.0, 5.0, 14.9])
def test_crash_loop_is_detected_for_any_gap(gap: float) -> None:
    policy = replace(PLAIN, crash_loop=CrashLoop(count=5, window_s=60.0))
    record = RestartRecord()
    decisions = [decide(policy, record=record, now=1000.0 + gap * number) for number in range(5)]
    assert [type(decision) for decision in decisions] == [Again] * 4 + [GiveUp]
    assert "crashed 5 times in 60 s" in decisions[-1].reason


def test_deaths_outside_the_window_do_not_count() -> None:
    policy = replace(PLAIN, crash_loop=CrashLoop(count=2, window_s=60.0))
    record = RestartRecord()
    assert all(isinstance(decide(policy, record=record, now=61.0 * number), Again) for number in range(20))


def test_stable_runs_do_not_hide_a_crash_loop() -> None:
    policy = replace(PLAIN, crash_loop=CrashLoop(count=3, window_s=60.0))
    record = RestartRecord()
    for now in (0.0, 12.0):
        assert isinstance(decide(policy, record=record, now=now), Again)
        record.stable()
    assert isinstance(decide(policy, record=record, now=24.0), GiveUp)


def test_slow_mode_lasts_until_a_stable_run() -> None:
    policy = replace(PLAIN, crash_loop=CrashLoop(count=2, window_s=10.0, then="slow", every_s=600.0))
    record = RestartRecord()
    delays = [
        decision.delay_s
        for now in (0.0, 1.0, 700.0, 1400.0)
        if isinstance(decision := decide(policy, record=record, now=now), Again)
    ]
    assert delays == [1.0, 600.0, 600.0, 600.0]
    record.stable()
    after = decide(policy, record=record, now=3000.0)
    assert isinstance(after, Again)
    assert after.delay_s == 1.0


@pytest.mark.parametrize(
    ("report", "text"),
    [
        (ExitReport(3), "exited with code 3"),
        (ExitReport(3, reason="bind failed"), "exited with code 3: bind failed"),
        (ExitReport(None, "SIGSEGV"), "killed by SIGSEGV"),
        (ExitReport(None, oom=True, reason="cuda"), "killed by the kernel: out of memory: cuda"),
        (
            ExitReport(None, kind=ExitKind.UNKNOWN, reason="while the daemon was down"),
            "died with an unknown exit code: while the daemon was down",
        ),
        (ExitReport(None, reason="liveness probe failed 3 times"), "liveness probe failed 3 times"),
        (ExitReport(None), "died with an unknown exit code"),
    ],
)
def test_describe_exit_names_cause_and_reason(report: ExitReport, text: str) -> None:
    assert describe_exit(report) == text


# -- the same in the fleet --------------------------------------------------------------------------------------------------


def crashing(**changes: object) -> Rig:
    policy = replace(RestartPolicy(backoff=Backoff(1.0, 2.0, 8.0, 0.0)), **changes)  # type: ignore[arg-type]
    rig = Rig(fleet_spec([process("a", restart=policy)]))
    rig.spawned("a")
    return rig


def test_crash_is_swept_then_backed_off_then_restarted() -> None:
    rig = crashing()
    rig.clear()
    rig.exits("a")
    assert [type(command) for command in rig.seen] == [c.StopProbes, c.Sweep]
    assert rig.state("a") is ProcessState.STOPPING
    rig.empty("a")
    assert rig.state("a") is ProcessState.BACKOFF
    assert rig.fleet.next_deadline() == rig.now + 1.0
    rig.wait(1.0)
    assert rig.state("a") is ProcessState.STARTING
    assert (rig.of("a").generation, rig.of("a").restarts) == (2, 1)


def test_stable_run_resets_the_backoff() -> None:
    rig = crashing(stable_after_s=10.0)
    for _ in range(2):
        rig.dies("a")
        rig.wait(8.0)
        rig.spawned("a")
    assert rig.of("a").record.deaths == 2
    rig.wait(9.9)
    assert rig.of("a").record.deaths == 2
    rig.wait(0.2)
    assert rig.of("a").record.deaths == 0
    assert rig.take(c.Persist)[-1].remembered.deaths == 0
    rig.dies("a")
    assert rig.of("a").next_start_s == rig.now + 1.0


def test_crash_loop_fails_until_an_operator_acts() -> None:
    rig = crashing(crash_loop=CrashLoop(count=3, window_s=60.0))
    for _ in range(2):
        rig.dies("a")
        rig.wait(4.0)
        rig.spawned("a")
    rig.dies("a")
    assert rig.state("a") is ProcessState.FAILED
    assert rig.take(c.Persist)[-1].remembered.failed == rig.of("a").reason
    assert rig.fleet.next_deadline() is None
    rig.wait(10_000)
    assert rig.state("a") is ProcessState.FAILED
    rig.send(e.StartRequested("a"))
    assert rig.state("a") is ProcessState.STARTING
    assert rig.of("a").record.deaths == 0


JOB = RestartPolicy(mode=RestartMode.NEVER)


@pytest.mark.parametrize(("code", "state"), [(0, ProcessState.EXITED), (3, ProcessState.FAILED)])
def test_start_due_of_an_ended_job_starts_it(code: int, state: ProcessState) -> None:
    rig = Rig(fleet_spec([process("a", restart=JOB)]))
    for run in range(1, 4):
        rig.spawned("a")
        rig.exits("a", code)
        rig.empty("a")
        assert rig.state("a") is state
        rig.wait(60)
        assert rig.state("a") is state
        rig.send(e.StartDue("a", "schedule"))
        assert rig.state("a") is ProcessState.STARTING
        assert rig.of("a").generation == run + 1


def test_start_due_of_a_running_job_leaves_it_alone() -> None:
    rig = Rig(fleet_spec([process("a", restart=JOB)]))
    rig.spawned("a")
    rig.send(e.StartDue("a", "schedule"))
    assert (rig.state("a"), rig.of("a").generation) == (ProcessState.READY, 1)
    assert not rig.take(c.Stop)


def test_start_due_while_the_set_is_swept_starts_after_it() -> None:
    rig = Rig(fleet_spec([process("a", restart=JOB)]))
    rig.spawned("a")
    rig.exits("a", 0)
    rig.send(e.StartDue("a", "schedule"))
    assert rig.state("a") is ProcessState.STOPPING
    rig.empty("a")
    assert (rig.state("a"), rig.of("a").generation) == (ProcessState.STARTING, 2)


def test_start_due_after_a_stop_by_hand_starts_nothing() -> None:
    rig = Rig(fleet_spec([process("a", restart=JOB)]))
    rig.spawned("a")
    rig.send(e.StopRequested("a"))
    rig.send(e.StartDue("a", "schedule"))
    rig.exits("a", 0)
    rig.empty("a")
    rig.send(e.StartDue("a", "schedule"))
    rig.send(e.StartDue("nobody", "schedule"))
    assert rig.state("a") is ProcessState.STOPPED


def test_restart_and_start_due_at_once_restart_once() -> None:
    rig = Rig(fleet_spec([process("a", restart=JOB)]))
    rig.spawned("a")
    rig.send(e.RestartDue("a", "schedule", in_turn=True))
    rig.send(e.StartDue("a", "schedule"))
    rig.exits("a", None)
    rig.empty("a")
    assert (rig.state("a"), rig.of("a").generation) == (ProcessState.STARTING, 2)
    rig.spawned("a")
    assert rig.state("a") is ProcessState.READY


@pytest.mark.parametrize(("ran_s", "state"), [(1.5, ProcessState.READY), (0.5, ProcessState.FAILED)])
def test_crash_loop_counts_runs_below_min_uptime(ran_s: float, state: ProcessState) -> None:
    loop = CrashLoop(count=4, window_s=600.0, min_uptime_s=1.0)
    policy = RestartPolicy(backoff=Backoff(1.0, 1.0, 1.0, 0.0), stable_after_s=1.0, crash_loop=loop)
    rig = Rig(fleet_spec([process("a", restart=policy)]))
    for _ in range(30):
        if rig.state("a") is ProcessState.FAILED:
            break
        rig.spawned("a")
        rig.wait(ran_s)
        rig.exits("a", 0)
        rig.wait(5)  # a slow sweep is no part of the run
        rig.empty("a")
        rig.wait(1.1)
    else:
        rig.spawned("a")
    assert rig.state("a") is state


@pytest.mark.parametrize("order", [e.StopRequested("a"), e.RestartRequested("a"), e.RestartDue("a", "schedule")])
def test_requested_stop_is_not_a_death(order: e.Event) -> None:
    rig = crashing()
    rig.send(order)
    assert rig.state("a") is ProcessState.STOPPING
    rig.exits("a", None)
    rig.empty("a")
    assert rig.of("a").record.deaths == 0
    assert rig.state("a") is (ProcessState.STOPPED if isinstance(order, e.StopRequested) else ProcessState.STARTING)


def test_failed_spawn_is_a_death_and_a_final_one_fails() -> None:
    rig = Rig(fleet_spec([process("a")]))
    rig.send(e.SpawnFailed("a", 1, "port 80 is taken"))
    assert rig.state("a") is ProcessState.BACKOFF
    rig.wait(1.0)
    rig.send(e.SpawnFailed("a", 2, "no such file: a.js", recoverable=False))
    assert rig.state("a") is ProcessState.FAILED
    assert "no such file: a.js" in rig.of("a").reason


def test_external_server_is_retried_forever() -> None:
    from fleetd.core.data.specs import Capabilities, ProbeKind
    from tests.support.core import ALL_PROBES

    far = process("far", capabilities=Capabilities(owns_process=False, many_models=True), probes=ALL_PROBES)
    rig = Rig(fleet_spec([far]))
    for _ in range(20):
        rig.wait(10.0)
        assert rig.state("far") is ProcessState.BACKOFF
        rig.wait(80.0 if rig.of("far").record.deaths > 6 else rig.of("far").next_start_s - rig.now)  # type: ignore[operator]
        if rig.state("far") is ProcessState.BACKOFF:
            rig.wait(rig.of("far").next_start_s - rig.now)  # type: ignore[operator]
    assert not rig.take(c.Spawn)
    assert not rig.take(c.Stop)
    while rig.state("far") is not ProcessState.STARTING:
        rig.wait(1.0)
    rig.probe("far", ProbeKind.STARTUP)
    rig.probe("far", ProbeKind.READINESS)
    assert rig.state("far") is ProcessState.READY


def test_few_deaths_are_persisted_for_any_crash_loop() -> None:
    record = RestartRecord()
    for number in range(1500):
        record.times.append(float(number))
    assert record.last(3) == (1497.0, 1498.0, 1499.0)
    assert len(record.last(1_000_000)) == 20, "every record of the process holds them, and so does the journal"
    assert RestartRecord().last(5) == ()
