"""Convert a list of model entities (such as config-aientities.json) to models of a fleet.

Invariants:
- Field names are a mapping, not a schema: `FIELDS` lists the paths of each meaning, and a caller may add more.
- Unknown fields are in the report, with the number of entities that have them.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from fleetd.config.importers.emit import to_yaml
from fleetd.config.importers.ollama_parameters import parameter
from fleetd.config.importers.report import Imported, Report
from fleetd.errors import ConfigError, Problem

# Property of a model → the paths under which files have it; the first existing path counts.
FIELDS: Mapping[str, tuple[str, ...]] = {
    "name": ("id", "name", "key", "slug"),
    "title": ("displayName", "display_name", "title", "label"),
    "enabled": ("enabled", "active"),
    "from": ("model.path", "modelPath", "model_path", "path", "file", "gguf", "from", "model.file"),
    "format": ("model.format", "format"),
    "quantization": ("model.quantization", "quantization", "quant", "model.quant"),
    "template": ("prompt.template", "template"),
    "system": ("prompt.system", "systemPrompt", "system_prompt", "system"),
    "parameters": ("parameters", "params", "options", "model.parameters"),
    "aliases": ("aliases", "alias"),
    "served_as": ("model.name", "ollamaModel", "ollama_model", "tag"),
}
_SERVERS = ("lmStudioServers", "lm_studio_servers", "lmstudio")
_LISTS = ("entities", "models", "aiEntities", "items")
_VOLUME = re.compile(r"(/Volumes/[^/]+|/mnt/[^/]+|/media/[^/]+/[^/]+)/")
_QUANTIZE = ("q8_0", "q4_K_M", "q4_K_S", "f16", "f32")  # the quantisations that Ollama can create
_WHOLE_TYPES = frozenset({"f16", "f32", "bf16"})  # that Ollama can quantise
QuantizationOf = Callable[[str], str | None]


def import_entities(
    text: str,
    *,
    instance: Sequence[str] = (),
    fields: Mapping[str, Sequence[str]] | None = None,
    shown: str = "entities",
    quantize: str = "",
    quantization_of: QuantizationOf | None = None,
) -> Imported:
    """Return models for every entity. Without `instance` an Ollama server is added for them. Raises ConfigError.

    `fields` adds paths to `FIELDS`, tried first: {"from": ["weights.file"]}. `quantize` is the quantisation to create of every f16 and
    f32 file; `quantization_of` returns the one in a GGUF file's header, None if it cannot be read.
    """
    if quantize and quantize.lower() not in {one.lower() for one in _QUANTIZE}:
        raise ConfigError(
            [Problem("--quantize", 0, 0, "", f"{quantize!r} is none that Ollama creates: {', '.join(_QUANTIZE)}")]
        )
    try:
        document = json.loads(text)
    except (ValueError, RecursionError) as error:
        line, column = getattr(error, "lineno", 0), getattr(error, "colno", 0)
        raise ConfigError([Problem(shown, line, column, "", f"is not JSON: {getattr(error, 'msg', error)}")]) from None
    report = Report()
    entities = _entities(document, report, shown)
    known = {name: (*(fields or {}).get(name, ()), *paths) for name, paths in FIELDS.items()}
    reader = _EntityReader(known, report, tuple(instance) or ("ollama",), quantize, quantization_of)
    models: dict[str, Any] = {}
    for number, entity in enumerate(entities):
        reader.read(entity, number, models)
    reader.report_unknown(len(entities))
    data = _fleet(document, models, reader, bool(instance), report)
    head = [
        f"{len(models)} models from {shown}",
        *(["left out: " + ", ".join(reader.left_out)] if reader.left_out else []),
    ]
    comments = {"": head, **{f"models.{name}": [title] for name, title in reader.titles.items()}}
    return Imported(to_yaml(data, comments), data, report)


def _entities(document: Any, report: Report, shown: str) -> list[Any]:
    if isinstance(document, list):
        return document
    if isinstance(document, dict):
        for key in _LISTS:
            if isinstance(document.get(key), list):
                for other in document:
                    if other == "version" or other in _SERVERS:
                        continue
                    if other == "maxConcurrentWorkers":
                        detail = (
                            "fleetd has no workers: requests queue per model, and queue.max and concurrency bound them"
                        )
                        report.approximated("", other, detail)
                    elif other != key:
                        report.refused("", other, "not understood")
                return list(document[key])
    raise ConfigError([Problem(shown, 0, 0, "", f"has no list of entities: looked for {', '.join(_LISTS)}")])


def _fleet(
    document: Any, models: dict[str, Any], reader: _EntityReader, has_instance: bool, report: Report
) -> dict[str, Any]:
    instances: dict[str, Any] = {}
    if not has_instance and models:
        instances["ollama"] = {"engine": "ollama"}
        if reader.volumes:
            instances["ollama"]["requires"] = sorted(reader.volumes)
    elif reader.volumes:
        volumes = ", ".join(sorted(reader.volumes))
        report.warn(
            "", "", f"files lie on {volumes}: say requires: [{volumes}] at the instances that hold these models"
        )
    servers: list[Any] = next(
        (document[key] for key in _SERVERS if isinstance(document, dict) and isinstance(document.get(key), list)), []
    )
    for number, server in enumerate(servers, start=1):
        host = server.get("ip") or server.get("host") if isinstance(server, dict) else None
        if not host:
            report.refused("", f"lmStudioServers[{number - 1}]", "has no ip")
            continue
        name = _slug(str(server.get("name") or f"lmstudio-{number}"))
        while name in instances or name in models:
            name += "-server"
        instances[name] = {"engine": "lmstudio", "external": f"http://{host}:{server.get('port', 1234)}"}
        report.mapped("", f"lmStudioServers[{number - 1}]", f"instances.{name}, an external server")
    return {"version": 1, **({"instances": instances} if instances else {}), **({"models": models} if models else {})}


class _EntityReader:
    def __init__(
        self,
        known: Mapping[str, tuple[str, ...]],
        report: Report,
        instance: tuple[str, ...],
        quantize: str,
        quantization_of: QuantizationOf | None,
    ) -> None:
        self.quantize, self.quantization_of = quantize, quantization_of
        self.known = known
        self.report = report
        self.instance = instance
        self.volumes: set[str] = set()
        self.titles: dict[str, str] = {}
        self.left_out: list[str] = []
        self._unknown: Counter[str] = Counter()

    def read(self, entity: Any, number: int, models: dict[str, Any]) -> None:
        if not isinstance(entity, dict):
            self.report.refused("", f"entities[{number}]", "is not a mapping")
            return
        said, used = self._said(entity)
        for path in _leaves(entity):
            if not any(path == one or path.startswith(one + ".") for one in used):
                self._unknown[path] += 1
        name = _slug(str(said.get("name") or f"entity-{number + 1}"))
        if name in models:
            self.report.refused(name, "", "is there twice: the first one is used")
            return
        if said.get("enabled") is False:
            self.left_out.append(name)
            self.report.refused(name, "enabled", "is false: left out")
            return
        models[name] = self._model(name, said)
        if said.get("title"):
            self.titles[name] = " ".join(str(said["title"]).split())

    def _said(self, entity: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
        said, used = {}, []
        for name, paths in self.known.items():
            for path in paths:
                value = _at(entity, path)
                if value is not None:
                    said[name] = value
                    used.append(path)
                    break
        return said, used

    def _model(self, name: str, said: dict[str, Any]) -> dict[str, Any]:
        model: dict[str, Any] = {"instance": self.instance[0] if len(self.instance) == 1 else list(self.instance)}
        if isinstance(said.get("served_as"), str):
            model["served_as"] = said["served_as"]
        aliases = said.get("aliases")
        if aliases:
            model["aliases"] = aliases if isinstance(aliases, list) else [aliases]
        if isinstance(said.get("from"), str):
            model["from"] = said["from"]
            self.report.mapped(name, "from", said["from"])
            volume = _VOLUME.match(said["from"])
            if volume:
                self.volumes.add(volume[1])
        else:
            self.report.warn(name, "from", "no file is named: the server must have the model already")
        self._quantize(name, said, model)
        modelfile = {key: said[key] for key in ("template", "system") if isinstance(said.get(key), str) and said[key]}
        parameters = self._parameters(name, said.get("parameters"))
        if parameters:
            modelfile["parameters"] = parameters
        if modelfile:
            model["modelfile"] = modelfile
            self.report.mapped(name, "modelfile", ", ".join(modelfile))
        return model

    def _quantize(self, name: str, said: dict[str, Any], model: dict[str, Any]) -> None:
        wanted, source = self.quantize or said.get("quantization"), str(said.get("from", ""))
        form = said.get("format")
        if form not in (None, "gguf", "safetensors"):
            self.report.warn(name, "format", f"{form} is not a format that a held model can have")
        if not isinstance(wanted, str) or not wanted:
            return
        has = self._quantization(source, wanted)
        if has == wanted.lower():
            return
        if has not in _WHOLE_TYPES:
            if not self.quantize:
                what = f"the file is {has}" if has else "the file has another one"
                self.report.refused(name, "quantization", f"{wanted}: {what}, which only an f16 or f32 file can change")
            return
        match = next((one for one in _QUANTIZE if one.lower() == wanted.lower()), None)
        if match is None:
            self.report.refused(name, "quantization", f"{wanted}: Ollama makes {', '.join(_QUANTIZE)} only")
            return
        model["quantize"] = match
        self.report.mapped(name, "quantization", f"quantize: {match} on import")

    def _quantization(self, source: str, wanted: str) -> str | None:
        """Return the quantisation of a file in lower case, by its header, else by its name."""
        found = self.quantization_of(source) if self.quantization_of is not None and source else None
        if found is not None:
            return found.lower()
        name = source.lower().rsplit("/", 1)[-1]
        if wanted.lower() in name:
            return wanted.lower()
        return next((one for one in ("bf16", "f16", "f32") if one in name), None)

    def _parameters(self, name: str, parameters: Any) -> dict[str, Any]:
        if parameters is None:
            return {}
        if not isinstance(parameters, dict):
            self.report.refused(name, "parameters", "is not a mapping")
            return {}
        found: dict[str, Any] = {}
        for key, value in parameters.items():
            if value is None:
                continue
            try:
                found[key] = parameter(key, value)
            except ValueError as error:
                self.report.refused(name, f"parameters.{key}", str(error))
        return found

    def report_unknown(self, count: int) -> None:
        for path, times in sorted(self._unknown.items()):
            self.report.refused("", path, f"not understood; {times} of {count} entities have it")


def _at(value: Any, path: str) -> Any:
    for part in path.split("."):
        if not isinstance(value, dict) or part not in value:
            return None
        value = value[part]
    return value


def _leaves(value: Any, path: str = "") -> Iterator[str]:
    if isinstance(value, dict) and value:
        for key, item in value.items():
            yield from _leaves(item, f"{path}.{key}" if path else str(key))
    else:
        yield path


def _slug(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9._:/@+-]+", "-", text.strip()).strip("-.").lower()[:200] or "model"
