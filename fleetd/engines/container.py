"""Run an engine in a container: from its own command line to that of docker or podman. Not an engine; pure functions.

The rules of this file
- The client stays in the foreground and is our child: its life is the container's, a signal to it reaches the server.
- Values never stand on the command line: `--env NAME` takes them from the client's own environment.
- What the command line names must be there inside as well: a required path that no mount covers is mounted at its own place.
- A kill of the client leaves the container running; `find` and `remove` are for that. The label says whose it is.
- Ports are bound on loopback only: by the host's network, or published there.
- What it says comes through the client into our own log; the container engine keeps no second copy, which nobody would rotate.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

from fleetd.core.data.specs import ExitKind
from fleetd.engines.base import ExitVerdict, Launch
from fleetd.errors import EngineError

LABEL = "fleetd.instance"
FLEET_LABEL = "fleetd.fleet"
CANNOT_START = 125  # the client's exit code when it could not start the container: that may exist all the same
_NAME = re.compile(r"[^A-Za-z0-9_.-]")
# an engine may leave these to `extra_args`; from a container's own words they would break what is promised above
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
# what docker and podman read themselves: inside it may be said, but it must not change how the client works
CLIENTS_OWN = frozenset(
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
    """What `runtime: {docker: …}` says. `gpus` is ("all",) or numbers or UUIDs; `network` is host or bridge."""

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
    """A launch through a container, and the commands that go with it. `stop` and `remove` act on the container itself.

    `where` prints `PID ID`: the first process of the container as this machine sees it. `taken` names the variables that stand
    on the command line, since the client would read them itself.
    """

    launch: Launch
    name: str
    stop: tuple[str, ...]
    remove: tuple[str, ...]
    find: tuple[str, ...]
    where: tuple[str, ...]
    taken: frozenset[str] = frozenset()


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
    """Return the container's command line for an engine's own; `own_env` are the entry's own variables.

    The first word of the engine's command line becomes the entry point, so it is a program of the image, not of this machine.
    Raises EngineError for a mount or an argument that cannot be.
    """
    if not launch.argv:
        raise EngineError(f"{instance}: there is no command to run in the container", recoverable=False)
    refused = next((word for word in runtime.args if word.split("=")[0] in _OWNED), None)
    if refused is not None:
        raise EngineError(f"{instance}: runtime.docker.args: fleetd says {refused} itself", recoverable=False)
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
    for mount in (*(_stated(instance, text) for text in runtime.mounts), *_required(launch, runtime)):
        argv += ["--mount", mount]
    stated = {**launch.env, **(own_env or {})}
    for key, value in sorted(stated.items()):
        argv += ["--env", f"{key}={value}" if key in CLIENTS_OWN else key]
    argv += [*runtime.args, "--entrypoint", launch.argv[0], runtime.image, *launch.argv[1:]]
    return Contained(
        launch=Launch(
            tuple(argv),
            {key: value for key, value in launch.env.items() if key not in CLIENTS_OWN},
            launch.unset_env,
            _outside(launch, runtime),
            launch.secret_env,
            launch.named,
        ),
        name=name,
        stop=(runtime.program, "stop", "-t", str(stop_s), name),
        remove=(runtime.program, "rm", "--force", name),
        find=find_command(fleet, runtime.program),
        where=(runtime.program, "inspect", "--format", "{{.State.Pid}} {{.Id}}", name),
        taken=CLIENTS_OWN.intersection(stated),
    )


def container_name(fleet: str, instance: str) -> str:
    """Return the container's name: the same for the same instance, and one that docker accepts."""
    return "fleetd-" + _NAME.sub("-", f"{fleet}-{instance}")


def find_command(fleet: str, program: str = "docker") -> tuple[str, ...]:
    """Return the command that lists a fleet's containers, one `ID<tab>INSTANCE` per line."""
    template = (
        '{{.ID}}\t{{index .Labels "fleetd.instance"}}'
        if "podman" in PurePosixPath(program).name
        else '{{.ID}}\t{{.Label "fleetd.instance"}}'
    )
    return (program, "ps", "--all", "--filter", f"label={FLEET_LABEL}={fleet}", "--format", template)


def found(output: str, known: Collection[str]) -> list[tuple[str, str]]:
    """Read what `find` printed: (id, instance) of the containers whose instance is not among `known`."""
    rows = (line.split("\t") for line in output.splitlines())
    return [
        (row[0].strip(), row[1].strip())
        for row in rows
        if len(row) == 2 and row[0].strip() and row[1].strip() not in known
    ]


def pulling(line: str) -> str | None:
    """Return how far a start has come when the line is the client's own, which fetches the image first."""
    return "pulling the image" if _PULLING.search(line) else None


def absent(output: str) -> bool:
    """Say whether a failed removal means that there is no such container: nothing is left to be removed."""
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
    """Say why docker or podman itself ended; None: it is the program inside that did.

    They end with 125 when they cannot start a container, with 126 and 127 when they cannot start its program; the small init
    inside, which starts it for them, has words of its own.
    """
    if code and any(_NO_PROGRAM.search(line) for line in log_tail[-3:]):
        return ExitVerdict(ExitKind.BAD_CONFIG, f"command: the image has no program {program}, or cannot run it")
    if code not in (CANNOT_START, 126, 127):
        return None
    for pattern, kind, key in _CAUSES:
        line = next((line for line in reversed(log_tail) if pattern.search(line)), None)
        if line is not None:
            return ExitVerdict(kind, f"{key}: {line.strip()[:300]}" if key else line.strip()[:300])
    last = next((line.strip()[:300] for line in reversed(log_tail) if line.strip()), "")
    if code == CANNOT_START:
        return ExitVerdict(ExitKind.CRASH, _with_line("the container could not be started", last))
    return ExitVerdict(
        ExitKind.BAD_CONFIG, _with_line("command: the image has no such program, or cannot run it", last)
    )


def _with_line(sentence: str, line: str) -> str:
    return f"{sentence}: {line}" if line else sentence


def inner_signal(code: int | None) -> str | None:
    """Return the signal that ended the program inside: the client tells it as an exit code."""
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
    if runtime.is_podman:  # podman knows GPUs by the Container Device Interface
        return [word for gpu in runtime.gpus for word in ("--device", f"nvidia.com/gpu={gpu}")]
    if "all" in runtime.gpus:
        return ["--gpus", "all"]
    listed = ",".join(runtime.gpus)
    return ["--gpus", f'"device={listed}"' if "," in listed else f"device={listed}"]


def _stated(instance: str, text: str) -> str:
    """`/a:/b:ro` → a bind mount. Unlike --volume it does not create what is absent, as an unplugged drive would be."""
    parts = text.split(":")
    if len(parts) not in (2, 3) or not all(parts) or (len(parts) == 3 and parts[2] not in ("ro", "rw")):
        raise EngineError(
            f"{instance}: {text!r} is no mount; write /here:/inside or /here:/inside:ro", recoverable=False
        )
    if "," in text:
        raise EngineError(
            f"{instance}: {text!r}: a mount with a comma in its path cannot be written", recoverable=False
        )
    return _bind(parts[0], parts[1], readonly=parts[2:] == ["ro"])


def _required(launch: Launch, runtime: DockerRuntime) -> list[str]:
    """Mount what the engine requires and no stated mount covers; a folder that a variable names is written to."""
    inside = [PurePosixPath(text.split(":")[1]) for text in runtime.mounts if text.count(":") >= 1]
    written = set(launch.env.values())
    mounts = []
    for path in launch.requires:
        covered = any(PurePosixPath(path) == target or target in PurePosixPath(path).parents for target in inside)
        if not covered and "," not in path:
            mounts.append(_bind(path, path, readonly=path not in written))
    return mounts


def _outside(launch: Launch, runtime: DockerRuntime) -> tuple[str, ...]:
    """Return the required paths of this machine, mounted ones among them: what a mount covers is looked for where it comes from."""
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
