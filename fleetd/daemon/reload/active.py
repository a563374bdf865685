"""The configuration that the daemon runs, and what is wrong with the file on disk.

Invariants:
- An accepted reading is exactly what was read: the file is not read a second time.
- Assigned ports are on disk before a process starts on one.
- A rejected file changes nothing; its first problem is shown until a valid file is applied.
"""

from __future__ import annotations

import asyncio
import json
import zlib
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from fleetd.core.data.specs import ModelSpec
from fleetd.daemon.reload.messages import Reading
from fleetd.errors import ConfigError, FleetError
from fleetd.resolver.launch_plan import LaunchPlan
from fleetd.resolver.port_assignment import keep_ports
from fleetd.resolver.resolved import ResolvedFleet


class ActiveConfiguration:
    """The last accepted reading. Children inherit from `parent_env`.

    Hold `applying` while the configuration is changed.
    """

    def __init__(self, path: Path, reading: Reading, parent_env: Mapping[str, str]) -> None:
        self.path = path
        self.parent_env = parent_env
        self.applying = asyncio.Lock()
        self.error: str | None = None  # the first problem of a rejected file
        self.files_to_fix: tuple[Path, ...] = ()  # the files of a rejected configuration
        self.restart_needed: tuple[str, ...] = ()  # changed keys that need a restart of the daemon
        self._reading = reading
        self._subscribers: list[Callable[[ResolvedFleet], None]] = []

    @property
    def resolved(self) -> ResolvedFleet:
        return self._reading.resolved

    @property
    def plans(self) -> Mapping[str, LaunchPlan]:
        return self._reading.resolved.plans

    @property
    def model_specs(self) -> Mapping[str, ModelSpec]:
        return self._reading.resolved.spec.models

    @property
    def state_dir(self) -> Path:
        return self._reading.resolved.paths.state

    @property
    def baseline(self) -> bytes:
        """The configuration as its worker process needs it to compare the next one."""
        return self._reading.kept

    def environment(self, plan: LaunchPlan) -> dict[str, str]:
        """Return the whole environment of a process."""
        return plan.environment(self.parent_env)

    def subscribe(self, subscriber: Callable[[ResolvedFleet], None]) -> None:
        """Call `subscriber` with the resolved fleet after changes and rejected files."""
        self._subscribers.append(subscriber)

    def shown(self) -> Any:
        """Return the running configuration without the defaults, secrets hidden."""
        return json.loads(zlib.decompress(self._reading.shown))

    async def accept(self, reading: Reading, path: Path | None) -> None:
        """Activate a reading. The caller passes its spec to the fleet."""
        await asyncio.to_thread(keep_ports, self.state_dir, reading.resolved.ports)
        running = self.resolved  # its folders and its listener are those of the start
        self._reading = replace(
            reading, resolved=replace(reading.resolved, paths=running.paths, gateway=running.gateway)
        )
        if path is not None:
            self.path = path
        self.error, self.files_to_fix = None, ()

    def publish(self) -> None:
        """Call the subscribers."""
        for subscriber in self._subscribers:
            subscriber(self.resolved)

    def amend(self, plan: LaunchPlan) -> None:
        """Replace a plan by its completed form; the caller updates the fleet."""
        resolved = self.resolved
        spec = replace(resolved.spec.processes[plan.name], launch_hash=plan.launch_hash())
        self._reading = replace(
            self._reading,
            resolved=replace(
                resolved,
                plans={**resolved.plans, plan.name: plan},
                spec=replace(resolved.spec, processes={**resolved.spec.processes, plan.name: spec}),
            ),
        )

    def reject(self, error: FleetError) -> str:
        """Record that the file on disk cannot be used; return its first problem."""
        problems = error.problems if isinstance(error, ConfigError) else ()
        files = error.files if isinstance(error, ConfigError) else ()
        self.files_to_fix = tuple(dict.fromkeys([*files, *(Path(problem.file) for problem in problems)]))
        first = problems[0].headline if problems else str(error).splitlines()[0]
        more = len(problems) - 1
        self.error = first + (f" (and {more} more)" if more > 0 else "")
        return self.error
