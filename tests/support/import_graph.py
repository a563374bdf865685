"""Read the imports of a package from its syntax trees: who imports whom, cycles, and the longest path."""

from __future__ import annotations

import ast
from collections.abc import Collection, Iterator, Mapping
from functools import cache
from pathlib import Path

Graph = Mapping[str, Collection[str]]


@cache
def parsed(source: str) -> ast.Module:
    """Return the syntax tree of a module's text. Do not change it: all callers share it."""
    return ast.parse(source)


@cache
def nodes(source: str) -> tuple[ast.AST, ...]:
    """Return all nodes of a module."""
    return tuple(ast.walk(parsed(source)))


def dotted(path: Path, root: Path) -> str:
    """Return the import name of a module or package below `root`."""
    parts = list(path.relative_to(root).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def is_module(name: str, root: Path) -> bool:
    target = root / Path(*name.split("."))
    return target.with_suffix(".py").is_file() or target.is_dir()


def imports(source: str, module: str, is_package: bool, root: Path) -> Iterator[tuple[int, str, bool]]:
    """Yield (line, dotted name, only for types) of every import, relative ones resolved."""
    typing_only = {
        id(node)
        for block in nodes(source)
        if isinstance(block, ast.If) and ast.unparse(block.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")
        for statement in block.body
        for node in ast.walk(statement)
    }
    for node in nodes(source):
        lazy = id(node) in typing_only
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name, lazy
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                anchor = module.split(".")[: len(module.split(".")) - node.level + (1 if is_package else 0)]
                base = ".".join([*anchor, base] if base else anchor)
            for alias in node.names:
                full = f"{base}.{alias.name}"
                yield node.lineno, full if is_module(full, root) else base, lazy


def import_graph(sources: Mapping[str, tuple[str, bool]], root: Path) -> dict[str, set[str]]:
    """Return which modules each module imports, imports for types and inside functions included.

    `sources` maps a module to its text and whether it is a package.
    """
    return {
        module: {name for _, name, _ in imports(text, module, is_package, root) if name in sources} - {module}
        for module, (text, is_package) in sources.items()
    }


def components(graph: Graph) -> list[list[str]]:
    """Return the groups of modules that import each other, by Tarjan's algorithm; importers come last."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for target in sorted(graph[node]):
            if target not in index:
                visit(target)
                low[node] = min(low[node], low[target])
            elif target in stack:
                low[node] = min(low[node], index[target])
        if low[node] == index[node]:
            group = [stack.pop()]
            while group[-1] != node:
                group.append(stack.pop())
            found.append(sorted(group))

    for node in sorted(graph):
        if node not in index:
            visit(node)
    return found


def cycles(graph: Graph) -> list[list[str]]:
    """Return the groups of two or more modules that import each other."""
    return [group for group in components(graph) if len(group) > 1]


def levels(graph: Graph) -> int:
    """Return the number of modules on the longest import path; a cycle counts as one."""
    depth: dict[str, int] = {}
    for group in components(graph):
        below = [depth[target] for node in group for target in graph[node] if target not in group]
        depth |= dict.fromkeys(group, 1 + max(below, default=0))
    return max(depth.values(), default=0)
