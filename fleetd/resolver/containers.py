"""Engines in containers: what fleet.yaml says of one as a recipe, and the commands that end a container to the last.

The rules of this file
- A recipe turns an engine's own command line into the client's, at assembly and again at a start whose program came later.
- The client is our child and the container is not: whatever became of the client, the container is stopped, removed, and
  seen to be gone before anything counts as empty. A container that cannot be removed is a survivor.
- At a daemon's start, containers with the fleet's label that no adopted client belongs to are removed.
"""

from __future__ import annotations

import pwd
import shutil
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from fleetd.engines.base import Engine, LaunchContext
from fleetd.engines.container import Contained, DockerRuntime, absent, contain, find_command, found
from fleetd.errors import EngineError, HostError
from fleetd.units import expand_home

if TYPE_CHECKING:
    from fleetd.config.schema.process import DockerKeys, EngineKeys
    from fleetd.resolver.launch_plan import LaunchPlan

PROGRAMS = ("docker", "podman")
IN_IMAGE = {"vllm": ("vllm", "serve"), "ollama": ("ollama", "serve"), "llamacpp": ("llama-server",)}
REMOVE_S = 30.0
_EVERYWHERE = "0.0.0.0"
_FIND_S = 15.0
_GRACE_S = 5.0  # beyond the time that the container itself is given to stop


class Commands(Protocol):
    """The part of the machine that runs short programs."""

    async def run(
        self, argv: Sequence[str], env: Mapping[str, str], cwd: str | None, timeout_s: float
    ) -> tuple[bool, str]: ...


@dataclass(frozen=True, slots=True)
class ContainerRecipe:
    """How one entry's container is made. `fleet` tells this fleet's containers from those of others on the machine."""

    runtime: DockerRuntime
    fleet: str
    instance: str
    stop_timeout_s: float
    own_env: Mapping[str, str]

    def contain(self, engine: Engine, context: LaunchContext) -> Contained:
        """Return the client's command line. Raises EngineError: no client, or something that cannot be contained."""
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
    """Return what fleet.yaml says; without `gpus`, an entry that lives on a GPU is given that one."""
    gpus = keys.gpus
    if not gpus and device.startswith("gpu"):
        gpus = (uuid,) if uuid else ("all",)
    program = keys.program if "program" in keys.model_fields_set else ""
    return DockerRuntime(
        keys.image, gpus, keys.mounts, keys.pull, keys.args, keys.network, program, None, tuple(cpus), nofile
    )


def inner_host(keys: EngineKeys | None) -> str:
    """Return where a server has to listen: in a network of its own on all of its addresses, which is published on loopback."""
    bridged = keys is not None and keys.runtime is not None and keys.runtime.docker.network != "host"
    return _EVERYWHERE if bridged else "127.0.0.1"


def client_path(instance: str, program: str) -> str:
    """Return the client's absolute path: the one named, else docker, else podman. Raises EngineError when there is none."""
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
    """Return UID:GID of a user of this machine, or of the numbers themselves. Raises KeyError for an unknown name."""
    if name.replace(":", "", 1).isdigit():
        return name
    entry = pwd.getpwnam(name)
    return f"{entry.pw_uid}:{entry.pw_gid}"


# -- ending -------------------------------------------------------------------------------------------------------------


async def end(machine: Commands, contained: Contained, env: Mapping[str, str], stop_s: float | None) -> str | None:
    """Stop a container gently (`stop_s` None: at once) and remove it; return why it could not be, None: it is gone."""
    try:
        if stop_s is not None:
            await machine.run(contained.stop, env, None, stop_s + _GRACE_S)
        return await _remove(machine, contained.remove, env)
    except HostError as error:
        return f"its container {contained.name} could not be removed: {error}"


async def _remove(machine: Commands, argv: Sequence[str], env: Mapping[str, str]) -> str | None:
    ok, output = await machine.run(argv, env, None, REMOVE_S)
    if ok or absent(output):
        return None
    last = output.strip().splitlines()[-1:] or ["it said nothing"]
    return f"{' '.join(argv)} failed: {last[0][:300]}"


async def remove_by(machine: Commands, argv: Sequence[str], env: Mapping[str, str]) -> str | None:
    """Run a removal that a record kept; return why it failed."""
    try:
        return await _remove(machine, argv, env)
    except HostError as error:
        return str(error)


async def remove_orphans(
    machine: Commands, plans: Iterable[LaunchPlan], live: Collection[str], env: Mapping[str, str]
) -> list[tuple[str, str]]:
    """Remove this fleet's containers that belong to no instance of `live`; return (instance, what was done) for each."""
    told: list[tuple[str, str]] = []
    asked: set[tuple[str, str]] = set()
    for plan in plans:
        if plan.contained is None or plan.recipe is None:
            continue
        key = (plan.contained.find[0], plan.recipe.fleet)
        if key in asked:
            continue
        asked.add(key)
        client, fleet = key
        try:
            ok, output = await machine.run(find_command(fleet, client), env, None, _FIND_S)
        except HostError as error:
            ok, output = False, str(error)
        if not ok:
            told.append((plan.name, f"its containers cannot be listed: {output.strip()[-300:]}"))
            continue
        for identity, instance in found(output, live):
            why = await remove_by(machine, (client, "rm", "--force", identity), env)
            told.append((instance, f"a container was left behind: {why or 'removed'}"))
    return told


# -- looking ------------------------------------------------------------------------------------------------------------


async def first_pid(machine: Commands, contained: Contained, env: Mapping[str, str]) -> int | None:
    """Return the pid of the container's first process on this machine; None where it is not to be seen from here.

    A client may speak to another machine, or to a virtual one: a pid counts only if its control group names the container.
    """
    try:
        ok, output = await machine.run(contained.where, env, None, _FIND_S)
    except HostError:
        return None
    words = output.split()
    if not ok or len(words) != 2 or not words[0].isdigit() or int(words[0]) <= 1:
        return None
    try:
        groups = Path(f"/proc/{words[0]}/cgroup").read_text("utf-8", "replace")
    except OSError:
        return None
    return int(words[0]) if words[1][:12] and words[1] in groups else None
