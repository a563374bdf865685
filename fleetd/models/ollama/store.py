"""Read Ollama's store on disk, and parse its model names. Nothing here changes a store.

    MODELS_DIR/manifests/HOST/NAMESPACE/MODEL/TAG    JSON: config and layers, each with mediaType, digest, size
    MODELS_DIR/blobs/sha256-<64 hex digits>          the bytes, or a symbolic link to a file elsewhere

Invariants:
- A name is `[host/][namespace/]model[:tag]`; registry.ollama.ai, library and latest are implied, case is ignored.
- Files of a store are untrusted: a manifest is read up to a limit, and a digest is checked before it becomes a path.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DEFAULT_HOST = "registry.ollama.ai"
DEFAULT_NAMESPACE = "library"
DEFAULT_TAG = "latest"
MANIFEST_LIMIT_BYTES = 4 * 1024 * 1024
DIGEST = re.compile(r"sha256[:-]([0-9a-fA-F]{64})")
MODEL_LAYER = "application/vnd.ollama.image.model"
PARAMS_LAYER = "application/vnd.ollama.image.params"

_PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,79}")
_NAMESPACE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]{0,79}")
_HOST = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.:-]{0,349}")


@dataclass(frozen=True, slots=True)
class ModelName:
    """A model name with all four parts."""

    host: str
    namespace: str
    model: str
    tag: str

    @classmethod
    def parse(cls, text: str) -> ModelName:
        """Parse a name as Ollama does. Raises ValueError that names the invalid part."""
        if "@" in text:
            raise ValueError(f"{text!r} is not a model name: Ollama does not accept a digest after '@'")
        rest, tag = text, DEFAULT_TAG
        head, colon, last = text.rpartition(":")
        if colon and "/" not in last:
            rest, tag = head, last
        parts = rest.split("/")
        if len(parts) > 3:
            raise ValueError(f"{text!r} is not a model name: at most host/namespace/model:tag")
        model = parts[-1]
        namespace = parts[-2] if len(parts) > 1 else DEFAULT_NAMESPACE
        host = parts[-3] if len(parts) > 2 else DEFAULT_HOST
        for part, pattern, what in (
            (model, _PART, "model"),
            (tag, _PART, "tag"),
            (namespace, _NAMESPACE, "namespace"),
            (host, _HOST, "host"),
        ):
            if not pattern.fullmatch(part):
                raise ValueError(
                    f"{text!r} is not a model name: the {what} {part!r} must be letters, digits, '_', '-' or '.', "
                    "start with a letter, a digit or '_', and have at most 80 characters"
                )
        return cls(host, namespace, model, tag)

    @property
    def key(self) -> str:
        """The full name in lower case, for comparisons."""
        return f"{self.host}/{self.namespace}/{self.model}:{self.tag}".lower()

    @property
    def short(self) -> str:
        """The name as Ollama lists it: no implied host or namespace, always the tag."""
        prefix = ""
        if self.host.lower() != DEFAULT_HOST:
            prefix = f"{self.host}/{self.namespace}/"
        elif self.namespace.lower() != DEFAULT_NAMESPACE:
            prefix = f"{self.namespace}/"
        return f"{prefix}{self.model}:{self.tag}"


def same_name(one: str, other: str) -> bool:
    """Return whether two names mean one model; invalid ones are compared as text."""
    try:
        return ModelName.parse(one).key == ModelName.parse(other).key
    except ValueError:
        return one == other


def blob_path(models_dir: Path, digest: str) -> Path:
    """Return the path of a blob. Raises ValueError if `digest` is not a sha256 digest."""
    match = DIGEST.fullmatch(digest)
    if match is None:
        raise ValueError(f"{digest!r} is not a sha256 digest")
    return models_dir / "blobs" / f"sha256-{match.group(1).lower()}"


def manifest_path(models_dir: Path, name: ModelName) -> Path | None:
    """Return the path of a manifest, ignoring case; None if not in the store."""
    exact = models_dir / "manifests" / name.host / name.namespace / name.model / name.tag
    if exact.is_file():
        return exact
    folder = models_dir / "manifests"
    for part in (name.host, name.namespace, name.model, name.tag):
        try:
            match = next((entry for entry in folder.iterdir() if entry.name.lower() == part.lower()), None)
        except OSError:
            return None
        if match is None:
            return None
        folder = match
    return folder if folder.is_file() else None


def read_manifest(models_dir: Path, name: str) -> Mapping[str, Any] | None:
    """Return a manifest; None if not in the store. Raises ValueError if unreadable."""
    path = manifest_path(models_dir, ModelName.parse(name))
    if path is None:
        return None
    return _read_object(path)


def layer_path(models_dir: Path, manifest: Mapping[str, Any], media_type: str) -> Path | None:
    """Return the path of the first layer of a type; None if the manifest has none."""
    layers = manifest.get("layers")
    for layer in layers if isinstance(layers, list) else ():
        if isinstance(layer, Mapping) and layer.get("mediaType") == media_type:
            return blob_path(models_dir, str(layer.get("digest")))
    return None


def model_file(models_dir: Path, name: str) -> Path | None:
    """Return the weights of a model, None if missing. Raises ValueError if unreadable."""
    manifest = read_manifest(models_dir, name)
    path = layer_path(models_dir, manifest, MODEL_LAYER) if manifest is not None else None
    return path if path is not None and path.is_file() else None


def stored_parameters(models_dir: Path, name: str) -> Mapping[str, Any]:
    """Return the PARAMETERs of a stored model. Raises ValueError if unreadable."""
    manifest = read_manifest(models_dir, name)
    path = layer_path(models_dir, manifest, PARAMS_LAYER) if manifest is not None else None
    return _read_object(path) if path is not None and path.is_file() else {}


def _read_object(path: Path) -> Mapping[str, Any]:
    try:
        with path.open("rb") as file:
            body = file.read(MANIFEST_LIMIT_BYTES + 1)
        if len(body) > MANIFEST_LIMIT_BYTES:
            raise ValueError(f"{path} is larger than {MANIFEST_LIMIT_BYTES} bytes")
        data = json.loads(body)
    except (OSError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(data, Mapping):
        raise ValueError(f"{path} is not a JSON object")
    return data
