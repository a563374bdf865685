"""The configuration of a running daemon: read, compared, applied; a bad file changes nothing and is shown until it is mended.

The rules of this file
- Reading and assembling happen in a thread: 5,000 models must not stop the requests of the others.
- One apply at a time. What is applied is exactly what was read: nobody looks at the file twice.
- Ports that were assigned are on disk before a process starts on one.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from fleetd.config.load import LoadedConfig, load
from fleetd.daemon.assemble import assemble, checked
from fleetd.daemon.assembly import Assembly, Surroundings
from fleetd.daemon.ports import remember
from fleetd.errors import ConfigError, HostError
from fleetd.host.handle import write_atomically
from fleetd.host.ports import is_free

if TYPE_CHECKING:
    from collections.abc import Collection

PORTS_FILE = "ports.json"


def kept_ports(state: Path) -> dict[str, int]:
    """Return the assignments of earlier runs; an absent or torn file gives none."""
    try:
        content = json.loads((state / PORTS_FILE).read_bytes())
        return {str(name): int(port) for name, port in content["ports"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}


def keep_ports(state: Path, ports: Mapping[str, int]) -> None:
    """Write the assignments down. Raises OSError."""
    state.mkdir(mode=0o700, parents=True, exist_ok=True)
    write_atomically(state / PORTS_FILE, json.dumps({"version": 1, "ports": dict(ports)}).encode(), durable=False)


@dataclass(frozen=True, slots=True)
class Reader:
    """How files become assemblies. `ours(name)` says that a process of ours has its port now."""

    env: Mapping[str, str]
    hostname: str
    ours: Callable[[], Collection[str]] = frozenset

    def read(self, path: Path, around: Surroundings) -> Assembly:
        """Load and assemble. Raises ConfigError with every problem. Blocks."""
        return self.assemble(load(path, self.env), around)

    def assemble(self, loaded: LoadedConfig, around: Surroundings) -> Assembly:
        """Assemble what was loaded. Raises ConfigError with every problem. Blocks."""
        state = loaded.resolve(("paths", "state"), loaded.config.paths.state)
        ports = {**kept_ports(state), **around.ports}
        running = frozenset(self.ours())

        def usable(name: str, port: int) -> bool:
            return name in running or is_free("127.0.0.1", port)

        return checked(assemble(loaded, replace(around, ports=ports), usable, self.hostname))

    def keep(self, assembly: Assembly) -> None:
        """Keep the assembly's ports for later runs. Raises OSError. Blocks."""
        before = kept_ports(assembly.paths.state)
        after = remember(before, assembly.ports)
        if after != before:
            keep_ports(assembly.paths.state, after)


class Configuration:
    """What runs, what lies on disk, and the way from one to the other."""

    def __init__(self, reader: Reader, path: Path, assembly: Assembly, around: Callable[[], Surroundings]) -> None:
        self.reader = reader
        self.path = path
        self.assembly = assembly
        self._around = around
        self.applying = asyncio.Lock()
        self.error: str | None = None
        self.differs = False

    async def read(self, path: Path | None = None, text: str | None = None) -> Assembly:
        """Read a file (the daemon's own: None), or a text as if it stood in the daemon's own. Raises ConfigError."""
        if text is not None:
            return await asyncio.to_thread(self._read_text, text)
        return await asyncio.to_thread(self.reader.read, path or self.path, self._surroundings())

    def _surroundings(self) -> Surroundings:
        return replace(self._around(), ports=dict(self.assembly.ports))

    def _read_text(self, text: str) -> Assembly:
        """Relative paths and includes of the text are meant from the folder of the daemon's own file."""
        beside = self.path.with_name(f".{self.path.name}.{os.getpid()}.plan.yaml")
        try:
            beside.write_text(text, "utf-8")
            return self.reader.read(beside, self._surroundings())
        except ConfigError as error:
            shown = [
                replace(problem, file=problem.file.replace(str(beside), str(self.path))) for problem in error.problems
            ]
            raise ConfigError(shown, hint=error.hint) from None
        except OSError as error:
            raise HostError(f"{beside.parent} cannot be written to: {error.strerror}", recoverable=False) from error
        finally:
            beside.unlink(missing_ok=True)

    async def accept(self, assembly: Assembly, path: Path | None) -> None:
        """Make an assembly the one that runs. The caller tells the fleet."""
        await asyncio.to_thread(self.reader.keep, assembly)
        self.assembly = assembly
        if path is not None:
            self.path = path
        self.error, self.differs = None, False

    def refused(self, error: ConfigError) -> str:
        """Remember that the file on disk cannot be used; return its first problem."""
        first = str(error.problems[0]) if error.problems else str(error)
        more = len(error.problems) - 1
        self.error = first.splitlines()[0] + (f" (and {more} more)" if more > 0 else "")
        return self.error
