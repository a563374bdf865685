"""Taking over what an earlier daemon left running.

The rules of this file
- What is proven to be ours and still in fleet.yaml goes on as it is; its deaths in the meantime are noticed.
- What is proven but no longer in fleet.yaml, and what a dead leader left behind, is ended: it carries our token.
- What cannot be proven is left alone and said.
- A container outlives its client: one that no adopted client belongs to is found by its label, and removed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace

from fleetd.core.data.events import Adopted, Exited
from fleetd.core.data.specs import ExitKind, ExitReport, Remembered
from fleetd.daemon.effects.containers import remove_by, remove_orphans
from fleetd.daemon.effects.machine import HostMachine
from fleetd.daemon.effects.processes import Processes
from fleetd.errors import HostError
from fleetd.host.types import HandleRecord
from fleetd.resolver.launch_plan import REMOVAL, RESTARTS, LaunchPlan


@dataclass(slots=True)
class Adoption:
    """What was taken over. `died` ended while nobody watched; `changed` names those that fleet.yaml now wants to run
    differently; `restarts` is what the records count, which are written before a start, and so never too late."""

    adopted: list[Adopted] = field(default_factory=list)
    died: list[Exited] = field(default_factory=list)
    changed: list[str] = field(default_factory=list)
    restarts: dict[str, int] = field(default_factory=dict)

    def raised(self, remembered: Mapping[str, Remembered]) -> dict[str, Remembered]:
        """Return what is remembered, with no count below that of a record."""
        kept = dict(remembered)
        for name, count in self.restarts.items():
            if count > kept.setdefault(name, Remembered()).restarts:
                kept[name] = replace(kept[name], restarts=count)
        return kept


async def adopt_all(
    machine: HostMachine,
    processes: Processes,
    plans: Mapping[str, LaunchPlan],
    tell: Callable[[str, str], None],
    records: Iterable[HandleRecord],
) -> Adoption:
    """Go through `records`; `tell(name, sentence)` hears of each."""
    found = Adoption()
    for record in records:
        plan = plans.get(record.name)
        if plan is None or plan.external:
            await _end(machine, record, "no longer in fleet.yaml", tell)
            continue
        counted = record.extra.get(RESTARTS)
        found.restarts[record.name] = counted if isinstance(counted, int) else 0
        run = processes.adopt(plan, record)
        try:
            handle = await machine.adopt(record, processes.exit_seen(run))
        except HostError as error:
            gone = await machine.host.gone(record)
            survivors = await _end(machine, record, str(error), tell)
            if gone and not survivors:
                report = ExitReport(None, kind=ExitKind.UNKNOWN, reason="it exited while no daemon ran")
                found.died.append(Exited(record.name, record.generation, report))
            continue
        event = processes.adopted(run, handle)
        found.adopted.append(event)
        if record.extra.get("launch_hash") != plan.launch_hash():
            found.changed.append(record.name)
        tell(record.name, f"adopted: pid {event.pid}, generation {event.generation}")
    live = {event.name for event in found.adopted}
    for name, sentence in await remove_orphans(machine, plans.values(), live, machine.parent_env):
        tell(name, sentence)
    return found


async def _end(
    machine: HostMachine, record: HandleRecord, why: str, tell: Callable[[str, str], None]
) -> tuple[int, ...]:
    removal = record.extra.get(REMOVAL)
    if isinstance(removal, list) and removal and all(isinstance(word, str) for word in removal):
        failed = await remove_by(machine, removal, machine.parent_env)
        why += f"; its container: {failed or 'removed'}"
    survivors = await machine.host.sweep_record(record)
    left = f"; cannot be killed: {', '.join(map(str, survivors))}" if survivors else ""
    tell(record.name, f"not adopted: {why}{left}")
    return survivors
