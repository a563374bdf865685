"""Models of fleet.yaml as the engines' ServedModel values, for servers and for processes of one model.

Invariants:
- A `from` that looks like a path becomes absolute, from the folder of its file, as do the files of `modelfile`; any other
  `from` is a name for the server and is kept.
"""

from __future__ import annotations

from collections.abc import Iterable

from fleetd.config.load import LoadedConfig
from fleetd.config.schema.model import HeldModel
from fleetd.engines.base import LaunchContext, ServedModel
from fleetd.resolver.entries import ConfigEntry


def held_models(loaded: LoadedConfig, names: Iterable[str]) -> Iterable[ServedModel]:
    """Yield the models of a server, in the order of the file."""
    for name in names:
        keys = loaded.config.models[name]
        if isinstance(keys, HeldModel):
            yield held_model(loaded, name, keys)


def held_model(loaded: LoadedConfig, name: str, keys: HeldModel) -> ServedModel:
    modelfile = (
        keys.modelfile.model_dump(exclude_none=True, exclude_defaults=True) if keys.modelfile is not None else {}
    )
    for key in ("adapter", "projector"):
        if key in modelfile:
            modelfile[key] = str(loaded.resolve(("models", name, "modelfile"), modelfile[key]))
    if "adapters" in modelfile:
        modelfile["adapters"] = tuple(
            str(loaded.resolve(("models", name, "modelfile"), text)) for text in modelfile["adapters"]
        )
    return ServedModel(
        name=name,
        served_as=keys.served_as or name,
        source=source_of(loaded, name, keys.from_),
        quantize=keys.quantize,
        modelfile=modelfile,
        embedding=keys.embedding,
        options=dict(keys.options),
    )


def own_held(entry: ConfigEntry, context: LaunchContext) -> ServedModel | None:
    """Return the one model of a process, for its engine's probes."""
    if entry.own_model is None:
        return None
    options = context.options.shared()
    source = options.model
    path = context.config_dir / source if source is not None and looks_like_path(source) else None
    return ServedModel(
        name=entry.base,
        served_as=context.served_as,
        source=str(path) if path is not None else None,
        embedding=options.embeddings,
    )


def looks_like_path(text: str) -> bool:
    return text.startswith(("/", "./", "../", "~")) or text.lower().endswith((".gguf", ".safetensors"))


def source_of(loaded: LoadedConfig, name: str, text: str | None) -> str | None:
    if text is None or not looks_like_path(text):
        return text
    return str(loaded.resolve(("models", name, "from"), text))
