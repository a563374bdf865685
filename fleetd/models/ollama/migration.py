"""Generate a migration proposal: vLLM serves the models of an Ollama store under the same names, with Ollama as its fallback.

Invariants:
- vLLM gets the safetensors source that the GGUF's own header names. Nothing is guessed from a model's name; without a source in
  the header the proposal reports that, and only Ollama serves.
- One name, both engines: a weighted route whose sides are each other's fallback. To migrate is to move the weights.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from fleetd.models.ollama.inventory import Stored

_HUB = re.compile(r"^(?:https?://)?(?:www\.)?(?:huggingface\.co|hf\.co)/([\w.-]+/[\w.-]+?)(?:\.git)?(?:/.*)?$")
_REPOSITORY = re.compile(r"^[\w-][\w.-]*/[\w.-]+$")
# Header keys that name the source of the weights, nearest first. A source that is itself a GGUF is useless.
_KEYS = (
    "general.source.huggingface.repository",
    "general.source.repo_url",
    "general.source.url",
    "general.source.hf_repo",
    "general.repo_url",
    "general.base_model.0.repo_url",
    "general.base_model.0.url",
)


@dataclass(slots=True)
class Proposal:
    """A part of fleet.yaml, and the sources of its models.

    `found`: name → where its source was read; `unknown`: name → why it has none.
    """

    models: dict[str, Any] = field(default_factory=dict)
    found: dict[str, str] = field(default_factory=dict)
    unknown: dict[str, str] = field(default_factory=dict)


def source_of(model: Stored) -> tuple[str, str] | None:
    """Return (repository, header key) of the safetensors; None if not in the header."""
    for key in _KEYS:
        value = model.keys.get(key)
        if not isinstance(value, str):
            continue
        match = _HUB.match(value.strip())
        repository = match[1] if match else value.strip()
        if _REPOSITORY.match(repository) and "gguf" not in repository.lower():
            return repository, key
    return None


def propose(
    stored: Iterable[Stored],
    names: Mapping[str, str] | None = None,
    *,
    instance: str = "ollama",
    vllm_weight: int = 10,
    device: str | None = None,
) -> Proposal:
    """Return entries for every model; `names`: served name → name in the fleet.

    `vllm_weight` of 100 requests go to vLLM.
    """
    proposal = Proposal()
    for model in stored:
        short = model.name.removesuffix(":latest")
        name = (names or {}).get(model.name) or (names or {}).get(short) or short
        if name in proposal.models:
            continue
        source = source_of(model)
        served: dict[str, Any] = {"instance": instance, "served_as": model.name}
        if model.embedding:
            served["embedding"] = True
        why = _why_not(model, source)
        if why is not None or source is None:
            proposal.models[name] = served
            proposal.unknown[name] = why or ""
            continue
        ollama, vllm = f"{name}-ollama", f"{name}-vllm"
        proposal.models[name] = {
            "route": [{"to": vllm, "weight": vllm_weight}, {"to": ollama, "weight": 100 - vllm_weight}]
        }
        proposal.models[ollama] = {**served, "fallback": [vllm]}
        proposal.models[vllm] = _engine(model, source[0], device) | {"fallback": [ollama]}
        proposal.found[name] = f"{source[0]} ({source[1]})"
    return proposal


def _why_not(model: Stored, source: tuple[str, str] | None) -> str | None:
    if model.weights is None:
        return "its weights are not in the store, so nothing says what it was made from"
    if model.adapters:
        return "it has adapters, which Ollama keeps as GGUF: name the safetensors adapter by hand"
    if source is None:
        return "its header names no safetensors source: name the model that it was converted from by hand"
    return None


def _engine(model: Stored, repository: str, device: str | None) -> dict[str, Any]:
    options: dict[str, Any] = {"model": repository}
    length = model.parameters.get("num_ctx") or min(model.context_length or 8192, 8192)
    if isinstance(length, int):
        options["max_model_len"] = length
    entry: dict[str, Any] = {"engine": "vllm"}
    if device is not None:
        entry["device"] = device
    return entry | {"options": options}
