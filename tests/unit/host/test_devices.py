"""Pools of memory, from machines that are not here."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fleetd.host.system.gpu import AmdSource, Gpu, NvmlSource, system_sources
from fleetd.host.system.memory import GIB, Devices, apple_wired_limit, limited_host_memory


class FixedGpus:
    """The cards that it was given."""

    def __init__(self, gpus: Sequence[Gpu] = ()) -> None:
        self.gpus = gpus

    def sample(self) -> Sequence[Gpu]:
        return list(self.gpus)


class NvmlError(Exception):
    pass


class FakeNvml:
    """The used functions of pynvml over a table of cards; `broken` names failing ones."""

    NVMLError = NvmlError
    NVML_TEMPERATURE_GPU = 0

    def __init__(self, cards: int = 2) -> None:
        self.cards, self.broken, self.begun = cards, set[str](), 0

    def __getattr__(self, name: str) -> Any:
        answers = {
            "nvmlInit": lambda: setattr(self, "begun", self.begun + 1),
            "nvmlShutdown": lambda: None,
            "nvmlDeviceGetCount": lambda: self.cards,
            "nvmlDeviceGetHandleByIndex": lambda index: index,
            "nvmlDeviceGetMemoryInfo": lambda index: SimpleNamespace(total=24 * GIB, used=(index + 1) * GIB),
            "nvmlDeviceGetUtilizationRates": lambda _: SimpleNamespace(gpu=50),
            "nvmlDeviceGetTemperature": lambda _h, _s: 61,
            "nvmlDeviceGetUUID": lambda index: f"GPU-{index}".encode(),
            "nvmlDeviceGetComputeRunningProcesses": lambda _: [
                SimpleNamespace(pid=7, usedGpuMemory=GIB),
                SimpleNamespace(pid=8, usedGpuMemory=None),
            ],
        }
        if name not in answers:
            raise AttributeError(name)

        def call(*args: Any) -> Any:
            if name in self.broken:
                raise NvmlError(f"{name} failed")
            return answers[name](*args)

        return call


def test_nvidia() -> None:
    first, second = NvmlSource(FakeNvml()).sample()
    assert first == Gpu("gpu0", 24 * GIB, GIB, "GPU-0", 0.5, 61.0, {7: GIB, 8: 0})
    assert (second.name, second.used_bytes) == ("gpu1", 2 * GIB)


OPTIONAL = [
    "nvmlDeviceGetUtilizationRates",
    "nvmlDeviceGetTemperature",
    "nvmlDeviceGetUUID",
    "nvmlDeviceGetComputeRunningProcesses",
]


@pytest.mark.parametrize("broken", OPTIONAL)
def test_a_value_that_a_card_lacks_is_none(broken: str) -> None:
    library = FakeNvml(1)
    library.broken.add(broken)
    (card,) = NvmlSource(library).sample()
    assert card.total_bytes == 24 * GIB
    assert [card.utilization, card.temperature_c, card.uuid, card.pid_bytes or None].count(None) == 1


def test_nvml_lost_is_initialised_again() -> None:
    library, now = FakeNvml(1), [0.0]
    source = NvmlSource(library, clock=lambda: now[0])
    assert len(source.sample()) == 1
    library.broken = {"nvmlDeviceGetCount"}
    assert source.sample() == []
    assert source.problem == "nvmlDeviceGetCount failed"
    library.broken = {"nvmlInit"}
    now[0] = 31.0
    assert source.sample() == []
    library.broken = set()
    assert source.sample() == []  # not asked again at once
    now[0] = 62.0
    assert len(source.sample()) == 1
    library.broken = {"nvmlDeviceGetMemoryInfo"}
    assert source.sample() == []
    assert source.problem is not None


def test_the_real_sources_never_raise() -> None:
    for source in system_sources():
        assert isinstance(list(source.sample()), list)


def test_amd(tmp_path: Path) -> None:
    device = tmp_path / "card0" / "device"
    (device / "hwmon" / "hwmon3").mkdir(parents=True)
    for name, value in {
        "mem_info_vram_total": str(16 * GIB), "mem_info_vram_used": str(GIB), "gpu_busy_percent": "25\n", "unique_id": "abc\n",
        "hwmon/hwmon3/temp1_input": "45000",
    }.items():  # fmt: skip
        (device / name).write_text(value)
    (tmp_path / "card0-DP-1").mkdir()
    (tmp_path / "card1" / "device").mkdir(parents=True)
    assert AmdSource(tmp_path).sample() == [Gpu("gpu0", 16 * GIB, GIB, "abc", 0.25, 45.0)]
    assert AmdSource(tmp_path / "none").sample() == []


def test_pools() -> None:
    cards = FixedGpus([Gpu("x", 100, 30, "U", 0.1, 50.0, {1: 5})])
    host, gpu = Devices([cards, FixedGpus()], lambda: (1000, 400), lambda: None).sample()
    assert (host.name, host.kind, host.total_bytes, host.used_bytes, host.available_bytes) == (
        "host",
        "host",
        1000,
        600,
        400,
    )
    assert (gpu.name, gpu.kind, gpu.uuid, gpu.available_bytes, gpu.pid_bytes) == ("gpu0", "gpu", "U", 70, {1: 5})
    (unified,) = Devices([cards], lambda: (1000, 400), lambda: 750).sample()
    assert (unified.name, unified.kind, unified.total_bytes, unified.limit_bytes) == ("unified", "unified", 1000, 750)


@pytest.mark.parametrize(
    ("sysctl", "limit"),
    [
        ({"hw.memsize": 192 * GIB, "iogpu.wired_limit_mb": 180 * 1024}, 180 * GIB),
        ({"hw.memsize": 192 * GIB, "iogpu.wired_limit_mb": 0}, 144 * GIB),
        ({"hw.memsize": 192 * GIB}, 144 * GIB),
        ({"hw.memsize": 24 * GIB}, 16 * GIB),
        ({"hw.memsize": 24 * GIB, "iogpu.wired_limit_mb": 10**9}, 24 * GIB),
    ],
)
def test_apple(sysctl: dict[str, int], limit: int) -> None:
    assert apple_wired_limit(sysctl.get, "darwin-arm64") == limit
    assert apple_wired_limit(sysctl.get, "linux-x86_64") is None


def test_limits_of_cgroups(tmp_path: Path) -> None:
    total, available = limited_host_memory(tmp_path)
    assert 0 < available <= total
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text("4:memory:/a\n0::/system/fleetd\n")
    deep = tmp_path / "sys/fs/cgroup/system/fleetd"
    deep.mkdir(parents=True)
    (deep / "memory.max").write_text("max\n")
    (deep.parent / "memory.max").write_text(f"{2 * GIB}\n")
    (deep.parent / "memory.current").write_text(f"{GIB}\n")
    (deep.parent / "memory.stat").write_text(f"anon 5\ninactive_file {GIB // 2}\n")
    assert limited_host_memory(tmp_path) == (2 * GIB, min(available, 3 * GIB // 2))
    old = tmp_path / "sys/fs/cgroup/memory/a"
    old.mkdir(parents=True)
    (old / "memory.limit_in_bytes").write_text(str(GIB))
    (old / "memory.usage_in_bytes").write_text(str(2 * GIB))
    assert limited_host_memory(tmp_path) == (GIB, 0)
