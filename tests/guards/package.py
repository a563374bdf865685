"""The modules of the package, each read and parsed once for all guards."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "fleetd"


@cache
def modules() -> tuple[Path, ...]:
    return tuple(sorted(PACKAGE.rglob("*.py")))


@cache
def source_of(path: Path) -> str:
    return path.read_text("utf-8")


@cache
def parsed(source: str) -> ast.Module:
    """Return the syntax tree of a module's text. Do not change it: all guards share it."""
    return ast.parse(source)


@cache
def nodes(source: str) -> tuple[ast.AST, ...]:
    """Return all nodes of a module."""
    return tuple(ast.walk(parsed(source)))


def name_of(path: Path) -> str:
    """Return a path relative to the repository."""
    return str(path.relative_to(ROOT))


def dotted(path: Path) -> str:
    """Return the import name of a module or package of fleetd."""
    parts = list(path.relative_to(ROOT).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
