"""Restarts that can wait: the replicas of one name restart one after the other, so that the others serve meanwhile.

The rules of this file
- The next replica restarts when every other one serves again, or has failed or ended for good. One that is on its way back
  (stopping, starting, waiting for its next try, blocked) holds the others where they are: they run.
- Who waits is a fact (`Facts.turns`); whose turn it is is recomputed from what the replicas are. A replica that starts anew for
  any other reason has had its turn.
"""

from __future__ import annotations

from collections.abc import Callable

from fleetd.core.data.fleet_state import FleetState
from fleetd.core.data.journal import RestartTurn
from fleetd.core.data.state import SERVING, Process, ProcessState

_SETTLED = SERVING | {ProcessState.FAILED, ProcessState.EXITED}


def give(state: FleetState, wanted: Callable[[Process], bool]) -> None:
    """Let those restart whose turn it is; forget those that no longer run."""
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
    """Return the other replicas; one that sleeps has nothing on its way."""
    awake = (state.processes.get(name) for name in state.awake)
    return [one for one in awake if one is not None and one is not process and one.spec.base == process.spec.base]


def _on_its_way(process: Process, wanted: Callable[[Process], bool]) -> bool:
    return wanted(process) and (process.restart_wanted is not None or process.state not in _SETTLED)
