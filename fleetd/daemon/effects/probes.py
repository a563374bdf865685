"""Run probes on command and report every answer as an event. The core judges the answers.

Invariants:
- One probe per process and kind: a new StartProbe of that kind replaces it, StopProbes stops it, and a startup probe
  stops at its first success.
- A completion probe is skipped while real answers arrive: a good answer, or a part of one, within the period counts as a
  success; one that arrives during the probe turns its failure into a success.
- A sleeping server passes its completion probe only if fleetd put it to sleep: otherwise requests would wait for ever.
- While all slots are taken, a failed probe counts as a success for `_BUSY_S` after the last sign of life; never for a
  process that a signal has stopped, or that fails its readiness probe for long.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from urllib.parse import urlsplit

from fleetd.core.data.commands import StartProbe, StopProbes
from fleetd.core.data.events import ProbeResult
from fleetd.core.data.specs import ProbeKind, ProbeSpec
from fleetd.daemon.context import DaemonContext
from fleetd.daemon.effects.processes import Processes
from fleetd.errors import FleetError
from fleetd.host.host import Host
from fleetd.host.probe import Answer, Completion, Prober, Target
from fleetd.host.process.handle import ProcessHandle
from fleetd.host.process.table import is_paused
from fleetd.resolver.launch_plan import LaunchPlan

_REFUSED = re.compile(r"GET \S+: (401|403)\b")
_KEY = "options.api_key"
_BUSY_S = 600.0
_UNREADY_S = 60.0  # a server that refuses its readiness probe for longer is not only busy
_BEFORE_THE_PROBER = 0.95  # of the timeout: the prober's own would come before `_excuse`


@dataclass(frozen=True, slots=True)
class Traffic:
    """What real requests show of a process, in monotonic seconds.

    `last_answer_s` returns when the last good answer, or a part of one, arrived (0: never); `full_since_s` since when all
    slots of a model are taken (None: one is free).
    """

    last_answer_s: Callable[[str], float]
    full_since_s: Callable[[str], float | None]


class ProbeRunner:
    """The running probes of all processes, and their last answers."""

    def __init__(self, context: DaemonContext, host: Host, processes: Processes, traffic: Traffic) -> None:
        self._context = context
        self._host = host
        self._processes = processes
        self._traffic = traffic
        self._running: dict[tuple[str, ProbeKind], Prober] = {}
        self._unready_since: dict[str, float] = {}
        self.answers: dict[tuple[str, ProbeKind], tuple[float, Answer]] = {}  # with wall-clock time

    def start(self, command: StartProbe) -> None:
        plan = self._context.config.plans.get(command.name)
        spec: ProbeSpec | None = getattr(plan.probes, command.probe) if plan is not None else None
        if plan is None or spec is None:
            self._context.dispatch(ProbeResult(command.name, command.generation, command.probe, True, "no probe"))
            return
        key = (command.name, command.probe)
        self._end(key)
        run = self._processes.run_of(command.name, command.generation)

        def answered(answer: Answer) -> None:
            self.answers[key] = (time.time(), answer)
            if answer.ok and command.probe is ProbeKind.STARTUP:
                self._end(key)
            refused = not answer.ok and _REFUSED.match(answer.detail)
            detail = plan.with_key(answer.detail, _KEY) if refused else answer.detail
            pid = None if answer.ok else self._paused_pid(command.name, command.generation)
            if pid is not None:
                detail = f"process {pid} is stopped (SIGSTOP)"
            self._note_readiness(command, answer.ok)
            result = ProbeResult(
                command.name, command.generation, command.probe, answer.ok, detail, answer.final, pid is not None
            )
            self._context.dispatch(result)

        completion = self._completion(command.name, plan, spec) if spec.completion else None
        handle = run.handle if run is not None else None
        target, spec = self._target(plan, spec, command.generation, handle)
        self._running[key] = Prober(self._host, target, command.probe, spec, answered, completion)

    def _target(
        self, plan: LaunchPlan, spec: ProbeSpec, generation: int, handle: ProcessHandle | None
    ) -> tuple[Target, ProbeSpec]:
        """Return whom to ask, and the probe with the path of an external endpoint."""
        headers = {}
        if plan.endpoint is not None and plan.endpoint.api_key:
            headers["Authorization"] = f"Bearer {plan.endpoint.api_key}"
        target = Target(
            name=plan.name,
            generation=generation,
            host=plan.context.host,
            port=plan.context.port,
            env=self._context.config.environment(plan) if spec.exec else {},
            cwd=plan.execution.cwd,
            headers=headers,
            own_listener=not plan.external and plan.recipe is None,  # a container's listener is no child of ours
            handle=handle,
        )
        if plan.external and plan.endpoint is not None:
            url = urlsplit(plan.endpoint.base_url)
            tls = url.scheme == "https"
            target = replace(target, host=url.hostname or "127.0.0.1", port=url.port or (443 if tls else 80), tls=tls)
            spec = replace(spec, http=url.path.rstrip("/") + spec.http) if spec.http else spec
        return target, spec

    def stop(self, command: StopProbes) -> None:
        """Stop all probes of a process."""
        for kind in ProbeKind:
            self._end((command.name, kind))
        self._unready_since.pop(command.name, None)

    def close(self) -> None:
        """Stop all probes."""
        for key in list(self._running):
            self._end(key)

    def _end(self, key: tuple[str, ProbeKind]) -> None:
        probe = self._running.pop(key, None)
        if probe is not None:
            probe.close()

    def _note_readiness(self, command: StartProbe, ok: bool) -> None:
        if command.probe is ProbeKind.READINESS:
            if ok:
                self._unready_since.pop(command.name, None)
            else:
                self._unready_since.setdefault(command.name, time.monotonic())

    def _paused_pid(self, name: str, generation: int) -> int | None:
        """Return the PID of a main process that a signal has stopped; None for a running one."""
        run = self._processes.run_of(name, generation)
        pid = run.handle.pid if run is not None and run.handle is not None else None
        return pid if pid is not None and is_paused(pid) else None

    def _is_wedged(self, name: str) -> bool:
        """Return whether more than many requests keeps it from answering: it is stopped, or its readiness fails for long."""
        since = self._unready_since.get(name)
        run = self._processes.runs.get(name)
        paused = run is not None and run.handle is not None and is_paused(run.handle.pid)
        return paused or (since is not None and time.monotonic() - since > _UNREADY_S)

    def _excuse(self, name: str, began: float, answer: Answer) -> Answer:
        """Return a success if real requests show that the server is only busy."""
        if self._is_wedged(name):
            return answer
        answered_s = self._traffic.last_answer_s(name)
        if answered_s >= began:
            return Answer(True, "busy: it is answering requests")
        full = self._traffic.full_since_s(name)
        if full is not None and time.monotonic() - max(full, answered_s) < _BUSY_S:
            return Answer(True, "busy: all its slots are taken")
        return answer

    def _completion(self, name: str, plan: LaunchPlan, spec: ProbeSpec) -> Completion:
        async def ask(timeout_s: float) -> Answer:
            began = time.monotonic()
            if began - self._traffic.last_answer_s(name) < spec.period_s:
                return Answer(True, "it is answering requests")
            if plan.endpoint is None:
                return Answer(False, "it has no port to ask")
            try:
                async with asyncio.timeout(timeout_s * _BEFORE_THE_PROBER):
                    session = self._context.http.session
                    outcome = await plan.engine.alive(session, plan.endpoint, plan.own_model, timeout_s)
                answer = Answer(outcome.ok, plan.with_key(outcome.detail, outcome.key), outcome.final)
                if outcome.asleep and not self._context.queries.may_be_asleep(name):
                    return Answer(False, "it sleeps, and fleetd did not put it to sleep")
            except TimeoutError:
                answer = Answer(False, f"no answer within {timeout_s:g} s")
            except FleetError as error:
                answer = Answer(False, plan.error_text(error))
            return answer if answer.ok else self._excuse(name, began, answer)

        return ask
