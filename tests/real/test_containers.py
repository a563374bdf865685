"""Engines in real containers: started, used, measured, killed in every way, and always removed."""

from __future__ import annotations

import json
import os
import pwd
import signal
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from fleetd.engines.llamacpp.command import EMBEDDED_SERVER
from tests.real.podman import IMAGE, Podman, podman, why_not
from tests.support.daemon import Fleetd, fleetd
from tests.support.ports import free_port
from tests.support.waiting import until

pytestmark = [pytest.mark.real, pytest.mark.timeout(300)]

FAKES = Path(__file__).parents[1] / "fakes"
MIB = 2**20
PROGRAM = "runtime: {docker: {program: podman, image: IMAGE, pull: never, mounts: [FAKES:/fakes:ro]}}"
NOBODY = pwd.getpwnam("nobody")


@pytest.fixture
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Podman]:
    reason = why_not()
    if reason is not None:
        pytest.skip(f"containers: {reason}")
    found = podman(tmp_path_factory.mktemp("podman"))
    yield found
    left = found.containers()
    for name in left:
        found("rm", "--force", "--time", "0", name, check=False)
    assert left == [], "a container was left behind"


def model(name: str, *flags: str, more: str = "", runtime: str = PROGRAM) -> str:
    """Return an entry of a fake model server in a container."""
    words = ", ".join(f'"{word}"' for word in ("--model", name, *flags))
    runtime = runtime.replace("IMAGE", IMAGE).replace("FAKES", str(FAKES))
    command = f'[python3, -I, /fakes/fake_model_server.py, --port, "{{port}}", --host, "{{host}}", {words}]'
    return f"{name}: {{engine: process, command: {command}, {runtime}, options: {{api: openai, health: /health}}, {more}}}\n"


def daemon_of(folder: Path, engine: Podman, entries: str, head: str = "") -> Fleetd:
    made = fleetd(folder, f"{head}models:\n" + "".join(f"  {line}\n" for line in entries.splitlines()))
    made.env = {**made.env, **engine.environment}
    return made


def test_stopped_model_leaves_no_container(tmp_path: Path, engine: Podman) -> None:
    entry = model(
        "m", "--memory", str(80 * MIB), more="user: nobody, env: {SOME_TOKEN: hush, HOME: /tmp}, memory: 200MiB"
    )
    with daemon_of(tmp_path, engine, entry).start() as daemon:
        answer = daemon.chat("m")
        assert answer.status == 200, answer.body
        (name,) = engine.containers()
        asked = "{{.Config.User}} {{.State.Pid}} {{.HostConfig.LogConfig.Type}} {{.HostConfig.NetworkMode}}"
        user, pid, log, network = engine("inspect", "--format", asked, name).split()
        assert (user, log, network) == (f"{NOBODY.pw_uid}:{NOBODY.pw_gid}", "none", "host")
        server = next(one for one in psutil.Process(int(pid)).children(recursive=True))
        assert server.uids().real == NOBODY.pw_uid
        assert server.environ()["SOME_TOKEN"] == "hush"
        assert server.environ()["HOME"] == "/tmp"
        assert "hush" not in " ".join(psutil.Process(daemon.process_row("m")["pid"]).cmdline())
        until(lambda: (daemon.process_row("m")["rss_bytes"] or 0) > 80 * MIB, "its memory is seen through the client")
        assert "listening" in daemon.log_of("m").lower() or daemon.log_of("m"), "its words are in our own log"
        assert daemon.control("POST", "/v1/models/m/unload").status < 300
        until(lambda: engine.containers() == [], "the container is removed with its model")
        assert daemon.chat("m").status == 200
        assert daemon.stop() == 0
        assert engine.containers() == []


def test_killed_client_removes_its_container(tmp_path: Path, engine: Podman) -> None:
    with daemon_of(tmp_path, engine, model("m", more="preload: true")).start() as daemon:
        first = daemon.until_state("m", "READY")
        os.kill(first["pid"], signal.SIGKILL)
        until(lambda: daemon.process_row("m")["generation"] > first["generation"], "it is started again")
        daemon.until_state("m", "READY")
        assert len(engine.containers()) == 1
        assert daemon.chat("m").status == 200


def test_container_is_adopted_after_a_killed_daemon(tmp_path: Path, engine: Podman) -> None:
    with daemon_of(tmp_path, engine, model("m", more="preload: true")).start() as daemon:
        before = daemon.until_state("m", "READY")
        identity = engine("ps", "--format", "{{.ID}}")
        daemon.signal(signal.SIGKILL)
        daemon.wait()
        assert engine("ps", "--format", "{{.ID}}") == identity
        daemon.start()
        after = daemon.until_state("m", "READY")
        assert (after["pid"], after["generation"]) == (before["pid"], before["generation"])
        assert engine("ps", "--format", "{{.ID}}") == identity
        assert daemon.chat("m").status == 200
        assert daemon.stop() == 0


def test_orphaned_container_is_removed_by_label(tmp_path: Path, engine: Podman) -> None:
    entries = model("m", more="preload: true") + model("gone", more="preload: true")
    with daemon_of(tmp_path, engine, entries).start() as daemon:
        clients = [daemon.until_state(name, "READY")["pid"] for name in ("m", "gone")]
        daemon.signal(signal.SIGKILL)
        daemon.wait()
        for pid in clients:
            os.kill(pid, signal.SIGKILL)
        assert len(engine.containers()) == 2
        daemon.write(f"models:\n  {model('m', more='preload: true')}")  # and one left the file meanwhile
        daemon.start()
        until(lambda: [name.endswith("-m") for name in engine.containers()] == [True], "both are removed, one is new")
        daemon.until_state("m", "READY")
        assert daemon.chat("m").status == 200
        assert [name.endswith("-m") for name in engine.containers()] == [True]
        assert daemon.stop() == 0


def test_container_that_ignores_stop_is_killed(tmp_path: Path, engine: Podman) -> None:
    entry = model("m", "--ignore-term", more="preload: true, stop: {timeout: 1s}")
    with daemon_of(tmp_path, engine, entry).start() as daemon:
        daemon.until_state("m", "READY")
        assert daemon.stop() == 0
        assert engine.containers() == []


def test_bridge_network_is_published_on_loopback(tmp_path: Path, engine: Podman) -> None:
    runtime = PROGRAM.replace("pull: never", "pull: never, network: bridge")
    port = free_port()
    with daemon_of(tmp_path, engine, model("m", runtime=runtime, more=f"port: {port}")).start() as daemon:
        answer = daemon.chat("m")
        if answer.status != 200 and "netavark" in daemon.log_of("m") + daemon.log():
            pytest.skip("a bridge needs iptables, which this machine has not")
        assert answer.status == 200, answer.body
        assert daemon.stop() == 0


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("IMAGE", "localhost/no-such-image:1", "runtime.docker.image: "),
        ("image: IMAGE", "image: IMAGE, args: [--no-such-flag]", "runtime.docker.args: "),
    ],
)
def test_invalid_option_reports_its_key_and_is_not_retried(
    tmp_path: Path, engine: Podman, old: str, new: str, said: str
) -> None:
    with daemon_of(tmp_path, engine, model("m", runtime=PROGRAM.replace(old, new))).start() as daemon:
        answer = daemon.chat("m")
        assert answer.status == 503, answer.body
        row = daemon.until_state("m", "FAILED")
        assert said in row["reason"], row
        assert row["restarts"] == 0


def test_program_missing_in_the_image_is_reported(tmp_path: Path, engine: Podman) -> None:
    entry = model("m").replace("[python3,", "[no-such-program,")
    with daemon_of(tmp_path, engine, entry).start() as daemon:
        assert daemon.chat("m").status == 503
        row = daemon.until_state("m", "FAILED")
        assert "command: " in row["reason"]
        assert "no-such-program" in row["reason"]


def test_llama_cpp_serves_from_a_container(tmp_path: Path, engine: Podman) -> None:
    packages = sysconfig.get_paths()["platlib"]
    if sys.version_info[:2] != (3, 11) or not (Path(packages) / "xllamacpp").is_dir():
        pytest.skip("the image's Python 3.11 cannot load this machine's llama.cpp wheel")
    from bench import tiny_gguf

    file = tmp_path / "tiny.gguf"
    tiny_gguf.write(file)
    openmp = Path("/usr/lib/x86_64-linux-gnu/libgomp.so.1")
    mounts = [
        f"{EMBEDDED_SERVER.parent}:/engine:ro",
        f"{packages}:/packages:ro",
        *([f"{openmp}:{openmp}:ro"] if openmp.exists() else []),
    ]
    entry = f"""\
tiny:
  engine: llamacpp
  command: [python3, /engine/{EMBEDDED_SERVER.name}]
  env: {{PYTHONPATH: /packages}}
  options: {{model: {file}, context_length: 512}}
  runtime:
    docker: {{program: podman, image: {IMAGE}, pull: never, mounts: {json.dumps(mounts)}}}
"""
    with daemon_of(tmp_path, engine, entry).start() as daemon:
        answer = daemon.chat("tiny")
        assert answer.status == 200, (answer.body, daemon.log_of("tiny"))
        assert answer.json["usage"]["completion_tokens"] >= 1
        assert daemon.stop() == 0
