"""Find the models in a folder, and propose an entry of fleet.yaml for each.

Invariants:
- Bounded in entries, depth and, if asked, time; folders behind symbolic links are not entered. A note reports what was left out.
- Only headers are read. A file that is not a model is a note, not an error; adapters, vocabularies and projectors are no models.
- A projector belongs to the models in the same folder whose width it has; the first shard represents a split model.
- A file that several names lead to is one model.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from fleetd.errors import EngineError
from fleetd.models.formats import gguf, safetensors
from fleetd.models.formats.gguf import Header
from fleetd.models.ollama.modelfile import split_of

MAX_ENTRIES = 200_000
MAX_MODELS = 2_000
MAX_DEPTH = 8
EMBEDDING = frozenset({"bert", "nomic-bert", "nomic-bert-moe", "jina-bert-v2", "gemma-embedding", "t5encoder"})
_RERANK = 4  # llama.cpp's pooling type of a model that judges pairs of texts
_OPAQUE = re.compile(r"(ggml-)?(model|weights|sha256[-:][0-9a-f]{64})([-_.](i?q\d\w*|b?f16|f32))?", re.IGNORECASE)
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
    rerank: bool = False
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
        if self.rerank or self.embedding:
            options["rerank" if self.rerank else "embeddings"] = True
        return {"engine": "llamacpp", "options": options}


@dataclass(frozen=True, slots=True)
class Scan:
    """The models of a folder, and notes about what was skipped."""

    models: tuple[Found, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(slots=True)
class _Walk:
    root: Path
    until: float | None = None  # monotonic
    left: int = MAX_ENTRIES
    notes: list[str] = field(default_factory=list)
    deep: list[Path] = field(default_factory=list)  # folders that were not searched deeper
    seen: set[tuple[int, int]] = field(default_factory=set)

    @property
    def late(self) -> bool:
        return self.until is not None and time.monotonic() > self.until

    def is_new(self, path: Path) -> bool:
        """Remember a file by its inode; False if another name has led to it. Raises OSError."""
        status = path.stat()
        mark = (status.st_dev, status.st_ino)
        known = mark in self.seen
        self.seen.add(mark)
        return not known

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


def scan(root: Path, limit_s: float | None = None) -> Scan:
    """Return the models below a folder, found in at most `limit_s` seconds. Raises EngineError if it is not a folder."""
    if not root.is_dir():
        raise EngineError(f"{root} is not a folder", recoverable=False)
    walk = _Walk(root, None if limit_s is None else time.monotonic() + limit_s)
    models: list[Found] = []
    for folder, files in walk.folders():
        models += _ggufs(files, walk)
        models += _safetensors(folder, files, walk)
        if walk.late:
            walk.notes.append(f"stopped at {folder} after {limit_s:g} s; name a smaller folder")
            break
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


def _ggufs(files: Sequence[Path], walk: _Walk) -> Iterator[Found]:
    models: list[tuple[Found, Header]] = []
    projectors: list[tuple[Path, Header]] = []
    for path in (path for path in files if path.suffix.lower() == ".gguf"):
        if walk.late:
            break
        if split_of(path) > 1 and not _FIRST.search(path.name):
            continue
        try:
            if not walk.is_new(path):
                continue
            header = gguf.read(path)
            if header.architecture == "clip" or "mmproj" in path.name.lower():
                projectors.append((path, header))
            elif unusable := _unusable(header):
                walk.notes.append(f"{path}: left out, {unusable}")
            else:
                models.append((_gguf_model(path, header), header))
        except (EngineError, OSError) as error:
            walk.notes.append(str(error))
    for model, header in models:
        fitting = [path for path, projector in projectors if _belongs(projector, header)]
        yield replace(model, projector=fitting[0]) if len(fitting) == 1 else model


def _gguf_model(path: Path, header: Header) -> Found:
    parts = [Path(part) for part in gguf.shards(path)]
    pooling = header.number("pooling_type")
    return Found(
        key=_key_of(path, header),
        kind="gguf",
        path=path,
        size_bytes=sum(part.stat().st_size for part in parts),
        architecture=header.architecture,
        context_length=header.number("context_length"),
        embedding=bool(pooling) or header.architecture in EMBEDDING,
        rerank=pooling == _RERANK,
        shards=len(parts),
    )


def _key_of(path: Path, header: Header) -> str:
    """Return the name of the file; the header's own if the file's says nothing, such as model.gguf."""
    stem = _FIRST.sub("", path.name).removesuffix(path.suffix)
    own = header.keys.get("general.name")
    if (_OPAQUE.fullmatch(stem) or not _UNUSED.sub("", stem.lower())) and isinstance(own, str) and own.strip():
        return own.strip()
    return stem


def _unusable(header: Header) -> str | None:
    """Return why llama.cpp cannot serve a file of its own; None if it can."""
    kind = header.keys.get("general.type", "model")
    if kind != "model":
        return f"it is no model but of type {kind!r}"
    if not header.tensors and not header.number("block_count"):
        return "it has no weights (a vocabulary)"
    return None


def _belongs(projector: Header, model: Header) -> bool:
    """Return whether a projector can be of this model: its output is as wide as the model, where both say."""
    if model.architecture in EMBEDDING:
        return False
    out = projector.keys.get("clip.vision.projection_dim") or projector.keys.get("clip.audio.projection_dim")
    width = model.number("embedding_length")
    return not isinstance(out, int) or not width or out % width == 0


def _safetensors(folder: Path, files: Sequence[Path], walk: _Walk) -> Iterator[Found]:
    weights = [path for path in files if path.suffix == ".safetensors"]
    if not weights or not any(path.name == "config.json" for path in files):
        return
    try:
        if not walk.is_new(weights[0]):  # another snapshot of the same model in Hugging Face's cache
            return
        model = safetensors.read_folder(folder)
    except (EngineError, OSError) as error:
        walk.notes.append(str(error))
        return
    listed = model.config.get("architectures")
    architecture = str(listed[0]) if isinstance(listed, list) and listed else ""
    yield Found(
        key=_folder_key(folder),
        kind="safetensors",
        path=folder,
        size_bytes=model.weight_bytes,
        architecture=architecture,
        context_length=model.number("max_position_embeddings"),
        shards=len(model.files),
    )


def _folder_key(folder: Path) -> str:
    """Return the name of a model's folder; of a snapshot models--ORG--NAME/snapshots/REVISION, NAME."""
    repository = folder.parent.parent.name
    if folder.parent.name == "snapshots" and repository.startswith("models--"):
        return repository.rsplit("--", 1)[-1]
    return folder.name


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
