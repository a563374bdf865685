"""What is wrong with the options of engines, in the words and at the places of fleet.yaml.

The rules of this file
- Each engine types its own options; the configuration knows them as raw mappings.
- `find` works on plain data that may be wrong anywhere: what makes no sense there is told elsewhere.
"""

from __future__ import annotations

import difflib
from typing import Any

from pydantic import ValidationError

from fleetd.config.index import mapping
from fleetd.config.marks import Marks, Path_
from fleetd.engines import load as find_engine
from fleetd.engines.base import Engine
from fleetd.errors import EngineError, Problem


def read_options(engine: Engine, raw: Any, path: Path_, marks: Marks) -> tuple[Any, list[Problem]]:
    """Return the typed options of the entry at `path`, or None and every mistake in them."""
    try:
        return engine.options.model_validate(raw), []
    except ValidationError as error:
        return None, [
            marks.problem(
                (*path, "options", *filter(_in_file, item["loc"])),
                _message(item, engine),
                at_key=item["type"] == "extra_forbidden",
            )
            for item in error.errors(include_url=False)
        ]


def find(data: Any, marks: Marks) -> list[Problem]:
    """Return the mistakes in the options of all entries of a configuration that has other mistakes."""
    found: list[Problem] = []
    for section in ("instances", "models"):
        for name, entry in mapping(mapping(data).get(section)).items():
            engine, options = mapping(entry).get("engine"), mapping(entry).get("options", {})
            if isinstance(engine, str) and isinstance(options, dict):
                found += _of_entry(engine, options, (section, name), marks)
    return found


def _of_entry(name: str, options: dict[str, Any], path: Path_, marks: Marks) -> list[Problem]:
    try:
        return read_options(find_engine(name), options, path, marks)[1]
    except EngineError as error:
        return [marks.problem((*path, "engine"), error.sentence)]


def _in_file(part: str | int) -> bool:
    """Pydantic adds the names of union members to its paths; those are not keys of the file."""
    return isinstance(part, int) or not part.startswith(("function-", "literal[", "constrained-", "tagged-"))


def _message(item: Any, engine: Engine) -> str:
    if item["type"] == "extra_forbidden":
        key, known = str(item["loc"][-1]), engine.options.model_fields
        near = difflib.get_close_matches(key, known, 1)
        hint = f"did you mean {near[0]}?" if near else f"{engine.name} knows {', '.join(sorted(known))}"
        return f"unknown option: {hint}"
    if item["type"] == "missing":
        return "is required"
    return str(item["msg"]).removeprefix("Value error, ")
