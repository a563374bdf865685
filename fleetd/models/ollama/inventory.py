"""List the models of an Ollama store from its manifests and blobs, without asking a server.

Invariants:
- An unreadable manifest or header is a note, not an error.
- Bounded in manifests; of each weights file only the header is read.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fleetd.errors import EngineError
from fleetd.models.formats import gguf
from fleetd.models.ollama import store
from fleetd.models.scan import EMBEDDING

MAX_MODELS = 5_000


@dataclass(frozen=True, slots=True)
class Stored:
    """A model of a store.

    `name` as Ollama lists it; `keys`: the header's `general.*` keys; `weights` None: missing.
    """

    name: str
    weights: Path | None
    size_bytes: int
    architecture: str
    context_length: int | None = None
    embedding: bool = False
    keys: Mapping[str, Any] = field(default_factory=dict)
    parameters: Mapping[str, Any] = field(default_factory=dict)
    adapters: int = 0


@dataclass(frozen=True, slots=True)
class Inventory:
    models: tuple[Stored, ...] = ()
    notes: tuple[str, ...] = ()


def is_store(folder: Path) -> bool:
    """Return whether a folder has the layout of a store."""
    return (folder / "manifests").is_dir()


def read(folder: Path, limit_s: float | None = None) -> Inventory:
    """Return the models of a store, read in at most `limit_s` seconds. Raises EngineError if the folder is not a store."""
    if not is_store(folder):
        hint = "a store has the folders manifests and blobs; Ollama's own is ~/.ollama/models"
        raise EngineError(f"{folder} is not an Ollama store", hint=hint, recoverable=False)
    notes: list[str] = []
    models: list[Stored] = []
    until = None if limit_s is None else time.monotonic() + limit_s
    for name in _names(folder):
        if until is not None and time.monotonic() > until:
            notes.append(f"stopped after {limit_s:g} s and {len(models)} models")
            break
        if len(models) >= MAX_MODELS:
            notes.append(f"stopped after {MAX_MODELS} models")
            break
        try:
            models.append(_model(folder, name, notes))
        except (ValueError, OSError) as error:
            notes.append(f"{name.short}: {error}")
    return Inventory(tuple(models), tuple(notes))


def _names(folder: Path) -> Iterator[store.ModelName]:
    for path in sorted((folder / "manifests").glob("*/*/*/*")):
        if path.name.startswith(".") or not path.is_file():
            continue
        host, namespace, model, tag = path.relative_to(folder / "manifests").parts
        yield store.ModelName(host, namespace, model, tag)


def _model(folder: Path, name: store.ModelName, notes: list[str]) -> Stored:
    full = f"{name.host}/{name.namespace}/{name.model}:{name.tag}"
    manifest = store.read_manifest(folder, full)
    layers = manifest.get("layers") if manifest is not None else None
    kinds = [layer.get("mediaType") for layer in layers or () if isinstance(layer, Mapping)]
    weights = store.model_file(folder, full)
    keys: Mapping[str, Any] = {}
    architecture, context_length, pooling, size = "", None, None, 0
    if weights is not None:
        size = weights.stat().st_size
        try:
            header = gguf.read(weights)
            keys = {key: value for key, value in header.keys.items() if key.startswith("general.")}
            architecture = header.architecture
            context_length, pooling = header.number("context_length"), header.number("pooling_type")
        except EngineError as error:
            notes.append(f"{name.short}: {error}")
    elif store.MODEL_LAYER in kinds:
        notes.append(f"{name.short}: its weights are missing (an unplugged drive?)")
    return Stored(
        name=name.short,
        weights=weights,
        size_bytes=size,
        architecture=architecture,
        context_length=context_length,
        embedding=pooling is not None or architecture in EMBEDDING,
        keys=keys,
        parameters=store.stored_parameters(folder, full),
        adapters=kinds.count("application/vnd.ollama.image.adapter"),
    )
