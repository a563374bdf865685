"""Models as code: build each model with a `from` in its server's store before it is loaded.

Invariants:
- When a server is ready, its store is compared with fleet.yaml once, and differences are built, one model at a time in
  the whole daemon. A load builds what it needs; a second one finds it built.
- Servers that share a store share the work. Unchanged models are not rebuilt; nothing is deleted here.
- A loaded model is unloaded before it is rebuilt, and loaded again afterwards.
- A failure names the key of fleet.yaml; it is retried when its file, its volume or fleet.yaml changes.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fleetd.control.event_codes import EventCode
from fleetd.core.data.commands import Load
from fleetd.core.data.events import Event, LoadProgress, LoadRequested, ModelPrerequisitesChanged, UnloadRequested
from fleetd.core.data.state import ProcessState, Residency
from fleetd.daemon.async_tools import ChangeSignal
from fleetd.daemon.context import DaemonContext
from fleetd.daemon.effects.model_stores import SharedStore, stores_of
from fleetd.daemon.sources.prerequisites import Prerequisites
from fleetd.engines.base import ServedModel
from fleetd.errors import EngineError, FleetError
from fleetd.models.ollama.sync import Step, StoreChange
from fleetd.resolver.launch_plan import LaunchPlan

TELL_S = 1.0
_PASS_AGE_S = 10.0
_UNLOAD_S = 60.0
_DONE = {
    StoreChange.NONE: "unchanged",
    StoreChange.FOREIGN: "foreign",
    StoreChange.CREATE: "made",
    StoreChange.UPDATE: "made",
}


@dataclass(frozen=True, slots=True)
class Note:
    """The state of a model in its store, with a detail and the progress of a build.

    States: unchanged | made | making | failed | blocked | missing | foreign | changed.
    """

    state: str
    detail: str
    done_bytes: int = 0
    total_bytes: int = 0

    def document(self) -> dict[str, Any]:
        found: dict[str, Any] = {"state": self.state, "detail": self.detail}
        if self.total_bytes:
            found |= {"done_bytes": self.done_bytes, "total_bytes": self.total_bytes}
        return found


class ModelBuilds:
    """Compare stores with fleet.yaml and build the differences; `notes` for status."""

    def __init__(
        self, context: DaemonContext, prerequisites: Prerequisites, changes: ChangeSignal, request_ids: Iterator[int]
    ) -> None:
        self._config = context.config
        self._dispatch = context.dispatch
        self._queries = context.queries
        self._http = context.http
        self._reporter = context.reporter
        self._tasks = context.tasks
        self._prerequisites = prerequisites
        self._changes = changes
        self._request_ids = request_ids
        self._one = asyncio.Lock()
        self._for: object = None
        self._stores: dict[str, SharedStore] = {}
        self._due: set[str] = set()
        self._passing: set[str] = set()
        self._passed: dict[str, float] = {}
        self._seen: dict[str, int] = {}  # process to the generation that was seen ready
        self._verified: dict[tuple[str, str], tuple[ServedModel, object]] = {}
        self.notes: dict[str, Note] = {}

    # -- stores ---------------------------------------------------------------------------------------------------------

    def stores(self) -> dict[str, SharedStore]:
        """Return the stores of the current plans."""
        plans = self._config.plans
        if plans is not self._for:
            self._for, self._stores = plans, stores_of(plans)
            wanted = {name for store in self._stores.values() for name in store.models}
            self.notes = {name: note for name, note in self.notes.items() if name in wanted}
            self._due = {key for key, store in self._stores.items() if store.has_recipes}
            self._verified.clear()
        return self._stores

    def serving(self, store: SharedStore) -> LaunchPlan | None:
        """Return a ready server of the store."""
        for plan in store.plans:
            process = self._queries.process(plan.name)
            if process is not None and process.state in (ProcessState.READY, ProcessState.DRAINING):
                return plan
        return None

    # -- in the background ----------------------------------------------------------------------------------------------

    def observe(self, event: Event) -> None:
        """Start due builds after a step; compare again when a model's file returns."""
        if isinstance(event, ModelPrerequisitesChanged) and not event.missing:
            self._due |= {key for key, store in self.stores().items() if event.model in store.models}
        self._begin_due()

    def _begin_due(self) -> None:
        """Compare the stores that are due and have a ready server."""
        for key, store in self.stores().items():
            if not store.has_recipes:
                continue
            for plan in store.plans:
                process = self._queries.process(plan.name)
                if process is None or process.state is not ProcessState.READY:
                    continue
                if self._seen.get(plan.name) != process.generation:
                    self._seen[plan.name] = process.generation
                    if time.monotonic() - self._passed.get(key, -1e9) > _PASS_AGE_S:
                        self._due.add(key)
                if key in self._due and key not in self._passing:
                    self._due.discard(key)
                    self._passing.add(key)
                    self._tasks.start(self._pass(store), f"compare {key} with fleet.yaml")

    async def _pass(self, store: SharedStore) -> None:
        try:
            plan = self.serving(store)
            if plan is not None:
                for step in await self.steps(store, plan):
                    await self._step(store, plan, step)
        except FleetError as error:
            self._reporter.model(store.instances[0], EventCode.STORE_NOT_COMPARED, str(error))
        finally:
            self._passed[store.key] = time.monotonic()
            self._passing.discard(store.key)
            self._begin_due()

    async def steps(self, store: SharedStore, plan: LaunchPlan) -> list[Step]:
        """Return the differences of a store; bad entries are failures. Raises EngineError."""
        assert plan.endpoint is not None
        recipes = []
        for name, (owner, held) in store.models.items():
            try:
                recipes.append(store.engine.recipe(owner.context, held))
            except EngineError as error:
                self._failed(name, error)
        library = store.engine.library(self._http.session, plan.endpoint, plan.context, self._config.state_dir)
        return await library.plan(recipes)

    async def _step(self, store: SharedStore, plan: LaunchPlan, step: Step) -> None:
        name = step.name
        if step.recipe is None or name not in store.models:
            return
        if step.change in (StoreChange.NONE, StoreChange.FOREIGN):
            await self._right(store, step)
        elif step.change is StoreChange.MISSING:
            blocked = name in self._prerequisites.reported.models
            self.notes[name] = Note("blocked" if blocked else "missing", step.reason)
        else:
            async with self._one:
                if self._config.plans is self._for and self.serving(store) is plan:
                    await self.make(store, plan, step)

    async def make(
        self, store: SharedStore, plan: LaunchPlan, step: Step, progress: Callable[[Note], None] = lambda _: None
    ) -> Note:
        """Build one model, unloading it first; a failure becomes a note."""
        name = step.name
        held = store.models[name][1]
        was_loaded = step.change is StoreChange.UPDATE and self._in_memory(name)
        try:
            if was_loaded:
                await self._unload(name)
            await self._prepare(plan, held, progress)
            await self._right(store, step)
        except FleetError as error:
            self._failed(name, error)
        finally:
            if was_loaded:
                self._load_again(name)
        progress(self.notes[name])
        return self.notes[name]

    async def make_alone(
        self, store: SharedStore, plan: LaunchPlan, step: Step, progress: Callable[[Note], None]
    ) -> Note:
        """Build one model when no other build runs."""
        async with self._one:
            return await self.make(store, plan, step, progress)

    async def _unload(self, name: str) -> None:
        """Unload a model before it is built; continue after a while even when it stays."""
        self._dispatch(UnloadRequested(name))
        await self._changes.wait_for(lambda: None if self._is_placed(name) else True, _UNLOAD_S)

    def _load_again(self, name: str) -> None:
        if self._queries.model(name) is not None:
            self._dispatch(LoadRequested(name, next(self._request_ids)))

    def _is_placed(self, name: str) -> bool:
        model = self._queries.model(name)
        return model is not None and bool(model.placements)

    def _in_memory(self, name: str) -> bool:
        model = self._queries.model(name)
        return model is not None and model.state in (Residency.LOADED, Residency.LOADING)

    async def _right(self, store: SharedStore, step: Step) -> None:
        """Record that the store has the model as fleet.yaml asks, for all of its servers."""
        held = store.models[step.name][1]
        known = self.notes.get(step.name)
        if known is None or known.state != "made":
            self.notes[step.name] = Note(_DONE[step.change], step.reason)
        if step.change is not StoreChange.FOREIGN:
            mark = (held, await asyncio.to_thread(_stamp, held))
            self._verified |= {(plan.name, step.name): mark for plan in store.plans}

    def _failed(self, name: str, error: FleetError) -> None:
        sentence = error.sentence.removeprefix(f"{name}: ")
        text = (f"models.{name}: " if not sentence.startswith("models.") else "") + sentence
        if self.notes.get(name) != Note("failed", text):
            self.notes[name] = Note("failed", text)
            self._reporter.model(name, EventCode.MODEL_NOT_MADE, text)

    # -- before a load --------------------------------------------------------------------------------------------------

    async def before_load(self, command: Load, plan: LaunchPlan, held: ServedModel) -> bool:
        """Build a model for its load; False if it was current. Raises EngineError."""
        if held.source is None or plan.engine.store is None:
            return False
        missing = await self._prerequisites.fresh_model(command.model)
        if missing:
            raise EngineError(f"missing: {', '.join(missing)}")
        stamp = await asyncio.to_thread(_stamp, held)
        if self._verified.get((plan.name, command.model)) == (held, stamp):
            return False
        making = asyncio.ensure_future(self._prepare(plan, held))
        try:
            while not (await asyncio.wait({making}, timeout=TELL_S))[0]:
                note = self.notes.get(command.model)
                phase = note.detail if note is not None and note.state == "making" else "waiting for another to be made"
                self._dispatch(LoadProgress(command.model, command.process, command.generation, phase))
            await making
        except FleetError as error:
            self._failed(command.model, error)
            raise EngineError(
                self.notes[command.model].detail, recoverable=getattr(error, "recoverable", True)
            ) from error
        finally:
            making.cancel()
            await asyncio.gather(making, return_exceptions=True)
        self._verified[plan.name, command.model] = (held, stamp)
        if self.notes.get(command.model, Note("", "")).state != "made":
            self.notes[command.model] = Note("unchanged", "as fleet.yaml says")
        return True

    def doubt(self, process: str, model: str) -> bool:
        """Return whether to compare again after the load of a current model failed."""
        return self._verified.pop((process, model), None) is not None

    async def _prepare(
        self, plan: LaunchPlan, held: ServedModel, progress: Callable[[Note], None] = lambda _: None
    ) -> None:
        name, began, reported = held.name, time.monotonic(), ""

        def tell(phase: str, done: int, total: int) -> None:
            nonlocal reported
            percent = f" {100 * done // total} %" if total > 1 else ""
            note = Note("making", f"making {held.served_as}: {phase}{percent}", done, total if total > 1 else 0)
            self.notes[name] = note
            progress(note)
            if phase != reported and not reported:
                self._reporter.model(name, EventCode.MODEL_MAKING, f"making {held.served_as} from {held.source}")
            reported = phase

        before = self.notes.get(name)
        try:
            assert plan.engine.store is not None
            assert plan.endpoint is not None
            summary = await plan.engine.store.build(
                self._http.session,
                plan.endpoint,
                plan.context,
                held,
                state_dir=self._config.state_dir,
                progress=tell,
            )
        except BaseException:
            if self.notes.get(name, Note("", "")).state == "making":
                self.notes.pop(name)
            raise
        if summary is not None:
            took_s = time.monotonic() - began
            self.notes[name] = Note("made", summary)
            self._reporter.model(name, EventCode.MODEL_MADE, f"{summary} ({took_s:.1f} s)")
        elif before is not None and before.state != "making":
            self.notes[name] = replace(before, state="unchanged") if before.state == "failed" else before


def _stamp(held: ServedModel) -> object:
    """Return a mark that changes with the source file; None without one. Blocks."""
    found = []
    for path in _files(held):
        try:
            stat = path.stat()
            found.append((str(path), stat.st_size, stat.st_mtime_ns, stat.st_ino))
        except OSError:
            found.append((str(path), 0, 0, 0))
    return tuple(found)


def _files(held: ServedModel) -> Iterable[Path]:
    if held.source is not None and held.source.startswith("/"):
        yield Path(held.source)
    for key in ("adapter", "projector"):
        text = held.modelfile.get(key)
        if isinstance(text, str) and text.startswith("/"):
            yield Path(text)
