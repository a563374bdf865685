"""Checks of the machine: limits, memory, GPUs, the clock.

Pure: every check reads facts alone.
"""

from __future__ import annotations

from collections.abc import Iterator

from fleetd.setup.doctor.facts import Facts, GpuFact
from fleetd.setup.doctor.findings import Finding, failed, passed, warned
from fleetd.units import listed, show_size

FILES_LEAST, FILES_WANTED = 256, 4096
FILES_PER_PROCESS = 16  # log, pipe, pidfd, probe connections, and the connections of requests
YEAR_2025_S = 1_735_689_600.0
CLOCK_SLACK_S = 300.0
GIB = 1 << 30


def open_files(facts: Facts) -> Iterator[Finding]:
    """Judge the limits of descriptors."""
    found = facts.limits
    soft, hard = found.open_files_soft, found.open_files_hard
    needed = max(FILES_LEAST, 128 + FILES_PER_PROCESS * found.wanted)
    if soft is not None:
        text = f"{soft} descriptors per process (hard limit {hard}); this fleet may need {needed}"
        fix = f"ulimit -n {max(needed, FILES_WANTED)}"
        if hard is not None and hard < needed:
            fix = f"raise nofile in /etc/security/limits.conf to {max(needed, FILES_WANTED)}, and log in again"
            yield failed("limits.files", text, fix)
        elif soft < needed:
            yield warned("limits.files", text, fix)
        else:
            yield passed("limits.files", text)
    most, now = found.system_files_max, found.system_files_now
    if most and now is not None and now > most * 0.9:
        text = f"{now} of {most} descriptors of the whole machine are in use"
        yield warned("limits.system_files", text, f"sudo sysctl fs.file-max={most * 2}")


def processes(facts: Facts) -> Iterator[Finding]:
    """Judge how many more processes may be started."""
    found = facts.limits
    pairs = (
        (
            "of this user",
            found.processes_soft,
            found.processes_now,
            f"ulimit -u {(found.processes_soft or 0) * 2 + 4096}",
        ),
        (
            "of this cgroup",
            found.cgroup_pids_max,
            found.cgroup_pids_now,
            "raise TasksMax= of the unit, or --pids-limit of the container",
        ),
    )
    needed = 64 + 32 * found.wanted  # threads count too
    for whose, most, now, fix in pairs:
        if most is None or now is None:
            continue
        text = f"{now} of {most} processes and threads {whose}; this fleet may need {needed}"
        room = most - now
        say = failed if room < found.wanted + 8 else warned
        yield say("limits.processes", text, fix) if room < needed else passed("limits.processes", text)


def memory(facts: Facts) -> Iterator[Finding]:
    """Judge overcommit, swap and the budgets against the memory that there is."""
    found = facts.memory
    if found.overcommit == 2:
        limit = show_size(found.commit_limit_bytes) if found.commit_limit_bytes else "its limit"
        text = (
            f"strict overcommit (vm.overcommit_memory=2): engines reserve far more than they use, and fail at {limit}"
        )
        yield warned("memory.overcommit", text, "sudo sysctl vm.overcommit_memory=0")
    elif found.overcommit is not None:
        yield passed("memory.overcommit", f"vm.overcommit_memory={found.overcommit}")
    for device, budget in found.budgets.items():
        total = found.totals.get(device)
        if total is None:
            yield warned(
                "memory.budget",
                f"fleet.yaml names {device}, which this machine does not have",
                f"remove devices.{device}, or set its uuid",
            )
        elif budget > total:
            text = f"the budget of {device}, {show_size(budget)}, is more than its {show_size(total)}"
            yield failed("memory.budget", text, f"set devices.{device}.budget: 80%")
        else:
            yield from _budget(facts, device, budget, total)
    wired = found.wired_limit_bytes
    if wired is not None and found.budgets.get("unified", 0) > wired:
        text = f"the GPU may wire down {show_size(wired)}, less than the budget of unified"
        yield warned("memory.wired", text, f"sudo sysctl iogpu.wired_limit_mb={found.budgets['unified'] >> 20}")


def _budget(facts: Facts, device: str, budget: int, total: int) -> Iterator[Finding]:
    """Judge one budget against what is in use by others; a running daemon's own models are in it too."""
    used = facts.memory.used.get(device)
    text = f"{device}: budget {show_size(budget)} of {show_size(total)}"
    if used is not None and facts.daemon.state == "stopped" and budget > total - used:
        text += f", of which {show_size(used)} are in use by other programs"
        look = "nvidia-smi" if device.startswith("gpu") else "ps aux --sort=-rss | head"
        yield warned("memory.budget", text, look if facts.platform == "linux" else "top -o mem")
    else:
        yield passed("memory.budget", text)


def gpus(facts: Facts) -> Iterator[Finding]:
    """Judge the driver, NVML and the device files of GPUs."""
    found = facts.gpu
    if found.nvidia_on_bus:
        yield from _nvidia(found)
    if found.amd_on_bus and not found.amd_cards:
        yield warned(
            "gpu.driver", "an AMD GPU is there, and the driver amdgpu reports no memory of it", "sudo modprobe amdgpu"
        )
    if found.denied:
        group = "render,video" if any("dri" in one or "kfd" in one for one in found.denied) else "video"
        text = f"this user may not open {listed(found.denied)}"
        yield failed("gpu.rights", text, f"sudo usermod -aG {group} $USER, and log in again")
    if found.wanted and not (found.nvml_cards or found.amd_cards):
        text = f"fleet.yaml names {listed(found.wanted)}, and no GPU can be seen"
        yield failed("gpu.wanted", text, "nvidia-smi" if found.nvidia_on_bus else f"remove device: {found.wanted[0]}")
    if not (found.nvidia_on_bus or found.amd_on_bus or found.wanted):
        yield passed("gpu.driver", "no NVIDIA or AMD GPU on this machine")


def _nvidia(found: GpuFact) -> Iterator[Finding]:
    """Judge the driver of NVIDIA: kernel module, library, and both of one version."""
    if found.driver is None:
        text = "an NVIDIA GPU is there, and its driver is not loaded"
        yield failed("gpu.driver", text, "sudo modprobe nvidia; dmesg | grep -i nvrm | tail")
        return
    problem = (found.nvml_problem or "").lower()
    if "mismatch" in problem:
        text = f"driver {found.driver} and its library differ (an update without a restart)"
        yield failed("gpu.driver", text, "sudo reboot")
    elif found.nvml_problem and not found.nvml_cards:
        text = f"NVML does not work with driver {found.driver}: {found.nvml_problem}"
        yield failed("gpu.nvml", text, "nvidia-smi")
    elif found.nvml_problem:
        yield warned("gpu.nvml", f"NVML: {found.nvml_problem}", "nvidia-smi")
    elif found.nvml_cards < found.nvidia_on_bus:
        text = f"NVML sees {found.nvml_cards} of {found.nvidia_on_bus} NVIDIA GPUs (one is lost, or hidden from this container)"
        yield warned("gpu.nvml", text, "dmesg | grep -i xid | tail")
    else:
        yield passed("gpu.driver", f"NVIDIA driver {found.driver}, NVML sees {found.nvml_cards}")
    if found.missing_nodes:
        yield failed("gpu.nodes", f"missing {listed(found.missing_nodes)}", "sudo nvidia-modprobe -u -c=0")


def clock(facts: Facts) -> Iterator[Finding]:
    """Judge the clock: schedules, TTLs of keys and log times depend on it."""
    found = facts.clock
    fix = "sudo timedatectl set-ntp true" if facts.platform == "linux" else "sudo sntp -sS time.apple.com"
    if found.now_s < YEAR_2025_S:
        yield failed("clock", "the clock is before 2025", fix)
    elif found.newest_file_s is not None and found.newest_file_s > found.now_s + CLOCK_SLACK_S:
        ahead = found.newest_file_s - found.now_s
        yield warned("clock", f"files of fleetd are {ahead / 60:.0f} min in the future: the clock was set back", fix)
    elif found.synchronized is False:
        yield warned("clock", "the clock is not synchronized with a time server", fix)
    else:
        yield passed("clock", "synchronized" if found.synchronized else "plausible")
