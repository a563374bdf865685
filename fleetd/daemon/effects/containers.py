"""Stop, remove and find containers of the fleet.

Invariants:
- The client is fleetd's child and the container is not: when the client has exited, the container is stopped, removed and seen
  to be gone before the process set counts as empty. A container that cannot be removed is a survivor.
- When a daemon starts, it removes containers with the fleet's label that belong to no adopted client.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from fleetd.engines.container import Contained, list_command, no_such_container, unknown_containers
from fleetd.errors import HostError
from fleetd.resolver.launch_plan import LaunchPlan

REMOVE_S = 30.0
_FIND_S = 15.0
_GRACE_S = 5.0  # beyond the container's own time to stop


class Commands(Protocol):
    """The part of the machine that runs short programs."""

    async def run(
        self, argv: Sequence[str], env: Mapping[str, str], cwd: str | None, timeout_s: float
    ) -> tuple[bool, str]: ...


# -- ending -------------------------------------------------------------------------------------------------------------


async def end(machine: Commands, contained: Contained, env: Mapping[str, str], stop_s: float | None) -> str | None:
    """Stop (`stop_s` None: kill) and remove a container; return the error or None."""
    try:
        if stop_s is not None:
            await machine.run(contained.stop, env, None, stop_s + _GRACE_S)
        return await _remove(machine, contained.remove, env)
    except HostError as error:
        return f"its container {contained.name} could not be removed: {error}"


async def _remove(machine: Commands, argv: Sequence[str], env: Mapping[str, str]) -> str | None:
    ok, output = await machine.run(argv, env, None, REMOVE_S)
    if ok or no_such_container(output):
        return None
    last = output.strip().splitlines()[-1:] or ["it printed nothing"]
    return f"{' '.join(argv)} failed: {last[0][:300]}"


async def remove_by(machine: Commands, argv: Sequence[str], env: Mapping[str, str]) -> str | None:
    """Run the removal command of a record; return the error."""
    try:
        return await _remove(machine, argv, env)
    except HostError as error:
        return str(error)


async def remove_orphans(
    machine: Commands, plans: Iterable[LaunchPlan], live: Collection[str], env: Mapping[str, str]
) -> list[tuple[str, str]]:
    """Remove containers of no `live` instance; return (instance, result) of each."""
    results: list[tuple[str, str]] = []
    asked: set[tuple[str, str]] = set()
    for plan in plans:
        if plan.contained is None or plan.recipe is None:
            continue
        key = (plan.contained.list_all[0], plan.recipe.fleet)
        if key in asked:
            continue
        asked.add(key)
        client, fleet = key
        try:
            ok, output = await machine.run(list_command(fleet, client), env, None, _FIND_S)
        except HostError as error:
            ok, output = False, str(error)
        if not ok:
            results.append((plan.name, f"its containers cannot be listed: {output.strip()[-300:]}"))
            continue
        for identity, instance in unknown_containers(output, live):
            why = await remove_by(machine, (client, "rm", "--force", identity), env)
            results.append((instance, f"a container was left behind: {why or 'removed'}"))
    return results


# -- looking ------------------------------------------------------------------------------------------------------------


async def first_pid(machine: Commands, contained: Contained, env: Mapping[str, str]) -> int | None:
    """Return the pid of a container's first process; None if not visible here.

    A client may speak to another machine, or to a virtual one: a pid counts only if its control group names the container.
    """
    try:
        ok, output = await machine.run(contained.inspect, env, None, _FIND_S)
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
