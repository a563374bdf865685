"""What a person reads at three in the morning: for every broken thing the cause and the next command."""

from __future__ import annotations

from dataclasses import replace

import pytest

from fleetd.core.advice import Advice
from fleetd.core.data import commands as c
from fleetd.core.data import events as e
from fleetd.core.data.specs import ExitReport, ProbeKind, Probes, ProbeSpec, brief_exit, describe_exit
from tests.support.core import Rig, fleet_spec, model, own, owners, process


def of(rig: Rig, name: str) -> Advice:
    return rig.fleet.queries.process_advice(rig.of(name), rig.now)


def of_model(rig: Rig, name: str) -> Advice:
    return rig.fleet.queries.model_advice(rig.fleet.models[name], rig.now)


def reject(rig: Rig) -> c.Reject:
    return rig.take(c.Reject)[-1]


def die(rig: Rig, name: str, report: ExitReport) -> None:
    generation = rig.of(name).generation
    rig.send(e.Exited(name, generation, report))
    rig.send(e.SetEmpty(name, generation))


CUDA = ExitReport(3, reason="CUDA error: out of memory")


def test_crash_loop_of_service_names_the_way_back() -> None:
    rig = Rig(fleet_spec([process("bot")]))
    for _ in range(5):
        rig.wait(max(0.0, (rig.of("bot").next_start_s or rig.now) - rig.now))
        rig.spawned("bot")
        die(rig, "bot", CUDA)
        rig.now += 0.1
    advice = of(rig, "bot")
    assert advice.reason == "crashed 5 times in 60 s (exit code 3: CUDA error: out of memory); fleetd has given up"
    assert advice.hint == "fleetctl logs bot -n 30; when it is fixed: fleetctl start bot"
    assert advice.problem


def test_crashed_engine_on_demand_leaves_a_trace() -> None:
    rig = Rig(owners("a"))
    rig.send(e.LoadRequested("a", 1))
    rig.spawned("a")
    die(rig, "a", ExitReport(None, "SIGKILL"))
    rig.wait(6.0)
    advice = of(rig, "a")
    if rig.state("a") == "STOPPED":
        assert advice.reason == "crashed 6 s ago (SIGKILL, not sent by fleetd); the next request starts it"
        assert advice.hint == "fleetctl logs a"
    assert advice.problem
    assert of_model(rig, "a").problem


def test_missing_file_says_that_it_loads_once_it_is_there() -> None:
    missing = ("models.a.options.model: /x.gguf (does not exist)",)
    rig = Rig(owners("a"), missing={"a": missing})
    advice = of_model(rig, "a")
    assert missing[0] in advice.reason
    assert advice.hint == "it loads as soon as what is missing is there"
    rig.send(e.RequestArrived(1, "a", ()))
    assert (reject(rig).code, reject(rig).hint) == ("model_blocked", "it is served as soon as what is missing is there")


def test_stopped_process_of_a_model_names_start_and_no_retry() -> None:
    rig = Rig(owners("a"))
    rig.send(e.StopRequested("a"))
    assert of(rig, "a").hint == "fleetctl start a"
    assert not of(rig, "a").problem, "an operator caused it"
    rig.send(e.RequestArrived(1, "a", ()))
    found = reject(rig)
    assert (found.hint, found.final, found.model) == ("fleetctl start a", True, "a")


def test_pin_that_blocks_another_has_numbers_and_unpin() -> None:
    rig = Rig(owners("ab", budget=1))
    rig.send(e.LoadRequested("a", 1))
    rig.spawned("a")
    rig.send(e.PinRequested("a"))
    rig.send(e.RequestArrived(2, "b", ()))
    found = reject(rig)
    assert found.reason == "b needs 1.00 GiB; 0 B of 1.00 GiB are free on gpu0 and a (1.00 GiB) is pinned"
    assert found.hint == "fleetctl unpin a"


def test_model_above_the_budget_names_the_key() -> None:
    rig = Rig(fleet_spec([own("a")], [model("a", size=4)], budget=1))
    rig.send(e.RequestArrived(1, "a", ()))
    assert reject(rig).code == "model_too_large"
    assert reject(rig).hint == "raise devices.gpu0.budget in fleet.yaml, or make the model smaller"


def test_slow_load_is_not_called_a_lack_of_room() -> None:
    probes = Probes(startup=ProbeSpec(http="/health", period_s=1.0, timeout_s=1.0, failures=1, deadline_s=20.0))
    rig = Rig(fleet_spec([own("never", probes=probes)], [model("never", queue_timeout_s=15.0)]))
    rig.send(e.RequestArrived(1, "never", ()))
    rig.spawned("never")
    rig.probe("never", ProbeKind.STARTUP, False, "GET /health: 503 Loading model")
    rig.wait(15.0)
    found = reject(rig)
    assert found.reason == "never is still loading after 15 s (GET /health: 503 Loading model; limit 20 s)"
    assert found.hint == "raise models.never.queue.timeout"


def test_stopped_by_signal_names_cont_and_the_restart() -> None:
    probe = ProbeSpec(http="/health", period_s=10.0, timeout_s=2.0, failures=3)
    rig = Rig(fleet_spec([process("good", probes=Probes(readiness=probe, liveness=probe))]))
    rig.spawned("good")
    rig.probe("good", ProbeKind.READINESS)
    generation, pid = rig.of("good").generation, rig.of("good").pid
    rig.send(e.ProbeResult("good", generation, ProbeKind.LIVENESS, False, "no answer", paused=True))
    advice = of(rig, "good")
    assert advice.reason == f"process {pid} is stopped (SIGSTOP); restart due in 20 s"
    assert advice.hint == f"kill -CONT {pid}, or fleetctl restart good"


def test_drained_process_names_undrain() -> None:
    rig = Rig(fleet_spec([process("a")]))
    rig.spawned("a")
    rig.send(e.DrainRequested("a"))
    assert of(rig, "a").hint == "fleetctl undrain a"


def test_damaged_model_says_that_no_retry_helps() -> None:
    rig = Rig(owners("a"))
    loaded = rig.fleet.models["a"]
    loaded.load_failed("tensor is not within the file bounds", rig.now, rig.now, True)
    hint = of_model(rig, "a").hint
    assert hint == "no retry can help: fleetctl logs a -n 30; when it is fixed: fleetctl load a"


def test_failed_dependency_names_the_process_to_start() -> None:
    from fleetd.core.data.specs import Dependency, DependencyCondition

    needs = (Dependency("db", DependencyCondition.READY),)
    rig = Rig(fleet_spec([process("db"), process("web", depends_on=needs)]))
    rig.send(e.StopRequested("db"))
    assert of(rig, "web").hint == "fleetctl start db"


@pytest.mark.parametrize(
    ("report", "brief", "whole"),
    [
        (CUDA, "exit code 3: CUDA error: out of memory", "exited with code 3: CUDA error: out of memory"),
        (ExitReport(None, "SIGKILL", reason="ended by SIGKILL"), "SIGKILL", "killed by SIGKILL"),
        (ExitReport(None, "SIGKILL", oom=True), "out of memory", "killed by the kernel: out of memory"),
        (ExitReport(None), "unknown exit code", "died with an unknown exit code"),
    ],
)
def test_exit_is_described_once(report: ExitReport, brief: str, whole: str) -> None:
    assert (brief_exit(report), describe_exit(report)) == (brief, whole)


def test_running_fleet_has_no_problem_and_no_hint() -> None:
    rig = Rig(replace(fleet_spec([process("a")])))
    rig.spawned("a")
    assert of(rig, "a") == Advice("ready")
