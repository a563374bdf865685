"""Facts as the doctor gathers them: from folders, programs and answers that the test writes."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from fleetd.cli.service_files import EXAMPLE_PLIST, ServiceSettings, launchd, systemd
from fleetd.host.process.ask import Answered
from fleetd.host.system.load import threads_of
from fleetd.setup.doctor import gather, gather_service, gather_system
from fleetd.setup.doctor.facts import ConfigFact, DaemonFact, Facts
from fleetd.setup.programs import Ask, Installed
from fleetd.setup.servers import Running
from tests.support.cli import Ran, fleetctl, raw_server
from tests.support.ports import free_port
from tests.support.waiting import until


def answers(**texts: str) -> Ask:
    """Return an `ask` that answers by a word of the command line; anything else is not installed."""

    def ask(argv: tuple[str, ...], limit_s: float) -> Answered:
        found = next((text for word, text in texts.items() if word.replace("_", "-") in argv), None)
        return Answered(None, "No such file") if found is None else Answered(0, found)

    return ask


# -- the machine ---------------------------------------------------------------------------------------------------------


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def test_limits_reads_the_kernels_files(tmp_path: Path) -> None:
    root = write(
        tmp_path,
        {
            "proc/sys/fs/file-nr": "1000\t0\t2000\n",
            "proc/self/cgroup": "0::/a/b\n",
            "sys/fs/cgroup/a/b/pids.max": "max\n",
            "sys/fs/cgroup/a/pids.max": "512\n",
            "sys/fs/cgroup/a/pids.current": "40\n",
        },
    )
    found = gather_system.limits(None, 3, root)
    assert (found.system_files_now, found.system_files_max) == (1000, 2000)
    assert (found.cgroup_pids_now, found.cgroup_pids_max) == (40, 512)
    assert found.open_files_soft is None or found.open_files_soft > 0
    assert gather_system.limits(None, 0, tmp_path / "nothing").cgroup_pids_max is None


def test_memory_reads_overcommit(tmp_path: Path) -> None:
    root = write(tmp_path, {"proc/sys/vm/overcommit_memory": "2\n", "proc/meminfo": "CommitLimit:  100 kB\nX: y\n"})
    found = gather_system.memory((), {"host": 5}, root)
    assert (found.overcommit, found.commit_limit_bytes, found.budgets) == (2, 102_400, {"host": 5})


def test_gpu_reads_the_bus_and_the_driver(tmp_path: Path) -> None:
    class Nvml:
        problem = "Driver/library version mismatch"

        def sample(self) -> list[Any]:
            return []

    root = write(
        tmp_path,
        {
            "sys/bus/pci/devices/0000:01/class": "0x030200\n",
            "sys/bus/pci/devices/0000:01/vendor": "0x10de\n",
            "sys/bus/pci/devices/0000:02/class": "0x020000\n",
            "sys/bus/pci/devices/0000:02/vendor": "0x10de\n",
            "sys/module/nvidia/version": "570.1\n",
            "dev/nvidiactl": "",
            "dev/nvidia0": "",
        },
    )
    found = gather_system.gpu(["gpu0"], root, Nvml())  # type: ignore[arg-type]
    assert (found.nvidia_on_bus, found.driver, found.nvml_cards) == (1, "570.1", 0)
    assert found.nvml_problem == "Driver/library version mismatch"
    assert found.missing_nodes == (str(root / "dev/nvidia-uvm"),)


@pytest.mark.parametrize(
    ("answer", "problem"),
    [
        (Answered(0, ""), None),
        (Answered(1, "Traceback\nImportError: libgomp.so.1: cannot open\n"), "ImportError: libgomp.so.1: cannot open"),
        (Answered(-4, ""), "killed by signal 4 (a processor without the instructions that it needs?)"),
        (Answered(None, ""), "no answer within 12 s"),
    ],
)
def test_library_reports_why_it_does_not_load(
    answer: Answered, problem: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gather_system, "embedded", lambda: object())
    assert gather_system.library(True, lambda *_: answer).problem == problem


def test_clock_sees_files_of_the_future(tmp_path: Path) -> None:
    write(tmp_path, {"a": ""})
    os.utime(tmp_path / "a", (4e9, 4e9))
    assert gather_system.clock([tmp_path, tmp_path / "missing"]).newest_file_s == 4e9
    assert gather_system.synchronized() in (True, False, None)


# -- services ------------------------------------------------------------------------------------------------------------


UNIT = ServiceSettings(
    fleetd=("/no/such/fleetd",), fleetctl=("fleetctl",), config="/c/50% of it.yaml", path="/a b:/usr/bin", user=None, home=Path("/h")
)  # fmt: skip


def test_systemd_reads_the_unit_that_fleetd_installs(tmp_path: Path) -> None:
    write(tmp_path, {".config/systemd/user/fleetd.service": systemd(UNIT).text})
    ask = answers(show="ActiveState=active\nSubState=running\nUnitFileState=enabled\n", show_user="Linger=no\n")
    found, path = gather_service.systemd(tmp_path, "me", ask, tmp_path / "root")
    assert path == "/a b:/usr/bin"
    assert (found.kind, found.active, found.enabled, found.linger) == ("user", True, True, False)
    assert (found.config, found.program, found.program_found) == ("/c/50% of it.yaml", "/no/such/fleetd", False)


def test_systemd_without_a_unit_or_an_answer(tmp_path: Path) -> None:
    assert gather_service.systemd(tmp_path, "me", answers(), tmp_path)[0].kind is None
    write(tmp_path, {"etc/systemd/system/fleetd.service": "[Service]\nExecStart='\n"})
    found, path = gather_service.systemd(tmp_path / "home", "me", answers(), tmp_path)
    assert (found.kind, found.active, found.program, path) == ("system", None, None, None)


def test_launchd_reads_the_property_list_that_fleetd_installs(tmp_path: Path) -> None:
    write(tmp_path, {"Library/LaunchAgents/org.fleetd.fleetd.plist": launchd(EXAMPLE_PLIST).text})
    shown = "gui/501/org.fleetd.fleetd = {\n\tstate = running\n\tpid = 5\n}\n"
    ask = answers(print=shown, print_disabled='\t"org.fleetd.fleetd" => enabled\n')
    found, path = gather_service.launchd(tmp_path, "me", 501, ask, tmp_path / "root")
    assert path == EXAMPLE_PLIST.path
    assert (found.kind, found.active, found.enabled, found.state) == ("user", True, True, "running")
    assert found.config == EXAMPLE_PLIST.config
    off = answers(print=shown.replace("running", "waiting"), print_disabled='"org.fleetd.fleetd" => disabled')
    found, _ = gather_service.launchd(tmp_path, "me", 501, off, tmp_path / "root")
    assert (found.active, found.enabled, found.state) == (False, False, "waiting")
    assert gather_service.launchd(tmp_path, "me", 501, answers(), tmp_path)[0].state == "not loaded"


def test_ollama_finds_a_service_of_its_own() -> None:
    assert gather_service.ollama("systemd", answers(is_active="")).unit == "ollama.service"
    assert gather_service.ollama("launchd", answers(list="- 0 homebrew.mxcl.ollama")).unit == "homebrew.mxcl.ollama"
    assert gather_service.ollama("none", answers(), [(5, True)]).unit is None
    assert gather_service.ollama("none", answers(), [(5, True), (6, False)]).unit == "ollama serve, pid 6"


@pytest.mark.parametrize(("env", "seen"), [({}, True), ({"FLEETD_STATE": "/s"}, False)])
def test_ollama_finds_a_server_that_no_fleetd_started(tmp_path: Path, env: dict[str, str], seen: bool) -> None:
    (tmp_path / "serve").write_text("read line\n")
    words, pipe = ["ollama", "serve"], subprocess.PIPE
    server = subprocess.Popen(words, executable="/bin/sh", cwd=tmp_path, env={"PATH": "/usr/bin", **env}, stdin=pipe)
    try:
        ours = (server.pid, not seen)
        until(lambda: ours in list(gather_service._servers()), "the process is in the table")
        assert (gather_service.ollama("none", answers(), [ours]).unit is not None) is seen
    finally:
        server.communicate(b"\n")


# -- the fleet -----------------------------------------------------------------------------------------------------------


def gathered(tmp_path: Path, fleet: str, daemon: DaemonFact | None = None, **env: str) -> Facts:
    config = tmp_path / "fleet.yaml"
    config.write_text(f"version: 1\npaths: {{state: ./s, run: ./r, logs: ./l}}\n{fleet}")
    base = {"PATH": os.environ["PATH"], "HOME": str(tmp_path)}
    return gather.gather(config, base | env, daemon or DaemonFact())


def test_gather_sees_programs_ports_and_files(tmp_path: Path) -> None:
    taken = socket.create_server(("127.0.0.1", 0))
    port = taken.getsockname()[1]
    (tmp_path / "plain").write_text("")
    fleet = f"""
gateway: {{listen: 127.0.0.1:{free_port()}}}
services:
  web: {{command: [no-such-program-x], port: {port}}}
  file: {{command: [./plain]}}
  good: {{command: [sh, -c, "true"], requires: [./plain]}}
models:
  m: {{engine: llamacpp, options: {{model: ./missing.gguf}}}}
"""
    with taken:
        facts = gathered(tmp_path, fleet)
    problems = {program.processes: program.problem for program in facts.programs}
    assert problems[("web",)] == "no-such-program-x is not on PATH"
    assert str(problems[("file",)]).endswith("plain is not executable")
    assert problems[("good",)] is None
    ports = {fact.users: fact for fact in facts.ports}
    assert ports[("web",)].owner_pid == os.getpid()
    assert (ports[("web",)].free, ports[("web",)].ours) == (False, False)
    assert ports[("gateway",)].free
    missing = {path.processes: path.missing for path in facts.paths}
    assert "does not exist" in str(missing[("m",)])
    assert missing[("good",)] is None
    assert facts.engines == ("llamacpp",)
    assert {folder.role: folder.exists for folder in facts.folders} == {"state": False, "run": False, "logs": False}
    assert facts.silent == ()


def test_gather_says_how_to_install_a_missing_engine(tmp_path: Path) -> None:
    facts = gathered(tmp_path, "models: {q: {engine: vllm, options: {model: x/y}}}\n", PATH="/nonexistent")
    (program,) = facts.programs
    assert "no program named vllm on PATH" in str(program.problem)
    assert str(program.hint).startswith("pip install vllm")


def test_with_running_adds_a_server_of_another_version() -> None:
    own = Installed("ollama", "/usr/bin/ollama", "0.35.0")
    other = Running("ollama", 11434, "0.20.0")
    assert gather.with_running((own,), None) == (own,)
    assert gather.with_running((own,), Running("ollama", 11434, "0.35.0")) == (own,)
    found = gather.with_running((own,), other)
    assert [(one.path, one.version) for one in found[1:]] == [("the server on port 11434", "0.20.0")]


def test_limits_counts_the_threads_of_a_user(monkeypatch: pytest.MonkeyPatch) -> None:
    assert threads_of(os.getuid()) >= 1
    monkeypatch.setattr(os, "getuid", lambda: 54321)
    found = gather_system.limits(None, 0)
    assert found.processes_now == (0 if found.processes_soft is not None else None)


def test_gather_reads_an_invalid_file_and_goes_on(tmp_path: Path) -> None:
    facts = gathered(tmp_path, "services: {a: {comand: [x]}}\n")
    assert "comand" in facts.config.problems[0]
    assert facts.folders[0].role == "state"


@pytest.mark.parametrize("kind", ["missing", "folder", "pipe"])
def test_gather_survives_a_file_that_cannot_be_read(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "fleet.yaml"
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    facts = gather.gather(path, {"PATH": "/usr/bin", "HOME": str(tmp_path)}, DaemonFact())
    assert facts.config.unread in ("no such file", "not a regular file")


def test_gather_sees_who_may_write_the_file(tmp_path: Path) -> None:
    config = tmp_path / "fleet.yaml"
    config.write_text("version: 1\n")
    config.chmod(0o666)
    found = gather.gather(config, {"PATH": "/usr/bin", "HOME": str(tmp_path)}, DaemonFact()).config
    assert found == ConfigFact(str(config), exposed=str(config))


def test_gather_sees_who_may_write_an_included_file(tmp_path: Path) -> None:
    (tmp_path / "more.yaml").write_text("services: {}\n")
    (tmp_path / "more.yaml").chmod(0o622)
    assert gathered(tmp_path, "include: [more.yaml]\n").config.exposed == str(tmp_path / "more.yaml")


def test_folder_fact_looks_at_the_nearest_that_exists(tmp_path: Path) -> None:
    found = gather.folder_fact("state", tmp_path / "a" / "b")
    assert (found.exists, found.existing, found.is_folder) == (False, str(tmp_path), True)
    assert found.free_bytes is not None
    (tmp_path / "file").write_text("")
    assert gather.folder_fact("state", tmp_path / "file").is_folder is False


def test_left_running_finds_processes_of_a_dead_daemon(tmp_path: Path) -> None:
    env = {**os.environ, "FLEETD_STATE": str(tmp_path), "FLEETD_INSTANCE": "bot:3"}
    left = subprocess.Popen([sys.executable, "-c", "input()"], env=env, stdin=subprocess.PIPE)
    try:
        until(lambda: gather.left_running(str(tmp_path)) != (), "the process is in the table")
        (found,) = gather.left_running(str(tmp_path))
        assert (found.name, found.pid) == ("bot", left.pid)
    finally:
        left.communicate(b"\n")


# -- the verb ------------------------------------------------------------------------------------------------------------


def doctor(tmp_path: Path, *arguments: str, **env: str) -> Ran:
    return fleetctl("doctor", *arguments, HOME=str(tmp_path), **env)


def test_doctor_prints_a_fix_below_each_problem(tmp_path: Path) -> None:
    (tmp_path / "fleet.yaml").write_text("version: 1\nservices: {a: {command: [no-such-program-x]}}\n")
    ran = doctor(tmp_path, "--config", str(tmp_path / "fleet.yaml"))
    assert ran.code == 1, ran.out
    lines = ran.out.splitlines()
    at = next(number for number, line in enumerate(lines) if line.startswith("FAIL  programs"))
    assert "no-such-program-x is not on PATH (needed by a)" in lines[at]
    assert "fix: command -v no-such-program-x" in lines[at + 1]
    assert lines[-1].startswith("1 FAIL, ")
    assert not any(line.startswith("PASS") for line in doctor(tmp_path, "-q").out.splitlines())


def test_doctor_in_json_has_stable_fields(tmp_path: Path) -> None:
    (tmp_path / "fleet.yaml").write_text("version: 1\n")
    ran = doctor(tmp_path, "--config", str(tmp_path / "fleet.yaml"), "-o", "json")
    document = json.loads(ran.out)
    assert document["schema"] == "fleetctl/v1"
    assert document["ok"] is (ran.code == 0)
    assert {"check", "verdict", "text", "fix"} == set(document["findings"][0])
    checks = {finding["check"]: finding["verdict"] for finding in document["findings"]}
    assert checks["daemon"] == "WARN"
    assert checks["left"] == "PASS"


def test_doctor_rejects_a_missing_file(tmp_path: Path) -> None:
    ran = doctor(tmp_path, "--config", str(tmp_path / "no.yaml"))
    assert (ran.code, "no such file" in ran.err) == (2, True)


def test_doctor_ends_when_the_daemon_hangs(tmp_path: Path, short: Path) -> None:
    def hold(connection: socket.socket) -> None:
        connection.recv(65536)
        connection.settimeout(10.0)
        connection.recv(1)  # until the client gives up

    (short / "fleetd.lock").write_text(f"{os.getpid()}\n")
    with raw_server(short / "fleetd.sock", hold) as path:
        before = time.monotonic()
        ran = doctor(tmp_path, "-o", "json", FLEETD_SOCKET=str(path))
    assert time.monotonic() - before < 25.0
    daemon = next(one for one in json.loads(ran.out)["findings"] if one["check"] == "daemon")
    assert (ran.code, daemon["verdict"]) == (1, "FAIL")
    assert daemon["fix"].startswith(f"kill -CONT {os.getpid()}")
