"""Convert the models of an Ollama server (`ollama list`, or `GET /api/tags`), or a Modelfile, to models of a fleet.

Invariants:
- Nothing is downloaded or created: each name is served as it is. Sizes on disk are not memory, so none is declared.
- Models that run on Ollama's cloud are skipped and reported.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

from fleetd.config.importers.emit import to_yaml
from fleetd.config.importers.modelfile import is_modelfile, read_modelfile
from fleetd.config.importers.pm2.ollama import volume_of
from fleetd.config.importers.report import Imported, Report
from fleetd.config.schema.base import MODEL_NAME
from fleetd.errors import ConfigError, Problem

_EMBEDDING = frozenset({"bert", "nomic-bert", "gemma-embedding"})
_NAME = re.compile(MODEL_NAME)


def import_ollama(
    text: str, *, shown: str = "ollama list", instance: Sequence[str] = (), models_dir: str = "", name: str = ""
) -> Imported:
    """Return a model for every name, or that of a Modelfile, called `name`. Raises ConfigError.

    Without `instance` an Ollama server is added for them, on the store `models_dir` where that is not Ollama's default.
    """
    if is_modelfile(text):
        return read_modelfile(text, shown=shown, instance=instance, name=name)
    report = Report()
    holders = list(instance) or ["ollama"]
    models: dict[str, Any] = {}
    for name, details in _listed(text, shown):
        key = name.removesuffix(":latest")
        if details.get("remote_host") or key.endswith(("-cloud", ":cloud")):
            report.refused(name, "", "runs on Ollama's servers, not here: left out")
        elif not _NAME.fullmatch(key):
            report.refused(name, "", "cannot be the name of a model of the fleet: left out")
        elif key in models:
            report.refused(name, "", "is there twice")
        else:
            models[key] = {"instance": holders[0] if len(holders) == 1 else holders}
            if key != name:
                models[key]["served_as"] = name
            if _EMBEDDING & set(details.get("details", {}).get("families") or ()):
                models[key]["embedding"] = True
            report.mapped(name, "", f"models.{key}")
    data: dict[str, Any] = {"version": 1}
    if not instance and models:
        data["instances"] = {"ollama": _server(models_dir)}
    if models:
        data["models"] = models
    return Imported(to_yaml(data, {"": [f"{len(models)} models that Ollama has, from {shown}"]}), data, report)


def _server(models_dir: str) -> dict[str, Any]:
    server: dict[str, Any] = {"engine": "ollama"}
    if models_dir:
        server["options"] = {"models_dir": models_dir}
        volume = volume_of(models_dir)
        if volume is not None:
            server["requires"] = [volume]
    return server


def _listed(text: str, shown: str) -> list[tuple[str, dict[str, Any]]]:
    if text.lstrip().startswith(("{", "[")):
        try:
            document = json.loads(text)
        except (ValueError, RecursionError) as error:
            line, column = getattr(error, "lineno", 0), getattr(error, "colno", 0)
            raise ConfigError(
                [Problem(shown, line, column, "", f"is not JSON: {getattr(error, 'msg', error)}")]
            ) from None
        found = document.get("models") if isinstance(document, dict) else document
        if isinstance(found, list):
            named = [one for one in found if isinstance(one, dict) and isinstance(one.get("name"), str)]
            return [(one["name"], one if isinstance(one.get("details"), dict) else {}) for one in named]
    lines = [line.split() for line in text.splitlines() if line.strip()]
    if lines and lines[0][0].upper() == "NAME":
        return [(words[0], {}) for words in lines[1:]]
    message = "is neither the output of `ollama list` or GET /api/tags, nor a Modelfile"
    raise ConfigError([Problem(shown, 0, 0, "", message)])
