"""Map a path in the merged configuration to its file, line and column.

Invariants:
- The merged configuration is itself a tree of nodes, so an inherited value points to where it was written.
- A path that the tree does not hold falls back to its nearest parent.
- A value that came out of a variable never appears in a message.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

from fleetd.config.yaml.parser import Node
from fleetd.errors import Problem
from fleetd.units import shown

Path_ = tuple[str | int, ...]


def path_text(path: Path_) -> str:
    """Return `models.coder.route[0].to` for a path."""
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{_key(part)}" if text else _key(part)
    return text


def _key(part: str) -> str:
    return part or '""'


class SourceMap:
    """Places of the merged tree."""

    def __init__(self, root: Node) -> None:
        self.root = root

    def find(self, path: Path_) -> tuple[Node, int]:
        """Return the nearest node to a path and how many parts of the path it covers."""
        node = self.root
        for depth, part in enumerate(path):
            children = node.value
            if isinstance(children, dict) and str(part) in children:
                node = children[str(part)]
            elif isinstance(children, list) and isinstance(part, int) and 0 <= part < len(children):
                node = children[part]
            else:
                return node, depth
        return node, len(path)

    def problem(self, path: Path_, message: str, *, at_key: bool = False) -> Problem:
        """Return a problem at a value or key; a missing value points to its parent's key."""
        node, depth = self.find(path)
        for value, raw in _interpolated(node):
            message = message.replace(shown(value), shown(raw))
            if len(value) > 3:
                message = message.replace(value, raw)
        return node.problem(
            message, path_text(path), at_key=at_key or depth < len(path) or isinstance(node.value, dict)
        )

    def folder_of(self, path: Path_) -> Path:
        """Return the folder of the file that wrote the value at a path."""
        return self.find(path)[0].source.folder

    def order_of(self, file: str) -> int:
        """Return the position of a file in the order of reading; unknown files come last."""
        return self._orders.get(file, 1 << 30)

    @cached_property
    def _orders(self) -> dict[str, int]:
        """Return the positions of all files, cached: thousands of warnings are sorted by it."""
        orders: dict[str, int] = {}
        pending = [self.root]
        while pending:
            node = pending.pop()
            orders.setdefault(node.source.shown, node.source.order)
            if isinstance(node.value, dict):
                pending.extend(node.value.values())
        return orders


def _interpolated(node: Node) -> Iterator[tuple[str, str]]:
    """Yield (result, text before interpolation) of at most 1000 values of a node."""
    pending = [node]
    for _ in range(1000):
        if not pending:
            return
        one = pending.pop()
        if isinstance(one.value, str):
            if one.raw is not None:
                yield one.value, one.raw
        else:
            pending.extend(one.value.values() if isinstance(one.value, dict) else one.value)
