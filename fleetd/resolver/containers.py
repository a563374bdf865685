"""Container recipes: how the program of an entry runs in docker or podman.

Invariants:
- A recipe turns the engine's own command line into the client's, when the fleet is resolved and again at a start whose program
  was missing before.
"""

from __future__ import annotations

import pwd
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from fleetd.engines.base import Engine, Launch, LaunchContext
from fleetd.engines.container import Contained, DockerRuntime, contain, is_volume
from fleetd.errors import EngineError
from fleetd.units import expand_home

if TYPE_CHECKING:
    from fleetd.config.schema.process import DockerKeys, EngineKeys, Service

PROGRAMS = ("docker", "podman")
IN_IMAGE = {"vllm": ("vllm", "serve"), "ollama": ("ollama", "serve"), "llamacpp": ("llama-server",)}
_EVERYWHERE = "0.0.0.0"


@dataclass(frozen=True, slots=True)
class ContainerRecipe:
    """The recipe of one entry's container; `fleet` is its label on the machine."""

    runtime: DockerRuntime
    fleet: str
    instance: str
    stop_timeout_s: float
    own_env: Mapping[str, str]

    def contain(self, engine: Engine, context: LaunchContext) -> Contained:
        """Return the client's command line. Raises EngineError if it cannot run."""
        inside = context
        if self.runtime.network != "host":
            inside = replace(context, host=_EVERYWHERE, port=self.runtime.container_port or context.port)
        own_program = runs_image_program(engine.name, context.command)
        return contain(
            Launch(argv=inside.args) if own_program else engine.launch(inside),
            replace(self.runtime, program=client_path(self.instance, self.runtime.program)),
            instance=self.instance,
            fleet=self.fleet,
            port=context.port,
            host=context.host,
            own_env=self.own_env,
            stop_timeout_s=self.stop_timeout_s,
            own_program=own_program,
        )


def runs_image_program(engine: str, command: Sequence[str]) -> bool:
    """Return whether the image's own entry point runs, with `args` as its arguments."""
    return engine == "process" and not command


def runtime_of(
    keys: DockerKeys,
    device: str,
    uuid: str | None,
    limits: tuple[Sequence[int], int | None],
    resolve: Callable[[str], object],
) -> DockerRuntime:
    """Return the runtime of fleet.yaml; `gpus` defaults to the GPU of the entry.

    `limits` are the cores and the number of open files; `resolve` makes the source of a mount absolute.
    """
    cpus, nofile = limits
    gpus = keys.gpus
    if not gpus and device.startswith("gpu"):
        gpus = (uuid,) if uuid else ("all",)
    program = keys.program if "program" in keys.model_fields_set else ""
    return DockerRuntime(
        image=keys.image,
        gpus=gpus,
        mounts=tuple(_resolved_mount(text, resolve) for text in keys.mounts),
        pull=keys.pull,
        args=keys.args,
        network=keys.network,
        container_port=keys.container_port,
        program=program,
        cpus=tuple(cpus),
        nofile=nofile,
    )


def _resolved_mount(text: str, resolve: Callable[[str], object]) -> str:
    """Return a mount with an absolute source; the name of a volume stays."""
    source, _, rest = text.partition(":")
    return text if is_volume(source) else f"{resolve(source)}:{rest}"


def inner_address(keys: Service | EngineKeys, port: int | None) -> tuple[str, int | None]:
    """Return where the program listens: on all addresses in a bridged network."""
    if keys.runtime is None or keys.runtime.docker.network == "host":
        return "127.0.0.1", port
    return _EVERYWHERE, keys.runtime.docker.container_port or port


def client_path(instance: str, program: str) -> str:
    """Return the client's path: the named one, docker, or podman. Raises EngineError."""
    for name in (program,) if program else PROGRAMS:
        path = shutil.which(expand_home(name))
        if path is not None:
            return path
    named = f"no program {program}" if program else "neither docker nor podman on PATH"
    raise EngineError(
        f"{instance}: runtime.docker: there is {named}",
        hint="install docker or podman, or name the program: runtime: {docker: {program: /path/to/podman}}",
        recoverable=False,
    )


def user_ids(name: str) -> str:
    """Return UID:GID of a user name or number. Raises KeyError for an unknown name."""
    if name.replace(":", "", 1).isdigit():
        return name
    entry = pwd.getpwnam(name)
    return f"{entry.pw_uid}:{entry.pw_gid}"
