"""Run an engine in a container: from its own command line to that of docker or podman. Not an engine; pure functions.

The rules of this file
- The client stays in the foreground and is our child: its life is the container's, a signal to it reaches the server.
- Values never stand on the command line: `--env NAME` takes them from the client's own environment.
- What the command line names must be there inside as well: a required path that no mount covers is mounted at its own place.
- A kill of the client leaves the container running; `find` and `remove` are for that. The label says whose it is.
- Ports are bound on loopback only: by the host's network, or published there.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import PurePosixPath

from fleetd.engines.base import Launch
from fleetd.errors import EngineError

LABEL = "fleetd.instance"
FLEET_LABEL = "fleetd.fleet"
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

    @property
    def is_podman(self) -> bool:
        return "podman" in PurePosixPath(self.program).name


@dataclass(frozen=True, slots=True)
class Contained:
    """A launch through a container, and the commands that go with it. `stop` and `remove` act on the container itself."""

    launch: Launch
    name: str
    stop: tuple[str, ...]
    remove: tuple[str, ...]
    find: tuple[str, ...]


def contain(
    launch: Launch,
    runtime: DockerRuntime,
    *,
    instance: str,
    fleet: str,
    port: int | None,
    host: str = "127.0.0.1",
    env_names: Collection[str] = (),
    stop_timeout_s: float = 10.0,
) -> Contained:
    """Return the container's command line for an engine's own; `env_names` are the entry's own variables.

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
    argv += ["--pull", runtime.pull, "--stop-timeout", str(stop_s)]
    argv += _network(runtime, host, port)
    argv += _gpus(runtime)
    for mount in (*(_stated(instance, text) for text in runtime.mounts), *_required(launch, runtime)):
        argv += ["--mount", mount]
    for key in sorted({*launch.env, *env_names}):
        argv += ["--env", key]
    argv += [*runtime.args, "--entrypoint", launch.argv[0], runtime.image, *launch.argv[1:]]
    return Contained(
        launch=Launch(tuple(argv), launch.env, launch.unset_env, _outside(launch, runtime), launch.secret_env),
        name=name,
        stop=(runtime.program, "stop", "-t", str(stop_s), name),
        remove=(runtime.program, "rm", "--force", name),
        find=find_command(fleet, runtime.program),
    )


def container_name(fleet: str, instance: str) -> str:
    """Return the container's name: the same for the same instance, and one that docker accepts."""
    return "fleetd-" + _NAME.sub("-", f"{fleet}-{instance}")


def find_command(fleet: str, program: str = "docker") -> tuple[str, ...]:
    """Return the command that lists a fleet's containers, one `ID<tab>INSTANCE` per line."""
    template = (
        '{{.ID}}\t{{index .Labels "fleetd.instance"}}'
        if "podman" in program
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
    """Return the required paths of this machine: one that a mount covers is looked for where the mount takes it from."""
    mounts = [text.split(":")[:2] for text in runtime.mounts]
    found = []
    for path in launch.requires:
        inside = PurePosixPath(path)
        for source, target in mounts:
            if inside.is_relative_to(target):
                path = str(PurePosixPath(source) / inside.relative_to(target))
                break
        found.append(path)
    return tuple(found)


def _bind(source: str, target: str, *, readonly: bool) -> str:
    return f"type=bind,source={source},target={target}" + (",readonly" if readonly else "")
