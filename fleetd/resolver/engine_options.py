"""Find mistakes in engine options, with the places of fleet.yaml.

Invariants:
- Each engine types its own options; the configuration has them as raw mappings.
- `find` works on plain data that may be wrong anywhere; other checks report what it skips.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Any

from pydantic import ValidationError

from fleetd.config.validate.raw_entries import mapping
from fleetd.config.yaml.source_map import Path_, SourceMap
from fleetd.engines.base import Engine
from fleetd.engines.options import Options
from fleetd.engines.registry import load as find_engine
from fleetd.errors import EngineError, Problem

_SHOWN_AT_MOST = 35  # names in one sentence


def read_options(engine: Engine, raw: Any, path: Path_, source_map: SourceMap) -> tuple[Options | None, list[Problem]]:
    """Return the typed options of the entry at `path`, and every mistake in them.

    Where there are mistakes, the options are those that are right; None where one that is required is not.
    """
    try:
        return engine.options.model_validate(raw), []
    except ValidationError as error:
        found: dict[Path_, Problem] = {}
        for item in error.errors(include_url=False):
            where = _in_file(item, raw)
            unknown = item["type"] == "extra_forbidden"
            problem = source_map.problem((*path, "options", *where), _message(item, engine), at_key=unknown)
            found.setdefault(where, problem)
    wrong = {where[0] for where in found if where}
    return _without(engine, raw, wrong), list(found.values())


def _without(engine: Engine, raw: dict[str, Any], wrong: set[str | int]) -> Options | None:
    try:
        return engine.options.model_validate({key: value for key, value in raw.items() if key not in wrong})
    except ValidationError:
        return None


def find(data: Any, source_map: SourceMap) -> list[Problem]:
    """Return the mistakes in all options of an otherwise invalid configuration."""
    found: list[Problem] = []
    for section in ("instances", "models"):
        for name, entry in mapping(mapping(data).get(section)).items():
            engine, options = mapping(entry).get("engine"), mapping(entry).get("options", {})
            if isinstance(engine, str) and isinstance(options, dict):
                found += _of_entry(engine, options, (section, name), source_map)
    return found


def _of_entry(name: str, options: dict[str, Any], path: Path_, source_map: SourceMap) -> list[Problem]:
    try:
        return read_options(find_engine(name), options, path, source_map)[1]
    except EngineError as error:
        return [source_map.problem((*path, "engine"), error.sentence)]


def _in_file(item: Any, raw: Any) -> Path_:
    """Return the place of a mistake below `options`, without pydantic's union members."""
    mistake = (item.get("ctx") or {}).get("error")
    location = (*item["loc"], *getattr(mistake, "where", ()))
    where: Path_ = ()
    for part in location:
        known = (isinstance(raw, dict) and part in raw) or (isinstance(raw, list) and isinstance(part, int))
        if known:
            where, raw = (*where, part), raw[part]
        elif item["type"] == "missing" and part == location[-1]:
            where = (*where, part)
    return where


def _message(item: Any, engine: Engine) -> str:
    if item["type"] == "extra_forbidden":
        return _unknown(item["loc"], engine)
    if item["type"] == "missing":
        return "is required"
    mistake = (item.get("ctx") or {}).get("error")
    message = str(mistake if mistake is not None else item["msg"])
    return message.replace("Input should be", "must be", 1)


def _unknown(location: Sequence[str | int], engine: Engine) -> str:
    key = str(location[-1])
    if len(location) > 1:
        return "unknown key: there is no such one here"
    if key in engine.options.refused:
        return engine.options.refused[key]
    known = engine.options.model_fields
    near = difflib.get_close_matches(key, known, 1)
    if near:
        return f"unknown option: did you mean {near[0]}?"
    if len(known) <= _SHOWN_AT_MOST:
        return f"unknown option: {engine.name} knows {', '.join(sorted(known))}"
    untyped = "; what has no option of its own goes under extra_args" if "extra_args" in known else ""
    return f"unknown option: {engine.name} has none of this name{untyped}"
