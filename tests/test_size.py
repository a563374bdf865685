"""The limits that keep the code readable: length of functions and modules, and words that say nothing in a name."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "fleetd"
FUNCTION_LINES, MODULE_LINES, CORE_LINES = 60, 500, 300
EMPTY_WORDS = frozenset({"manager", "helper", "helpers", "util", "utils", "common", "misc"})


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def long_functions(source: str) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            if length > FUNCTION_LINES:
                found.append(f"{node.name}: {length} lines")
    return found


def empty_names(name: str, source: str) -> list[str]:
    """Return the names of the module, its classes and functions that hold a word of no meaning."""
    names = [name]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.append(node.name)
    return [
        name for name in names if EMPTY_WORDS & set(re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower().split("_"))
    ]


def name_of(path: Path) -> str:
    return str(path.relative_to(PACKAGE.parent))


@pytest.mark.parametrize("path", modules(), ids=name_of)
def test_functions_fit_on_a_screen(path: Path) -> None:
    assert long_functions(path.read_text("utf-8")) == []


@pytest.mark.parametrize("path", modules(), ids=name_of)
def test_modules_hold_one_idea(path: Path) -> None:
    limit = CORE_LINES if path.parent.name == "core" else MODULE_LINES
    assert len(path.read_text("utf-8").splitlines()) <= limit


@pytest.mark.parametrize("path", modules(), ids=name_of)
def test_names_say_something(path: Path) -> None:
    assert empty_names(path.stem, path.read_text("utf-8")) == []


@pytest.mark.parametrize("path", [path for path in modules() if path.name != "__init__.py"], ids=name_of)
def test_modules_open_with_a_docstring(path: Path) -> None:
    assert ast.get_docstring(ast.parse(path.read_text("utf-8")))


def test_the_checks_themselves() -> None:
    body = "\n".join("    x = 1" for _ in range(FUNCTION_LINES))
    assert long_functions(f"def f():\n{body}\n") == ["f: 61 lines"]
    assert empty_names("loop", "class ModelManager: ...\ndef run(): ...\n") == ["ModelManager"]
    assert empty_names("http_utils", "") == ["http_utils"]
    assert empty_names("utility", "def commonly(): ...") == []
