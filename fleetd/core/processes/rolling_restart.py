"""Restart the replicas of one name one after the other, so that the others serve meanwhile.

Invariants:
- A replica restarts once every other one serves, or has failed or exited for good. A replica that is on its way back (stopping,
  starting, backing off, blocked) delays the others, which keep running.
- A replica that restarts for any other reason has had its turn.
"""

from __future__ import annotations

from collections.abc import Callable

from fleetd.core.data.fleet_state import FleetState
from fleetd.core.data.journal import RestartTurn
from fleetd.core.data.state import SERVING, Process, ProcessState

_SETTLED = SERVING | {ProcessState.FAILED, ProcessState.EXITED}


def advance(state: FleetState, wanted: Callable[[Process], bool]) -> None:
    """Restart the next replica of each name; forget replicas that no longer run."""
    for name in sorted(state.rolling):
        process = state.processes.get(name)
        runs = process is not None and (process.state in SERVING or process.state is ProcessState.STARTING)
        if process is None or not runs or process.restart_wanted is not None:
            del state.rolling[name]
        elif not any(_on_its_way(other, wanted) for other in _others(state, process)):
            reason = state.rolling.pop(name)
            process.request_restart(reason)
            state.journal.note(RestartTurn(name, reason))
            state.wake(name)


def _others(state: FleetState, process: Process) -> list[Process]:
    """Return the other replicas that are visited."""
    awake = (state.processes.get(name) for name in state.awake)
    return [one for one in awake if one is not None and one is not process and one.spec.base == process.spec.base]


def _on_its_way(process: Process, wanted: Callable[[Process], bool]) -> bool:
    return wanted(process) and (process.restart_wanted is not None or process.state not in _SETTLED)
