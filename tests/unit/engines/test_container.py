"""An engine's command line in a container, as a table."""

from __future__ import annotations

from typing import Any

import pytest

from fleetd.core.data.specs import ExitKind
from fleetd.engines.base import Launch
from fleetd.engines.container import (
    DockerRuntime,
    client_verdict,
    contain,
    container_name,
    inner_signal,
    list_command,
    no_such_container,
    unknown_containers,
)
from fleetd.errors import EngineError

IMAGE = "vllm/vllm-openai:v0.33.0"
LAUNCH = Launch(
    argv=("vllm", "serve", "/models/qwen", "--port", "8001"),
    env={"VLLM_API_KEY": "s3cret", "CUDA_VISIBLE_DEVICES": "GPU-1"},
    unset_env=("VLLM_PORT",),
    requires=("/models/qwen",),
    secret_env=frozenset({"VLLM_API_KEY"}),
)


def plan(launch: Launch = LAUNCH, **changes: Any) -> Any:
    arguments = {"instance": "coder", "fleet": "box", "port": 8001, **changes.pop("arguments", {})}
    return contain(launch, DockerRuntime(IMAGE, **changes), **arguments)


def test_contain_writes_the_whole_command_line() -> None:
    made = plan(
        gpus=("all",),
        mounts=("/srv/models:/models:ro",),
        args=("--ipc", "host"),
        arguments={"own_env": {"HF_HOME": "/hf", "HOME": "/root"}},
    )
    assert list(made.launch.argv) == [
        "docker", "run", "--rm", "--init", "--name", "fleetd-box-coder",
        "--label", "fleetd.instance=coder", "--label", "fleetd.fleet=box",
        "--pull", "missing", "--log-driver", "none", "--network", "host", "--gpus", "all",
        "--mount", "type=bind,source=/srv/models,target=/models,readonly",
        "--env", "CUDA_VISIBLE_DEVICES", "--env", "HF_HOME", "--env", "HOME=/root", "--env", "VLLM_API_KEY",
        "--ipc", "host", "--entrypoint", "vllm", IMAGE, "serve", "/models/qwen", "--port", "8001",
    ]  # fmt: skip
    assert made.stop == ("docker", "stop", "-t", "10", "fleetd-box-coder")
    assert made.remove == ("docker", "rm", "--force", "fleetd-box-coder")
    assert made.inspect == ("docker", "inspect", "--format", "{{.State.Pid}} {{.Id}}", "fleetd-box-coder")
    assert made.on_command_line == {"HOME"}  # for the program inside, not for docker


def test_contain_stop_timeout_is_that_of_the_entry() -> None:
    assert plan(arguments={"stop_timeout_s": 29.2}).stop == ("docker", "stop", "-t", "30", "fleetd-box-coder")


def test_contain_keeps_values_off_the_command_line() -> None:
    made = plan()
    assert not any("s3cret" in word for word in made.launch.argv)
    assert made.launch.env["VLLM_API_KEY"] == "s3cret"
    assert made.launch.secret_env == {"VLLM_API_KEY"}
    assert made.launch.unset_env == ("VLLM_PORT",)
    assert made.launch.requires == ("/models/qwen",)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"gpus": ("0", "1")}, ("--gpus", '"device=0,1"')),
        ({"gpus": ("GPU-1",)}, ("--gpus", "device=GPU-1")),
        (
            {"gpus": ("0", "1"), "program": "/usr/bin/podman"},
            ("--device", "nvidia.com/gpu=0", "--device", "nvidia.com/gpu=1"),
        ),
        ({"network": "bridge"}, ("--network", "bridge", "--publish", "127.0.0.1:8001:8001")),
        ({"network": "bridge", "arguments": {"host": "::1"}}, ("--publish", "[::1]:8001:8001")),
        ({"pull": "never"}, ("--pull", "never")),
        ({"user": "1000:100"}, ("--user", "1000:100")),
        ({"cpus": (0, 3), "nofile": 4096}, ("--cpuset-cpus", "0,3", "--ulimit", "nofile=4096:4096")),
        ({"mounts": ("/a b:/b",)}, ("--mount", "type=bind,source=/a b,target=/b")),
        ({}, ("--mount", "type=bind,source=/models/qwen,target=/models/qwen,readonly")),
    ],
)
def test_contain_setting_becomes_flags(changes: dict[str, Any], words: tuple[str, ...]) -> None:
    argv = plan(**changes).launch.argv
    assert any(argv[start : start + len(words)] == words for start in range(len(argv))), argv


def test_contain_mounts_a_store_writable() -> None:
    launch = Launch(("ollama", "serve"), {"OLLAMA_MODELS": "/store"}, requires=("/store",))
    assert "type=bind,source=/store,target=/store" in plan(launch).launch.argv


@pytest.mark.parametrize("mounts", [("/models:/models:ro",), ("/a:/b", "/:/models/qwen")])
def test_contain_does_not_mount_a_covered_path(mounts: tuple[str, ...]) -> None:
    assert sum(word == "--mount" for word in plan(mounts=mounts).launch.argv) == len(mounts)


@pytest.mark.parametrize(
    ("mounts", "requires"),
    [
        ((), ("/models/qwen",)),
        (("/srv:/models:ro",), ("/srv", "/srv/qwen")),
        (("/srv/q:/models/qwen",), ("/srv/q",)),
        (("/a:/mod",), ("/a", "/models/qwen")),
    ],
)
def test_contain_requires_paths_of_this_machine(mounts: tuple[str, ...], requires: tuple[str, ...]) -> None:
    assert plan(mounts=mounts).launch.requires == requires


@pytest.mark.parametrize(
    "changes",
    [
        {"mounts": ("/a",)},
        {"mounts": ("/a:/b:rx",)},
        {"mounts": (":/b",)},
        {"mounts": ("/a,b:/c",)},
        {"args": ("--name", "mine")},
        {"args": ("--network=host",)},
        {"launch": Launch(())},
    ],
)
def test_contain_invalid_setting_is_an_error(changes: dict[str, Any]) -> None:
    with pytest.raises(EngineError, match="coder") as caught:
        plan(**changes)
    assert not caught.value.recoverable


@pytest.mark.parametrize(
    ("fleet", "instance", "name"),
    [("mac studio", "a/b:c", "fleetd-mac-studio-a-b-c"), ("box", "coder", "fleetd-box-coder")],
)
def test_container_name_is_valid_for_docker(fleet: str, instance: str, name: str) -> None:
    assert container_name(fleet, instance) == name


def test_unknown_containers_are_found_by_label() -> None:
    command = list_command("box")
    assert command[:5] == ("docker", "ps", "--all", "--filter", "label=fleetd.fleet=box")
    output = "abc\tcoder\ndef\tgone\n\nbroken line\n"
    assert unknown_containers(output, {"coder"}) == [("def", "gone")]
    assert unknown_containers("", ()) == []


@pytest.mark.parametrize(
    ("code", "line", "kind", "text"),
    [
        (125, "docker: Error response from daemon: pull access denied for nosuch, repository does", "BAD_CONFIG", "runtime.docker.image: "),
        (125, "Error: initializing source docker://nosuch:latest: reading manifest latest", "BAD_CONFIG", "runtime.docker.image: "),
        (125, "docker: Error response from daemon: No such image: nosuch:latest", "BAD_CONFIG", "runtime.docker.image: "),
        (125, 'Error: nosuch: image not known', "BAD_CONFIG", "runtime.docker.image: "),
        (125, 'docker: Error response from daemon: could not select device driver', "BAD_CONFIG", "runtime.docker.gpus: "),
        (125, "invalid mount config for type bind: bind source path does not exist: /x", "BAD_CONFIG", "runtime.docker.mounts: "),
        (125, "Error: statfs /x: no such file or directory", "BAD_CONFIG", "runtime.docker.mounts: "),
        (125, "Bind for 127.0.0.1:80 failed: port is already allocated", "PORT_IN_USE", "port: "),
        (125, "Cannot connect to the Docker daemon.", "CRASH", "the container could not be started: Cannot"),
        (125, 'Error: creating container storage: the container name "f" is already in use', "CRASH", "Error: creating"),
        (125, "unknown flag: --nosuch", "BAD_CONFIG", "runtime.docker.args: "),
        (127, 'exec: "nosuch": executable file not found in $PATH: unknown.', "BAD_CONFIG", "command: "),
        (126, "something else", "BAD_CONFIG", "command: the image has no such program"),
        (1, "ERROR (catatonit:7): failed to exec pid1: No such file or directory", "BAD_CONFIG", "command: the image has no program p,"),
        (127, "[FATAL tini (7)] exec nosuch failed: No such file or directory", "BAD_CONFIG", "command: the image has no program p,"),
        (125, "", "CRASH", "the container could not be started"),
    ],
)  # fmt: skip
def test_client_verdict_explains_a_failed_client(code: int, line: str, kind: str, text: str) -> None:
    verdict = client_verdict(code, ["pulling", line] if line else [], "p")
    assert verdict is not None
    assert verdict.kind is ExitKind[kind]
    assert verdict.reason.startswith(text)


def test_client_verdict_exit_of_inner_program_is_none() -> None:
    assert client_verdict(1, ["port is already allocated"]) is None
    assert client_verdict(None, []) is None
    assert [inner_signal(code) for code in (137, 139, 1, 0, None)] == ["SIGKILL", "SIGSEGV", None, None, None]


def test_no_such_container_reads_the_clients_message() -> None:
    assert no_such_container("Error: No such container: fleetd-a")
    assert not no_such_container("Cannot connect to the Docker daemon")
