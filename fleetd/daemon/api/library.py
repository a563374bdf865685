"""`fleetctl models` and `fleetctl volumes` on the daemon's side: implements control.port.LibraryPort.

Invariants:
- The servers themselves report differences; a store without a ready server has an error instead.
- A sync continues when its client leaves; it changes only differences and reports each step.
- Only models that fleetd created and that fleet.yaml no longer names are deleted.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fleetd.daemon.context import DaemonContext
from fleetd.daemon.effects.model_builds import ModelBuilds, Note
from fleetd.daemon.effects.model_stores import SharedStore
from fleetd.daemon.sources.prerequisites import Prerequisites
from fleetd.errors import ApiError, EngineError, FleetError
from fleetd.models.ollama.sync import Library, Step, StoreChange
from fleetd.resolver.launch_plan import LaunchPlan

_KEPT = 8  # syncs whose steps can still be read
_ITEMS = 5000


@dataclass(slots=True)
class Sync:
    """One sync: its steps so far, and whether it is finished."""

    items: list[dict[str, Any]] = field(default_factory=list)
    over: bool = False
    news: asyncio.Event = field(default_factory=asyncio.Event)

    def add(self, **item: Any) -> None:
        if len(self.items) < _ITEMS:
            self.items.append(item)
        self.news.set()


class Libraries:
    """Store operations for `fleetctl models` and `fleetctl volumes`."""

    def __init__(self, context: DaemonContext, builds: ModelBuilds, prerequisites: Prerequisites) -> None:
        self._config = context.config
        self._http = context.http
        self._queries = context.queries
        self._tasks = context.tasks
        self._builds = builds
        self._prerequisites = prerequisites
        self._syncs: dict[int, Sync] = {}
        self._last = 0

    # -- looking --------------------------------------------------------------------------------------------------------

    async def diff(self) -> Mapping[str, Any]:
        stores = [await self._compared(store) for store in self._builds.stores().values() if store.models]
        todo = sum(step["change"] not in ("none", "foreign") for one in stores for step in one["steps"])
        return {"stores": stores, "differences": todo}

    async def _compared(self, store: SharedStore) -> dict[str, Any]:
        found: dict[str, Any] = {"store": store.key, "instances": store.instances, "error": None, "steps": []}
        try:
            steps = await self._builds.steps(store, self._ready(store))
        except FleetError as error:
            return {**found, "error": str(error)}
        found["steps"] = [_shown(step, self._prerequisites.reported.models) for step in steps]
        for name in store.models:
            note = self._builds.notes.get(name)
            if note is not None and note.state == "failed":
                rows = [
                    row for row in found["steps"] if row["name"] == name and row["change"] not in ("none", "foreign")
                ]
                for row in rows:
                    row["failure"] = note.detail
        return found

    def _ready(self, store: SharedStore) -> LaunchPlan:
        plan = self._builds.serving(store)
        if plan is not None:
            return plan
        states = [
            f"{name} is {process.state}: {process.reason}"
            for name in store.instances
            if (process := self._queries.process(name)) is not None
        ]
        raise EngineError("; ".join(states) or "no server of this store is in the fleet")

    async def show(self, name: str) -> Mapping[str, Any]:
        model = self._queries.find_model(name)
        if model is None:
            raise ApiError(404, "unknown_name", f"There is no model named {name!r}.")
        for store in self._builds.stores().values():
            if model.name in store.models:
                plan, held = store.models[model.name]
                library = self._library(store, plan)
                facts = await asyncio.to_thread(_facts, store, plan, model.name, library)
                note = self._builds.notes.get(model.name)
                where = [{"process": name, "state": str(one.state)} for name, one in model.placements.items()]
                return {
                    "model": model.name,
                    "served_as": held.served_as,
                    "store": store.key,
                    "instances": list(model.spec.holders),
                    "loaded": where,
                    "state": note.document() if note is not None else None,
                    **facts,
                }
        raise ApiError(409, "not_held", f"{model.name} is not on a server with a store: it cannot be built.")

    def _library(self, store: SharedStore, plan: LaunchPlan) -> Library:
        assert plan.endpoint is not None
        found: Library = store.engine.library(self._http.session, plan.endpoint, plan.context, self._config.state_dir)
        return found

    # -- changing -------------------------------------------------------------------------------------------------------

    def sync(self, names: Sequence[str]) -> int:
        """Start a sync; return the number under which its progress can be read."""
        known = {name: self._queries.canonical_name(name) for name in names}
        for name, model in known.items():
            if model is None:
                raise ApiError(404, "unknown_name", f"There is no model named {name!r}.")
        self._last += 1
        sync = self._syncs[self._last] = Sync()
        for number in list(self._syncs)[:-_KEPT]:
            del self._syncs[number]
        self._tasks.start(self._sync(sync, {model for model in known.values() if model is not None}), "sync models")
        return self._last

    async def _sync(self, sync: Sync, names: Collection[str]) -> None:
        count = dict.fromkeys(("unchanged", "made", "failed"), 0)
        try:
            for store in self._builds.stores().values():
                if store.models:
                    await self._sync_store(sync, store, names, count)
        finally:
            sync.over = True
            sync.add(what="done", **count)

    async def _sync_store(self, sync: Sync, store: SharedStore, names: Collection[str], count: dict[str, int]) -> None:
        try:
            plan = self._ready(store)
            steps = await self._builds.steps(store, plan)
        except FleetError as error:
            count["failed"] += 1
            sync.add(what="failed", name=None, store=store.key, detail=str(error))
            return
        for step in steps:
            if step.recipe is None or (names and step.name not in names):
                continue
            if step.change in (StoreChange.NONE, StoreChange.FOREIGN):
                count["unchanged"] += 1
            elif step.change is StoreChange.MISSING:
                count["failed"] += 1
                blocked = self._prerequisites.reported.models.get(step.name)
                sync.add(what="failed", name=step.name, store=store.key, detail=", ".join(blocked or (step.reason,)))
            else:
                await self._sync_model(sync, store, plan, step, count)

    async def _sync_model(
        self, sync: Sync, store: SharedStore, plan: LaunchPlan, step: Step, count: dict[str, int]
    ) -> None:
        def tell(note: Note) -> None:
            if note.state == "making":
                sync.add(what="making", name=step.name, store=store.key, **_without(note.document(), "state"))

        note = await self._builds.make_alone(store, plan, step, tell)
        what = "failed" if note.state == "failed" else "made"
        count[what] += 1
        sync.add(what=what, name=step.name, store=store.key, detail=note.detail)

    async def progress(self, number: int) -> AsyncIterator[Mapping[str, Any]]:
        """Yield the past and coming steps of a sync until it is finished."""
        sync = self._syncs.get(number)
        if sync is None:
            raise ApiError(404, "unknown_name", f"There is no sync {number}.")
        sent = 0
        while True:
            while sent < len(sync.items):
                yield sync.items[sent]
                sent += 1
            if sync.over:
                return
            sync.news.clear()
            await sync.news.wait()

    async def prune(self, dry_run: bool) -> Mapping[str, Any]:
        found: list[dict[str, Any]] = []
        for store in self._builds.stores().values():
            try:
                plan = self._ready(store)
                steps = await self._builds.steps(store, plan)
            except FleetError as error:
                found.append({"store": store.key, "name": None, "result": "failed", "reason": str(error)})
                continue
            doomed = [step for step in steps if step.change is StoreChange.DELETE]
            found += [await self._delete(store, plan, step, dry_run) for step in doomed]
        return {"results": found} if not dry_run else {"doomed": found}

    async def _delete(self, store: SharedStore, plan: LaunchPlan, step: Step, dry_run: bool) -> dict[str, Any]:
        row = {"store": store.key, "name": step.served_as, "result": "ok", "reason": step.reason}
        if dry_run:
            return row
        library = self._library(store, plan)
        try:
            async with store.engine.lock(store.key):
                await library.delete(step.served_as)
        except FleetError as error:
            return {**row, "result": "failed", "reason": str(error)}
        return row

    # -- volumes --------------------------------------------------------------------------------------------------------

    def volumes(self) -> Mapping[str, Any]:
        """Return the volumes that the fleet needs."""
        known = self._prerequisites.volumes.known
        needed = self._prerequisites.needed_by()
        return {
            "volumes": [
                {
                    "path": path,
                    "identity": known.get(path) or None,
                    "problem": self._prerequisites.why(path),
                    "needed_by": names,
                }
                for path, names in sorted(needed.items())
            ]
        }

    def accept_volume(self, path: str) -> Mapping[str, Any]:
        if not self._prerequisites.forget(path):
            raise ApiError(
                404, "unknown_name", f"No volume at {path} was seen yet.", hint="fleetctl volumes lists them"
            )
        return {"path": path, "accepted": True}


def _shown(step: Step, blocked: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    change = "blocked" if step.change is StoreChange.MISSING and step.name in blocked else str(step.change)
    reason = ", ".join(blocked[step.name]) if change == "blocked" else step.reason
    return {"name": step.name, "served_as": step.served_as, "change": change, "reason": reason}


def _without(document: Mapping[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in document.items() if key not in keys}


def _entry_of(made: Mapping[str, Mapping[str, Any]], served_as: str) -> dict[str, Any] | None:
    from fleetd.models.ollama.store import ModelName

    entry = made.get(ModelName.parse(served_as).key)
    return dict(entry) if entry is not None else None


def _facts(store: SharedStore, plan: LaunchPlan, name: str, library: Library) -> dict[str, Any]:
    """Read the entry, the record and the file. Blocks."""
    held = store.models[name][1]
    found: dict[str, Any] = {
        "modelfile": None,
        "modelfile_error": None,
        "from": held.source,
        "quantize": held.quantize,
    }
    try:
        recipe = store.engine.recipe(plan.context, held)
        if recipe.source is None and recipe.base is None:
            found["modelfile_error"] = f"models.{name}.from is not set: the model in the store is used unchanged"
        else:
            found["modelfile"] = recipe.render()
    except (EngineError, ValueError) as error:
        found["modelfile_error"] = str(error)
    if held.source is not None and held.source.startswith("/"):
        path = Path(held.source)
        found["size_bytes"] = path.stat().st_size if path.is_file() else None
    made = _entry_of(library.created(), held.served_as)
    return found | {"made": made, **library.stored(held.served_as)}
