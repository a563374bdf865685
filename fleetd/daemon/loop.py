"""The single writer of the fleet: every event enters here, and every command leaves here.

Invariants:
- `dispatch` is synchronous and may be called from anywhere on the event loop, also from inside a command: a nested call
  only appends to the inbox. The fleet never receives an event while it handles another.
- Nothing is awaited between an event and the start of its commands. A slow command runs as a task, and its result is
  the next event.
- A warm request bypasses the inbox with `take` and `give`, but only while no event is being handled: the order holds.
- One timer serves `fleet.next_deadline()`. It is moved only when the deadline moved to an earlier moment or has passed.
- An exception out of the fleet is a bug: it is reported with its event, and the daemon continues.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Iterable
from typing import Protocol

from fleetd.core.data.commands import Command
from fleetd.core.data.events import Event, Tick
from fleetd.core.data.state import Placement

# Check again after this time even without a nearer deadline: call_later of some loops does not take weeks.
_LONGEST_SLEEP_S = 3600.0


class Decider(Protocol):
    """The part of `core.Fleet` that the loop needs."""

    def handle(self, event: Event, now: float) -> Iterable[Command]: ...

    def take(self, request_id: int, model: str, now: float) -> Placement | None: ...

    def give(self, request_id: int, now: float) -> bool: ...

    def next_deadline(self) -> float | None: ...


class Starter(Protocol):
    """The part of the executor that the loop needs."""

    def start(self, command: Command) -> None: ...


Subscriber = Callable[[Event], None]


class FleetLoop:
    """Pass events to a fleet and start its commands; `fault(event, error)` gets bugs."""

    def __init__(
        self,
        fleet: Decider,
        executor: Starter,
        *,
        fault: Callable[[Event, Exception], None] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._fleet = fleet
        self._executor = executor
        self._fault = fault
        self._clock = clock
        self._before: list[Subscriber] = []
        self._after: list[Subscriber] = []
        self._inbox: deque[Event] = deque()
        self._draining = False
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = 0.0
        self._closed = self._held = False

    def subscribe(self, *subscribers: Subscriber, before_commands: bool = False) -> None:
        """Call each subscriber at every step, after or before its commands start."""
        (self._before if before_commands else self._after).extend(subscribers)

    def dispatch(self, event: Event) -> None:
        """Pass one event to the fleet, now or after the event that is being handled."""
        self._inbox.append(event)
        if self._draining or self._held:
            return
        self._draining = True
        try:
            while self._inbox:
                self._step(self._inbox.popleft())
        finally:
            self._draining = False
        self._set_timer()

    def take(self, request_id: int, model: str) -> Placement | None:
        """Grant a free slot of a loaded model; None: dispatch RequestArrived instead."""
        return None if self._draining or self._held else self._fleet.take(request_id, model, self._clock())

    def give(self, request_id: int) -> bool:
        """Return a granted slot at once; False: dispatch RequestFinished instead."""
        if self._draining or self._held or not self._fleet.give(request_id, self._clock()):
            return False
        deadline = self._fleet.next_deadline()
        if deadline is not None and (self._timer is None or deadline < self._timer_at):
            self._set_timer()
        return True

    def _step(self, event: Event) -> None:
        try:
            commands = list(self._fleet.handle(event, self._clock()))
        except Exception as error:
            if self._fault is None:
                raise
            self._fault(event, error)
            return
        for subscriber in self._before:
            subscriber(event)
        for command in commands:
            self._executor.start(command)
        for subscriber in self._after:
            subscriber(event)

    def _set_timer(self) -> None:
        if self._closed:
            return
        deadline = self._fleet.next_deadline()
        timer = self._timer
        if deadline is None:
            if timer is not None:
                timer.cancel()
                self._timer = None
            return
        if timer is not None:
            # A timer that fires too early costs one Tick; moving it at every request would cost more.
            if self._timer_at <= deadline:
                return
            timer.cancel()
        delay_s = min(max(0.0, deadline - self._clock()), _LONGEST_SLEEP_S)
        self._timer_at = deadline
        # uvloop counts in milliseconds and may fire one early: the fleet would answer with the same deadline, at once.
        self._timer = asyncio.get_running_loop().call_later(delay_s + 0.001, self._fire)

    def _fire(self) -> None:
        self._timer = None
        self.dispatch(Tick())

    def hold(self) -> None:
        """Handle no further event: the next program starts from the present state."""
        self._held = True
        self.close()

    def close(self) -> None:
        """Stop the timer: no deadline wakes the fleet any more."""
        self._closed = True
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
