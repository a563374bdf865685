"""The limits that keep the code readable: sizes of functions, modules and folders, and names that say one thing each."""

from __future__ import annotations

import ast
import re

from tests.guards.package import PACKAGE, modules, name_of, source_of
from tests.support.import_graph import nodes, parsed

FUNCTION_LINES, WARN_LINES, MODULE_LINES, FOLDER_FILES = 60, 400, 600, 25
EMPTY_WORDS = frozenset({"manager", "helper", "helpers", "util", "utils", "common", "misc"})


def long_functions(source: str) -> list[str]:
    found = []
    for node in nodes(source):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            if length > FUNCTION_LINES:
                found.append(f"{node.name}: {length} lines")
    return found


def empty_names(name: str, source: str) -> list[str]:
    """Return the names of the module, its classes and functions that hold a word of no meaning."""
    names = [name]
    for node in nodes(source):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.append(node.name)
    return [
        name for name in names if EMPTY_WORDS & set(re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower().split("_"))
    ]


def test_functions_fit_on_a_screen() -> None:
    assert {name_of(path): found for path in modules() if (found := long_functions(source_of(path)))} == {}


def test_modules_stay_below_the_line_limit() -> None:
    lengths = {name_of(path): len(source_of(path).splitlines()) for path in modules()}
    assert {name: lines for name, lines in lengths.items() if lines > MODULE_LINES} == {}
    for name, lines in lengths.items():
        if lines > WARN_LINES:
            print(f"long module: {name}: {lines} lines")


def crowded(folders: dict[str, int]) -> list[str]:
    """Return the folders with too many files."""
    return [f"{name}: {count} files" for name, count in folders.items() if count > FOLDER_FILES]


def test_folders_hold_at_most_25_files() -> None:
    folders = {path.parent for path in modules()}
    assert PACKAGE in folders
    assert crowded({name_of(one): len([path for path in one.iterdir() if path.is_file()]) for one in folders}) == []


def classes_of(sources: dict[str, str]) -> dict[str, list[str]]:
    """Return the modules that define each class, nested classes and private ones included."""
    found: dict[str, list[str]] = {}
    for name, source in sources.items():
        for node in nodes(source):
            if isinstance(node, ast.ClassDef):
                found.setdefault(node.name, []).append(name)
    return found


def test_no_class_name_is_defined_twice() -> None:
    found = classes_of({name_of(path): source_of(path) for path in modules()})
    assert {name: places for name, places in sorted(found.items()) if len(places) > 1} == {}


def test_names_say_something() -> None:
    assert {name_of(path): found for path in modules() if (found := empty_names(path.stem, source_of(path)))} == {}


def test_modules_open_with_a_docstring() -> None:
    undocumented = [name_of(path) for path in modules() if not ast.get_docstring(parsed(source_of(path)))]
    assert [name for name in undocumented if not name.endswith("__init__.py")] == []


def test_size_checks_find_violations() -> None:
    body = "\n".join("    x = 1" for _ in range(FUNCTION_LINES))
    assert long_functions(f"def f():\n{body}\n") == ["f: 61 lines"]
    assert empty_names("loop", "class ModelManager: ...\ndef run(): ...\n") == ["ModelManager"]
    assert empty_names("http_utils", "") == ["http_utils"]
    assert empty_names("utility", "def commonly(): ...") == []
    assert classes_of({"a": "class X: ...", "b": "class Y:\n    class X: ..."})["X"] == ["a", "b"]
    assert crowded({"a": FOLDER_FILES, "b": FOLDER_FILES + 1}) == ["b: 26 files"]
