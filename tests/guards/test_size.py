"""The limits that keep the code readable: sizes of functions, modules and folders, and names that say one thing each."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "fleetd"
FUNCTION_LINES, WARN_LINES, MODULE_LINES, FOLDER_FILES = 60, 400, 600, 25
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
def test_module_stays_below_the_line_limit(path: Path) -> None:
    lines = len(path.read_text("utf-8").splitlines())
    assert lines <= MODULE_LINES
    if lines > WARN_LINES:
        record_long_module(f"{name_of(path)}: {lines} lines")


def record_long_module(line: str) -> None:
    """Print a module above the warning limit; it is no failure."""
    print(f"long module: {line}")


@pytest.mark.parametrize("folder", sorted({path.parent for path in modules()}), ids=name_of)
def test_folder_holds_at_most_25_files(folder: Path) -> None:
    assert len([path for path in folder.iterdir() if path.is_file()]) <= FOLDER_FILES


def classes_of(sources: dict[str, str]) -> dict[str, list[str]]:
    """Return the modules that define each class, nested classes and private ones included."""
    found: dict[str, list[str]] = {}
    for name, source in sources.items():
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.ClassDef):
                found.setdefault(node.name, []).append(name)
    return found


def test_no_class_name_is_defined_twice() -> None:
    found = classes_of({name_of(path): path.read_text("utf-8") for path in modules()})
    assert {name: places for name, places in sorted(found.items()) if len(places) > 1} == {}


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
    assert classes_of({"a": "class X: ...", "b": "class Y:\n    class X: ..."})["X"] == ["a", "b"]
