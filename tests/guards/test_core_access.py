"""The door to the core: code outside `fleetd.core` reads a fleet through `Fleet.queries` alone."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from tests.guards.package import PACKAGE, modules, name_of, source_of
from tests.support.import_graph import nodes

OUTSIDE = [path for path in modules() if not path.is_relative_to(PACKAGE / "core")]

# The modules of the core that others may import: values, the fleet itself, and its queries.
OPEN = frozenset({
    "fleetd.core.data.specs", "fleetd.core.data.events", "fleetd.core.data.commands", "fleetd.core.data.state",
    "fleetd.core.data.journal", "fleetd.core.fleet", "fleetd.core.queries",
})  # fmt: skip
# What others may use of a fleet.
FLEET_API = frozenset({"queries", "handle", "take", "give", "next_deadline"})


def breaches(source: str) -> list[str]:
    """Return the imports of closed modules and the uses of parts of a fleet in a module outside the core."""
    found = []
    for node in nodes(source):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("fleetd.core"):
            names = (
                [node.module or ""] if node.module in OPEN else [f"{node.module}.{alias.name}" for alias in node.names]
            )
            found += [f"line {node.lineno} imports {name}" for name in names if name not in OPEN]
        elif isinstance(node, ast.Import):
            found += [
                f"line {node.lineno} imports {alias.name}"
                for alias in node.names
                if alias.name.startswith("fleetd.core") and alias.name not in OPEN
            ]
        elif isinstance(node, ast.Attribute) and _is_fleet(node.value) and node.attr not in FLEET_API:
            found.append(f"line {node.lineno} uses fleet.{node.attr}")
    return found


def _is_fleet(node: ast.expr) -> bool:
    """Return whether an expression is named like a fleet: `fleet`, `self._fleet`, `daemon.fleet`."""
    name = node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""
    return name.lstrip("_") == "fleet"


def fleet_modules() -> list[Path]:
    """Return the modules in which `fleet` is a fleet of the core: the daemon's."""
    return [path for path in OUTSIDE if path.is_relative_to(PACKAGE / "daemon")]


def test_modules_outside_the_core_use_its_door() -> None:
    found = {}
    for path in OUTSIDE:
        here = breaches(source_of(path))
        if path not in fleet_modules():  # elsewhere `fleet` is a port, or a value of the configuration
            here = [breach for breach in here if " imports " in breach]
        found[name_of(path)] = here
    assert {name: here for name, here in found.items() if here} == {}


def test_breaches_finds_import_and_attribute() -> None:
    assert breaches("from fleetd.core.data.fleet_state import FleetState") == [
        "line 1 imports fleetd.core.data.fleet_state.FleetState"
    ]
    assert breaches("from fleetd.core.data import events, fleet_state") == [
        "line 1 imports fleetd.core.data.fleet_state"
    ]
    assert breaches("import fleetd.core.models.ledger") == ["line 1 imports fleetd.core.models.ledger"]
    assert breaches("from fleetd.core.queries import FleetQueries\nself._fleet.queries.process('a')") == []
    assert breaches("daemon.fleet.state") == ["line 1 uses fleet.state"]


# Attribute -> the one module of the core that assigns it.
WRITERS = {
    "restart_wanted": "data/state.py",
    "outcome": "processes/termination.py",
    "failure": "data/state.py",
    "failures": "data/state.py",
    "failure_final": "data/state.py",
    "survivors": "processes/termination.py",
}


def assigned(source: str) -> set[str]:
    """Return the attributes that a module assigns."""
    found = set()
    for node in nodes(source):
        targets = (
            node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AugAssign) else []
        )
        for target in targets:
            parts = target.elts if isinstance(target, ast.Tuple) else [target]
            found |= {part.attr for part in parts if isinstance(part, ast.Attribute)}
    return found


@pytest.mark.parametrize("flag", WRITERS)
def test_flag_of_the_core_has_one_writer(flag: str) -> None:
    writers = {
        str(path.relative_to(PACKAGE / "core"))
        for path in PACKAGE.rglob("*.py")
        if flag in assigned(path.read_text("utf-8")) and path.is_relative_to(PACKAGE / "core")
    }
    assert writers == {WRITERS[flag]}
