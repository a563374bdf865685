"""The store of an Ollama server: which servers share one, and building models in it."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit
from weakref import WeakValueDictionary

from fleetd.engines.base import Endpoint, LaunchContext, ServedModel
from fleetd.engines.load_options import load_options
from fleetd.engines.ollama.environment import store_folder
from fleetd.engines.ollama.options import LOAD_TIME_OPTIONS
from fleetd.errors import EngineError
from fleetd.models.ollama import store
from fleetd.models.ollama.modelfile import recipe
from fleetd.models.ollama.sync import Library, StoreChange, copied

if TYPE_CHECKING:
    from aiohttp import ClientSession

    from fleetd.models.ollama.api import Progress
    from fleetd.models.ollama.modelfile import ModelRecipe

BUILD_TIMEOUT_S = 3600.0
_LOCKS: WeakValueDictionary[tuple[int, str], asyncio.Lock] = WeakValueDictionary()  # by event loop and store


class OllamaStore:
    """Builds models by /api/create, one at a time per store, across replicas."""

    def key(self, context: LaunchContext, endpoint: Endpoint) -> str:
        folder = _shared_folder(context, endpoint)
        return str(folder.resolve()) if folder is not None else endpoint.base_url

    def library(self, http: ClientSession, endpoint: Endpoint, context: LaunchContext, state_dir: Path) -> Library:
        return Library(http, endpoint.base_url, state_dir, _shared_folder(context, endpoint), endpoint.api_key)

    def recipe(self, context: LaunchContext, model: ServedModel) -> ModelRecipe:
        try:
            return recipe(
                model.name,
                model.served_as,
                source=model.source,
                quantize=model.quantize,
                modelfile=_with_load_options(model),
                config_dir=context.config_dir,
            )
        except ValueError as error:
            raise EngineError(str(error).replace("\n", "; "), recoverable=False) from error

    def lock(self, key: str) -> asyncio.Lock:
        return _LOCKS.setdefault((id(asyncio.get_running_loop()), key), asyncio.Lock())

    def has_copy(self, context: LaunchContext, endpoint: Endpoint | None, model: ServedModel, state_dir: Path) -> bool:
        if endpoint is None:
            return False
        folder = _shared_folder(context, endpoint)
        if folder is not None:
            return store.model_file(folder, model.served_as) is not None
        return copied(state_dir, endpoint.base_url, model.served_as)

    async def build(
        self, http: ClientSession, endpoint: Endpoint, context: LaunchContext, model: ServedModel, *,
        state_dir: Path, progress: Progress | None = None,
    ) -> str | None:  # fmt: skip
        from fleetd.models.ollama.api import ignore_progress

        if model.source is None:
            return None
        wanted = self.recipe(context, model)
        library = self.library(http, endpoint, context, state_dir)
        async with self.lock(library.key):
            step = await library.ensure(wanted, progress or ignore_progress, BUILD_TIMEOUT_S)
        if step.change in (StoreChange.NONE, StoreChange.FOREIGN):
            return None
        return f"{model.served_as}: {step.change}d, {step.reason}"


def _shared_folder(context: LaunchContext, endpoint: Endpoint) -> Path | None:
    """Return the store's folder; None if the server or the folder is elsewhere."""
    host = urlsplit(endpoint.base_url).hostname or ""
    here = host == "localhost" or host.startswith("127.") or host == "::1"
    folder = store_folder(context)
    return folder if here and folder.is_dir() else None


def _with_load_options(model: ServedModel) -> Mapping[str, Any]:
    """Return the modelfile with load options as parameters, since /v1 carries none."""
    pinned = load_options(model, LOAD_TIME_OPTIONS)
    if not pinned:
        return model.modelfile
    return {**model.modelfile, "parameters": {**(model.modelfile.get("parameters") or {}), **pinned}}
