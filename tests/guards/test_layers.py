"""The layers of the architecture, read from the import statements of every module.

A module imports only downward. The core is pure: it may import data types and nothing that touches the world.
"""

from __future__ import annotations

import ast
import sys

import pytest

from tests.guards.package import PACKAGE, ROOT, dotted, modules, source_of
from tests.support.import_graph import cycles, import_graph, imports, levels, nodes

# Package (or top-level module) -> what of fleetd it may import. The longest matching prefix counts.
ALLOWED: dict[str, tuple[str, ...]] = {
    "fleetd": (),
    "fleetd.errors": (),
    "fleetd.units": ("fleetd.errors",),
    "fleetd.config": ("fleetd.errors", "fleetd.units", "fleetd.config"),
    "fleetd.core": ("fleetd.errors", "fleetd.units", "fleetd.core"),
    "fleetd.models": ("fleetd.errors", "fleetd.units", "fleetd.models"),
    "fleetd.engines": ("fleetd.errors", "fleetd.units", "fleetd.config", "fleetd.core.data.specs", "fleetd.models", "fleetd.engines"),
    "fleetd.host": ("fleetd", "fleetd.errors", "fleetd.units", "fleetd.config", "fleetd.core.data.specs", "fleetd.host"),
    "fleetd.gateway": ("fleetd", "fleetd.errors", "fleetd.units", "fleetd.config", "fleetd.core", "fleetd.gateway"),
    "fleetd.control": ("fleetd", "fleetd.errors", "fleetd.units", "fleetd.config", "fleetd.core", "fleetd.control"),
    "fleetd.resolver": (
        "fleetd", "fleetd.errors", "fleetd.units", "fleetd.config", "fleetd.core", "fleetd.engines", "fleetd.models",
        "fleetd.host", "fleetd.control", "fleetd.resolver",
    ),
    "fleetd.daemon": (
        "fleetd", "fleetd.errors", "fleetd.units", "fleetd.config", "fleetd.core", "fleetd.engines", "fleetd.models", "fleetd.resolver",
        "fleetd.host", "fleetd.gateway", "fleetd.control", "fleetd.daemon",
    ),
    "fleetd.setup": (
        "fleetd", "fleetd.errors", "fleetd.units", "fleetd.config", "fleetd.core.data.specs", "fleetd.engines", "fleetd.models",
        "fleetd.host", "fleetd.control", "fleetd.resolver", "fleetd.setup",
    ),
    "fleetd.cli": (
        "fleetd", "fleetd.errors", "fleetd.units", "fleetd.config", "fleetd.control.wire", "fleetd.models", "fleetd.cli",
    ),
    "fleetd.cli.fleetd": (
        "fleetd", "fleetd.errors", "fleetd.units", "fleetd.config", "fleetd.resolver", "fleetd.daemon", "fleetd.cli",
    ),
    "fleetd.cli.commands.doctor": ("fleetd.errors", "fleetd.units", "fleetd.setup", "fleetd.cli"),
    "fleetd.cli.commands.init": ("fleetd.errors", "fleetd.units", "fleetd.setup", "fleetd.cli"),
    "fleetd.__main__": ("fleetd.cli",),
}  # fmt: skip

# What the core may import from outside the project: data and pure functions only.
CORE_STDLIB = frozenset({
    "__future__", "abc", "bisect", "collections", "dataclasses", "enum", "functools", "hashlib", "heapq", "itertools", "json",
    "math", "operator", "types", "typing",
})  # fmt: skip

# Libraries that touch the machine: the host, and a child program of an engine, alone may use them.
HOST_ONLY = frozenset({"subprocess", "psutil", "pynvml", "watchfiles"})


def rule_of(module: str) -> str:
    return max((key for key in ALLOWED if module == key or module.startswith(key + ".")), key=len)


def may_import(rule: str, name: str) -> bool:
    return any(name == allowed or (allowed != "fleetd" and name.startswith(allowed + ".")) for allowed in ALLOWED[rule])


def upward(module: str, source: str, is_package: bool = False) -> list[str]:
    """Return the imports of `source` that the layers forbid."""
    found = []
    rule = rule_of(module)
    for line, name, lazy in imports(source, module, is_package, ROOT):
        top = name.split(".")[0]
        if top == "fleetd":
            if not may_import(rule, name) and name != module:
                found.append(f"{module}:{line} imports {name}")
            elif rule == "fleetd.engines" and _other_engine(module, name):
                found.append(f"{module}:{line} imports another engine, {name}")
        elif module.startswith("fleetd.core") and top not in CORE_STDLIB and not (name == "random" and lazy):
            found.append(f"{module}:{line} imports {name}: the core is pure")
        elif top in HOST_ONLY and not (lazy or module.startswith("fleetd.host") or module in HOST_ONLY_EXCEPTIONS):
            found.append(f"{module}:{line} imports {name}: only the host may")
    return found


# fleetctl writes unit files and opens programs for a person; the doctor asks the machine the same questions as the host.
HOST_ONLY_EXCEPTIONS = frozenset({"fleetd.cli.fleetctl"})


def _other_engine(module: str, name: str) -> bool:
    engines = {"ollama", "vllm", "lmstudio", "llamacpp", "generic", "external"}
    mine, theirs = module.split("."), name.split(".")
    return theirs[:2] == ["fleetd", "engines"] and len(theirs) > 2 and theirs[2] in engines and theirs[2] != mine[2]


def test_modules_import_only_downward() -> None:
    assert [
        found for path in modules() for found in upward(dotted(path), source_of(path), path.name == "__init__.py")
    ] == []


def package_sources() -> dict[str, tuple[str, bool]]:
    return {dotted(path): (source_of(path), path.name == "__init__.py") for path in modules()}


def test_no_import_cycle() -> None:
    assert cycles(import_graph(package_sources(), ROOT)) == []


def test_layer_table_has_no_stale_name() -> None:
    known = set(package_sources())
    named = {*ALLOWED, *HOST_ONLY_EXCEPTIONS} | {name for allowed in ALLOWED.values() for name in allowed}
    assert named - known == set()


def random_uses(source: str) -> list[str]:
    """Return uses of the `random` module beyond the type `random.Random`."""
    return [
        ast.unparse(node)
        for node in nodes(source)
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and node.value.id == "random"
        and node.attr != "Random"
    ]


def test_core_has_no_random_source_of_its_own() -> None:
    core = [path for path in modules() if "core" in path.relative_to(PACKAGE).parts]
    assert core
    assert {dotted(path): found for path in core if (found := random_uses(source_of(path)))} == {}


@pytest.mark.parametrize(
    ("module", "source", "bad"),
    [
        ("fleetd.core.fleet", "import asyncio", True),
        ("fleetd.core.fleet", "import random", True),
        ("fleetd.core.fleet", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import random", False),
        ("fleetd.core.fleet", "from time import monotonic", True),
        ("fleetd.core.fleet", "from fleetd.host import process", True),
        ("fleetd.core.fleet", "from . import events", False),
        ("fleetd.engines.vllm.engine", "from fleetd.engines.ollama.engine import ENGINE", True),
        ("fleetd.engines.vllm.engine", "from fleetd.engines.base import Options", False),
        ("fleetd.engines.vllm.engine", "from fleetd.core.fleet import Fleet", True),
        ("fleetd.gateway.proxy", "from fleetd.daemon import app", True),
        ("fleetd.control.server", "import psutil", True),
        ("fleetd.host.process", "import psutil", False),
        ("fleetd.cli.fleetctl", "from fleetd.daemon import app", True),
        ("fleetd.cli.fleetd", "from fleetd.daemon import app", False),
        ("fleetd.config.load", "from fleetd.core.data import specs", True),
    ],
)
def test_layer_check_finds_upward_imports(module: str, source: str, bad: bool) -> None:
    assert bool(upward(module, source)) is bad


def test_random_check_finds_a_use() -> None:
    assert random_uses("import random\nrandom.random()") == ["random.random"]
    assert random_uses("def f(rng: random.Random): ...") == []


def test_core_names_are_standard_library() -> None:
    assert sys.stdlib_module_names >= CORE_STDLIB


def test_cycle_check_finds_a_cycle() -> None:
    sources = {
        "a": ("import b", False),
        "b": ("def f():\n    import c", False),
        "c": ("import a", False),
        "d": ("import a", False),
    }
    assert cycles(import_graph(sources, ROOT)) == [["a", "b", "c"]]
    assert levels(import_graph(sources, ROOT)) == 2
