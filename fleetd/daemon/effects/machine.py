"""The machine behind a protocol: what the executor asks of the host, so that another host can stand in its place.

The rules of this file
- `Machine` holds questions and orders in the executor's words; nothing of it is decided here.
- Handles are opaque: who made one takes it back.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol
from urllib.parse import urlsplit

from fleetd.core.data.specs import ProbeKind, ProbeSpec
from fleetd.host.host import Host
from fleetd.host.probe import Answer, Completion, Prober, Target
from fleetd.host.process.program import Program
from fleetd.host.types import CommandSaid, HandleRecord, RawExit, SpawnRequest, StopPolicy, Usage
from fleetd.resolver.launch_plan import LaunchPlan


class Handle(Protocol):
    """A live process of ours."""

    @property
    def pid(self) -> int: ...

    @property
    def uptime_s(self) -> float: ...

    @property
    def stop_command(self) -> CommandSaid | None:
        """How its stop.command went, once it was asked to stop by one."""


class Probe(Protocol):
    """A probe that runs."""

    def close(self) -> None: ...


class Machine(Protocol):
    """The host, as the executor sees it. Everything that the machine refuses is a HostError."""

    async def spawn(self, request: SpawnRequest, on_exit: Callable[[RawExit], None]) -> Handle:
        """Start a process; `on_exit` fires once, when its leader dies."""
        ...

    async def stop(self, handle: Any, policy: StopPolicy, force: bool) -> tuple[int, ...]:
        """Empty the process set; return what would not die."""
        ...

    async def sweep(self, handle: Any, scope: str) -> tuple[int, ...]:
        """Empty what a dead leader left behind; return what would not die."""
        ...

    async def adopt(self, record: HandleRecord, on_exit: Callable[[RawExit], None]) -> Handle:
        """Take over a process of an earlier daemon, proven to be ours."""
        ...

    async def run(
        self, argv: Sequence[str], env: Mapping[str, str], cwd: str | None, timeout_s: float
    ) -> tuple[bool, str]:
        """Run a short program; return whether it succeeded, and the end of what it said."""
        ...

    async def last_words(self, handle: Any, lines: int) -> tuple[str, ...]:
        """Return the last lines that this run wrote into its log."""
        ...

    def probe(
        self,
        plan: LaunchPlan,
        handle: Any,
        generation: int,
        kind: ProbeKind,
        spec: ProbeSpec,
        on_answer: Callable[[Answer], None],
        completion: Completion | None,
    ) -> Probe:
        """Begin to ask, until it is closed."""
        ...

    async def usage_all(self, handles: Sequence[Any]) -> list[Usage]:
        """Return the usage of several sets, from one look."""
        ...

    async def count_guest(self, handle: Any, pid: int | None) -> None:
        """Count the process `pid` and its descendants, a container's, as the usage of this set from now on."""
        ...

    def new_lines(self, handle: Any) -> Callable[[], Awaitable[list[str]]]:
        """Return what gives, at each call, the lines that this run has logged since the last one."""
        ...

    async def signal(self, handle: Any, name: str) -> bool:
        """Send a signal to the leader; False when it is gone."""
        ...


class HostMachine:
    """This machine, by fleetd.host."""

    def __init__(self, host: Host, parent_env: Mapping[str, str]) -> None:
        self.host = host
        self.parent_env = parent_env
        self.spawn = host.spawn
        self.adopt = host.adopt
        self.sweep = host.sweep
        self.signal = host.signal

    async def stop(self, handle: Any, policy: StopPolicy, force: bool) -> tuple[int, ...]:
        return await self.host.stop(handle, policy, force=force)

    async def run(
        self, argv: Sequence[str], env: Mapping[str, str], cwd: str | None, timeout_s: float
    ) -> tuple[bool, str]:
        result = await self.host.command(Program(argv=tuple(argv), env=env, cwd=cwd), timeout_s)
        if result.timed_out:
            return False, f"{argv[0]} was killed after {timeout_s:g} s"
        return result.ok, result.output

    async def last_words(self, handle: Any, lines: int) -> tuple[str, ...]:
        found = await self.host.logs.run_tail(handle, lines)
        return tuple(line.text for line in found)

    def new_lines(self, handle: Any) -> Callable[[], Awaitable[list[str]]]:
        return self.host.logs.reader(handle).new_lines

    def probe(
        self,
        plan: LaunchPlan,
        handle: Any,
        generation: int,
        kind: ProbeKind,
        spec: ProbeSpec,
        on_answer: Callable[[Answer], None],
        completion: Completion | None,
    ) -> Probe:
        headers = {}
        if plan.endpoint is not None and plan.endpoint.api_key:
            headers["Authorization"] = f"Bearer {plan.endpoint.api_key}"
        target = Target(
            name=plan.name,
            generation=generation,
            host=plan.context.host,
            port=plan.context.port,
            env=plan.environment(self.parent_env) if spec.exec else {},
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
        return Prober(self.host, target, kind, spec, on_answer, completion)

    async def usage_all(self, handles: Sequence[Any]) -> list[Usage]:
        return await self.host.usage_all(handles)

    async def count_guest(self, handle: Any, pid: int | None) -> None:
        handle.guest = pid
