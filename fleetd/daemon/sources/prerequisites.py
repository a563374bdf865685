"""Check the paths and volumes that processes and models require: before a start, and periodically.

Invariants:
- Every two seconds the mounts and a part of the paths are checked; missing paths, and after a mount change all paths, at
  once. A check that hangs is abandoned after a few seconds, and its path counts as missing.
- A running process is stopped when a prerequisite is gone at two checks in a row: files mapped from an unplugged drive
  would crash it later. A path that only does not answer stops nothing.
- A held model needs its file only while the server's store has no copy of it.
- A result counts only for the plans that it was computed for; after a change the check is repeated.
- Only a changed result is an event. Seen volumes survive a restart, so that a swapped one is detected.
"""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from fleetd.core.data.events import ModelPrerequisitesChanged, ProcessPrerequisitesChanged, RestartDue
from fleetd.core.data.state import SERVING, ProcessState, Residency
from fleetd.daemon.context import DaemonContext
from fleetd.daemon.reload.deferred_env import DeferredEnvironment, Missing, MissingPrerequisites
from fleetd.errors import EngineError
from fleetd.host.system.volumes import Look, Volumes
from fleetd.resolver.launch_plan import LaunchPlan

if TYPE_CHECKING:
    from fleetd.engines.base import ServedModel

PERIOD_S = 2.0
SUSPECTED_S = 0.5
_LIMIT_S = 3.0
_PATHS_PER_S = 2000
_COPY_CHECK_S = 30.0
_SLICE = 400
_RUNNING = SERVING | {ProcessState.STARTING}
_IN_MEMORY = (Residency.LOADED, Residency.LOADING)


class _Required:
    """The prerequisites of some plans. Immutable: a thread may read it."""

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


class Prerequisites:
    """The last results of everything with prerequisites, as `reported` to the fleet."""

    def __init__(self, context: DaemonContext, deferred_env: DeferredEnvironment) -> None:
        self._config = context.config
        self._dispatch = context.dispatch
        self._queries = context.queries
        self._deferred_env = deferred_env
        self._record = context.config.state_dir / "volumes.json"
        self.volumes = Volumes(known=read_known(self._record))
        self._saved = dict(self.volumes.known)
        self._looks: dict[Path, Look] = {}
        self._table: object = None
        self._next = 0
        self._required = _Required({})
        self._suspected: dict[tuple[str, str], Missing] = {}
        self._copies: dict[str, tuple[bool, float]] = {}  # held model to whether its store has a copy, and when checked
        self._check_now = asyncio.Event()
        self.reported = MissingPrerequisites()

    # -- checks -------------------------------------------------------------------------------------------------------

    async def check(self, plans: Mapping[str, LaunchPlan]) -> MissingPrerequisites:
        """Return everything that is missing now, for these plans."""
        required = self._learn(plans)
        looks = await self._look_at(required.all())
        missing = await asyncio.to_thread(self._evaluate, required, looks)
        unread = {name: _unread(plan) for name, plan in plans.items() if plan.unread}
        return MissingPrerequisites({**unread, **missing.processes}, missing.models)

    def accept(self, missing: MissingPrerequisites) -> None:
        """Record a result that a new spec contains; later checks report changes."""
        self.reported.processes |= missing.processes
        self.reported.models = dict(missing.models)
        self._suspected.clear()
        self._check_now.set()

    async def fresh(self, name: str) -> Missing:
        """Check one process right before it starts, and report a changed result."""
        plan = self._config.plans.get(name)
        paths = [Path(path) for path in plan.requires] if plan is not None else []
        if not paths:
            return ()
        looks = await self._look_at(paths)
        missing = _missing(looks, paths, plan.required_by if plan is not None else {})
        if plan is not None and plan.unread and not missing:
            missing = _unread(plan)
        if missing != self.reported.processes.get(name, ()):
            self.reported.processes[name] = missing
            self._dispatch(ProcessPrerequisitesChanged(name, missing))
        return missing

    async def fresh_model(self, name: str) -> Missing:
        """Check the file of one held model, and report a changed result."""
        required = self._learn(self._config.plans)
        entry = required.sources.get(name)
        if entry is None:
            return ()
        looks = await self._look_at([source_path(entry[1])])
        missing = await asyncio.to_thread(self._missing_of, name, required, looks)
        if missing != self.reported.models.get(name, ()):
            self.reported.models[name] = missing
            self._dispatch(ModelPrerequisitesChanged(name, missing))
        return missing

    def recheck(self) -> None:
        """Check everything again now."""
        self._table = None
        self._copies.clear()
        self._check_now.set()

    def needed_by(self) -> dict[str, list[str]]:
        """Return the names that need each volume."""
        required = self._learn(self._config.plans)
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
        """Return why the volume cannot be used now; None: it can be."""
        for path, look in self._looks.items():
            if look.missing is not None and str(look.mount) == mount:
                return look.missing.removeprefix(str(path)).strip(" ()")
        return None

    def _learn(self, plans: Mapping[str, LaunchPlan]) -> _Required:
        if plans is not self._required.plans:
            self._required = _Required(plans)
            self._copies.clear()
            wanted = set(self._required.all())
            self._looks = {path: look for path, look in self._looks.items() if path in wanted}
        return self._required

    async def _look_at(self, paths: Sequence[Path]) -> Mapping[Path, Look]:
        """Check paths; return their results and the earlier ones of all other paths."""
        if not paths:
            return self._looks
        try:
            async with asyncio.timeout(_LIMIT_S + len(paths) / _PATHS_PER_S):
                found = await asyncio.to_thread(self.volumes.look_at_all, paths)
        except TimeoutError:  # one of them hangs: ask each by itself
            looks = await asyncio.gather(*(self.volumes.limited(path) for path in paths[:_SLICE]))
            found = dict(zip(paths, looks, strict=False))
        self._looks = known = {**self._looks, **found}
        await self._save()
        return known

    async def _look_again(self, required: _Required) -> None:
        """Check all paths after a mount, else missing ones and the next part."""
        table = await asyncio.to_thread(self.volumes.table)
        paths = required.all()
        if table is not None and table == self._table and len(paths) > _SLICE:
            missing = [path for path in paths if self._looks.get(path, Look()).missing is not None]
            turn = list(islice(paths, self._next, self._next + _SLICE))
            self._next = self._next + _SLICE if len(turn) == _SLICE else 0
            paths = [*missing[:_SLICE], *turn]
        if table != self._table:
            self._copies.clear()
        self._table = table
        await self._look_at(paths)

    def _evaluate(self, required: _Required, looks: Mapping[Path, Look]) -> MissingPrerequisites:
        """Return what is missing according to `looks`. Blocks."""
        processes = {name: _missing(looks, paths, required.keys[name]) for name, paths in required.paths.items()}
        models = {name: self._missing_of(name, required, looks) for name in required.sources}
        return MissingPrerequisites(
            {name: missing for name, missing in processes.items() if missing},
            {name: missing for name, missing in models.items() if missing},
        )

    def _missing_of(self, name: str, required: _Required, looks: Mapping[Path, Look]) -> Missing:
        """Return what a model misses; nothing if the store has a copy. Blocks."""
        plan, held = required.sources[name]
        missing = looks.get(source_path(held), Look()).missing
        if missing is None:
            return ()
        return () if self._has_copy(name, plan, held) else (f"models.{name}.from: {missing}",)

    def _has_copy(self, name: str, plan: LaunchPlan, held: ServedModel) -> bool:
        """Return whether the store has a copy; a result counts for half a minute."""
        store, now = plan.engine.store, time.monotonic()
        if store is None:
            return False
        known = self._copies.get(name)
        if known is None or now - known[1] > _COPY_CHECK_S:
            try:
                known = store.has_copy(plan.context, plan.endpoint, held, self._config.state_dir), now
            except (EngineError, OSError, ValueError):
                known = False, now
            self._copies[name] = known
        return known[0]

    # -- reports ------------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Check for ever."""
        while True:
            self._check_now.clear()
            self._learn(self._config.plans)
            with suppress(TimeoutError):
                async with asyncio.timeout(self._period_s()):
                    await self._check_now.wait()
            required = self._learn(self._config.plans)
            await self._look_again(required)
            now = await asyncio.to_thread(self._evaluate, required, self._looks)
            if self._required is not required:
                continue
            unread = {
                name: await self._read_deferred_env(name) for name in set(self.reported.processes) - set(now.processes)
            }
            for name in {**self.reported.processes, **now.processes}:
                self._report_process(name, now.processes.get(name) or unread.get(name, ()))
            for name in {**self.reported.models, **now.models}:
                self._report_model(name, now.models.get(name, ()))

    def _period_s(self) -> float | None:
        """Return the seconds until the next check; None: nothing to check."""
        if not self._required.paths and not self._required.sources and not self.reported.processes:
            return None
        return SUSPECTED_S if self._suspected else PERIOD_S

    async def _read_deferred_env(self, name: str) -> Missing:
        """Return what still blocks a process after its env files are read."""
        reported = self.reported.processes.get(name, ())
        if not reported:
            return ()
        found = await self._deferred_env.read(name, self.reported)
        return reported if found is None else found

    def _report_process(self, name: str, missing: Missing) -> None:
        process = self._queries.process(name)
        running = process is not None and process.state in _RUNNING
        if missing != self.reported.processes.get(name, ()):
            if running and missing and not self._sure("process", name, missing):
                return
            self.reported.processes[name] = missing
            self._dispatch(ProcessPrerequisitesChanged(name, missing))
        if not missing:
            self.reported.processes.pop(name, None)
            self._suspected.pop(("process", name), None)
        elif running and process is not None and process.restart_wanted is None and self._certain(missing):
            self._dispatch(RestartDue(name, f"missing: {', '.join(missing)}"))

    def _report_model(self, name: str, missing: Missing) -> None:
        model = self._queries.model(name)
        if not missing:
            self._suspected.pop(("model", name), None)
        if missing == self.reported.models.get(name, ()):
            return
        if missing and model is not None and model.state in _IN_MEMORY and not self._sure("model", name, missing):
            return
        self.reported.models[name] = missing
        if not missing:
            self.reported.models.pop(name, None)
        self._dispatch(ModelPrerequisitesChanged(name, missing))

    def _sure(self, kind: str, name: str, missing: Missing) -> bool:
        """Return whether something in use is missing at two checks in a row."""
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

    # -- seen volumes -------------------------------------------------------------------------------------------------

    def forget(self, mount: str) -> bool:
        """Accept whatever is mounted there as right; False if nothing was seen."""
        known = self.volumes.forget(mount)
        self.recheck()
        return known

    async def _save(self) -> None:
        if self.volumes.known == self._saved:
            return
        self._saved = dict(self.volumes.known)
        with suppress(OSError):  # it is known for the life of this daemon all the same
            await asyncio.to_thread(write_known, self._record, self._saved)


def _unread(plan: LaunchPlan) -> Missing:
    return tuple(f"{plan.required_by[path]}: {path} (it exists and was not read yet)" for path in plan.unread)


def source_path(held: ServedModel) -> Path:
    """Return the file that a held model is built from; only for those that have one."""
    assert held.source is not None
    return Path(held.source)


def read_known(record: Path) -> dict[str, str]:
    """Return the volumes that an earlier daemon saw; empty if damaged."""
    try:
        data = json.loads(record.read_bytes())
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


def is_about(entry: str, path: str) -> bool:
    """Return whether an entry of a Missing is about this path."""
    return entry.startswith(f"{path} (") or f": {path} (" in entry


def _missing(looks: Mapping[Path, Look], paths: Iterable[Path], keys: Mapping[str, str]) -> Missing:
    """Return "PATH (why)" of each missing path, after its key if it has one."""
    found = ((path, looks.get(path, Look()).missing) for path in paths)
    return tuple(
        f"{keys[str(path)]}: {entry}" if str(path) in keys else entry for path, entry in found if entry is not None
    )
