"""Find the models in a folder, and propose an entry of fleet.yaml for each.

Invariants:
- Bounded in entries and depth; folders behind symbolic links are not entered. A note reports what was left out.
- Only headers are read. A file that is not a model is a note, not an error.
- A projector (mmproj) belongs to the model in the same folder; the first shard represents a split model.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from fleetd.errors import EngineError
from fleetd.models.formats import gguf, safetensors
from fleetd.models.ollama.modelfile import split_of

MAX_ENTRIES = 200_000
MAX_MODELS = 2_000
MAX_DEPTH = 8
_UNUSED = re.compile(r"[^a-z0-9.]+")
_FIRST = re.compile(r"-00001-of-\d{5}\.gguf$", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Found:
    """A model on disk.

    `kind` is gguf or safetensors; `path` a file, or the folder of a safetensors model.
    """

    key: str
    kind: str
    path: Path
    size_bytes: int
    architecture: str = ""
    context_length: int | None = None
    embedding: bool = False
    shards: int = 1
    projector: Path | None = None

    def entry(self, instance: str | None = None) -> dict[str, Any]:
        """Return its entry: served by `instance` if possible, else its own process."""
        if self.kind == "safetensors":
            return {"engine": "vllm", "options": {"model": str(self.path)}}
        if instance is not None and self.shards == 1:
            served: dict[str, Any] = {"instance": instance, "from": str(self.path)}
            return served | ({"embedding": True} if self.embedding else {})
        options: dict[str, Any] = {"model": str(self.path)}
        if self.projector is not None:
            options["mmproj"] = str(self.projector)
        return {"engine": "llamacpp", "options": options | ({"embeddings": True} if self.embedding else {})}


@dataclass(frozen=True, slots=True)
class Scan:
    """The models of a folder, and notes about what was skipped."""

    models: tuple[Found, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(slots=True)
class _Walk:
    root: Path
    left: int = MAX_ENTRIES
    notes: list[str] = field(default_factory=list)
    deep: list[Path] = field(default_factory=list)  # folders that were not searched deeper

    def folders(self) -> Iterator[tuple[Path, list[Path]]]:
        """Yield (folder, its files), nearest first; adds a note where it stopped."""
        waiting = [(self.root, 0)]
        while waiting:
            folder, depth = waiting.pop(0)
            try:
                with os.scandir(folder) as entries:
                    listed = sorted(entries, key=lambda entry: entry.name)
            except OSError as error:
                self.notes.append(f"{folder}: {error.strerror or error}")
                continue
            self.left -= len(listed)
            if self.left < 0:
                self.notes.append(f"stopped at {folder}: more than {MAX_ENTRIES} files; name a smaller folder")
                return
            below = [
                entry for entry in listed if not entry.name.startswith(".") and entry.is_dir(follow_symlinks=False)
            ]
            if depth < MAX_DEPTH:
                waiting += [(Path(entry.path), depth + 1) for entry in below]
            elif below:
                self.deep.append(folder)
            yield folder, [Path(entry.path) for entry in listed if entry.is_file()]


def scan(root: Path) -> Scan:
    """Return the models below a folder. Raises EngineError if it is not a folder."""
    if not root.is_dir():
        raise EngineError(f"{root} is not a folder", recoverable=False)
    walk = _Walk(root)
    models: list[Found] = []
    for folder, files in walk.folders():
        models += _ggufs(files, walk.notes)
        models += _safetensors(folder, files, walk.notes)
        if len(models) > MAX_MODELS:
            walk.notes.append(f"stopped at {folder}: more than {MAX_MODELS} models")
            break
    if walk.deep:
        more = f" and {len(walk.deep) - 1} more" if len(walk.deep) > 1 else ""
        walk.notes.append(f"{walk.deep[0]}{more}: not searched deeper than {MAX_DEPTH} folders")
    return Scan(tuple(_named(models[:MAX_MODELS])), tuple(walk.notes))


def entries(models: Sequence[Found], instance: str | None = None) -> dict[str, dict[str, Any]]:
    """Return the `models` part of a fleet.yaml."""
    return {model.key: model.entry(instance) for model in models}


def _ggufs(files: Sequence[Path], notes: list[str]) -> Iterator[Found]:
    whole = [path for path in files if path.suffix.lower() == ".gguf"]
    projectors = [path for path in whole if "mmproj" in path.name.lower()]
    for path in whole:
        if path in projectors or (split_of(path) > 1 and not _FIRST.search(path.name)):
            continue
        try:
            parts = [Path(part) for part in gguf.shards(path)]
            header = gguf.read(path)
            size = sum(part.stat().st_size for part in parts)
        except (EngineError, OSError) as error:
            notes.append(str(error))
            continue
        yield Found(
            key=_FIRST.sub("", path.name).removesuffix(path.suffix),
            kind="gguf",
            path=path,
            size_bytes=size,
            architecture=header.architecture,
            context_length=header.number("context_length"),
            embedding=header.number("pooling_type") is not None,
            shards=len(parts),
            projector=projectors[0] if len(projectors) == 1 else None,
        )


def _safetensors(folder: Path, files: Sequence[Path], notes: list[str]) -> Iterator[Found]:
    names = {path.name for path in files}
    if "config.json" not in names or not any(name.endswith(".safetensors") for name in names):
        return
    try:
        model = safetensors.read_folder(folder)
    except (EngineError, OSError) as error:
        notes.append(str(error))
        return
    listed = model.config.get("architectures")
    architecture = str(listed[0]) if isinstance(listed, list) and listed else ""
    yield Found(
        key=folder.name,
        kind="safetensors",
        path=folder,
        size_bytes=model.weight_bytes,
        architecture=architecture,
        context_length=model.number("max_position_embeddings"),
        shards=len(model.files),
    )


def _named(models: Sequence[Found]) -> Iterator[Found]:
    """Give each model a unique key that is valid in fleet.yaml."""
    taken: set[str] = set()
    for model in models:
        base = _UNUSED.sub("-", model.key.lower()).strip("-.")[:60] or "model"
        key, number = base, 2
        while key in taken:
            key, number = f"{base}-{number}", number + 1
        taken.add(key)
        yield replace(model, key=key)
