"""The machine's pools of memory: host, gpu0…, or one unified pool.

Invariants:
- `total_bytes` is what we may use at most: the machine's, or less where a cgroup limits us.
- Apple silicon has one pool, `unified`; `limit_bytes` is what the system lets the GPU wire down.
- Sampling blocks for milliseconds and happens in a thread.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import platform
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from fleetd.host.system.gpu import Gpu, GpuSource, system_sources

GIB = 1024**3


@dataclass(frozen=True, slots=True)
class DeviceSample:
    """One pool now: host, gpu or unified. `used_bytes` counts all programs."""

    name: str
    kind: str
    total_bytes: int
    used_bytes: int
    available_bytes: int
    limit_bytes: int | None = None
    uuid: str | None = None
    utilization: float | None = None
    temperature_c: float | None = None
    pid_bytes: Mapping[int, int] = field(default_factory=dict)


class Devices:
    """All pools of this machine. Tests pass their own sources."""

    def __init__(
        self,
        gpus: Sequence[GpuSource] | None = None,
        host_memory: Callable[[], tuple[int, int]] | None = None,
        wired_limit: Callable[[], int | None] | None = None,
    ) -> None:
        self._gpus = system_sources() if gpus is None else list(gpus)
        self._host_memory = host_memory or limited_host_memory
        self._wired_limit = wired_limit or apple_wired_limit

    def sample(self) -> list[DeviceSample]:
        """Ask every source. Blocks: call it in a thread."""
        total, available = self._host_memory()
        limit = self._wired_limit()
        if limit is not None:
            return [DeviceSample("unified", "unified", total, total - available, available, min(limit, total))]
        cards = [card for source in self._gpus for card in source.sample()]
        host = DeviceSample("host", "host", total, total - available, available)
        return [host, *(_pool(index, card) for index, card in enumerate(cards))]


def _pool(index: int, card: Gpu) -> DeviceSample:
    return DeviceSample(
        name=f"gpu{index}",
        kind="gpu",
        total_bytes=card.total_bytes,
        used_bytes=card.used_bytes,
        available_bytes=max(0, card.total_bytes - card.used_bytes),
        uuid=card.uuid,
        utilization=card.utilization,
        temperature_c=card.temperature_c,
        pid_bytes=card.pid_bytes,
    )


def limited_host_memory(root: Path = Path("/")) -> tuple[int, int]:
    """Return (total, available) bytes of RAM, less where a cgroup of ours limits it."""
    memory = psutil.virtual_memory()
    total, available = int(memory.total), int(memory.available)
    for limit, used in _cgroup_limits(root):
        if 0 < limit < total:
            total = limit
        available = min(available, max(0, limit - used))
    return total, max(0, available)


def _cgroup_limits(root: Path) -> list[tuple[int, int]]:
    """Return (limit, use without page cache) of every limiting cgroup above us."""
    found = []
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    for line in lines:
        number, controllers, path = [*line.split(":", 2), "", ""][:3]
        if number == "0":
            folders = [root / "sys/fs/cgroup", root / "sys/fs/cgroup/unified"]
            names = ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            folders = [root / "sys/fs/cgroup/memory"]
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        for folder in folders:
            place = folder / path.lstrip("/")
            while place != folder.parent:
                limit = _number(place / names[0])
                if limit is not None:
                    used = _number(place / names[1]) or 0
                    found.append((limit, max(0, used - _stat(place / "memory.stat", names[2]))))
                place = place.parent
    return found


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None


def _stat(path: Path, key: str) -> int:
    try:
        for line in path.read_text().splitlines():
            name, _, value = line.partition(" ")
            if name == key:
                return int(value)
    except (OSError, ValueError):
        pass
    return 0


def apple_wired_limit(sysctl: Callable[[str], int | None] | None = None, machine: str | None = None) -> int | None:
    """Return the GPU's wired limit of an Apple silicon Mac; None elsewhere.

    Unless `iogpu.wired_limit_mb` was set, the system allows two thirds of the memory, three quarters above 36 GiB.
    """
    kind = f"{sys.platform}-{platform.machine()}" if machine is None else machine
    if kind != "darwin-arm64":
        return None
    ask = sysctl or sysctl_number
    total = ask("hw.memsize") or int(psutil.virtual_memory().total)
    megabytes = ask("iogpu.wired_limit_mb")
    if megabytes:
        return min(total, megabytes * 1024 * 1024)
    return total * 2 // 3 if total <= 36 * GIB else total * 3 // 4


def sysctl_number(name: str) -> int | None:
    """Return a number of macOS' sysctl; None when there is none of this name."""
    path = ctypes.util.find_library("c")
    libc = ctypes.CDLL(path, use_errno=True)
    if not hasattr(libc, "sysctlbyname"):
        return None
    value, size = ctypes.c_uint64(0), ctypes.c_size_t(8)
    if libc.sysctlbyname(name.encode(), ctypes.byref(value), ctypes.byref(size), None, ctypes.c_size_t(0)) != 0:
        return None
    return int(value.value)
