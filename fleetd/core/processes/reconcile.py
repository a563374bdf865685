"""Bring each process one step closer to its desired state.

Invariants:
- `reconcile` is idempotent.
- A process is stopped as a *set*; nothing starts again before the set was seen to be empty.
- A requested stop is not a death. A crash, a failed liveness probe and a start that never became ready are.
- On a lane with an exclusive start, a requested stop waits for a start, as a start waits for a stop: these engines measure free
  memory while they start.
"""

from __future__ import annotations

from collections.abc import Iterator

from fleetd.core.data.commands import Spawn, StartProbe, StopProbes
from fleetd.core.data.fleet_state import FleetState
from fleetd.core.data.journal import RunStable
from fleetd.core.data.specs import ProbeKind
from fleetd.core.data.state import SERVING, Process, ProcessState, Residency
from fleetd.core.processes import rolling_restart
from fleetd.core.processes.start_gate import dependents_running, gate, stop_waits
from fleetd.core.processes.termination import RESWEEP_S, Termination

REFUSED_S = 1.0  # pause after a refused connection, if no probe reports the recovery


class ProcessSupervisor:
    def __init__(self, state: FleetState) -> None:
        self.state = state
        self.termination = Termination(state)

    # -- what is desired ------------------------------------------------------------------------------------------------

    def wanted(self, process: Process) -> bool:
        """Return whether this process should run now."""
        spec = process.spec
        if self.state.shutting_down or process.stopped or process.removed or not spec.enabled:
            return False
        if spec.own_model is None and (
            not spec.on_demand or process.start_requested or spec.name in self.state.unobserved
        ):
            return True
        return any(
            p.state is not Residency.UNLOADING or spec.own_model is None for p in self.state.placements_on(spec.name)
        )

    def in_flight(self, process: Process) -> int:
        return sum(placement.in_flight for placement in self.state.placements_on(process.name))

    def reconcile(self, now: float) -> None:
        for name in [name for name, until_s in self.state.unobserved.items() if now >= until_s]:
            del self.state.unobserved[name]
        for name in sorted(self.state.awake):
            process = self.state.processes.get(name)
            if process is None:
                self.state.awake.discard(name)
                continue
            self._advance(process, now)
            self.state.settle(process)
        if self.state.rolling:
            rolling_restart.advance(self.state, self.wanted)

    def _advance(self, process: Process, now: float) -> None:
        state = process.state
        if state is ProcessState.STARTING:
            self._watch_start(process, now)
        elif state in SERVING:
            self._watch_serving(process, now)
        elif state is ProcessState.STOPPING:
            return
        elif process.survivors:
            self.termination.resweep(process, now)
        elif process.removed:
            self.state.forget(process)
        elif state in (ProcessState.EXITED, ProcessState.FAILED):
            if process.impossible and not gate(self.state, process).impossible:
                self.termination.revive(process, now, "the dependency may start again")
                self._rest(process, now)
        else:
            self._rest(process, now)

    def _rest(self, process: Process, now: float) -> None:
        """Start a process at rest if it is wanted, due and allowed."""
        if not self.wanted(process):
            self._idle(process, now)
            return
        if process.state is ProcessState.BACKOFF and process.next_start_s is not None and now < process.next_start_s:
            return
        verdict = gate(self.state, process)
        if verdict.open:
            self._start(process, now)
        elif verdict.impossible:
            process.impossible = True
            self.state.move(process, ProcessState.FAILED, now, verdict.reason)
        elif process.state is not ProcessState.BLOCKED:
            process.again = process.again or process.state is ProcessState.BACKOFF
            self.state.move(process, ProcessState.BLOCKED, now, verdict.reason)
        else:
            process.reason = verdict.reason

    def _idle(self, process: Process, now: float) -> None:
        """Rest an unwanted process: STOPPED, or BLOCKED to show a missing prerequisite."""
        process.next_start_s, process.again = None, False
        silent = process.stopped or not process.spec.enabled or self.state.shutting_down
        target = ProcessState.BLOCKED if process.missing and not silent else ProcessState.STOPPED
        if process.state is not target:
            blocked = target is ProcessState.BLOCKED
            self.state.move(
                process, target, now, gate(self.state, process).reason if blocked else self._why_not(process)
            )
        elif not process.spec.enabled:
            process.reason = self._why_not(process)

    def _why_not(self, process: Process) -> str:
        for placement in self.state.placements_on(process.name):
            if process.spec.own_model is not None and placement.closing:
                return placement.closing
        if process.stopped:
            return "stopped by an operator"
        if not process.spec.enabled:
            return "disabled in the configuration"
        return "shutting down" if self.state.shutting_down else "not needed now"

    def _start(self, process: Process, now: float) -> None:
        reason = self._why_start(process)
        if process.again or process.state is ProcessState.BACKOFF:
            process.restarts += 1
        process.again = False
        process.generation += 1
        self.state.move(process, ProcessState.STARTING, now, "starting")
        self.begin_run(process, now)
        if process.spec.capabilities.owns_process:
            self.state.emit(Spawn(process.name, process.generation, reason, process.restarts))
            self.state.persist(process, "started")
        else:
            self.spawned(process, None, now)

    def _why_start(self, process: Process) -> str:
        if process.state is ProcessState.BACKOFF or process.again:
            return process.reason
        for placement in self.state.placements_on(process.name):
            return f"{placement.model}: {placement.reason}"
        return "first start" if process.generation == 0 else "wanted"

    def begin_run(self, process: Process, now: float) -> None:
        """Reset everything that belongs to the previous generation."""
        process.started_s = process.progress_s = now
        process.ready_s = process.next_start_s = process.leave_s = None
        process.cancel_restart()
        self.termination.forget_outcome(process)
        self.state.rolling.pop(process.name, None)
        self.state.unobserved.pop(process.name, None)
        process.startup_done, process.memory_strikes, process.rss_bytes = False, 0, 0
        process.phase = process.startup_detail = ""
        process.readiness.reset()
        process.liveness.reset()

    # -- while it starts --------------------------------------------------------------------------------------------------

    def spawned(self, process: Process, pid: int | None, now: float) -> None:
        """Record that it runs; the startup probe gates all others."""
        process.spawned, process.pid, process.progress_s = True, pid, now
        if process.spec.probes.startup is not None:
            self._probe(process, ProbeKind.STARTUP)
        else:
            self.startup_passed(process, now)

    def startup_passed(self, process: Process, now: float) -> None:
        process.startup_done = True
        if process.spec.probes.readiness is not None:
            self._probe(process, ProbeKind.READINESS)
        self.maybe_ready(process, now)

    def maybe_ready(self, process: Process, now: float) -> None:
        """Move from STARTING to READY once no probe gates it."""
        if process.state is not ProcessState.STARTING or not process.spawned or not process.startup_done:
            return
        if process.spec.probes.readiness is not None and not process.readiness.good:
            return
        process.ready_s = now
        self.state.move(process, ProcessState.READY, now, "ready")
        if process.spec.probes.liveness is not None:
            self._probe(process, ProbeKind.LIVENESS)

    def _watch_start(self, process: Process, now: float) -> None:
        if not process.spawned:
            return
        if not self.wanted(process) or process.restart_wanted:
            self.termination.stop(process, now, process.restart_wanted or self._why_not(process))
            return
        deadline = self._start_deadline(process)
        if deadline is not None and now >= deadline:
            details = (process.phase, process.readiness.detail or process.startup_detail)
            detail = "; ".join(one for one in details if one)
            reason = f"not ready within {deadline - process.progress_s:g} s" + (f" ({detail})" if detail else "")
            self.termination.kill(process, now, reason)
        elif process.startup_done:
            self.maybe_ready(process, now)

    def _start_deadline(self, process: Process) -> float | None:
        startup = process.spec.probes.startup
        if startup is None or startup.deadline_s is None or process.startup_done or not process.spawned:
            return None
        return process.progress_s + startup.deadline_s

    # -- while it serves --------------------------------------------------------------------------------------------------

    def _watch_serving(self, process: Process, now: float) -> None:
        spec = process.spec
        if (
            process.record.deaths
            and process.ready_s is not None
            and now >= process.ready_s + spec.restart.stable_after_s
        ):
            process.record.stable()
            self.state.journal.note(RunStable(process.name, spec.restart.stable_after_s))
            self.state.persist(process, "stable again")
        if self._ages(process) and now >= process.started_s + (spec.max_age_s or 0.0):
            self.state.rolling[process.name] = f"older than {spec.max_age_s:g} s"
        leaving = process.restart_wanted if self.wanted(process) else self._why_not(process)
        if leaving is None:
            process.leave_s = None
            self._settle_routing(process, now)
            return
        if self.state.shutting_down and not self.state.forced and dependents_running(self.state, process.name):
            return
        if process.leave_s is None:
            process.leave_s = now
        if process.state is not ProcessState.DRAINING:
            self.state.move(process, ProcessState.DRAINING, now, leaving)
        if self.in_flight(process) and now < process.leave_s + spec.drain_timeout_s and not self.state.forced:
            process.reason = leaving
            return
        process.reason = leaving if self.state.shutting_down else stop_waits(self.state, process) or leaving
        if process.reason == leaving:
            self.termination.stop(process, now, leaving)

    def _ages(self, process: Process) -> bool:
        """Return whether its maximum age will restart it."""
        return (
            process.spec.max_age_s is not None
            and process.restart_wanted is None
            and process.name not in self.state.rolling
        )

    def _settle_routing(self, process: Process, now: float) -> None:
        """Move between READY, UNHEALTHY and DRAINING by readiness and operator request."""
        if self._unprobed(process) and now >= process.since_s + REFUSED_S:
            process.readiness.reset()  # the next request decides
        healthy = process.readiness.good is not False
        if process.drained:
            target, reason = ProcessState.DRAINING, "drained by an operator"
        elif healthy:
            target, reason = ProcessState.READY, "ready"
        else:
            how = "readiness probe" if process.readiness.streak else "connection refused"
            target, reason = ProcessState.UNHEALTHY, f"{how}: {process.readiness.detail}"
        if process.state is not target:
            self.state.move(process, target, now, reason)

    def _unprobed(self, process: Process) -> bool:
        """Return whether it is out of routing and no probe can bring it back."""
        return process.state is ProcessState.UNHEALTHY and process.spec.probes.readiness is None

    def deadlines(self, process: Process) -> Iterator[float]:
        """Yield the times at which `reconcile` may decide otherwise without an event."""
        spec = process.spec
        if process.state is ProcessState.BACKOFF and process.next_start_s is not None:
            yield process.next_start_s
        elif process.state is ProcessState.STARTING:
            deadline = self._start_deadline(process)
            if deadline is not None:
                yield deadline
        elif process.state in SERVING:
            if process.record.deaths and process.ready_s is not None:
                yield process.ready_s + spec.restart.stable_after_s
            if self._ages(process):
                yield process.started_s + (spec.max_age_s or 0.0)
            if process.leave_s is not None:
                yield process.leave_s + spec.drain_timeout_s
            if self._unprobed(process):
                yield process.since_s + REFUSED_S
        elif process.survivors:
            yield process.since_s + RESWEEP_S

    def reprobe(self, process: Process, now: float) -> None:
        """The probes of a running process changed: begin again with the new ones."""
        self.state.emit(StopProbes(process.name, process.generation, "the probes changed"))
        process.readiness.reset()
        process.liveness.reset()
        if not process.startup_done:
            self.spawned(process, process.pid, now)
            return
        if process.spec.probes.readiness is not None:
            self._probe(process, ProbeKind.READINESS)
        if process.spec.probes.liveness is not None and process.state in SERVING:
            self._probe(process, ProbeKind.LIVENESS)

    def _probe(self, process: Process, probe: ProbeKind) -> None:
        if process.removed:
            return  # about to be stopped, and its probes left the configuration
        self.state.emit(
            StartProbe(process.name, process.generation, probe, f"{probe} probe of generation {process.generation}")
        )
