"""Facts of the machine itself: limits, memory, GPUs, the clock, the wheel of llama.cpp.

Invariants:
- Files are read below a root and programs are run by a function, both arguments: a test gives its own.
"""

from __future__ import annotations

import ctypes
import os
import resource
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path

from fleetd.host.process.ask import ask
from fleetd.host.system.gpu import AmdSource, NvmlSource
from fleetd.host.system.load import threads_of
from fleetd.host.system.memory import DeviceSample, limited_host_memory
from fleetd.setup.doctor.facts import ClockFact, GpuFact, LibraryFact, LimitsFact, MemoryFact
from fleetd.setup.programs import Ask, embedded

ROOT = Path("/")
NVIDIA, AMD = "0x10de", "0x1002"
_STA_UNSYNC = 0x40


def limits(pid: int | None, wanted: int, root: Path = ROOT) -> LimitsFact:
    """Return the limits of the daemon with this pid, else of this login."""
    soft, hard = _limit(pid, resource.RLIMIT_NOFILE)
    most, _ = _limit(pid, resource.RLIMIT_NPROC) if os.getuid() else (None, None)  # root is exempt
    cgroup = _cgroup_folder(root)
    system = _numbers(root / "proc/sys/fs/file-nr")
    return LimitsFact(
        open_files_soft=soft,
        open_files_hard=hard,
        processes_soft=most,
        processes_now=threads_of(os.getuid()) if most is not None else None,
        cgroup_pids_max=_number(cgroup / "pids.max") if cgroup else None,
        cgroup_pids_now=_number(cgroup / "pids.current") if cgroup else None,
        system_files_max=system[2] if len(system) == 3 and system[2] < 2**62 else None,
        system_files_now=system[0] if len(system) == 3 else None,
        wanted=wanted,
    )


def _limit(pid: int | None, which: int) -> tuple[int | None, int | None]:
    pair = resource.getrlimit(which)
    if pid is not None and hasattr(resource, "prlimit"):
        try:
            pair = resource.prlimit(pid, which)
        except OSError:  # of another user
            pass
    soft, hard = (None if one == resource.RLIM_INFINITY else one for one in pair)
    return soft, hard


def _cgroup_folder(root: Path) -> Path | None:
    """Return our cgroup (version 2), or the nearest one above it that limits processes."""
    for line in _text(root / "proc/self/cgroup").splitlines():
        if line.startswith("0::"):
            top = root / "sys/fs/cgroup"
            folder = top / line[3:].lstrip("/")
            while folder.is_relative_to(top):
                if _number(folder / "pids.max") is not None:
                    return folder
                folder = folder.parent
    return None


def memory(samples: Iterable[DeviceSample], budgets: Mapping[str, int], root: Path = ROOT) -> MemoryFact:
    """Return memory, overcommit and the budgets of fleet.yaml."""
    listed = list(samples)
    total, available = limited_host_memory(root)
    fields = dict(_meminfo(root))
    wired = next((one.limit_bytes for one in listed if one.kind == "unified"), None)
    return MemoryFact(
        total_bytes=total,
        available_bytes=available,
        swap_bytes=fields.get("SwapTotal"),
        overcommit=_number(root / "proc/sys/vm/overcommit_memory"),
        commit_limit_bytes=fields.get("CommitLimit"),
        committed_bytes=fields.get("Committed_AS"),
        budgets=dict(budgets),
        totals={one.name: one.total_bytes for one in listed},
        used={one.name: one.used_bytes for one in listed},
        wired_limit_bytes=wired,
    )


def _meminfo(root: Path) -> Iterable[tuple[str, int]]:
    for line in _text(root / "proc/meminfo").splitlines():
        name, _, rest = line.partition(":")
        words = rest.split()
        if words and words[0].isdigit():
            yield name, int(words[0]) * 1024


def gpu(wanted: Iterable[str], root: Path = ROOT, nvml: NvmlSource | None = None) -> GpuFact:
    """Return the GPUs as the bus, the driver and NVML see them."""
    source = nvml or NvmlSource()
    vendors = list(_display_vendors(root))
    on_bus = vendors.count(NVIDIA)
    cards = len(source.sample()) if on_bus or nvml is not None else 0
    driver = _text(root / "sys/module/nvidia/version").strip() or None
    amd = vendors.count(AMD)
    nodes = [root / "dev/nvidiactl", root / "dev/nvidia-uvm", root / "dev/nvidia0"] if on_bus and driver else []
    render = sorted((root / "dev/dri").glob("renderD*")) if amd else []
    amd_nodes = [*render, root / "dev/kfd"] if amd else []
    there = [node for node in (*nodes, *amd_nodes) if node.exists()]
    return GpuFact(
        nvidia_on_bus=on_bus,
        amd_on_bus=amd,
        driver=driver,
        nvml_problem=source.problem if on_bus else None,
        nvml_cards=cards,
        amd_cards=len(AmdSource(root / "sys/class/drm").sample()) if amd else 0,
        denied=tuple(str(node) for node in there if not os.access(node, os.R_OK | os.W_OK)),
        missing_nodes=tuple(str(node) for node in nodes if not node.exists()),
        wanted=tuple(wanted),
    )


def _display_vendors(root: Path) -> Iterable[str]:
    """Yield the vendor of each display controller or accelerator on the PCI bus."""
    for device in sorted((root / "sys/bus/pci/devices").glob("*")):
        if _text(device / "class").strip()[:4] in ("0x03", "0x12"):
            yield _text(device / "vendor").strip()


def clock(folders: Iterable[Path]) -> ClockFact:
    """Return the clock, and the newest time of the daemon's own files."""
    times = [stamp for folder in folders if (stamp := _newest(folder)) is not None]
    return ClockFact(time.time(), max(times, default=None), synchronized())


def _newest(folder: Path) -> float | None:
    try:
        with os.scandir(folder) as entries:
            return max((entry.stat(follow_symlinks=False).st_mtime for entry in entries), default=None)
    except OSError:
        return None


def synchronized() -> bool | None:
    """Return whether the kernel's clock follows a time server; None where the kernel does not say."""
    if sys.platform != "linux":
        return None
    buffer = ctypes.create_string_buffer(512)  # struct timex; its fields before `status` are int and three longs
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "adjtimex") or libc.adjtimex(buffer) < 0:
        return None
    width = ctypes.sizeof(ctypes.c_long)
    status = ctypes.c_int.from_buffer(buffer, width * 5).value  # modes, offset, freq, maxerror, esterror
    return not status & _STA_UNSYNC


def library(needed: bool, ask: Ask = ask, limit_s: float = 12.0) -> LibraryFact:
    """Import the wheel of llama.cpp in another process: a missing library, or instruction, is its exit."""
    if embedded() is None:
        return LibraryFact(False, needed)
    answer = ask((sys.executable, "-I", "-c", "import xllamacpp"), limit_s)
    if answer.code == 0:
        return LibraryFact(True, needed)
    lines = [line.strip() for line in answer.text.splitlines() if line.strip()]
    if answer.code is None:
        problem = f"no answer within {limit_s:g} s"
    elif answer.code < 0:
        problem = f"killed by signal {-answer.code} (a processor without the instructions that it needs?)"
    else:
        problem = lines[-1][:300] if lines else f"exit code {answer.code}"
    return LibraryFact(True, needed, problem)


def _text(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return file.read(1 << 20).decode("utf-8", "replace")
    except OSError:
        return ""


def _number(path: Path) -> int | None:
    found = _numbers(path)
    return found[0] if found else None


def _numbers(path: Path) -> list[int]:
    words = _text(path).split()
    return [int(word) for word in words] if words and all(word.isdigit() for word in words) else []
