"""End a run, requested or not, always with its whole process set.

Invariants:
- Nothing starts again before the set was seen to be empty. Survivors of SIGKILL are swept again after a long pause or on
  request; until then they keep their memory reservations and their row in the status.
- A requested stop is not a death. Deaths are counted once the set is empty.
"""

from __future__ import annotations

from dataclasses import replace

from fleetd.core.data.commands import Stop, StopProbes, Sweep
from fleetd.core.data.fleet_state import FleetState
from fleetd.core.data.specs import ExitKind, ExitReport, describe_exit
from fleetd.core.data.state import Process, ProcessState
from fleetd.core.processes.restart_policy import Again, Decision, Done, GiveUp, after_death, after_loss

RESWEEP_S = 60.0


class Termination:
    def __init__(self, state: FleetState) -> None:
        self.state = state

    def stop(self, process: Process, now: float, reason: str, force: bool = False) -> None:
        """Stop the whole set; `force`: without grace."""
        owns = process.spec.capabilities.owns_process
        self.state.move(process, ProcessState.STOPPING, now, reason)
        self.state.emit(StopProbes(process.name, process.generation, reason))
        if owns:
            self.state.emit(Stop(process.name, process.generation, reason, force=force or self.state.forced))
        else:
            self.set_empty(process, (), now)

    def kill(self, process: Process, now: float, reason: str, *, final: bool = False, force: bool = False) -> None:
        """Stop it for its own failure, a death. `final`: a restart cannot help."""
        process.outcome = ExitReport(None, kind=ExitKind.BAD_CONFIG if final else ExitKind.CRASH, reason=reason)
        process.crash, process.crash_s = process.outcome, now
        self.stop(process, now, reason, force)

    def died(self, process: Process, report: ExitReport, now: float) -> None:
        """Handle an exit; if not requested, sweep the set and count a death."""
        if process.restart_wanted and process.outcome is None and not report.reason:
            report = replace(report, reason=process.restart_wanted)  # such as a memory limit
        process.last_exit, process.last_exit_s = report, now
        if process.state is ProcessState.STOPPING:
            return
        process.outcome = report
        if report.code != 0:
            process.crash, process.crash_s = report, now
        self.state.move(process, ProcessState.STOPPING, now, describe_exit(report))
        self.state.emit(StopProbes(process.name, process.generation, describe_exit(report)))
        self.state.emit(Sweep(process.name, process.generation, describe_exit(report)))

    def start_failed(self, process: Process, report: ExitReport, now: float) -> None:
        """Handle a start that spawned nothing. A missing prerequisite is not a death."""
        if self._restartable(process) and not process.missing:
            self.settle_death(process, report, now)
        else:
            self.state.move(process, ProcessState.STOPPED, now, self._stop_reason(process))

    def set_empty(self, process: Process, survivors: tuple[int, ...], now: float) -> None:
        """Decide what follows once the set is empty, or has survivors."""
        process.survivors = survivors
        self.state.unobserved.pop(process.name, None)
        if survivors:
            self.forget_outcome(process)
            process.cancel_restart()
            pids = ", ".join(map(str, survivors))
            self.state.move(process, ProcessState.FAILED, now, f"cannot be killed: pid {pids} survives SIGKILL")
            self.state.persist(process, "unkillable")
            return
        outcome, process.outcome = process.outcome, None
        process.rss_bytes = 0
        if outcome is not None and self._restartable(process):
            self.settle_death(process, outcome, now)
            return
        process.again = process.restart_wanted is not None
        self.state.move(process, ProcessState.STOPPED, now, process.restart_wanted or self._stop_reason(process))
        process.cancel_restart()

    def forget_outcome(self, process: Process) -> None:
        """Do not count the end of this run as a death."""
        process.outcome = process.crash = None

    def restart_after_stop(self, process: Process, reason: str) -> None:
        """Start a process again once the stop that is under way is done."""
        self.forget_outcome(process)
        process.cancel_restart()
        process.request_restart(reason)

    def revive(self, process: Process, now: float, reason: str) -> None:
        """Leave FAILED or EXITED to try again; survivors are swept first."""
        process.impossible = False
        if process.survivors:
            self.state.move(process, ProcessState.STOPPING, now, reason)
            self.state.emit(Sweep(process.name, process.generation, reason))
        else:
            self.state.move(process, ProcessState.STOPPED, now, reason)

    def resweep(self, process: Process, now: float) -> None:
        """Sweep survivors again after a pause."""
        if now >= process.since_s + RESWEEP_S:
            self.revive(process, now, "sweeping survivors again")

    def _stop_reason(self, process: Process) -> str:
        if process.stopped:
            return "stopped by an operator"
        if self.state.shutting_down:
            return "shutting down"
        return process.reason

    def _restartable(self, process: Process) -> bool:
        return not (self.state.shutting_down or process.stopped or process.removed or not process.spec.enabled)

    def settle_death(self, process: Process, report: ExitReport, now: float) -> Decision:
        """Count a death and enter the state that the restart policy decides."""
        decision: Decision
        capabilities = process.spec.capabilities
        if capabilities.owns_process:
            decision = after_death(
                process.spec.restart,
                process.record,
                report,
                zero_is_failure=capabilities.exit_zero_is_failure,
                now=now,
                rng=self.state.rng,
                ran_s=self._ran_s(process, now),
            )
        else:
            decision = after_loss(process.spec.restart, process.record, report, self.state.rng)
        if isinstance(decision, Again):
            process.next_start_s = now + decision.delay_s
            self.state.move(process, ProcessState.BACKOFF, now, decision.reason)
        elif isinstance(decision, GiveUp):
            self.state.move(process, ProcessState.FAILED, now, decision.reason)
        elif isinstance(decision, Done):
            self.state.move(process, ProcessState.EXITED, now, decision.reason)
        self.state.persist(process, decision.reason)
        return decision

    def _ran_s(self, process: Process, now: float) -> float:
        """Return how long the run lasted that ended, without the sweep of its set."""
        if not process.spawned:
            return 0.0
        ended_s = process.last_exit_s
        return (ended_s if ended_s is not None and ended_s >= process.started_s else now) - process.started_s

    def escalate(self) -> None:
        """Kill everything that is being stopped: the shutdown was forced."""
        for process in self.state.processes.values():
            if process.state is ProcessState.STOPPING and process.spec.capabilities.owns_process:
                self.state.emit(Stop(process.name, process.generation, "shutdown was forced", force=True))
