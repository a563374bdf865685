"""The models that fleet.yaml gives an Ollama server: what is wrong with their entries, and making them before a load.

The rules of this file
- What Ollama keeps (`from`, `quantize`, `modelfile`) is checked here, since Ollama says so only when a model is made.
- One store is worked on by one call at a time, whichever replica asks: the first makes the model, the others find it made.
- Load-time options are written into the model that is made: a request to /v1 carries none, and Ollama would load the model again
  without them. So they are refused where fleetd makes no model.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit
from weakref import WeakValueDictionary

from fleetd.config.schema.types import FieldType, Whole
from fleetd.config.validate.raw_entries import read
from fleetd.engines.base import Endpoint, HeldModel, LaunchContext, OptionProblem
from fleetd.engines.load_options import COUNT, INDEX, LARGEST, SWITCH, held_option_problems, load_options
from fleetd.errors import EngineError
from fleetd.models.ollama import store
from fleetd.models.ollama.modelfile import (
    absolute,
    looks_like_path,
    modelfile_mistakes,
    quantize_mistakes,
    recipe,
    source_mistakes,
)
from fleetd.units import shown

if TYPE_CHECKING:
    from aiohttp import ClientSession

    from fleetd.models.ollama.api import Progress
    from fleetd.models.ollama.modelfile import ModelRecipe
    from fleetd.models.ollama.sync import Library, Step

# options of a request that make Ollama start a new runner when they differ from the loaded one's
LOAD_TIME_OPTIONS: Mapping[str, FieldType] = {
    "num_ctx": COUNT,
    "num_batch": COUNT,
    "num_gpu": Whole(-1, LARGEST),
    "main_gpu": INDEX,
    "use_mmap": SWITCH,
    "num_thread": INDEX,
}
_RESERVED = (":local", ":cloud", "-cloud")
_STORES: WeakValueDictionary[tuple[int, str], asyncio.Lock] = WeakValueDictionary()


def held_problems(models: Iterable[HeldModel]) -> list[OptionProblem]:
    """Return what is wrong with the entries of the models that a server shall hold."""
    found: list[OptionProblem] = []
    elsewhere = "; what is no option of a load goes under modelfile.parameters"
    for model in models:
        found += (OptionProblem(("models", model.name, *where), said) for where, said in _mistakes(model))
        found += held_option_problems([model], LOAD_TIME_OPTIONS, "Ollama", elsewhere) or _unmade_options(model)
    return found


def _mistakes(model: HeldModel) -> Iterator[tuple[tuple[str | int, ...], str]]:
    try:
        store.ModelName.parse(model.served_as)
    except ValueError as error:
        yield ("served_as",), str(error)
    if model.served_as.lower().endswith(_RESERVED):
        yield ("served_as",), f"Ollama keeps the ending of {model.served_as!r} for itself"
    for message in source_mistakes(model.source):
        yield ("from",), message
    if model.source is None and (model.quantize or model.modelfile):
        yield ("from",), "is needed: there is nothing that quantize or modelfile could change"
    if model.source is not None and store.same_name(model.source, model.served_as):
        said = f"names the model itself; what is made of it needs another name: served_as: {model.served_as}-own"
        yield ("from",), said
    yield from (*quantize_mistakes(model.quantize), *modelfile_mistakes(model.modelfile), *_contradictions(model))


def absent_sources(models: Iterable[HeldModel], config_dir: Path, models_dir: Path) -> Iterator[OptionProblem]:
    """Yield a warning for each file that a model is to be made from and that is absent, unless the store has the model."""
    for model in models:
        if model.source is None or not looks_like_path(model.source):
            continue
        path = absolute(model.source, config_dir)
        there = os.path.exists(path)  # noqa: PTH110 - the other one raises where a folder may not be entered
        if not there and not _is_stored(models_dir, model.served_as):
            message = f"{path} is not there: {model.name} cannot be made from it until it is"
            yield OptionProblem(("models", model.name, "from"), message, warning=True)


def _is_stored(models_dir: Path, served_as: str) -> bool:
    try:
        return store.model_file(models_dir, served_as) is not None
    except (OSError, ValueError):
        return False


def _contradictions(model: HeldModel) -> Iterator[tuple[tuple[str | int, ...], str]]:
    """Yield the options of a load that the model itself is to keep with another value."""
    parameters: Any = model.modelfile.get("parameters")
    if not isinstance(parameters, Mapping):
        return
    for key, value in model.options.items():
        kind = LOAD_TIME_OPTIONS.get(key)
        if kind is None or key not in parameters:
            continue
        kept, loaded = read(kind, parameters[key]), read(kind, value)
        if None not in (kept, loaded) and kept != loaded:
            said = f"{shown(value)} contradicts modelfile.parameters.{key}, which is {shown(parameters[key])}"
            yield ("options", key), f"{said}: state it in one of the two"


def _unmade_options(model: HeldModel) -> list[OptionProblem]:
    """Return the refusal of options of which nothing would be left after the first request."""
    if not model.options or model.source is not None or model.quantize or model.modelfile:
        return []
    said = "would hold until the first request to /v1, which carries none: fleetd does not make this model"
    message = f"{said}; have one made of it: from: {model.served_as}, served_as: {model.served_as}-own"
    return [OptionProblem(("models", model.name, "options"), message)]


def shared_store(endpoint: Endpoint, models_dir: Path) -> Path | None:
    """Return the store's folder where it is ours to write; None for a server elsewhere, and one whose folder is not here."""
    host = urlsplit(endpoint.base_url).hostname or ""
    here = host == "localhost" or host.startswith("127.") or host == "::1"
    return models_dir if here and models_dir.is_dir() else None


def library(http: ClientSession, endpoint: Endpoint, models_dir: Path, state_dir: Path) -> Library:
    """Return the store of a server."""
    from fleetd.models.ollama.sync import Library

    return Library(http, endpoint.base_url, state_dir, shared_store(endpoint, models_dir), endpoint.api_key)


def recipe_of(model: HeldModel, config_dir: Path) -> ModelRecipe:
    """Return how the model is made. Raises EngineError with everything that is wrong with its entry."""
    try:
        return recipe(
            model.name,
            model.served_as,
            source=model.source,
            quantize=model.quantize,
            modelfile=_with_load_options(model),
            config_dir=config_dir,
        )
    except ValueError as error:
        raise EngineError(str(error).replace("\n", "; "), recoverable=False) from error


def _with_load_options(model: HeldModel) -> Mapping[str, Any]:
    """Return the model's Modelfile, its load-time options among the parameters."""
    pinned = load_options(model, LOAD_TIME_OPTIONS)
    if not pinned:
        return model.modelfile
    return {**model.modelfile, "parameters": {**(model.modelfile.get("parameters") or {}), **pinned}}


def one_at_a_time(key: str) -> asyncio.Lock:
    """Return the lock of a store; hold it while anything in the store is made or deleted."""
    return _STORES.setdefault((id(asyncio.get_running_loop()), key), asyncio.Lock())


async def prepare(
    http: ClientSession,
    endpoint: Endpoint,
    context: LaunchContext,
    model: HeldModel,
    *,
    models_dir: Path,
    state_dir: Path,
    progress: Progress | None = None,
    timeout_s: float = 3600.0,
) -> Step | None:
    """Make the model in the server's store as fleet.yaml says; return what was done, None where there is nothing to make.

    `models_dir` is where the server keeps its models, as seen from here; `state_dir` holds the record of what was made.
    Raises EngineError; where only a drive is missing it is worth another try.
    """
    from fleetd.models.ollama.api import ignore_progress

    if model.source is None:
        return None
    wanted = recipe_of(model, context.config_dir)
    found = library(http, endpoint, models_dir, state_dir)
    async with one_at_a_time(found.key):
        return await found.ensure(wanted, progress or ignore_progress, timeout_s)
