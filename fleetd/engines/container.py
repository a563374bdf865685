"""Run an engine in a container: turn its command line into that of docker or podman.

Invariants:
- The client stays in the foreground as a child of fleetd: it lives as long as the container, and forwards signals.
- Values are not on the command line: `--env NAME` takes them from the client's environment.
- A required path that no mount covers is mounted at the same path, so that the command line is valid inside.
- A kill of the client leaves the container running, to be found by its label and removed by `remove`.
- Ports are bound on loopback only, by the host's network or published there.
- Output reaches fleetd's log through the client; the container engine keeps no second copy, which would grow without limit.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

from fleetd.core.data.specs import ExitKind
from fleetd.engines.base import ExitVerdict, Launch
from fleetd.engines.exit_text import LONGEST, last_line
from fleetd.errors import EngineError

LABEL = "fleetd.instance"
FLEET_LABEL = "fleetd.fleet"
CANNOT_START = 125  # the client's exit code when it could not start the container, which may exist nevertheless
_NAME = re.compile(r"[^A-Za-z0-9_.-]")
# flags that `runtime.docker.args` must not contain, since they would break the invariants
_OWNED = (
    "--name",
    "--label",
    "--rm",
    "--detach",
    "-d",
    "--network",
    "--net",
    "--publish",
    "-p",
    "--env-file",
    "--restart",
    "--entrypoint",
    "--log-driver",
)
# variables that docker and podman read themselves: set inside the container, not for the client
CLIENT_VARIABLES = frozenset(
    {
        "HOME",
        "PATH",
        "USER",
        "TMPDIR",
        "LD_LIBRARY_PATH",
        "LD_PRELOAD",
        "XDG_RUNTIME_DIR",
        "XDG_CONFIG_HOME",
        "XDG_DATA_HOME",
    }
)


@dataclass(frozen=True, slots=True)
class DockerRuntime:
    """The settings of `runtime: {docker: …}`.

    `gpus` is ("all",), or numbers or UUIDs; `network` is host or bridge.
    """

    image: str
    gpus: tuple[str, ...] = ()
    mounts: tuple[str, ...] = ()
    pull: str = "missing"
    args: tuple[str, ...] = ()
    network: str = "host"
    program: str = "docker"  # or podman, or a path to one of them
    user: str | None = None  # UID:GID inside
    cpus: tuple[int, ...] = ()
    nofile: int | None = None

    @property
    def is_podman(self) -> bool:
        return "podman" in PurePosixPath(self.program).name


@dataclass(frozen=True, slots=True)
class Contained:
    """A launch in a container, and the client's commands for that container.

    `inspect` prints `PID ID`, the first process of the container on this machine. `on_command_line` are the variables whose
    values are on the command line, since the client would read them from its environment.
    """

    launch: Launch
    name: str
    stop: tuple[str, ...]
    remove: tuple[str, ...]
    list_all: tuple[str, ...]
    inspect: tuple[str, ...]
    on_command_line: frozenset[str] = frozenset()


def contain(
    launch: Launch,
    runtime: DockerRuntime,
    *,
    instance: str,
    fleet: str,
    port: int | None,
    host: str = "127.0.0.1",
    own_env: Mapping[str, str] | None = None,
    stop_timeout_s: float = 10.0,
) -> Contained:
    """Return the container's launch; `own_env` are the variables of the entry.

    The first word of the engine's command line becomes the entry point: a program of the image. Raises EngineError for an
    invalid mount and for an argument that fleetd sets.
    """
    if not launch.argv:
        raise EngineError(f"{instance}: no command to run in the container", recoverable=False)
    refused = next((word for word in runtime.args if word.split("=")[0] in _OWNED), None)
    if refused is not None:
        raise EngineError(f"{instance}: runtime.docker.args: fleetd sets {refused} itself", recoverable=False)
    name = container_name(fleet, instance)
    stop_s = max(1, math.ceil(stop_timeout_s))
    argv = [runtime.program, "run", "--rm", "--init", "--name", name]
    argv += ["--label", f"{LABEL}={instance}", "--label", f"{FLEET_LABEL}={fleet}"]
    argv += ["--pull", runtime.pull, "--log-driver", "none"]
    argv += _network(runtime, host, port)
    argv += _gpus(runtime)
    argv += ["--user", runtime.user] if runtime.user else []
    argv += ["--cpuset-cpus", ",".join(map(str, runtime.cpus))] if runtime.cpus else []
    argv += ["--ulimit", f"nofile={runtime.nofile}:{runtime.nofile}"] if runtime.nofile else []
    for mount in (*(_mount(instance, text) for text in runtime.mounts), *_required_mounts(launch, runtime)):
        argv += ["--mount", mount]
    env = {**launch.env, **(own_env or {})}
    for key, value in sorted(env.items()):
        argv += ["--env", f"{key}={value}" if key in CLIENT_VARIABLES else key]
    argv += [*runtime.args, "--entrypoint", launch.argv[0], runtime.image, *launch.argv[1:]]
    return Contained(
        launch=Launch(
            tuple(argv),
            {key: value for key, value in launch.env.items() if key not in CLIENT_VARIABLES},
            launch.unset_env,
            _required_sources(launch, runtime),
            launch.secret_env,
            launch.named,
        ),
        name=name,
        stop=(runtime.program, "stop", "-t", str(stop_s), name),
        remove=(runtime.program, "rm", "--force", name),
        list_all=list_command(fleet, runtime.program),
        inspect=(runtime.program, "inspect", "--format", "{{.State.Pid}} {{.Id}}", name),
        on_command_line=CLIENT_VARIABLES.intersection(env),
    )


def container_name(fleet: str, instance: str) -> str:
    """Return a valid name for the container, the same for each start of the instance."""
    return "fleetd-" + _NAME.sub("-", f"{fleet}-{instance}")


def list_command(fleet: str, program: str = "docker") -> tuple[str, ...]:
    """Return the command that lists the containers, `ID<tab>INSTANCE` per line."""
    template = (
        '{{.ID}}\t{{index .Labels "fleetd.instance"}}'
        if "podman" in PurePosixPath(program).name
        else '{{.ID}}\t{{.Label "fleetd.instance"}}'
    )
    return (program, "ps", "--all", "--filter", f"label={FLEET_LABEL}={fleet}", "--format", template)


def unknown_containers(output: str, known: Collection[str]) -> list[tuple[str, str]]:
    """Return (id, instance) of listed containers whose instance is not in `known`."""
    rows = (line.split("\t") for line in output.splitlines())
    return [
        (row[0].strip(), row[1].strip())
        for row in rows
        if len(row) == 2 and row[0].strip() and row[1].strip() not in known
    ]


def pull_phase(line: str) -> str | None:
    """Return the phase if the line is the client's report of a pull, else None."""
    return "pulling the image" if _PULLING.search(line) else None


def no_such_container(output: str) -> bool:
    """Return whether a removal failed because the container does not exist."""
    return "no such container" in output.lower()


_CAUSES: tuple[tuple[re.Pattern[str], ExitKind, str], ...] = tuple(
    (re.compile(pattern, re.IGNORECASE), kind, key)
    for pattern, kind, key in (
        (r"port is already allocated|address already in use", ExitKind.PORT_IN_USE, "port"),
        (r"name .*is already in use", ExitKind.CRASH, ""),
        (
            r"could not select device driver|unresolvable CDI|nvidia-container-cli",
            ExitKind.BAD_CONFIG,
            "runtime.docker.gpus",
        ),
        (
            r"(bind|mount) source path does not exist|statfs .*no such file",
            ExitKind.BAD_CONFIG,
            "runtime.docker.mounts",
        ),
        (
            (
                r"pull access denied|manifest (for .* )?(unknown|not found)|invalid reference|repository name|name unknown|"
                r"no such image|image not known|short-name|access to the resource is denied|unauthorized:|initializing source"
            ),
            ExitKind.BAD_CONFIG,
            "runtime.docker.image",
        ),
        (r"unknown (shorthand )?flag|invalid argument|unable to find user", ExitKind.BAD_CONFIG, "runtime.docker.args"),
        (r"executable file .*not found|no such file or directory|permission denied", ExitKind.BAD_CONFIG, "command"),
    )
)
_PULLING = re.compile(
    r"^(Unable to find image .* locally|[\w./-]+: Pulling from |Trying to pull |Copying blob |[0-9a-f]{12}: )"
)
_NO_PROGRAM = re.compile(r"catatonit.*failed to exec|tini.*\bexec .*failed")
_SIGNALS = {129: "SIGHUP", 130: "SIGINT", 134: "SIGABRT", 135: "SIGBUS", 137: "SIGKILL", 139: "SIGSEGV", 143: "SIGTERM"}


def client_verdict(code: int | None, log_tail: Sequence[str], program: str = "") -> ExitVerdict | None:
    """Return why docker or podman itself exited; None: the program inside exited.

    They exit with 125 when they cannot start a container, and with 126 or 127 when they cannot start its program; the init
    process inside, which starts the program, reports failures in its own words.
    """
    if code and any(_NO_PROGRAM.search(line) for line in log_tail[-3:]):
        return ExitVerdict(ExitKind.BAD_CONFIG, f"command: the image has no program {program}, or cannot run it")
    if code not in (CANNOT_START, 126, 127):
        return None
    for pattern, kind, key in _CAUSES:
        line = next((line for line in reversed(log_tail) if pattern.search(line)), None)
        if line is not None:
            return ExitVerdict(kind, f"{key}: {line.strip()[:LONGEST]}" if key else line.strip()[:LONGEST])
    last = last_line(log_tail)
    if code == CANNOT_START:
        return ExitVerdict(ExitKind.CRASH, _with_line("the container could not be started", last))
    return ExitVerdict(
        ExitKind.BAD_CONFIG, _with_line("command: the image has no such program, or cannot run it", last)
    )


def _with_line(sentence: str, line: str) -> str:
    return f"{sentence}: {line}" if line else sentence


def inner_signal(code: int | None) -> str | None:
    """Return the signal behind the client's exit code; None: no signal."""
    return _SIGNALS.get(code) if code is not None else None


def _network(runtime: DockerRuntime, host: str, port: int | None) -> list[str]:
    if runtime.network == "host":
        return ["--network", "host"]
    words = ["--network", runtime.network]
    if port is not None:
        address = f"[{host}]" if ":" in host else host
        words += ["--publish", f"{address}:{port}:{port}"]
    return words


def _gpus(runtime: DockerRuntime) -> list[str]:
    if not runtime.gpus:
        return []
    if runtime.is_podman:  # podman addresses GPUs by the Container Device Interface
        return [word for gpu in runtime.gpus for word in ("--device", f"nvidia.com/gpu={gpu}")]
    if "all" in runtime.gpus:
        return ["--gpus", "all"]
    listed = ",".join(runtime.gpus)
    return ["--gpus", f'"device={listed}"' if "," in listed else f"device={listed}"]


def _mount(instance: str, text: str) -> str:
    """Return the bind mount for `/a:/b:ro`, which never creates a missing path."""
    parts = text.split(":")
    if len(parts) not in (2, 3) or not all(parts) or (len(parts) == 3 and parts[2] not in ("ro", "rw")):
        raise EngineError(
            f"{instance}: {text!r} is not a mount (use /here:/inside or /here:/inside:ro)", recoverable=False
        )
    if "," in text:
        raise EngineError(f"{instance}: {text!r}: a path in a mount must not contain a comma", recoverable=False)
    return _bind(parts[0], parts[1], readonly=parts[2:] == ["ro"])


def _required_mounts(launch: Launch, runtime: DockerRuntime) -> list[str]:
    """Return mounts for uncovered required paths; writable if a variable names them."""
    inside = [PurePosixPath(text.split(":")[1]) for text in runtime.mounts if text.count(":") >= 1]
    written = set(launch.env.values())
    mounts = []
    for path in launch.requires:
        covered = any(PurePosixPath(path) == target or target in PurePosixPath(path).parents for target in inside)
        if not covered and "," not in path:
            mounts.append(_bind(path, path, readonly=path not in written))
    return mounts


def _required_sources(launch: Launch, runtime: DockerRuntime) -> tuple[str, ...]:
    """Return the required paths on this machine: the source of a mounted path."""
    mounts = [text.split(":")[:2] for text in runtime.mounts]
    found = [source for source, _ in mounts]
    for path in launch.requires:
        inside = PurePosixPath(path)
        for source, target in mounts:
            if inside.is_relative_to(target):
                path = str(PurePosixPath(source) / inside.relative_to(target))
                break
        found.append(path)
    return tuple(dict.fromkeys(found))


def _bind(source: str, target: str, *, readonly: bool) -> str:
    return f"type=bind,source={source},target={target}" + (",readonly" if readonly else "")
