"""Memory, load and temperature of GPUs.

Invariants:
- A source is queried in a thread and never raises: a card that does not answer is skipped, a missing value is None.
- NVIDIA through NVML, loaded at the first query; after an error it is initialised again at most every 30 s.
- AMD through sysfs.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

_RETRY_S = 30.0


@dataclass(frozen=True, slots=True)
class Gpu:
    """One card. `utilization` is 0…1; `pid_bytes` is memory per process, if known."""

    name: str
    total_bytes: int
    used_bytes: int
    uuid: str | None = None
    utilization: float | None = None
    temperature_c: float | None = None
    pid_bytes: Mapping[int, int] = field(default_factory=dict)


class GpuSource(Protocol):
    def sample(self) -> Sequence[Gpu]: ...


class NvmlSource:
    """NVIDIA's management library; tests pass another `library` like pynvml."""

    def __init__(self, library: Any = None, clock: Callable[[], float] = time.monotonic) -> None:
        self._given, self._clock = library, clock
        self._nvml: Any = None
        self._retry_at = 0.0
        self.problem: str | None = None

    def _ready(self) -> bool:
        if self._nvml is not None:
            return True
        if self._clock() < self._retry_at:
            return False
        self._retry_at = self._clock() + _RETRY_S
        library: Any = self._given
        if library is None:
            try:
                library = importlib.import_module("pynvml")
            except ImportError as error:
                self.problem = str(error)
                return False
        try:
            library.nvmlInit()
        except (library.NVMLError, OSError) as error:
            self.problem = str(error)
            return False
        self._nvml, self.problem = library, None
        return True

    def sample(self) -> Sequence[Gpu]:
        if not self._ready():
            return []
        nvml = self._nvml
        try:
            count = nvml.nvmlDeviceGetCount()
        except nvml.NVMLError as error:
            self._lost(error)
            return []
        found = []
        for index in range(count):
            try:
                card = self._card(index)
            except nvml.NVMLError as error:
                self.problem = f"GPU {index}: {error}"
                continue
            found.append(card)
        return found

    def _lost(self, error: Exception) -> None:
        self.problem = str(error)
        nvml, self._nvml = self._nvml, None
        try:
            nvml.nvmlShutdown()
        except nvml.NVMLError:
            pass

    def _card(self, index: int) -> Gpu:
        nvml = self._nvml
        handle = nvml.nvmlDeviceGetHandleByIndex(index)
        memory = nvml.nvmlDeviceGetMemoryInfo(handle)
        load = self._optional(lambda: float(nvml.nvmlDeviceGetUtilizationRates(handle).gpu) / 100)
        heat = self._optional(lambda: float(nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU)))
        return Gpu(
            name=f"gpu{index}",
            total_bytes=int(memory.total),
            used_bytes=int(memory.used),
            uuid=self._optional(lambda: _text(nvml.nvmlDeviceGetUUID(handle))),
            utilization=load,
            temperature_c=heat,
            pid_bytes=self._optional(lambda: self._per_pid(handle)) or {},
        )

    def _per_pid(self, handle: Any) -> dict[int, int]:
        processes = self._nvml.nvmlDeviceGetComputeRunningProcesses(handle)
        return {int(process.pid): int(process.usedGpuMemory or 0) for process in processes}

    def _optional(self, ask: Callable[[], Any]) -> Any:
        try:
            return ask()
        except (self._nvml.NVMLError, ValueError, TypeError, UnicodeDecodeError):
            return None


class AmdSource:
    """AMD's driver, through /sys/class/drm."""

    def __init__(self, root: Path = Path("/sys/class/drm")) -> None:
        self._root = root

    def sample(self) -> Sequence[Gpu]:
        found: list[Gpu] = []
        for card in sorted(self._root.glob("card[0-9]*")):
            device = card / "device"
            total = _number(device / "mem_info_vram_total")
            if "-" in card.name or not total:
                continue
            busy = _number(device / "gpu_busy_percent")
            heat = next((_number(path) for path in sorted(device.glob("hwmon/hwmon*/temp1_input"))), None)
            found.append(
                Gpu(
                    name=f"gpu{len(found)}",
                    total_bytes=total,
                    used_bytes=_number(device / "mem_info_vram_used") or 0,
                    uuid=_word(device / "unique_id"),
                    utilization=busy / 100 if busy is not None else None,
                    temperature_c=heat / 1000 if heat is not None else None,
                )
            )
        return found


def _word(path: Path) -> str | None:
    try:
        return path.read_text().strip() or None
    except (OSError, UnicodeDecodeError):
        return None


def _number(path: Path) -> int | None:
    try:
        return int(_word(path) or "")
    except ValueError:
        return None


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value


def system_sources() -> list[GpuSource]:
    """Return the sources worth asking on this machine."""
    return [NvmlSource(), AmdSource()]
