"""Explain a state to a person: the reason, the next command, and whether it is a problem.

Invariants:
- Pure functions of the state and the time. They decide nothing, and nothing parses their text.
- Every problem has a hint; a state without a problem has none, unless an operator caused it and can take it back.
"""

from __future__ import annotations

from dataclasses import dataclass

from fleetd.core.data.fleet_state import FleetState
from fleetd.core.data.specs import brief_exit
from fleetd.core.data.state import Model, Placement, Process, ProcessState, Residency
from fleetd.core.processes.start_gate import gate

_S = ProcessState
_PROBLEMS = frozenset({_S.FAILED, _S.BACKOFF, _S.BLOCKED, _S.UNHEALTHY})
_OWN_SIGNALS = frozenset({"SIGKILL", "SIGTERM"})  # fleetd sends these too, so it says that it did not


@dataclass(frozen=True, slots=True)
class Advice:
    """What a person reads about a process or a model. `hint`: what to do next, None for nothing."""

    reason: str
    hint: str | None = None
    problem: bool = False


# -- processes ------------------------------------------------------------------------------------------------------------


def of_process(state: FleetState, process: Process, now: float) -> Advice:
    """Return the advice for a process."""
    name, at = process.name, process.state
    if at is _S.STOPPED and process.crash is not None and not process.stopped and process.spec.enabled:
        return Advice(f"{_crashed(process, now)}; the next request starts it", f"fleetctl logs {name}", problem=True)
    hint = None
    if process.survivors:
        hint = f"end pid {process.survivors[0]} by other means (ps -o stat,wchan {process.survivors[0]}), then: fleetctl start {name}"
    elif process.stopped:
        hint = f"fleetctl start {name}"
    elif at is _S.FAILED:
        hint = _hint_for_failed(state, process)
    elif process.missing:
        hint = "it starts as soon as what is missing is there"
    elif at is _S.BLOCKED:
        hint = _hint_for_dependency(state, process) or "it starts as soon as what it waits for is ready"
    elif at is _S.BACKOFF:
        hint = f"fleetctl logs {name} -n 30"
    elif process.paused and process.pid:
        hint = f"kill -CONT {process.pid}, or fleetctl restart {name}"
        return Advice(_paused(process), hint, problem=True)
    elif process.drained:
        hint = f"fleetctl undrain {name}"
    elif at is _S.UNHEALTHY:
        hint = f"fleetctl logs {name} -n 30, or fleetctl restart {name}"
    return Advice(process.reason, hint, problem=at in _PROBLEMS and not process.stopped)


def _crashed(process: Process, now: float) -> str:
    report = process.crash
    assert report is not None
    how = brief_exit(report)
    if report.signal in _OWN_SIGNALS and not report.oom and not report.reason:
        how += ", not sent by fleetd"
    return f"crashed {max(0.0, now - process.crash_s):.0f} s ago ({how})"


def _paused(process: Process) -> str:
    left_s = _until_liveness_restart(process)
    due = f"; restart due in {left_s:.0f} s" if left_s is not None else ""
    return f"process {process.pid} is stopped (SIGSTOP){due}"


def _until_liveness_restart(process: Process) -> float | None:
    """Return the seconds until the liveness probe has failed often enough; None without such a probe."""
    probe = process.spec.probes.liveness
    if probe is None:
        return None
    bad = process.liveness.streak if process.liveness.last_ok is False else 0
    return max(0, probe.failures - bad) * max(probe.period_s, probe.timeout_s)


def _hint_for_failed(state: FleetState, process: Process) -> str:
    if process.impossible:
        return _hint_for_dependency(state, process) or f"fleetctl start {process.name}"
    return f"fleetctl logs {process.name} -n 30; when it is fixed: fleetctl start {process.name}"


def _hint_for_dependency(state: FleetState, process: Process) -> str | None:
    """Return how to help the first dependency that will not come by itself."""
    for dependency in process.spec.depends_on:
        other = state.processes.get(dependency.name)
        if other is not None and (other.stopped or other.state in (_S.FAILED, _S.EXITED)):
            return f"fleetctl start {other.name}"
    if gate(state, process).impossible:
        return "enable what it depends on in fleet.yaml"
    return None


# -- models ---------------------------------------------------------------------------------------------------------------


def of_model(state: FleetState, model: Model, now: float) -> Advice:
    """Return the advice for a model."""
    missing = model.missing or _missing_for(state, model)
    if missing and not _loaded(model):
        return Advice(f"missing: {', '.join(missing)}", "it loads as soon as what is missing is there", problem=True)
    if model.failure and not _loaded(model):
        return Advice(model.failure, load_hint(model), problem=True)
    placement = next(iter(model.placements.values()), None)
    if placement is not None:
        return Advice(placement.reason)
    holders = _holders(state, model)
    if holders and all(one.stopped or one.drained or one.state in (_S.FAILED, _S.EXITED) for one in holders):
        advice = of_process(state, holders[0], now)
        own = holders[0].name == model.name
        return Advice(advice.reason if own else f"{holders[0].name}: {advice.reason}", advice.hint, advice.problem)
    crashed = next((one for one in holders if one.crash is not None and one.spec.own_model == model.name), None)
    if crashed is not None:
        return of_process(state, crashed, now)
    return Advice("not in memory")


def load_hint(model: Model) -> str:
    """Return what to do after a failed load."""
    holder = next(iter(model.spec.holders), model.name)
    if model.failure_final:
        return f"no retry can help: fleetctl logs {holder} -n 30; when it is fixed: fleetctl load {model.name}"
    return f"fleetctl logs {holder} -n 30; a request tries again, or: fleetctl load {model.name}"


def serving_hint(state: FleetState, model: Model) -> str | None:
    """Return how to make a model servable again that no process can take; None: it heals by itself."""
    for process in _holders(state, model):
        if process.stopped:
            return f"fleetctl start {process.name}"
        if process.drained:
            return f"fleetctl undrain {process.name}"
        if process.state is _S.FAILED:
            return _hint_for_failed(state, process)
        if process.missing:
            return "it is served as soon as what is missing is there"
    return None


def needs_operator(state: FleetState, model: Model) -> bool:
    """Return whether only an operator can make the model servable: all its processes were stopped or drained by hand."""
    holders = _holders(state, model)
    return bool(holders) and all(process.stopped or process.drained for process in holders)


@dataclass(frozen=True, slots=True)
class LoadStatus:
    """How far a load is: seconds so far, its limit, and what its engine says or answers."""

    elapsed_s: float
    limit_s: float
    detail: str


def load_progress(state: FleetState, placement: Placement, now: float) -> LoadStatus:
    """Return how long a load takes already, what its engine answers, and its limit."""
    process = state.processes.get(placement.process)
    model = state.models[placement.model]
    limit_s = model.spec.load_timeout_s
    answer = ""
    if process is not None:
        answer = process.phase or process.startup_detail
        startup = process.spec.probes.startup
        if process.spec.own_model is not None and startup is not None and startup.deadline_s is not None:
            limit_s = startup.deadline_s
    return LoadStatus(max(0.0, now - placement.order_s), limit_s, answer)


def loading_detail(state: FleetState, placement: Placement, now: float) -> str:
    """Return the progress of a load as a sentence."""
    found = load_progress(state, placement, now)
    inside = "; ".join(part for part in (found.detail, f"limit {found.limit_s:g} s") if part)
    return f"{placement.model} is still loading after {found.elapsed_s:.0f} s ({inside})"


def _loaded(model: Model) -> bool:
    return any(placement.state in (Residency.LOADED, Residency.ASLEEP) for placement in model.placements.values())


def _holders(state: FleetState, model: Model) -> list[Process]:
    return [process for name in model.spec.holders if (process := state.processes.get(name)) is not None]


def _missing_for(state: FleetState, model: Model) -> tuple[str, ...]:
    """Return what every process of a model misses; empty if one of them could start."""
    holders = _holders(state, model)
    return holders[0].missing if holders and all(process.missing for process in holders) else ()
