"""Give the models of llama-swap names that fleet.yaml accepts, unique among models and aliases.

Invariants:
- A model with an engine is named like a process; llama-swap's own name becomes an alias where an alias may have it.
- No two names are equal: the first one keeps it, and the report names the others.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from fleetd.config.importers.report import Report
from fleetd.config.names import RESERVED_NAMES, free_name, process_name
from fleetd.config.schema.base import MODEL_NAME

_NOT_IN_MODEL = re.compile(r"[^A-Za-z0-9._:/@+-]+")
_MODEL = re.compile(MODEL_NAME)


class SwapNames:
    """The names of one file: `keys` maps every name of llama-swap, aliases included, to its entry."""

    def __init__(self, models: Iterable[str], report: Report) -> None:
        self.report = report
        self.keys: dict[str, str] = {}
        self._taken: set[str] = set()
        for name in models:
            self.keys[name] = self._unique(_model_name(name))

    def _unique(self, wanted: str) -> str:
        key = free_name(wanted, self._taken)
        self._taken.add(key)
        return key

    def reserve(self, wanted: str) -> str:
        """Return a free name for an entry of another kind."""
        return self._unique(_model_name(wanted))

    def aliases(self, name: str, stated: Iterable[str]) -> list[str]:
        """Return the aliases of a model, its own name first where that differs from its key."""
        key = self.keys[name]
        found: list[str] = []
        for alias in (name, *stated):
            self.keys.setdefault(alias, key)
            fitting = alias if _MODEL.fullmatch(alias) else _NOT_IN_MODEL.sub("-", alias).strip("-._:/@+")[:200]
            if fitting != alias:
                if not fitting or fitting in self._taken:
                    self.report.warn(name, "aliases", f"{alias!r} is no name in fleetd: request {key}")
                else:
                    self.report.warn(name, "aliases", f"{alias!r} is no name in fleetd: request {fitting}")
            if fitting == key or fitting in found or not fitting:
                continue
            if fitting in self._taken:
                if fitting == alias:
                    self.report.refused(name, "aliases", f"{alias} is the name of another model")
                continue
            self._taken.add(fitting)
            found.append(fitting)
        return found


def _model_name(text: str) -> str:
    name = process_name(text, "model", 59)
    return f"{name}-model" if name in RESERVED_NAMES else name
