"""The modules of the package, each read once for all guards."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from tests.support import import_graph

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "fleetd"


@cache
def modules() -> tuple[Path, ...]:
    return tuple(sorted(PACKAGE.rglob("*.py")))


@cache
def source_of(path: Path) -> str:
    return path.read_text("utf-8")


def name_of(path: Path) -> str:
    """Return a path relative to the repository."""
    return str(path.relative_to(ROOT))


def dotted(path: Path) -> str:
    """Return the import name of a module or package of fleetd."""
    return import_graph.dotted(path, ROOT)
