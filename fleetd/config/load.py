"""Load fleet.yaml to a checked configuration, or report every mistake in it.

Invariants:
- Reading has no effect: no file is written, nothing is started, the environment is an argument.
- All problems of all files are reported at once, in the order of the files; a problem of one place is reported once.
- Checks of other modules also run on the valid part of an invalid configuration.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fleetd.config.schema.fleet import FleetConfig
from fleetd.config.schema.unsupported import find_unsupported
from fleetd.config.validate.conflicts import check
from fleetd.config.validate.messages import Messages
from fleetd.config.validate.recovery import typed, valid_part
from fleetd.config.yaml.include import IncludeReader
from fleetd.config.yaml.source_map import Path_, SourceMap
from fleetd.config.yaml.transform import lay_defaults, plain
from fleetd.errors import ConfigError, Problem
from fleetd.units import expand_home


@dataclass(frozen=True, slots=True)
class LoadedConfig:
    """A configuration without mistakes. `files` are all files that were read.

    `stand_ins` are invalid instances of which only the engine is known: the models that they hold are checked, they are not.
    """

    config: FleetConfig
    source_map: SourceMap
    files: tuple[Path, ...]
    config_hash: str
    stand_ins: frozenset[Path_] = frozenset()
    patterns: tuple[tuple[Path, str], ...] = ()  # (folder, pattern) of `include`

    def folder_of(self, path: Path_) -> Path:
        """Return the absolute folder that relative paths at `path` start from."""
        return self.source_map.folder_of(path)

    def resolve(self, path: Path_, text: str) -> Path:
        """Return a path of fleet.yaml as an absolute one, relative to its file."""
        return Path(os.path.normpath(self.folder_of(path) / expand_home(text)))


# Invalid plain data, its source map, and its valid part (None: there is none) → further problems.
FurtherChecks = Callable[[Any, SourceMap, LoadedConfig | None], list[Problem]]


def load(path: Path, env: Mapping[str, str], further: FurtherChecks | None = None) -> LoadedConfig:
    """Read and check a configuration. Raises ConfigError with every problem.

    `further` finds the mistakes that only other modules know, so that all are reported at once.
    """
    reader = IncludeReader(env)
    root = reader.read(Path.cwd() / path, str(path))
    if root is None:
        raise ConfigError(_sorted(reader.problems, reader.order), files=reader.files)
    merged = lay_defaults(root)
    source_map = SourceMap(merged)
    data = plain(merged)
    config, errors, problems = _validate(data, source_map)
    # A value that could not be read or interpolated is reported once: its type is unknown.
    places = {(problem.file, problem.line, problem.column) for problem in reader.problems}
    later = [problem for problem in problems if (problem.file, problem.line, problem.column) not in places]
    problems = [*reader.problems, *later]
    if problems or config is None:
        reported = {problem.path for problem in problems}
        others = (
            further(data, source_map, _valid_part(data, config, errors, source_map, reader.files)) if further else []
        )
        problems += [p for p in others if (p.file, p.line, p.column) not in places and p.path not in reported]
        raise ConfigError(_sorted(problems, reader.order), files=reader.files)
    digest = hashlib.sha256(json.dumps(data, sort_keys=True, default=str).encode()).hexdigest()[:16]
    return LoadedConfig(config, source_map, tuple(reader.files), digest, patterns=tuple(reader.patterns))


def _validate(data: Any, source_map: SourceMap) -> tuple[FleetConfig | None, list[Any], list[Problem]]:
    """Return the configuration, or the type errors, and all problems."""
    messages = Messages(source_map)
    problems = find_unsupported(data, source_map)
    config, errors = typed(data)
    problems += messages.problems(errors)
    return config, errors, problems + check(data, source_map, messages)


def _valid_part(
    data: Any, config: FleetConfig | None, errors: list[Any], source_map: SourceMap, files: list[Path]
) -> LoadedConfig | None:
    """Return the valid part of a configuration; None if there is none."""
    part, stand_ins = (config, frozenset[Path_]()) if config is not None else valid_part(data, errors)
    return LoadedConfig(part, source_map, tuple(files), "", stand_ins) if part is not None else None


def _sorted(problems: Iterable[Problem], order: Mapping[str, int]) -> list[Problem]:
    """Sort by place; an inherited mistake is shown once, where it was written."""
    by_place: dict[tuple[str, int, int, str], Problem] = {}
    for problem in problems:
        key = (problem.file, problem.line, problem.column, problem.message)
        first = by_place.get(key)
        if first is None or (problem.path.startswith("defaults.") and not first.path.startswith("defaults.")):
            by_place[key] = problem
    return sorted(by_place.values(), key=lambda one: (order.get(one.file, 1 << 30), one.line, one.column, one.path))
