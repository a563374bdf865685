"""fleet.yaml to a checked configuration, or to every mistake in it.

The rules of this file
- Reading has no effect: no file is written, nothing is started, the environment is an argument.
- All problems of all files are reported at once, in the order of the files; a problem of one place is reported once.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from fleetd.config.checks import check
from fleetd.config.include import Reader
from fleetd.config.marks import Marks, Path_, expand_home
from fleetd.config.messages import Messages
from fleetd.config.schema import FleetConfig
from fleetd.config.tree import lay_defaults, plain
from fleetd.config.unsupported import find_unsupported
from fleetd.errors import ConfigError, Problem


@dataclass(frozen=True, slots=True)
class LoadedConfig:
    """A configuration without mistakes. `files` are all files that were read; a change of one is a change of all."""

    config: FleetConfig
    marks: Marks
    files: tuple[Path, ...]
    config_hash: str

    def folder_of(self, path: Path_) -> Path:
        """Return the absolute folder that relative paths of the value at `path` start from."""
        return self.marks.folder_of(path)

    def resolve(self, path: Path_, text: str) -> Path:
        """Return a path of the configuration as an absolute one: `~` is the user's home, relative ones start at the file."""
        return Path(os.path.normpath(self.folder_of(path) / expand_home(text)))


def load(
    path: Path, env: Mapping[str, str], beside: Callable[[Any, Marks], list[Problem]] | None = None
) -> LoadedConfig:
    """Read, join, interpolate and check a configuration. Raises ConfigError with every problem found.

    Where there is one, `beside` is asked for those that others know of in the same plain data, so that all are told at once.
    """
    reader = Reader(env)
    root = reader.read(Path.cwd() / path, str(path))
    if root is None:
        raise ConfigError(_sorted(reader.problems, reader.order))
    merged = lay_defaults(root)
    marks = Marks(merged)
    data = plain(merged)
    config, problems = _validate(data, marks)
    # What could not be read or interpolated is reported once: its text says nothing about its type.
    places = {(problem.file, problem.line, problem.column) for problem in reader.problems}
    later = [problem for problem in problems if (problem.file, problem.line, problem.column) not in places]
    problems = [*reader.problems, *later]
    if problems or config is None:
        told = {problem.path for problem in problems}
        others = beside(data, marks) if beside else []
        problems += [p for p in others if (p.file, p.line, p.column) not in places and p.path not in told]
        raise ConfigError(_sorted(problems, reader.order))
    digest = hashlib.sha256(json.dumps(data, sort_keys=True, default=str).encode()).hexdigest()[:16]
    return LoadedConfig(config, marks, tuple(reader.files), digest)


def _validate(data: Any, marks: Marks) -> tuple[FleetConfig | None, list[Problem]]:
    messages = Messages(marks)
    problems = find_unsupported(data, marks)
    config: FleetConfig | None = None
    try:
        config = FleetConfig.model_validate(data)
    except ValidationError as error:
        problems += messages.problems(error.errors(include_url=False))
    return config, problems + check(data, marks, messages)


def _sorted(problems: Iterable[Problem], order: Mapping[str, int]) -> list[Problem]:
    """Sort by place; an inherited mistake is shown once, where it was written."""
    by_place: dict[tuple[str, int, int, str], Problem] = {}
    for problem in problems:
        key = (problem.file, problem.line, problem.column, problem.message)
        first = by_place.get(key)
        if first is None or (problem.path.startswith("defaults.") and not first.path.startswith("defaults.")):
            by_place[key] = problem
    return sorted(by_place.values(), key=lambda one: (order.get(one.file, 1 << 30), one.line, one.column, one.path))
