"""Env files: the variables of each entry, and the mistakes in the files.

Invariants:
- A missing file is no mistake of fleet.yaml: its process is BLOCKED until the file exists. An unreadable file is one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from fleetd.config.load import LoadedConfig
from fleetd.config.yaml.source_map import Path_, path_text
from fleetd.errors import Problem
from fleetd.resolver.entries import ConfigEntry
from fleetd.resolver.environment import EnvSource, Variables, read_env_file
from fleetd.resolver.findings import Findings


@dataclass(frozen=True, slots=True)
class OwnEnvironment:
    """The variables of an entry. `source`: None without files; `missing`: path → key."""

    values: dict[str, str]
    source: EnvSource | None = None
    missing: Mapping[str, str] = field(default_factory=dict)


class EnvFiles:
    """The env files of one configuration, each read once."""

    def __init__(self, loaded: LoadedConfig, findings: Findings) -> None:
        self._loaded = loaded
        self._findings = findings
        self._read: dict[Path, Variables | None] = {}

    def environment(self, entry: ConfigEntry, places: Mapping[str, object]) -> OwnEnvironment:
        """Return what an entry sets for its process."""
        files: dict[str, str] = {}
        missing: dict[str, str] = {}
        contents: list[Variables] = []
        for index, text in enumerate(entry.keys.env_file):
            path = self._loaded.resolve((*entry.path, "env_file"), text)
            where = (*entry.path, "env_file", index)
            files[str(path)] = path_text((*entry.path, "env_file"))
            content = self._content(path, where)
            if content is None:
                missing[str(path)] = files[str(path)]
                self._findings.warn(where, f"{path} is missing: {entry.name} stays BLOCKED until it exists")
            else:
                contents.append(content)
        source = EnvSource(files, entry.keys.env, places, entry.keys.replicas > 1 or entry.port is not None)
        return OwnEnvironment(source.made(contents), source if files else None, missing)

    def _content(self, path: Path, where: Path_) -> Variables | None:
        if path not in self._read:
            self._read[path] = self._variables(path, where)
        return self._read[path]

    def _variables(self, path: Path, where: Path_) -> Variables | None:
        found = read_env_file(path)
        if found is None:
            return None
        content, mistakes = found
        if mistakes.general is not None:
            self._findings.problem(where, mistakes.general)
        for line, message in mistakes.lines:
            self._findings.problems.append(Problem(str(path), line, 1, "", message))
        return content
