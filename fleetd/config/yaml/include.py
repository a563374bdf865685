"""Read fleet.yaml and the files that it includes into one tree.

Invariants:
- A pattern is relative to the file that has it. A plain name must exist; a pattern with `*`, `?` or `[` may match nothing.
- A file is read once. A file that includes itself, directly or not, is refused with the whole chain.
- A mistake in one file does not hide the mistakes of the others.
"""

from __future__ import annotations

import glob
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from fleetd.config.yaml.parser import Node, compose, read_source
from fleetd.config.yaml.scalars import resolve
from fleetd.config.yaml.transform import join, put_variables_in
from fleetd.errors import ConfigError, Problem
from fleetd.units import expand_home

MAX_FILES = 1000
MAX_ALL_NODES = 500_000


@dataclass(slots=True)
class IncludeReader:
    """One read of a configuration.

    `files` are all files that were read or are missing, in order; `patterns` are (folder, pattern) pairs that may match other
    files later.
    """

    env: Mapping[str, str]
    problems: list[Problem] = field(default_factory=list)
    files: list[Path] = field(default_factory=list)
    patterns: list[tuple[Path, str]] = field(default_factory=list)
    order: dict[str, int] = field(default_factory=dict)
    _nodes: int = 0
    _seen: set[Path] = field(default_factory=set)

    def read(self, path: Path, shown: str, chain: tuple[Path, ...] = ()) -> Node | None:
        """Return the tree of a file with its includes; None if it cannot be read."""
        real = Path(os.path.realpath(path))
        self._seen.add(real)
        self.files.append(path)
        self.order.setdefault(shown, len(self.order))
        try:
            root = compose(read_source(path, shown, self.order[shown]), self.problems.extend)
        except ConfigError as error:
            self.problems.extend(error.problems)
            return None
        if not isinstance(root.value, dict):
            self.problems.append(root.problem("must be a mapping with keys such as services, instances and models"))
            return None
        self._nodes += root.size
        put_variables_in(root, self.env, self.problems.append)
        for pattern in _patterns(root):
            for child in self._included(pattern, root, (*chain, real)):
                join(root, child, self.problems.append)
        return root

    def _included(self, pattern: Node, root: Node, chain: tuple[Path, ...]) -> list[Node]:
        children = []
        for name in self._matches(pattern, root.source.path.parent):
            path = root.source.path.parent / name
            real = Path(os.path.realpath(path))
            shown = os.path.normpath(Path(root.source.shown).parent / name)
            if real in chain:
                steps = " → ".join(one.name for one in (*chain[chain.index(real) :], real))
                self.problems.append(pattern.problem(f"a file includes itself: {steps}", "include"))
                continue
            if real in self._seen:
                continue
            if len(self.files) >= MAX_FILES or self._nodes >= MAX_ALL_NODES:
                limit = f"{MAX_FILES} files or {MAX_ALL_NODES} values"
                self.problems.append(pattern.problem(f"more than {limit} are included", "include"))
                break
            child = self.read(path, shown, chain)
            if child is not None:
                children.append(child)
        return children

    def _matches(self, pattern: Node, folder: Path) -> list[str]:
        text = expand_home(pattern.value)
        if glob.has_magic(text):
            self.patterns.append((folder, text))
            return sorted(glob.glob(text, root_dir=folder))  # noqa: PTH207 - Path.glob refuses absolute patterns
        if not (folder / text).exists():
            self.files.append(folder / text)
            self.problems.append(pattern.problem(f"there is no file {pattern.raw or pattern.value!r}", "include"))
            return []
        return [text]


def _patterns(root: Node) -> list[Node]:
    """Return the patterns of `include`; wrong types are left to the schema."""
    include = root.value.get("include")
    if include is None:
        return []
    nodes = include.value if isinstance(include.value, list) else [include]
    return [node for node in nodes if isinstance(node.value, str) and _is_text(node)]


def _is_text(node: Node) -> bool:
    return bool(node.value) and "\x00" not in node.value and (not node.plain or isinstance(resolve(node.value), str))
