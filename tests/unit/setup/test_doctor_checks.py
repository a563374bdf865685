"""Each check of the doctor on a machine that the test states: its verdict, and the command that helps."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest

from fleetd.setup.doctor import daemon, engines, storage, system
from fleetd.setup.doctor.facts import (
    ClockFact,
    ConfigFact,
    DaemonFact,
    Facts,
    FolderFact,
    GpuFact,
    LeftFact,
    LibraryFact,
    LimitsFact,
    MemoryFact,
    OllamaFact,
    PathFact,
    PortFact,
    ProgramFact,
    ServiceFact,
)
from fleetd.setup.doctor.findings import Finding
from fleetd.setup.doctor.report import CHECKS, document, examine
from fleetd.setup.programs import Installed

GIB = 1 << 30
RUNNING = DaemonFact("running", "/r/fleetd.sock", 7, "0.1.0", config="/c/fleet.yaml")
Check = Callable[[Facts], Iterable[Finding]]


def lines(check: Check, **facts: Any) -> list[str]:
    """Return `VERDICT check | fix` of each finding."""
    found = check(Facts(**({"version": "0.1.0", "uid": 1000, "clock": ClockFact(2e9)} | facts)))
    return [f"{one.verdict} {one.check}" + (f" | {one.fix}" if one.fix else "") for one in found]


def folder(role: str = "logs", **more: Any) -> FolderFact:
    usual = {"existing": f"/f/{role}", "exists": True, "owner": 1000, "free_bytes": 50 * GIB, "total_bytes": 100 * GIB}
    return FolderFact(role, f"/f/{role}", **(usual | more))


CASES: list[tuple[str, Check, dict[str, Any], list[str]]] = [
    ("no file", storage.config, {}, ["WARN config | fleetctl init"]),
    ("good file", storage.config, {"config": ConfigFact("/c/f.yaml")}, ["PASS config"]),
    (
        "invalid file",
        storage.config,
        {"config": ConfigFact("/c/my f.yaml", problems=("a\n  b", "c"))},
        ["FAIL config | fleetd check '/c/my f.yaml'"],
    ),
    ("warnings", storage.config, {"config": ConfigFact("/f", warnings=("w",))}, ["WARN config | fleetd check /f"]),
    ("unreadable", storage.config, {"config": ConfigFact("/f", unread="denied")}, ["FAIL config | ls -l /f"]),
    (
        "others may write it, root",
        storage.config,
        {"config": ConfigFact("/f", exposed="/f"), "uid": 0},
        ["PASS config", "FAIL config.rights | chmod go-w /f"],
    ),
    (
        "others may write it",
        storage.config,
        {"config": ConfigFact("/f", exposed="/f")},
        ["PASS config", "WARN config.rights | chmod go-w /f"],
    ),
    (
        "open to the network",
        storage.config,
        {"config": ConfigFact("/f", listen="0.0.0.0:80", loopback=False, insecure=True)},
        [
            "PASS config",
            "WARN gateway.open | set gateway.listen: 127.0.0.1:8484 and put a proxy with authentication in front",
        ],
    ),
    ("folder", storage.folders, {"folders": (folder(),)}, ["PASS rights.logs"]),
    (
        "folder hangs",
        storage.folders,
        {"folders": (FolderFact("state", "/n"),)},
        ["FAIL rights.state | set paths.state: to a local folder"],
    ),
    (
        "folder of root",
        storage.folders,
        {"folders": (folder(writable=False, owner=0),)},
        ["FAIL rights.logs | sudo chown 1000 /f/logs"],
    ),
    (
        "read-only folder",
        storage.folders,
        {"folders": (folder(writable=False),)},
        ["FAIL rights.logs | chmod u+rwx /f/logs; mount | grep -w ro"],
    ),
    (
        "run folder is a link",
        storage.folders,
        {"folders": (folder("run", is_link=True),)},
        ["FAIL rights.run | rm /f/run && mkdir -m 700 /f/run"],
    ),
    (
        "run folder of another user",
        storage.folders,
        {"folders": (folder("run", owner=5),)},
        ["FAIL rights.run | sudo chown -R 1000 /f/run"],
    ),
    (
        "a file where the folder should be",
        storage.folders,
        {"folders": (folder(is_folder=False),)},
        ["FAIL rights.logs | mv /f/logs /f/logs.old"],
    ),
    (
        "folder open to others",
        storage.folders,
        {"folders": (folder(mode=0o777),)},
        ["WARN rights.logs | chmod go-w /f/logs"],
    ),
    (
        "socket path too long",
        storage.folders,
        {"folders": (FolderFact("run", "/" + "x" * 100, "/", owner=0),)},
        ["PASS rights.run", "FAIL socket | set paths.run: to a shorter folder, such as ~/.fleetd/run"],
    ),
    ("space", storage.space, {"folders": (folder(),)}, ["PASS disk.logs"]),
    (
        "disk full",
        storage.space,
        {"folders": (folder(free_bytes=1),)},
        ["FAIL disk.logs | du -xh --max-depth=2 /f/logs | sort -h | tail"],
    ),
    (
        "disk nearly full",
        storage.space,
        {"folders": (folder(free_bytes=GIB // 2),), "platform": "darwin"},
        ["WARN disk.logs | du -xhd 2 /f/logs | sort -h | tail"],
    ),
    (
        "no inodes",
        storage.space,
        {"folders": (folder(free_inodes=0, total_inodes=100_000),)},
        ["PASS disk.logs", "FAIL inodes.logs | find /f/logs -xdev -printf '%h\\n' | sort | uniq -c | sort -n | tail"],
    ),
    (
        "a file system without inodes",
        storage.space,
        {"folders": (folder(free_inodes=0, total_inodes=0),)},
        ["PASS disk.logs"],
    ),
    (
        "drive not mounted",
        storage.required_paths,
        {"paths": (PathFact("/media/x/m", ("a",), "/media/x/m (the volume /media/x is not mounted)"),)},
        ["FAIL volumes | lsblk -f   # and mount it; fleetd notices"],
    ),
    (
        "file missing",
        storage.required_paths,
        {"paths": (PathFact("/m", ("a",), "/m (does not exist)"), PathFact("/n", ("a",)))},
        ["FAIL files | ls -l /m"],
    ),
    ("files there", storage.required_paths, {"paths": (PathFact("/n", ("a",)),)}, ["PASS files"]),
    # -- the machine
    (
        "few descriptors",
        system.open_files,
        {"limits": LimitsFact(256, 4096, wanted=20)},
        ["WARN limits.files | ulimit -n 4096"],
    ),
    (
        "few descriptors, and no more allowed",
        system.open_files,
        {"limits": LimitsFact(256, 256, wanted=20)},
        ["FAIL limits.files | raise nofile in /etc/security/limits.conf to 4096, and log in again"],
    ),
    ("descriptors", system.open_files, {"limits": LimitsFact(1024, None, wanted=3)}, ["PASS limits.files"]),
    (
        "the machine's descriptors",
        system.open_files,
        {"limits": LimitsFact(system_files_max=100, system_files_now=95)},
        ["WARN limits.system_files | sudo sysctl fs.file-max=200"],
    ),
    (
        "process limit reached",
        system.processes,
        {"limits": LimitsFact(processes_soft=100, processes_now=99, wanted=4)},
        ["FAIL limits.processes | ulimit -u 4296"],
    ),
    (
        "container with few processes",
        system.processes,
        {"limits": LimitsFact(cgroup_pids_max=100, cgroup_pids_now=20, wanted=4)},
        ["WARN limits.processes | raise TasksMax= of the unit, or --pids-limit of the container"],
    ),
    (
        "strict overcommit",
        system.memory,
        {"memory": MemoryFact(overcommit=2)},
        ["WARN memory.overcommit | sudo sysctl vm.overcommit_memory=0"],
    ),
    (
        "budget above the memory",
        system.memory,
        {"memory": MemoryFact(overcommit=0, budgets={"host": 3}, totals={"host": 2})},
        ["PASS memory.overcommit", "FAIL memory.budget | set devices.host.budget: 80%"],
    ),
    (
        "budget of a missing device",
        system.memory,
        {"memory": MemoryFact(budgets={"gpu1": 3}, totals={"host": 2})},
        ["WARN memory.budget | remove devices.gpu1, or set its uuid"],
    ),
    (
        "memory in use by others",
        system.memory,
        {"memory": MemoryFact(budgets={"gpu0": 9}, totals={"gpu0": 10}, used={"gpu0": 5})},
        ["WARN memory.budget | nvidia-smi"],
    ),
    (
        "memory in use by the fleet",
        system.memory,
        {"memory": MemoryFact(budgets={"gpu0": 9}, totals={"gpu0": 10}, used={"gpu0": 5}), "daemon": RUNNING},
        ["PASS memory.budget"],
    ),
    (
        "wired limit of a Mac",
        system.memory,
        {
            "memory": MemoryFact(
                budgets={"unified": 20 << 20}, totals={"unified": 30 << 20}, wired_limit_bytes=10 << 20
            ),
            "platform": "darwin",
        },
        ["PASS memory.budget", "WARN memory.wired | sudo sysctl iogpu.wired_limit_mb=20"],
    ),
    ("no GPU", system.gpus, {}, ["PASS gpu.driver"]),
    (
        "driver not loaded",
        system.gpus,
        {"gpu": GpuFact(nvidia_on_bus=1)},
        ["FAIL gpu.driver | sudo modprobe nvidia; dmesg | grep -i nvrm | tail"],
    ),
    (
        "driver updated without a restart",
        system.gpus,
        {"gpu": GpuFact(1, driver="570.1", nvml_problem="Driver/library version mismatch")},
        ["FAIL gpu.driver | sudo reboot"],
    ),
    (
        "NVML is broken",
        system.gpus,
        {"gpu": GpuFact(1, driver="570.1", nvml_problem="NVML Shared Library Not Found")},
        ["FAIL gpu.nvml | nvidia-smi"],
    ),
    (
        "a lost card",
        system.gpus,
        {"gpu": GpuFact(2, driver="570.1", nvml_cards=1)},
        ["WARN gpu.nvml | dmesg | grep -i xid | tail"],
    ),
    (
        "device files",
        system.gpus,
        {"gpu": GpuFact(1, driver="5", nvml_cards=1, denied=("/dev/nvidia0",), missing_nodes=("/dev/nvidia-uvm",))},
        [
            "PASS gpu.driver",
            "FAIL gpu.nodes | sudo nvidia-modprobe -u -c=0",
            "FAIL gpu.rights | sudo usermod -aG video $USER, and log in again",
        ],
    ),
    (
        "AMD without its driver",
        system.gpus,
        {"gpu": GpuFact(amd_on_bus=1)},
        ["WARN gpu.driver | sudo modprobe amdgpu"],
    ),
    (
        "a GPU in the file alone",
        system.gpus,
        {"gpu": GpuFact(wanted=("gpu0",))},
        ["FAIL gpu.wanted | remove device: gpu0"],
    ),
    ("clock", system.clock, {"clock": ClockFact(2e9, 1.9e9, True)}, ["PASS clock"]),
    (
        "clock of 1970",
        system.clock,
        {"clock": ClockFact(1000.0)},
        ["FAIL clock | sudo timedatectl set-ntp true"],
    ),
    (
        "clock set back",
        system.clock,
        {"clock": ClockFact(2e9, 2e9 + 9000), "platform": "darwin"},
        ["WARN clock | sudo sntp -sS time.apple.com"],
    ),
    (
        "clock not synchronized",
        system.clock,
        {"clock": ClockFact(2e9, None, False)},
        ["WARN clock | sudo timedatectl set-ntp true"],
    ),
    # -- engines
    (
        "programs",
        engines.programs,
        {"programs": (ProgramFact("ollama", ("o",)), ProgramFact("vllm", ("a",), "no program named vllm on PATH"))},
        ["FAIL programs | command -v vllm; set command: to its full path", "PASS programs"],
    ),
    (
        "PATH of the service",
        engines.programs,
        {
            "programs": (ProgramFact("vllm", ("a",), missing_for_service=True),),
            "service": ServiceFact("systemd", "user"),
        },
        ["FAIL programs.service | fleetctl install-service --user   # from a shell that finds vllm"],
    ),
    (
        "old Python",
        engines.versions,
        {"python": (3, 10)},
        ["FAIL versions.python | pipx reinstall --python python3.13 fleetd"],
    ),
    (
        "llama-server without a flag",
        engines.versions,
        {"installed": (Installed("llama-server", "/l", "b4000", lacks=("--cache-ram",)),)},
        ["WARN versions.llama-server | brew upgrade llama.cpp, or build a newer one"],
    ),
    (
        "no OpenMP",
        engines.library,
        {"library": LibraryFact(True, True, "libgomp.so.1: cannot open shared object file")},
        ["FAIL llamacpp | sudo apt-get install libgomp1   # Fedora: sudo dnf install libgomp"],
    ),
    (
        "wheel that is not needed",
        engines.library,
        {"library": LibraryFact(True, False, "killed by signal 4")},
        ["WARN llamacpp | pip install --force-reinstall xllamacpp"],
    ),
    ("wheel", engines.library, {"library": LibraryFact(True, True)}, ["PASS llamacpp"]),
    ("no wheel", engines.library, {}, []),
    (
        "ports",
        engines.ports,
        {
            "ports": (
                PortFact(1, ("a",)),
                PortFact(2, ("b",), free=False, ours=True),
                PortFact(3, ("c",), free=False, owner="pid 9 (x)", owner_pid=9),
                PortFact(4, ("d",), free=False),
            )
        },
        [
            "FAIL ports | kill 9   # or give c another port",
            "FAIL ports | sudo ss -ltnp 'sport = :4'",
            "PASS ports",
        ],
    ),
    (
        "Ollama twice",
        engines.ollama,
        {"ollama": OllamaFact("ollama.service", engine=True)},
        ["WARN ollama | sudo systemctl disable --now ollama"],
    ),
    (
        "Ollama twice, as a user",
        engines.ollama,
        {"ollama": OllamaFact("ollama.service", user_unit=True, engine=True)},
        ["WARN ollama | systemctl --user disable --now ollama"],
    ),
    (
        "Ollama twice on a Mac",
        engines.ollama,
        {"ollama": OllamaFact("homebrew.mxcl.ollama", engine=True), "platform": "darwin"},
        ["WARN ollama | brew services stop ollama"],
    ),
    ("Ollama used as it is", engines.ollama, {"ollama": OllamaFact("x", external=True)}, ["PASS ollama"]),
    ("Ollama of somebody", engines.ollama, {"ollama": OllamaFact("x")}, []),
    # -- the daemon
    ("daemon", daemon.daemon, {"daemon": RUNNING}, ["PASS daemon"]),
    (
        "no daemon",
        daemon.daemon,
        {"config": ConfigFact("/c/f.yaml")},
        ["WARN daemon | fleetd run --config /c/f.yaml"],
    ),
    (
        "no daemon, installed",
        daemon.daemon,
        {"service": ServiceFact("systemd", "system")},
        ["WARN daemon | sudo systemctl start fleetd"],
    ),
    (
        "no daemon on a Mac",
        daemon.daemon,
        {"service": ServiceFact("launchd", "user")},
        ["WARN daemon | launchctl kickstart gui/1000/org.fleetd.fleetd"],
    ),
    (
        "daemon hangs",
        daemon.daemon,
        {"daemon": DaemonFact("silent", pid=7)},
        ["FAIL daemon | kill -CONT 7; if it stays silent: kill -9 7, and start it again"],
    ),
    (
        "daemon of another user",
        daemon.daemon,
        {"daemon": DaemonFact("denied")},
        ["FAIL daemon | run fleetctl as the user that runs fleetd"],
    ),
    (
        "daemon of another version",
        daemon.daemon,
        {"daemon": DaemonFact("running", version="0.0.9", config_error="a\nb", config="/c", store_problem="full")},
        [
            "WARN daemon.version | fleetctl daemon-reexec",
            "FAIL daemon.config | fleetd check /c",
            "FAIL daemon.state | fleetctl doctor | grep -e disk -e rights",
        ],
    ),
    (
        "processes left",
        daemon.left,
        {"left": (LeftFact("a", 8, "x"), LeftFact("b", 9, "x")), "config": ConfigFact("/f")},
        ["WARN left | fleetd run --config /f   # adopts them; or: kill 8 9"],
    ),
    ("processes of a daemon", daemon.left, {"left": (LeftFact("a", 8, "x"),), "daemon": RUNNING}, []),
    ("no manager", daemon.service, {}, ["PASS service"]),
    (
        "not installed",
        daemon.service,
        {"service": ServiceFact("systemd")},
        ["WARN service | fleetctl install-service --user"],
    ),
    (
        "no linger",
        daemon.service,
        {"service": ServiceFact("systemd", "user", "/u", True, True, "active", False, "me")},
        ["PASS service", "WARN service.linger | sudo loginctl enable-linger me"],
    ),
    (
        "unit failed",
        daemon.service,
        {"service": ServiceFact("systemd", "system", "/u", False, True, "failed")},
        ["FAIL service | sudo journalctl -u fleetd -n 50; then: sudo systemctl restart fleetd"],
    ),
    (
        "unit not enabled",
        daemon.service,
        {"service": ServiceFact("systemd", "user", "/u", True, False, "active", True)},
        ["WARN service | systemctl --user enable --now fleetd"],
    ),
    (
        "program of the unit is gone",
        daemon.service,
        {"service": ServiceFact("systemd", "system", "/u", True, True, "active", program="/x", program_found=False)},
        ["FAIL service.program | sudo fleetctl install-service", "PASS service"],
    ),
    (
        "unit of another file",
        daemon.service,
        {
            "service": ServiceFact("systemd", "system", "/u", True, True, "active", config="/other"),
            "config": ConfigFact("/f"),
        },
        ["WARN service.config | sudo fleetctl install-service --config /f", "PASS service"],
    ),
    (
        "job not loaded",
        daemon.service,
        {"service": ServiceFact("launchd", "system", "/L/x.plist", False, True, "not loaded")},
        ["WARN service | sudo launchctl bootstrap system /L/x.plist"],
    ),
    (
        "job disabled",
        daemon.service,
        {"service": ServiceFact("launchd", "system", "/L", False, False, "waiting")},
        ["WARN service | sudo launchctl enable system/org.fleetd.fleetd"],
    ),
    (
        "job waits",
        daemon.service,
        {"service": ServiceFact("launchd", "system", "/L", False, True, "waiting")},
        ["WARN service | sudo launchctl kickstart system/org.fleetd.fleetd"],
    ),
    (
        "job of a login",
        daemon.service,
        {"service": ServiceFact("launchd", "user", "/L", True, True, "running")},
        ["PASS service", "WARN service.login | sudo fleetctl install-service   # a LaunchDaemon, which starts at boot"],
    ),
    ("hanging look", daemon.silent, {"silent": ("gpu",)}, ["WARN looks | dmesg | tail; mount"]),
]


@pytest.mark.parametrize(("check", "facts", "expected"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_check_gives_its_verdict_and_a_fix(check: Check, facts: dict[str, Any], expected: list[str]) -> None:
    assert lines(check, **facts) == expected


@pytest.mark.parametrize(
    ("name", "version", "engine", "verdict"),
    [
        ("ollama", "0.5.4", "ollama", "FAIL"),
        ("ollama", "0.5.4", "", "WARN"),
        ("ollama", "0.20.0", "ollama", "WARN"),
        ("ollama", "0.33.0-rc2", "ollama", "PASS"),
        ("ollama", "0.34.3", "ollama", "WARN"),
        ("ollama", "0.35.0", "ollama", "PASS"),
        ("ollama", "0.0.0", "ollama", "PASS"),
        ("ollama", None, "ollama", "PASS"),
        ("vllm", "0.14.0", "vllm", "WARN"),
        ("vllm", "0.20.1+cu128", "vllm", "PASS"),
        ("vllm", "0.6.0", "vllm", "FAIL"),
        ("lms", "1.2.3", "lmstudio", "PASS"),
    ],
)
def test_versions_finds_known_bad_ones(name: str, version: str | None, engine: str, verdict: str) -> None:
    found = lines(engines.versions, installed=(Installed(name, "/x", version),), engines=(engine,))
    assert [line.split(" | ")[0] for line in found] == [f"{verdict} versions.{name}"]


def test_every_problem_has_a_fix_and_every_check_a_case() -> None:
    seen = {case[1] for case in CASES} | {engines.versions}
    assert set(CHECKS) == seen
    for name, check, facts, _ in CASES:
        for finding in check(Facts(**facts)):
            assert (finding.fix is not None) == (finding.verdict != "PASS"), name


def test_document_counts_the_verdicts() -> None:
    report = document(examine(Facts(clock=ClockFact(1.0))))
    assert report["ok"] is False
    assert report["counts"]["fail"] == 1
    assert report["findings"][-1]["check"] == "service"
    assert sum(report["counts"].values()) == len(report["findings"])
