"""What processes and models require to be there: looked at before anything starts, and again and again while the daemon runs.

The rules of this file
- Every two seconds the mounts are looked at, and some of the paths; when a mount came or went, and for what is absent, all of
  them at once. A look that hangs is given up after a few seconds, and what was not answered counts as absent.
- What runs is stopped when what it requires is gone at two looks in a row: files that are mapped from a pulled drive would end
  it anyhow, later and worse. A path that merely does not answer stops nothing.
- A held model needs its file only as long as the server's store has no copy of it.
- An answer is about the plans that were asked about: what was looked at while others came is not told, and looked at again.
- Only a changed answer is an event. Volumes that were seen are kept over a restart, so that a swapped one is noticed.
"""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from fleetd.core.data.events import Event, ModelRequirementsChanged, RequirementsChanged, RestartDue
from fleetd.core.data.state import SERVING, ProcessState, Residency
from fleetd.errors import EngineError
from fleetd.host.system.volumes import Look, Volumes
from fleetd.resolver.launch_plan import LaunchPlan

if TYPE_CHECKING:
    from fleetd.core.queries import FleetQueries
    from fleetd.engines.base import ServedModel

PERIOD_S = 2.0
SUSPECTED_S = 0.5
_LIMIT_S = 3.0
_PATHS_PER_S = 2000
_ALONE_S = 30.0
_SLICE = 400
_RUNNING = SERVING | {ProcessState.STARTING}
_IN_MEMORY = (Residency.LOADED, Residency.LOADING)

Missing = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Absent:
    """What is absent, by process and by held model. Names without anything absent are left out."""

    processes: Mapping[str, Missing]
    models: Mapping[str, Missing]


class _Required:
    """What some plans require. Never changed: a thread may be at work on it."""

    def __init__(self, plans: Mapping[str, LaunchPlan]) -> None:
        self.plans = plans
        self.paths = {
            name: tuple(Path(path) for path in plan.requires) for name, plan in plans.items() if plan.requires
        }
        self.keys = {name: plans[name].required_by for name in self.paths}
        self.sources: dict[str, tuple[LaunchPlan, ServedModel]] = {}  # of the held models that have a file
        for plan in plans.values():
            if plan.engine.store is not None:
                for name, held in plan.held.items():
                    if held.source is not None and held.source.startswith("/"):
                        self.sources.setdefault(name, (plan, held))

    def all(self) -> list[Path]:
        paths = [path for several in self.paths.values() for path in several]
        return list(dict.fromkeys([*paths, *(source_path(held) for _, held in self.sources.values())]))


class Requirements:
    """The last answer for every process and held model that requires something.

    `state_dir` keeps which volumes were seen; None keeps nothing. `queries` tells what runs.
    """

    def __init__(
        self,
        dispatch: Callable[[Event], None],
        plans: Callable[[], Mapping[str, LaunchPlan]],
        queries: FleetQueries,
        state_dir: Path | None = None,
    ) -> None:
        self._dispatch = dispatch
        self._plans = plans
        self._queries = queries
        self._state_dir = state_dir
        self._record = state_dir / "volumes.json" if state_dir is not None else None
        self.volumes = Volumes(known=read_known(self._record))
        self._kept = dict(self.volumes.known)
        self._looks: dict[Path, Look] = {}
        self._table: object = None
        self._next = 0
        self._required = _Required({})
        self._suspected: dict[tuple[str, str], Missing] = {}
        self._alone: dict[str, tuple[bool, float]] = {}
        self._news = asyncio.Event()
        self.missing: dict[str, Missing] = {}
        self.missing_models: dict[str, Missing] = {}
        self.read_again: Callable[[str], Awaitable[Missing | None]] | None = None

    # -- looking --------------------------------------------------------------------------------------------------------

    async def look(self, plans: Mapping[str, LaunchPlan]) -> Absent:
        """Return everything that is absent now, for these plans."""
        required = self._learn(plans)
        looks = await self._look_at(required.all())
        absent = await asyncio.to_thread(self._absent, required, looks)
        unread = {name: _unread(plan) for name, plan in plans.items() if plan.unread}
        return Absent({**unread, **absent.processes}, absent.models)

    def accept(self, absent: Absent) -> None:
        """Take an answer that the fleet was told already; what is there again it is told by the next look."""
        self.missing, self.missing_models = {**self.missing, **absent.processes}, dict(absent.models)
        self._suspected.clear()
        self._news.set()

    async def fresh(self, name: str) -> Missing:
        """Look once more at what one process requires, right before it starts, and tell the fleet if that changed."""
        plan = self._plans().get(name)
        paths = [Path(path) for path in plan.requires] if plan is not None else []
        if not paths:
            return ()
        looks = await self._look_at(paths)
        missing = _missing(looks, paths, plan.required_by if plan is not None else {})
        if plan is not None and plan.unread and not missing:
            missing = _unread(plan)
        if missing != self.missing.get(name, ()):
            self.missing[name] = missing
            self._dispatch(RequirementsChanged(name, missing))
        return missing

    async def fresh_model(self, name: str) -> Missing:
        """The same for the file of a held model."""
        required = self._learn(self._plans())
        entry = required.sources.get(name)
        if entry is None:
            return ()
        looks = await self._look_at([source_path(entry[1])])
        missing = await asyncio.to_thread(self._missing_of, name, required, looks)
        if missing != self.missing_models.get(name, ()):
            self.missing_models[name] = missing
            self._dispatch(ModelRequirementsChanged(name, missing))
        return missing

    def look_soon(self) -> None:
        """Look again now: something changed."""
        self._table = None
        self._alone.clear()
        self._news.set()

    def needed_by(self) -> dict[str, list[str]]:
        """Return, for every volume that something is on, the names that need it."""
        required = self._learn(self._plans())
        found: dict[str, list[str]] = {}
        paths = [(name, path) for name, several in required.paths.items() for path in several]
        paths += [(name, source_path(held)) for name, (_, held) in required.sources.items()]
        for name, path in paths:
            mount = self._looks.get(path, Look()).mount
            if mount is not None:
                names = found.setdefault(str(mount), [])
                if name not in names:
                    names.append(name)
        return found

    def why(self, mount: str) -> str | None:
        """Return why the volume cannot be used now; None: it can."""
        for path, look in self._looks.items():
            if look.missing is not None and str(look.mount) == mount:
                return look.missing.removeprefix(str(path)).strip(" ()")
        return None

    def _learn(self, plans: Mapping[str, LaunchPlan]) -> _Required:
        if plans is not self._required.plans:
            self._required = _Required(plans)
            self._alone.clear()
            wanted = set(self._required.all())
            self._looks = {path: look for path, look in self._looks.items() if path in wanted}
        return self._required

    async def _look_at(self, paths: Sequence[Path]) -> Mapping[Path, Look]:
        """Look, and return it with what else is known of before."""
        if not paths:
            return self._looks
        try:
            async with asyncio.timeout(_LIMIT_S + len(paths) / _PATHS_PER_S):
                found = await asyncio.to_thread(self.volumes.look_at_all, paths)
        except TimeoutError:  # one of them hangs: ask each by itself
            looks = await asyncio.gather(*(self.volumes.limited(path) for path in paths[:_SLICE]))
            found = dict(zip(paths, looks, strict=False))
        self._looks = known = {**self._looks, **found}
        await self._keep()
        return known

    async def _look_again(self, required: _Required) -> None:
        """Look at everything when the mounts changed, else at what is absent and at the next few."""
        table = await asyncio.to_thread(self.volumes.table)
        paths = required.all()
        if table is not None and table == self._table and len(paths) > _SLICE:
            absent = [path for path in paths if self._looks.get(path, Look()).missing is not None]
            turn = list(islice(paths, self._next, self._next + _SLICE))
            self._next = self._next + _SLICE if len(turn) == _SLICE else 0
            paths = [*absent[:_SLICE], *turn]
        if table != self._table:
            self._alone.clear()
        self._table = table
        await self._look_at(paths)

    def _absent(self, required: _Required, looks: Mapping[Path, Look]) -> Absent:
        """Return what these looks say. Blocks."""
        processes = {name: _missing(looks, paths, required.keys[name]) for name, paths in required.paths.items()}
        models = {name: self._missing_of(name, required, looks) for name in required.sources}
        return Absent(
            {name: missing for name, missing in processes.items() if missing},
            {name: missing for name, missing in models.items() if missing},
        )

    def _missing_of(self, name: str, required: _Required, looks: Mapping[Path, Look]) -> Missing:
        """Return what a held model lacks; nothing when its server's store has what it needs. Blocks."""
        plan, held = required.sources[name]
        said = looks.get(source_path(held), Look()).missing
        if said is None:
            return ()
        return () if self._stands_alone(name, plan, held) else (f"models.{name}.from: {said}",)

    def _stands_alone(self, name: str, plan: LaunchPlan, held: ServedModel) -> bool:
        """Return whether the store has a copy; asked again after half a minute."""
        store, now = plan.engine.store, time.monotonic()
        if store is None or self._state_dir is None:
            return False
        known = self._alone.get(name)
        if known is None or now - known[1] > _ALONE_S:
            try:
                known = store.has_copy(plan.context, plan.endpoint, held, self._state_dir), now
            except (EngineError, OSError, ValueError):
                known = False, now
            self._alone[name] = known
        return known[0]

    # -- telling --------------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Look for ever."""
        while True:
            self._news.clear()
            self._learn(self._plans())
            with suppress(TimeoutError):
                async with asyncio.timeout(self._period_s()):
                    await self._news.wait()
            required = self._learn(self._plans())
            await self._look_again(required)
            now = await asyncio.to_thread(self._absent, required, self._looks)
            if self._required is not required:
                continue
            hindered = {name: await self._hindrance(name) for name in set(self.missing) - set(now.processes)}
            for name in {**self.missing, **now.processes}:
                self._tell_process(name, now.processes.get(name) or hindered.get(name, ()))
            for name in {**self.missing_models, **now.models}:
                self._tell_model(name, now.models.get(name, ()))

    def _period_s(self) -> float | None:
        """Return when to look again; None: nothing requires anything, until the plans change."""
        if not self._required.paths and not self._required.sources and not self.missing:
            return None
        return SUSPECTED_S if self._suspected else PERIOD_S

    async def _hindrance(self, name: str) -> Missing:
        """Return what keeps a process from starting although all that it requires is there: its files have to be read first."""
        told = self.missing.get(name, ())
        if not told or self.read_again is None:
            return ()
        found = await self.read_again(name)
        return told if found is None else found

    def _tell_process(self, name: str, missing: Missing) -> None:
        process = self._queries.process(name)
        running = process is not None and process.state in _RUNNING
        if missing != self.missing.get(name, ()):
            if running and missing and not self._sure("process", name, missing):
                return
            self.missing[name] = missing
            self._dispatch(RequirementsChanged(name, missing))
        if not missing:
            self.missing.pop(name, None)
            self._suspected.pop(("process", name), None)
        elif running and process is not None and process.restart_wanted is None and self._certain(missing):
            self._dispatch(RestartDue(name, f"requires {', '.join(missing)}, absent now"))

    def _tell_model(self, name: str, missing: Missing) -> None:
        model = self._queries.model(name)
        if not missing:
            self._suspected.pop(("model", name), None)
        if missing == self.missing_models.get(name, ()):
            return
        if missing and model is not None and model.state in _IN_MEMORY and not self._sure("model", name, missing):
            return
        self.missing_models[name] = missing
        if not missing:
            self.missing_models.pop(name, None)
        self._dispatch(ModelRequirementsChanged(name, missing))

    def _sure(self, kind: str, name: str, missing: Missing) -> bool:
        """Return whether what is in use is really gone: seen twice, and never for want of an answer."""
        if not self._certain(missing):
            return False
        twice = self._suspected.get((kind, name)) == missing
        if twice:
            del self._suspected[kind, name]
        else:
            self._suspected[kind, name] = missing
        return twice

    @staticmethod
    def _certain(missing: Missing) -> bool:
        return all(Look(one).certain for one in missing)

    # -- volumes that were seen -----------------------------------------------------------------------------------------

    def forget(self, mount: str) -> bool:
        """Take whatever is mounted there as the right volume from now on. False when nothing was known of it."""
        known = self.volumes.forget(mount)
        self.look_soon()
        return known

    async def _keep(self) -> None:
        if self._record is None or self.volumes.known == self._kept:
            return
        self._kept = dict(self.volumes.known)
        with suppress(OSError):  # it is known for the life of this daemon all the same
            await asyncio.to_thread(write_known, self._record, self._kept)


def _unread(plan: LaunchPlan) -> Missing:
    return tuple(f"{plan.required_by[path]}: {path} (it is there, and not read yet)" for path in plan.unread)


def source_path(held: ServedModel) -> Path:
    """Return the file a held model is made from; only for those that have one."""
    assert held.source is not None
    return Path(held.source)


def read_known(record: Path | None) -> dict[str, str]:
    """Return the volumes that an earlier daemon saw; a damaged record counts as empty."""
    try:
        data = json.loads(record.read_bytes()) if record is not None else {}
    except (OSError, ValueError):
        return {}
    volumes = data.get("volumes") if isinstance(data, dict) else None
    if not isinstance(volumes, dict):
        return {}
    return {key: value for key, value in volumes.items() if isinstance(value, str) and key.startswith("/")}


def write_known(record: Path, known: Mapping[str, str]) -> None:
    """Replace the record by rename. Raises OSError."""
    record.parent.mkdir(parents=True, exist_ok=True)
    part = record.with_name(f"{record.name}.{os.getpid()}")
    part.write_text(json.dumps({"volumes": dict(known)}, indent=1, sort_keys=True), "utf-8")
    part.replace(record)


def is_about(said: str, path: str) -> bool:
    """Say whether what is told as absent is this path."""
    return said.startswith(f"{path} (") or f": {path} (" in said


def _missing(looks: Mapping[Path, Look], paths: Iterable[Path], keys: Mapping[str, str]) -> Missing:
    """Return "PATH (why)" of what is absent, behind the key of fleet.yaml that names it where one does."""
    absent = ((path, looks.get(path, Look()).missing) for path in paths)
    return tuple(
        f"{keys[str(path)]}: {said}" if str(path) in keys else said for path, said in absent if said is not None
    )
