"""Convert a llama-swap configuration, in one file or in a folder of files, to models with an engine of their own.

Invariants:
- Groups and the matrix state by hand which models fit together; fleetd counts bytes. The report names the models whose memory is
  not known, since nothing keeps those from staying loaded together.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fleetd.config.importers.emit import to_yaml
from fleetd.config.importers.llama_swap import routing
from fleetd.config.importers.llama_swap.commands import shared_ports
from fleetd.config.importers.llama_swap.macros import marked, merge, resolved, without_comments
from fleetd.config.importers.llama_swap.models import LEFT_OUT, ModelReader, TrainedContext, health_timeout
from fleetd.config.importers.llama_swap.names import SwapNames
from fleetd.config.importers.report import Imported, Report
from fleetd.config.yaml.parser import Source, compose
from fleetd.config.yaml.transform import plain
from fleetd.errors import ConfigError, Problem

_DEFAULT_WAIT_S = 120  # of fleetd: how long a request may wait


def import_llama_swap(
    text: str,
    *,
    shown: str = "config.yaml",
    more: Sequence[tuple[str, str]] = (),
    trained_context: TrainedContext | None = None,
) -> Imported:
    """Return a model for every model of llama-swap. Raises ConfigError.

    `more` are further files of a folder: (name, text). `trained_context` returns the context length in a GGUF file's header.
    """
    document: dict[str, Any] = {}
    for name, content in ((shown, text), *more):
        if more and not without_comments(content).strip():
            continue
        found = plain(compose(Source(name, Path(name), text=marked(content))))
        if isinstance(found, dict):
            merge(document, found, name)
        elif found is not None:
            raise ConfigError([Problem(name, 0, 0, "", "is not a mapping: is it a configuration of llama-swap?")])
    if not isinstance(document.get("models"), dict) or not document["models"]:
        raise ConfigError([Problem(shown, 0, 0, "", "has no models: is it a configuration of llama-swap?")])
    return _SwapReader(resolved(document, shown), trained_context).imported(shown)


class _SwapReader:
    def __init__(self, document: dict[str, Any], trained_context: TrainedContext | None) -> None:
        self.document = document
        self.report = Report()
        found = document["models"]
        self.entries = {str(name): raw for name, raw in found.items() if isinstance(raw, dict)}
        for name in found:
            if not isinstance(found[name], dict):
                self.report.refused(str(name), "", "is not a mapping")
        self.names = SwapNames(self.entries, self.report)
        self.reader = ModelReader(document, self.names, self.report, trained_context)

    def imported(self, shown: str) -> Imported:
        read = [self.reader.read(name, raw) for name, raw in self.entries.items()]
        moved = shared_ports(model.at.port for model in read if model.at.external is None)
        models = {model.key: self.reader.entry(model, moved) for model in read}
        for field, names in self.reader.left_out.items():
            self.report.refused("", f"models.*.{field}", f"{LEFT_OUT[field]} ({len(names)} of {len(models)} models)")
        instances: dict[str, Any] = {}
        routing.apply(self.document, models, instances, self.names, self.reader.sized, self.report)
        data: dict[str, Any] = {"version": 1, "defaults": {"model": self._defaults()}}
        if instances:
            data["instances"] = instances
        data["models"] = models
        comments = {"": [f"{len(self.entries)} models from llama-swap's {shown}"]}
        for name, raw in self.entries.items():
            titles = [" ".join(str(raw[field]).split()) for field in ("name", "description") if raw.get(field)]
            if titles:
                comments[f"models.{self.names.keys[name]}"] = titles
        return Imported(to_yaml(data, comments), data, self.report)

    def _defaults(self) -> dict[str, Any]:
        """Return what llama-swap does for every model where fleetd's default differs."""
        ttl = self.document.get("globalTTL")
        seconds = ttl if isinstance(ttl, int) and not isinstance(ttl, bool) and ttl > 0 else 0
        defaults: dict[str, Any] = {"ttl": f"{min(seconds, 31_536_000)}s" if seconds else 0}
        wait = health_timeout(self.document)
        if wait > _DEFAULT_WAIT_S:
            defaults["load_timeout"] = f"{wait}s"
            defaults["queue"] = {"timeout": f"{min(wait, 86_400)}s"}
        return defaults
