"""Register a model in an Ollama store by writing its manifest: the file stays in place, nothing is copied.

Since 0.30 /api/create rewrites every GGUF, so that an import needs up to three times the file's size. A running server notices a
manifest written here at once, and it costs a few hundred bytes.

Invariants:
- Small blobs are named by their real SHA-256; the blob of the weights is a link that already exists.
- The manifest is written last, by rename: a server that reads meanwhile gets the old model or the new one.
- Only what a manifest can express completely is registered: one whole GGUF, no adapters, no quantization.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import sys
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

from fleetd.errors import EngineError
from fleetd.models.formats import gguf
from fleetd.models.ollama import store
from fleetd.models.ollama.modelfile import ModelRecipe

MANIFEST_TYPE = "application/vnd.docker.distribution.manifest.v2+json"
CONFIG_TYPE = "application/vnd.docker.container.image.v1+json"
LAYER_TYPE = "application/vnd.ollama.image."
# general.file_type of a GGUF header, as Ollama spells it
_FILE_TYPES: Mapping[Any, str] = {
    0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 7: "Q8_0", 8: "Q5_0", 9: "Q5_1", 10: "Q2_K", 11: "Q3_K_S", 12: "Q3_K_M",
    13: "Q3_K_L", 14: "Q4_K_S", 15: "Q4_K_M", 16: "Q5_K_S", 17: "Q5_K_M", 18: "Q6_K", 32: "BF16",
}  # fmt: skip
_MACHINES = {"x86_64": "amd64", "AMD64": "amd64", "aarch64": "arm64", "arm64": "arm64"}


def register(models_dir: Path, recipe: ModelRecipe, digest: str) -> None:
    """Write the files of a model whose weights are blob `digest`. Raises EngineError."""
    blob = store.blob_path(models_dir, digest)
    try:
        header = gguf.read(blob)
        layers = [{"mediaType": store.MODEL_LAYER, "digest": digest, "size": blob.stat().st_size}]
        layers += [_layer(models_dir, kind, body) for kind, body in _bodies(recipe)]
        config = _config(recipe, header, [str(layer["digest"]) for layer in layers])
        config_layer = _layer(models_dir, "", json.dumps(config, separators=(",", ":")).encode())
        manifest = {"schemaVersion": 2, "mediaType": MANIFEST_TYPE, "config": config_layer, "layers": layers}
        name = store.ModelName.parse(recipe.served_as)
        path = store.manifest_path(models_dir, name)
        if path is None:
            path = models_dir / "manifests" / name.host / name.namespace / name.model / name.tag
            path.parent.mkdir(parents=True, exist_ok=True)
        _replace(path, json.dumps(manifest, separators=(",", ":")).encode())
    except OSError as error:
        raise EngineError(f"{recipe.name}: cannot register {recipe.served_as} in {models_dir}: {error}") from error
    except ValueError as error:
        raise EngineError(f"{recipe.name}: {recipe.source}: {error}", recoverable=False) from error


def named_blobs(models_dir: Path, served_as: str) -> frozenset[str]:
    """Return the file names of the blobs in a model's manifest; empty without one."""
    try:
        manifest = store.read_manifest(models_dir, served_as) or {}
    except ValueError:
        return frozenset()
    parts = [manifest.get("config"), *(manifest.get("layers") or ())]
    digests = (str(part.get("digest", "")) for part in parts if isinstance(part, Mapping))
    return frozenset(digest.replace(":", "-").lower() for digest in digests if store.DIGEST.fullmatch(digest))


def _bodies(recipe: ModelRecipe) -> list[tuple[str, bytes]]:
    """Return the small layers, in the order in which Ollama writes them."""
    bodies = [("template", recipe.template), ("system", recipe.system), *(("license", text) for text in recipe.license)]
    found = [(kind, text.encode()) for kind, text in bodies if text]
    if recipe.parameters:
        parameters = {
            key: list(value) if isinstance(value, tuple) else value for key, value in recipe.parameters.items()
        }
        found.append(("params", json.dumps(parameters, sort_keys=True, separators=(",", ":")).encode()))
    if recipe.messages:
        messages = [{"role": role, "content": content} for role, content in recipe.messages]
        found.append(("messages", json.dumps(messages, separators=(",", ":")).encode()))
    return found


def _layer(models_dir: Path, kind: str, body: bytes) -> dict[str, Any]:
    digest = "sha256:" + hashlib.sha256(body).hexdigest()
    path = store.blob_path(models_dir, digest)
    if not path.is_file():
        path.parent.mkdir(exist_ok=True)
        _replace(path, body)
    return {"mediaType": LAYER_TYPE + kind if kind else CONFIG_TYPE, "digest": digest, "size": len(body)}


def _config(recipe: ModelRecipe, header: gguf.Header, digests: list[str]) -> dict[str, Any]:
    family = header.architecture
    config: dict[str, Any] = {
        "model_format": "gguf",
        "model_family": family,
        "model_families": [family],
        "model_type": _parameter_count(sum(prod(tensor.dims) for tensor in header.tensors)),
        "file_type": _FILE_TYPES.get(header.keys.get("general.file_type"), "unknown"),
    }
    extras = {"renderer": recipe.renderer, "parser": recipe.parser, "requires": recipe.requires}
    config |= {key: value for key, value in extras.items() if value}
    machine = _MACHINES.get(platform.machine(), platform.machine())
    system = "darwin" if sys.platform == "darwin" else "linux"
    return config | {"architecture": machine, "os": system, "rootfs": {"type": "layers", "diff_ids": digests}}


def _parameter_count(count: int) -> str:
    """Return a number of parameters as Ollama lists it: 115K, 494.03M, 7.6B."""
    for size, letter, digits in ((10**12, "T", 1), (10**9, "B", 1), (10**6, "M", 2), (10**3, "K", 0)):
        if count >= size:
            return f"{count / size:.{digits if count % size else 0}f}{letter}"
    return str(count)


def _replace(path: Path, body: bytes) -> None:
    fresh = path.with_name(f".{path.name}.{os.getpid()}")
    fresh.write_bytes(body)
    fresh.replace(path)
