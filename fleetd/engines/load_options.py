"""Type and check `models.NAME.options`: the arguments of a load, for models that a server loads.

Servers report a wrong type late, at the first load; these checks report it when fleet.yaml is read, at the key of the model.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any

from fleetd.config.schema.types import FieldType, Flag, Whole
from fleetd.engines.base import OptionProblem, ServedModel

LARGEST = 2**31 - 1
COUNT, INDEX, SWITCH = Whole(1, LARGEST), Whole(0, LARGEST), Flag()


def load_option_problems(
    models: Iterable[ServedModel], known: Mapping[str, FieldType], server: str, suffix: str = ""
) -> list[OptionProblem]:
    """Return the mistakes in load options; `suffix` ends each "unknown" message."""
    found: list[OptionProblem] = []
    for model in models:
        for key, value in model.options.items():
            kind = known.get(key)
            place = ("models", model.name, "options", key)
            if kind is None:
                found.append(OptionProblem(place, _unknown(key, known, server) + suffix))
                continue
            try:
                kind.parse(value)
            except ValueError as error:
                found.append(OptionProblem(place, str(error)))
    return found


def build_key_problems(models: Iterable[ServedModel], server: str) -> list[OptionProblem]:
    """Return the keys of models that only a server that builds models could apply."""
    return [
        OptionProblem(("models", model.name, key), f"has no effect: {server} does not build models, only Ollama does")
        for model in models
        for key, value in (("quantize", model.quantize), ("modelfile", model.modelfile))
        if value
    ]


def load_options(model: ServedModel, known: Mapping[str, FieldType]) -> dict[str, Any]:
    """Return checked load options in the server's types; a number may be a string."""
    return {key: known[key].parse(value) for key, value in model.options.items() if key in known}


def _unknown(key: str, known: Mapping[str, FieldType], server: str) -> str:
    if not known:
        return f"unknown option: a model served by {server} takes none"
    near = difflib.get_close_matches(key, known, 1)
    hint = f"did you mean {near[0]}?" if near else f"a model served by {server} takes {', '.join(sorted(known))}"
    return f"unknown option: {hint}"
