"""Take over the processes that an earlier daemon left running.

Invariants:
- A process that is proven to be ours and still in fleet.yaml continues; its exit in the meantime is reported.
- A proven process that is no longer in fleet.yaml, and what a dead leader left behind, is stopped: it has our token.
- A process that cannot be proven is left alone and reported.
- A container may outlive its client: one without an adopted client is found by its label and removed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace

from fleetd.core.data.events import Adopted, Exited
from fleetd.core.data.specs import ExitKind, ExitReport, Remembered
from fleetd.daemon.effects.containers import remove_by, remove_orphans
from fleetd.daemon.effects.processes import Processes
from fleetd.daemon.reload.active import ActiveConfiguration
from fleetd.errors import HostError
from fleetd.host.host import Host
from fleetd.host.types import HandleRecord
from fleetd.resolver.launch_plan import REMOVAL, RESTARTS

Report = Callable[[str, str], None]  # name, sentence


@dataclass(slots=True)
class Adoption:
    """The result of taking over.

    `died` exited while no daemon ran; `changed` names processes that fleet.yaml now starts differently; `restarts` are
    the counts of the records, which are written before a start and so are never too low.
    """

    adopted: list[Adopted] = field(default_factory=list)
    died: list[Exited] = field(default_factory=list)
    changed: list[str] = field(default_factory=list)
    restarts: dict[str, int] = field(default_factory=dict)

    def with_restarts(self, remembered: Mapping[str, Remembered]) -> dict[str, Remembered]:
        """Return `remembered` with every restart count raised to that of its record."""
        result = dict(remembered)
        for name, count in self.restarts.items():
            if count > result.setdefault(name, Remembered()).restarts:
                result[name] = replace(result[name], restarts=count)
        return result


async def adopt_all(
    host: Host, processes: Processes, config: ActiveConfiguration, report: Report, records: Iterable[HandleRecord]
) -> Adoption:
    """Adopt or stop the process of each record, and report it."""
    result = Adoption()
    for record in records:
        plan = config.plans.get(record.name)
        if plan is None or plan.external:
            await _stop(host, config, record, "no longer in fleet.yaml", report)
            continue
        restarts = record.extra.get(RESTARTS)
        result.restarts[record.name] = restarts if isinstance(restarts, int) else 0
        try:
            event = await processes.adopt(plan, record)
        except HostError as error:
            gone = await host.gone(record)
            survivors = await _stop(host, config, record, str(error), report)
            if gone and not survivors:
                exit_report = ExitReport(None, kind=ExitKind.UNKNOWN, reason="it exited while no daemon ran")
                result.died.append(Exited(record.name, record.generation, exit_report))
            continue
        result.adopted.append(event)
        if record.extra.get("launch_hash") != plan.launch_hash():
            result.changed.append(record.name)
        report(record.name, f"adopted: pid {event.pid}, generation {event.generation}")
    live = {event.name for event in result.adopted}
    for name, sentence in await remove_orphans(host, config.plans.values(), live, config.parent_env):
        report(name, sentence)
    return result


async def _stop(
    host: Host, config: ActiveConfiguration, record: HandleRecord, reason: str, report: Report
) -> tuple[int, ...]:
    removal = record.extra.get(REMOVAL)
    if isinstance(removal, list) and removal and all(isinstance(word, str) for word in removal):
        failed = await remove_by(host, removal, config.parent_env)
        reason += f"; its container: {failed or 'removed'}"
    survivors = await host.sweep_record(record)
    left = f"; cannot be killed: {', '.join(map(str, survivors))}" if survivors else ""
    report(record.name, f"not adopted: {reason}{left}")
    return survivors
