"""The configuration of a running daemon: read, compared, applied; a bad file changes nothing and is shown until it is mended.

The rules of this file
- Reading, assembling and comparing happen in a process of their own (`reader`): 5,000 models must not stop the requests of the
  others, and what it takes to read them does not stay in memory.
- One apply at a time. What is applied is exactly what was read: nobody looks at the file twice.
- Ports that were assigned are on disk before a process starts on one.
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
import zlib
from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

from fleetd.daemon.reload.messages import Circumstances, Reading
from fleetd.daemon.reload.worker_client import Reader
from fleetd.errors import ConfigError, FleetError, HostError
from fleetd.resolver.launch_plan import LaunchPlan
from fleetd.resolver.port_assignment import keep_ports
from fleetd.resolver.resolved import Assembly, Surroundings

STANDARD_INPUT = "-"  # as the client names the text that it sends


class Configuration:
    """What runs, what lies on disk, and the way from one to the other.

    `around()` is what an assembly may know of the machine; `running()` the names of processes that hold their ports now.
    """

    def __init__(
        self,
        path: Path,
        reading: Reading,
        around: Callable[[], Surroundings],
        running: Callable[[], Collection[str]],
    ) -> None:
        self.path = path
        self._reading = reading
        self._around = around
        self._running = running
        self._reader = Reader()
        self.applying = asyncio.Lock()
        self.to_mend: tuple[Path, ...] = ()  # the files of a configuration that was refused
        self._plans = 0

    @property
    def assembly(self) -> Assembly:
        return self._reading.assembly

    def shown(self) -> Any:
        """Return what the running configuration says beyond the defaults, secrets hidden."""
        return json.loads(zlib.decompress(self._reading.shown))

    async def read(self, path: Path | None = None, text: str | None = None) -> Reading:
        """Read a file (the daemon's own: None), or a text as if it stood in the daemon's own. Raises ConfigError, HostError."""
        if text is not None:
            return await self._read_text(text)
        return await self._reader.read(path or self.path, self._circumstances())

    def _circumstances(self) -> Circumstances:
        around = replace(self._around(), ports=dict(self.assembly.ports))
        return Circumstances(around, frozenset(self._running()), socket.gethostname(), self._reading.kept)

    async def _read_text(self, text: str) -> Reading:
        """Relative paths and includes of the text are meant from the folder of the daemon's own file."""
        self._plans += 1
        beside = self.path.with_name(f".{self.path.name}.{os.getpid()}-{self._plans}.plan.yaml")
        try:
            await asyncio.to_thread(beside.write_text, text, "utf-8")
            return await self._reader.read(beside, self._circumstances())
        except ConfigError as error:
            names = str(beside), STANDARD_INPUT
            shown = [
                replace(problem, file=problem.file.replace(*names), message=problem.message.replace(*names))
                for problem in error.problems
            ]
            raise ConfigError(shown, hint=error.hint) from None
        except OSError as error:
            raise HostError(f"{beside.parent} cannot be written to: {error.strerror}", recoverable=False) from error
        finally:
            beside.unlink(missing_ok=True)

    async def accept(self, reading: Reading, path: Path | None) -> None:
        """Make what was read the configuration that runs. The caller tells the fleet."""
        await asyncio.to_thread(keep_ports, self.assembly.paths.state, reading.assembly.ports)
        running = self.assembly  # its folders and its listener are those of the start
        self._reading = replace(
            reading, assembly=replace(reading.assembly, paths=running.paths, gateway=running.gateway)
        )
        if path is not None:
            self.path = path
        self.to_mend = ()

    def amend(self, plan: LaunchPlan) -> None:
        """Put a plan that was completed in the place of the one that was read. The caller tells the fleet."""
        assembly = self.assembly
        spec = replace(assembly.spec.processes[plan.name], launch_hash=plan.launch_hash())
        self._reading = replace(
            self._reading,
            assembly=replace(
                assembly,
                plans={**assembly.plans, plan.name: plan},
                spec=replace(assembly.spec, processes={**assembly.spec.processes, plan.name: spec}),
            ),
        )

    async def close(self) -> None:
        """Let go of the process that reads."""
        await self._reader.close()

    def refused(self, error: FleetError) -> str:
        """Remember that the file on disk cannot be used; return its first problem."""
        problems = error.problems if isinstance(error, ConfigError) else ()
        files = error.files if isinstance(error, ConfigError) else ()
        self.to_mend = tuple(dict.fromkeys([*files, *(Path(problem.file) for problem in problems)]))
        first = str(problems[0]) if problems else str(error)
        more = len(problems) - 1
        return first.splitlines()[0] + (f" (and {more} more)" if more > 0 else "")
