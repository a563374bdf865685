"""Read a configuration file or text in a worker process, given the state of the machine.

Invariants:
- Files are read, checked and compared outside the daemon: 5,000 models do not delay requests, and the memory that
  reading takes is returned with the process.
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from fleetd.daemon.effects.processes import Processes
from fleetd.daemon.reload.active import ActiveConfiguration
from fleetd.daemon.reload.messages import Reading, ReadInputs
from fleetd.daemon.reload.worker_client import WorkerClient
from fleetd.daemon.sources.sampler import Sampler
from fleetd.errors import ConfigError, HostError
from fleetd.resolver.resolved import Surroundings, machine_devices

STANDARD_INPUT = "-"  # as the client names the text that it sends


class ConfigReader:
    """Read and compare configurations; `learned` holds earlier footprints."""

    def __init__(
        self,
        config: ActiveConfiguration,
        processes: Processes,
        sampler: Sampler,
        learned: Mapping[str, Mapping[str, int]],
    ) -> None:
        self._config = config
        self._processes = processes
        self._sampler = sampler
        self._learned = learned
        self._worker = WorkerClient()
        self._texts = 0

    async def read(self, path: Path | None = None, text: str | None = None) -> Reading:
        """Read a file (None: the active one) or a text. Raises ConfigError, HostError."""
        if text is not None:
            return await self._read_text(text)
        return await self._worker.read(path or self._config.path, self._inputs())

    def _inputs(self) -> ReadInputs:
        devices = machine_devices(list(self._sampler.devices.values()))
        around = Surroundings(tuple(devices), dict(os.environ), dict(self._config.resolved.ports), self._learned)
        return ReadInputs(around, frozenset(self._processes.runs), socket.gethostname(), self._config.baseline)

    async def _read_text(self, text: str) -> Reading:
        """Read a text with paths relative to the folder of the active file."""
        self._texts += 1
        path = self._config.path
        copy = path.with_name(f".{path.name}.{os.getpid()}-{self._texts}.plan.yaml")
        try:
            await asyncio.to_thread(copy.write_text, text, "utf-8")
            return await self._worker.read(copy, self._inputs())
        except ConfigError as error:
            names = str(copy), STANDARD_INPUT
            shown = [
                replace(problem, file=problem.file.replace(*names), message=problem.message.replace(*names))
                for problem in error.problems
            ]
            raise ConfigError(shown, hint=error.hint) from None
        except OSError as error:
            raise HostError(f"{copy.parent} cannot be written to: {error.strerror}", recoverable=False) from error
        finally:
            copy.unlink(missing_ok=True)

    async def close(self) -> None:
        """Stop the worker process."""
        await self._worker.close()
