"""Container recipes: how an entry's engine runs in docker or podman.

Invariants:
- A recipe turns the engine's own command line into the client's, when the fleet is resolved and again at a start whose program
  was missing before.
"""

from __future__ import annotations

import pwd
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from fleetd.engines.base import Engine, LaunchContext
from fleetd.engines.container import Contained, DockerRuntime, contain
from fleetd.errors import EngineError
from fleetd.units import expand_home

if TYPE_CHECKING:
    from fleetd.config.schema.process import DockerKeys, EngineKeys

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
        inside = replace(context, host="0.0.0.0") if self.runtime.network != "host" else context
        return contain(
            engine.launch(inside),
            replace(self.runtime, program=client_path(self.instance, self.runtime.program)),
            instance=self.instance,
            fleet=self.fleet,
            port=context.port,
            host=context.host,
            own_env=self.own_env,
            stop_timeout_s=self.stop_timeout_s,
        )


def runtime_of(
    keys: DockerKeys, device: str, uuid: str | None, cpus: Sequence[int], nofile: int | None
) -> DockerRuntime:
    """Return the runtime of fleet.yaml; `gpus` defaults to the GPU of the entry."""
    gpus = keys.gpus
    if not gpus and device.startswith("gpu"):
        gpus = (uuid,) if uuid else ("all",)
    program = keys.program if "program" in keys.model_fields_set else ""
    return DockerRuntime(
        keys.image, gpus, keys.mounts, keys.pull, keys.args, keys.network, program, None, tuple(cpus), nofile
    )


def inner_host(keys: EngineKeys | None) -> str:
    """Return the address to listen on: all addresses in a bridged network."""
    bridged = keys is not None and keys.runtime is not None and keys.runtime.docker.network != "host"
    return _EVERYWHERE if bridged else "127.0.0.1"


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
