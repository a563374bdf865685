"""Put loaded models to sleep and wake them: the process stays, most of its memory is freed.

Invariants:
- Only a model with its own process sleeps. It is idle and gets no grants from the decision on, and nothing else starts, stops,
  sleeps or wakes on its lane meanwhile.
- The ledger holds the larger of both footprints on the way down and on the way up, and the sleeper's own in between. Memory that
  a sleep took on another device stays reserved after waking: the engine does not return it.
- After a failure the memory of the engine is unknown: it is killed without grace, which counts as a death, and started cold if
  it is wanted. For `SLEEPLESS_S` it is unloaded instead of put to sleep.
- A sleeper whose process exits is unloaded: no memory is reserved to start it again.
- An adopted engine that can sleep is asked first, because the previous daemon may have put it to sleep.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from fleetd.core.data.commands import CheckSleep, Sleep, Wake
from fleetd.core.data.fleet_state import FleetState
from fleetd.core.data.journal import SleepCancelled, SleepStepFailed
from fleetd.core.data.specs import SleepState
from fleetd.core.data.state import SERVING, Placement, Process, ProcessState, Residency, SleepStep
from fleetd.core.models.candidates import reservation_of
from fleetd.core.models.measurement import eviction_note
from fleetd.core.models.retention import cancel_preload, due, stays_loaded
from fleetd.core.processes.start_gate import lane_waits
from fleetd.core.processes.termination import Termination

ANSWER_GRACE_S = 10.0  # the daemon's own timeout comes first
SLEEPLESS_S = 600.0
_ORDERS: Mapping[SleepStep, type[Sleep | Wake | CheckSleep]] = {
    SleepStep.SLEEP: Sleep,
    SleepStep.WAKE: Wake,
    SleepStep.CHECK: CheckSleep,
}


class SleepControl:
    def __init__(self, state: FleetState) -> None:
        self.state = state
        self.termination = Termination(state)

    # -- decided ------------------------------------------------------------------------------------------------------

    def begin(self, placement: Placement, now: float, reason: str, by: str = "") -> None:
        """Put an idle placement to sleep once its lane is free; reserve its growth now."""
        model = self.state.models[placement.model]
        self.state.ledger.grow(placement.key, model.asleep or {})
        placement.step, placement.closing, placement.returns = SleepStep.SLEEP, reason, True
        self.state.journal.note(eviction_note(self.state, placement, now, reason, by))
        self.state.wake(placement.process)

    def call_off(self, placement: Placement, reason: str) -> None:
        """Cancel a sleep that was not ordered yet, and free the memory reserved for it."""
        if placement.step is SleepStep.SLEEP and not placement.ordered:
            placement.step, placement.closing, placement.returns = None, None, False
            self.state.ledger.correct(placement.key, reservation_of(self.state.models[placement.model], placement))
            self.state.journal.note(SleepCancelled(placement.model, placement.process, reason))

    def wake(self, placement: Placement, now: float, reason: str, for_request: bool) -> None:
        """Reserve memory and wake it once its lane is free. Raises CapacityError."""
        model = self.state.models[placement.model]
        self.state.ledger.grow(placement.key, model.footprint.bytes)
        self.state.move_placement(placement, Residency.LOADING, now, reason)
        placement.step, placement.order_s, placement.for_request, placement.waits = SleepStep.WAKE, now, for_request, ""
        cancel_preload(self.state, model.name)

    # -- carried out ----------------------------------------------------------------------------------------------------

    def attend(self, placement: Placement, process: Process, now: float) -> bool:
        """Order the due step on a free lane; handle timeouts and a lost process.

        Returns False if no step of a sleep is under way.
        """
        if placement.state is Residency.ASLEEP:
            if process.state not in SERVING:
                self._lost(placement, process, now)
            return True
        if placement.step is None:
            return False
        if placement.generation != process.generation or process.state not in SERVING | {ProcessState.STARTING}:
            if placement.step is SleepStep.CHECK:  # its memory was assumed: it may not fit
                self.state.unobserved.pop(process.name, None)
                self._lost(placement, process, now)
            placement.step, placement.ordered = None, False
        elif process.state is ProcessState.STARTING:
            pass  # adopted, no answer yet
        elif placement.ordered:
            if now >= self._deadline(placement):
                self.seen(placement, SleepState.FAILED, f"no answer within {now - placement.ordered_s:g} s", now)
        elif process.leave_s is None and not self._waits(placement, process):
            placement.ordered, placement.ordered_s = True, now
            reason = placement.closing or placement.reason
            self.state.emit(_ORDERS[placement.step](placement.model, process.name, process.generation, reason))
        return placement.step is not None

    def _waits(self, placement: Placement, process: Process) -> bool:
        waits = lane_waits(self.state, process) if placement.step is not SleepStep.CHECK else ""
        return self.state.waits_for_lane(placement, waits)

    def _deadline(self, placement: Placement) -> float:
        spec = self.state.models[placement.model].spec
        longest_s = spec.sleep_timeout_s if placement.step is SleepStep.SLEEP else spec.load_timeout_s
        return placement.ordered_s + longest_s + ANSWER_GRACE_S

    def deadlines(self, placement: Placement) -> Iterator[float]:
        if placement.step is not None and placement.ordered:
            yield self._deadline(placement)

    # -- answered -------------------------------------------------------------------------------------------------------

    def seen(self, placement: Placement, state: SleepState, message: str, now: float) -> bool:
        """Handle an answer. Returns True if an adopted engine is awake, and so loaded."""
        step = placement.step
        self.state.unobserved.pop(placement.process, None)
        if state is SleepState.ASLEEP and step is not SleepStep.WAKE:
            self._asleep(placement, now, "put to sleep" if step is SleepStep.SLEEP else "found asleep")
        elif state is SleepState.AWAKE and step is SleepStep.WAKE:
            self._awake(placement, now)
        elif state is SleepState.AWAKE and step is SleepStep.CHECK:
            return True
        else:
            self._failed(placement, message or f"it is {state}", now)
        return False

    def _asleep(self, placement: Placement, now: float, how: str) -> None:
        model = self.state.models[placement.model]
        reason = f"{how}: {placement.closing}" if placement.closing else how
        model.sleeps += placement.step is SleepStep.SLEEP
        placement.closing, placement.evicted, placement.slept = None, False, True
        self.state.move_placement(placement, Residency.ASLEEP, now, reason)
        self.state.ledger.correct(placement.key, reservation_of(model, placement))
        if placement.returns and stays_loaded(self.state, model):
            due(self.state, model)

    def _awake(self, placement: Placement, now: float) -> None:
        model = self.state.models[placement.model]
        model.wakes += 1
        model.wake_s = now - placement.order_s
        model.load_succeeded()
        placement.loaded_s = placement.last_used_s = now
        self.state.move_placement(placement, Residency.LOADED, now, "woken")
        cancel_preload(self.state, model.name)

    def _failed(self, placement: Placement, message: str, now: float) -> None:
        model, step = self.state.models[placement.model], placement.step
        model.sleepless_until_s = now + SLEEPLESS_S
        reason = f"{step} failed: {message}"
        self.state.journal.note(SleepStepFailed(model.name, placement.process, str(step), message, SLEEPLESS_S))
        if step is not SleepStep.WAKE:  # only a waking model has all of its memory reserved
            placement.evicted = step is SleepStep.SLEEP
            placement.returns = placement.returns or step is SleepStep.CHECK
            self.state.move_placement(placement, Residency.UNLOADING, now, reason)
        else:
            placement.step, placement.ordered = None, False
        process = self.state.processes[placement.process]
        if process.state in SERVING:
            self.termination.kill(process, now, reason, force=True)

    def _lost(self, placement: Placement, process: Process, now: float) -> None:
        """Unload a sleeper whose process exits; its memory is free once the set is empty."""
        placement.closing, placement.returns = f"{process.name} is {process.state}: {process.reason}", True
        self.state.move_placement(placement, Residency.UNLOADING, now, placement.closing)
