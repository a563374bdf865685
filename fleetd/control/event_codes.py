"""The stable codes of everything that `fleetctl events`, `fleetctl story` and the control API report.

Invariants:
- Every event, command and note type of the core has a code; no code is a Python class name.
- A code is part of the public interface: it never changes its meaning. `docs/reference/events.md` lists all of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from fleetd.core.data import commands as c
from fleetd.core.data import events as e
from fleetd.core.data import journal as j


class EventCode(StrEnum):
    # notes of the journal
    STATE_CHANGED = "state_changed"
    PREREQUISITES_CHANGED = "prerequisites_changed"
    START_PROGRESS = "start_progress"
    RUN_STABLE = "run_stable"
    RESTART_TURN = "restart_turn"
    PROCESS_FORGOTTEN = "process_forgotten"
    MODEL_LEAVING = "model_leaving"
    MODEL_EVICTED = "model_evicted"
    MODEL_LOST = "model_lost"
    LOAD_REPEATED = "load_repeated"
    LANE_WAIT = "lane_wait"
    LOAD_FAILED = "load_failed"
    UNLOAD_FAILED = "unload_failed"
    SLEEP_CANCELLED = "sleep_cancelled"
    SLEEP_FAILED = "sleep_failed"
    LOAD_REQUEST_DONE = "load_request_done"
    PIN_CHANGED = "pin_changed"
    REQUEST_FELL_BACK = "request_fell_back"
    FOOTPRINT_LEARNED = "footprint_learned"
    # events of the core
    TICK = "tick"
    CONFIG_CHANGED = "config_changed"
    ADOPTED = "adopted"
    SPAWNED = "spawned"
    SPAWN_FAILED = "spawn_failed"
    EXITED = "exited"
    SET_EMPTY = "set_empty"
    PROBE_RESULT = "probe_result"
    MEMORY_SAMPLED = "memory_sampled"
    RESTART_DUE = "restart_due"
    LOADED = "loaded"
    LOAD_PROGRESS = "load_progress"
    UNLOADED = "unloaded"
    SLEEP_STATE = "sleep_state"
    RESIDENTS_OBSERVED = "residents_observed"
    REQUEST_ARRIVED = "request_arrived"
    REQUEST_CANCELLED = "request_cancelled"
    REQUEST_FINISHED = "request_finished"
    START_REQUESTED = "start_requested"
    STOP_REQUESTED = "stop_requested"
    RESTART_REQUESTED = "restart_requested"
    DRAIN_REQUESTED = "drain_requested"
    LOAD_REQUESTED = "load_requested"
    UNLOAD_REQUESTED = "unload_requested"
    PIN_REQUESTED = "pin_requested"
    SHUTDOWN_REQUESTED = "shutdown_requested"
    # commands of the core
    SPAWN = "spawn"
    STOP = "stop"
    SWEEP = "sweep"
    START_PROBE = "start_probe"
    STOP_PROBES = "stop_probes"
    LOAD = "load"
    UNLOAD = "unload"
    SLEEP = "sleep"
    WAKE = "wake"
    CHECK_SLEEP = "check_sleep"
    GRANT = "grant"
    REJECT = "reject"
    READ_AHEAD = "read_ahead"
    PERSIST = "persist"
    LEARN_FOOTPRINT = "learn_footprint"
    FINISHED = "finished"
    # reports of the daemon
    ADOPTION = "adoption"
    HOOK = "hook"
    WARNING = "warning"
    WATCH_PAUSED = "watch_paused"
    MODEL_MAKING = "model_making"
    MODEL_MADE = "model_made"
    MODEL_NOT_MADE = "model_not_made"
    STORE_NOT_COMPARED = "store_not_compared"
    CONFIG_APPLIED = "config_applied"
    CONFIG_REJECTED = "config_rejected"
    RESTART_NEEDED = "restart_needed"
    STATE_FILE_DAMAGED = "state_file_damaged"
    SHUTDOWN = "shutdown"
    REEXEC = "reexec"
    INTERNAL_ERROR = "internal_error"


CODES: Mapping[type[e.Event | c.Command | j.JournalNote], EventCode] = {
    j.StateChanged: EventCode.STATE_CHANGED,
    j.PrerequisitesChanged: EventCode.PREREQUISITES_CHANGED,
    j.StartPhaseChanged: EventCode.START_PROGRESS,
    j.RunStable: EventCode.RUN_STABLE,
    j.RestartTurn: EventCode.RESTART_TURN,
    j.ProcessForgotten: EventCode.PROCESS_FORGOTTEN,
    j.ModelLeaving: EventCode.MODEL_LEAVING,
    j.Evicted: EventCode.MODEL_EVICTED,
    j.ModelLost: EventCode.MODEL_LOST,
    j.LoadRepeated: EventCode.LOAD_REPEATED,
    j.LaneWait: EventCode.LANE_WAIT,
    j.ModelLoadFailed: EventCode.LOAD_FAILED,
    j.ModelUnloadFailed: EventCode.UNLOAD_FAILED,
    j.SleepCancelled: EventCode.SLEEP_CANCELLED,
    j.SleepStepFailed: EventCode.SLEEP_FAILED,
    j.LoadRequestDone: EventCode.LOAD_REQUEST_DONE,
    j.PinChanged: EventCode.PIN_CHANGED,
    j.RequestFellBack: EventCode.REQUEST_FELL_BACK,
    j.FootprintLearned: EventCode.FOOTPRINT_LEARNED,
    e.Tick: EventCode.TICK,
    e.SpecChanged: EventCode.CONFIG_CHANGED,
    e.Adopted: EventCode.ADOPTED,
    e.Spawned: EventCode.SPAWNED,
    e.SpawnFailed: EventCode.SPAWN_FAILED,
    e.Exited: EventCode.EXITED,
    e.SetEmpty: EventCode.SET_EMPTY,
    e.ProbeResult: EventCode.PROBE_RESULT,
    e.StartProgress: EventCode.START_PROGRESS,
    e.ProcessPrerequisitesChanged: EventCode.PREREQUISITES_CHANGED,
    e.MemorySampled: EventCode.MEMORY_SAMPLED,
    e.RestartDue: EventCode.RESTART_DUE,
    e.Loaded: EventCode.LOADED,
    e.LoadFailed: EventCode.LOAD_FAILED,
    e.LoadProgress: EventCode.LOAD_PROGRESS,
    e.ModelPrerequisitesChanged: EventCode.PREREQUISITES_CHANGED,
    e.Unloaded: EventCode.UNLOADED,
    e.UnloadFailed: EventCode.UNLOAD_FAILED,
    e.SleepSeen: EventCode.SLEEP_STATE,
    e.ResidentsObserved: EventCode.RESIDENTS_OBSERVED,
    e.RequestArrived: EventCode.REQUEST_ARRIVED,
    e.RequestCancelled: EventCode.REQUEST_CANCELLED,
    e.RequestFinished: EventCode.REQUEST_FINISHED,
    e.StartRequested: EventCode.START_REQUESTED,
    e.StopRequested: EventCode.STOP_REQUESTED,
    e.RestartRequested: EventCode.RESTART_REQUESTED,
    e.DrainRequested: EventCode.DRAIN_REQUESTED,
    e.LoadRequested: EventCode.LOAD_REQUESTED,
    e.UnloadRequested: EventCode.UNLOAD_REQUESTED,
    e.PinRequested: EventCode.PIN_REQUESTED,
    e.ShutdownRequested: EventCode.SHUTDOWN_REQUESTED,
    c.Spawn: EventCode.SPAWN,
    c.Stop: EventCode.STOP,
    c.Sweep: EventCode.SWEEP,
    c.StartProbe: EventCode.START_PROBE,
    c.StopProbes: EventCode.STOP_PROBES,
    c.Load: EventCode.LOAD,
    c.Unload: EventCode.UNLOAD,
    c.Sleep: EventCode.SLEEP,
    c.Wake: EventCode.WAKE,
    c.CheckSleep: EventCode.CHECK_SLEEP,
    c.Grant: EventCode.GRANT,
    c.Reject: EventCode.REJECT,
    c.ReadAhead: EventCode.READ_AHEAD,
    c.Persist: EventCode.PERSIST,
    c.LearnFootprint: EventCode.LEARN_FOOTPRINT,
    c.Finished: EventCode.FINISHED,
}


def code_of(value: e.Event | c.Command | j.JournalNote) -> EventCode:
    """Return the code of an event, a command or a note."""
    return CODES[type(value)]


@dataclass(frozen=True, slots=True)
class CodeInfo:
    """The meaning of one code, and the keys that its `data` may have. `warning`: the daemon logs it as a warning."""

    meaning: str
    data: tuple[str, ...] = ()
    warning: bool = False


# The codes that `fleetctl events` and `fleetctl story` show. All others occur in `fleetctl dump` only.
SHOWN: Mapping[EventCode, CodeInfo] = {
    EventCode.STATE_CHANGED: CodeInfo("a process or a model changed its state: `before`, `state`", ("process",)),
    EventCode.PREREQUISITES_CHANGED: CodeInfo("required files or volumes went missing or came back", ("missing",)),
    EventCode.START_PROGRESS: CodeInfo("a starting engine entered another phase"),
    EventCode.RUN_STABLE: CodeInfo("a process stayed up long enough to reset its backoff", ("after_s",)),
    EventCode.RESTART_TURN: CodeInfo("a rolling restart reached this replica"),
    EventCode.PROCESS_FORGOTTEN: CodeInfo("a process that left the configuration was dropped"),
    EventCode.MODEL_LEAVING: CodeInfo("a model gets no new requests and is unloaded once idle", ("process",)),
    EventCode.MODEL_EVICTED: CodeInfo(
        "a model leaves memory, or is put to sleep, to make room", ("process", "by", "freed_bytes", "cost", "sleeps")
    ),
    EventCode.MODEL_LOST: CodeInfo("a model was in memory and its process died", ("process",)),
    EventCode.LOAD_REPEATED: CodeInfo("a load is ordered again after a requested restart of the server", ("process",)),
    EventCode.LANE_WAIT: CodeInfo("a load, unload, sleep or wake waits for its device lane"),
    EventCode.LOAD_FAILED: CodeInfo("a load failed", ("final",)),
    EventCode.UNLOAD_FAILED: CodeInfo("an unload failed", ("process", "attempts")),
    EventCode.SLEEP_CANCELLED: CodeInfo("a model stays awake after all", ("process",)),
    EventCode.SLEEP_FAILED: CodeInfo("a sleep, a wake or a check of it failed", ("process", "step", "pause_s")),
    EventCode.LOAD_REQUEST_DONE: CodeInfo("the load that an operator requested is done"),
    EventCode.PIN_CHANGED: CodeInfo("a model was pinned or unpinned", ("pinned",)),
    EventCode.REQUEST_FELL_BACK: CodeInfo("a request goes to this model as a fallback", ("request_id", "refused_by")),
    EventCode.FOOTPRINT_LEARNED: CodeInfo("a measurement exceeded the known memory of a model", ("bytes", "asleep")),
    EventCode.SPAWNED: CodeInfo("a process was started", ("pid", "generation")),
    EventCode.SPAWN_FAILED: CodeInfo("a process could not be started", ("generation",)),
    EventCode.EXITED: CodeInfo("a process exited", ("code", "signal", "oom", "log", "generation")),
    EventCode.SET_EMPTY: CodeInfo("processes of a set survived SIGKILL", ("survivors", "generation")),
    EventCode.RESTART_DUE: CodeInfo("a schedule, a watched file or a missing prerequisite requests a restart"),
    EventCode.START_REQUESTED: CodeInfo("an operator requested a start"),
    EventCode.STOP_REQUESTED: CodeInfo("an operator requested a stop"),
    EventCode.RESTART_REQUESTED: CodeInfo("an operator requested a restart"),
    EventCode.DRAIN_REQUESTED: CodeInfo("an operator drains a process, or ends that", ("drain",)),
    EventCode.LOAD_REQUESTED: CodeInfo("an operator requested a load"),
    EventCode.UNLOAD_REQUESTED: CodeInfo("an operator requested an unload"),
    EventCode.PIN_REQUESTED: CodeInfo("an operator pins or unpins a model", ("pin",)),
    EventCode.SHUTDOWN_REQUESTED: CodeInfo("an operator requested a shutdown", ("force",)),
    EventCode.SPAWN: CodeInfo("fleetd starts a process", ("generation", "restarts")),
    EventCode.STOP: CodeInfo("fleetd stops a process set", ("generation", "force")),
    EventCode.SWEEP: CodeInfo("fleetd kills the rest of the set of a dead process", ("generation",)),
    EventCode.LOAD: CodeInfo("fleetd loads a model on a server", ("process",)),
    EventCode.UNLOAD: CodeInfo("fleetd unloads a model from a server", ("process",)),
    EventCode.SLEEP: CodeInfo("fleetd puts a model to sleep", ("process",)),
    EventCode.WAKE: CodeInfo("fleetd wakes a model", ("process",)),
    EventCode.CHECK_SLEEP: CodeInfo("fleetd asks an adopted engine whether it is asleep", ("process",)),
    EventCode.REJECT: CodeInfo("a request was rejected", ("code", "request_id", "retry_after_s")),
    EventCode.READ_AHEAD: CodeInfo("fleetd reads the file of the next model into the page cache"),
    EventCode.FINISHED: CodeInfo("the shutdown is complete"),
    EventCode.ADOPTION: CodeInfo("a process of the previous daemon was adopted, or was not"),
    EventCode.HOOK: CodeInfo("a hook or a stop command finished"),
    EventCode.WARNING: CodeInfo("a problem that does not stop the process", warning=True),
    EventCode.WATCH_PAUSED: CodeInfo("a watched tree changes too often: it is not acted on for a while", warning=True),
    EventCode.MODEL_MAKING: CodeInfo("fleetd builds a model in the store of its server"),
    EventCode.MODEL_MADE: CodeInfo("a model was built in the store of its server"),
    EventCode.MODEL_NOT_MADE: CodeInfo("a model could not be built", warning=True),
    EventCode.STORE_NOT_COMPARED: CodeInfo("a store could not be compared with fleet.yaml", warning=True),
    EventCode.CONFIG_APPLIED: CodeInfo("a configuration was applied", ("config_hash",)),
    EventCode.CONFIG_REJECTED: CodeInfo("a configuration was rejected; the fleet runs on unchanged", warning=True),
    EventCode.RESTART_NEEDED: CodeInfo("a changed key takes effect at the next start of fleetd", warning=True),
    EventCode.STATE_FILE_DAMAGED: CodeInfo("a damaged state file was set aside", warning=True),
    EventCode.SHUTDOWN: CodeInfo("fleetd shuts down"),
    EventCode.REEXEC: CodeInfo("fleetd replaces its program and keeps its children"),
    EventCode.INTERNAL_ERROR: CodeInfo("an event could not be handled: a bug in fleetd", warning=True),
}
