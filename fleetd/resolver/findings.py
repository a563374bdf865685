"""Collect the problems and warnings of a resolution, each with its place in fleet.yaml.

Invariants:
- A stand-in, of which only the engine is known, gets no problems.
"""

from __future__ import annotations

from collections.abc import Iterable

from fleetd.config.load import LoadedConfig
from fleetd.config.yaml.source_map import Path_
from fleetd.errors import Problem


class Findings:
    """The problems and warnings of one configuration."""

    def __init__(self, loaded: LoadedConfig) -> None:
        self._source_map, self._stand_ins = loaded.source_map, loaded.stand_ins
        self.problems: list[Problem] = []
        self.warnings: list[Problem] = []

    def problem(self, path: Path_, message: str) -> None:
        self.add(path, [self._source_map.problem(path, message)])

    def add(self, path: Path_, problems: Iterable[Problem]) -> None:
        """Add problems of the entry at `path`; they may be in another file."""
        if path[:2] not in self._stand_ins:
            self.problems += problems

    def warn(self, path: Path_, message: str) -> None:
        self.warnings.append(self._source_map.problem(path, message))

    def source(self, path: Path_) -> tuple[str, int]:
        """Return the file and the line of an entry."""
        place = self._source_map.problem(path, "", at_key=True)
        return place.file, place.line

    def sorted(self, found: list[Problem]) -> tuple[Problem, ...]:
        """Sort by place and drop duplicates: replicas share their mistakes."""
        order = self._source_map.order_of
        return tuple(sorted(dict.fromkeys(found), key=lambda one: (order(one.file), one.line, one.column, one.path)))
