"""What `models.NAME.options` may say of a model that a server holds: the words of a load, typed.

The rules of this file
- A server takes a wrong type badly and late, at the first load; here it is told when fleet.yaml is read.
- Places are those of the model's own entry: `models.NAME.options.KEY`.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any

from fleetd.config.schema.types import FieldType, Flag, Whole
from fleetd.engines.base import HeldModel, OptionProblem

LARGEST = 2**31 - 1
COUNT, INDEX, SWITCH = Whole(1, LARGEST), Whole(0, LARGEST), Flag()


def held_option_problems(
    models: Iterable[HeldModel], known: Mapping[str, FieldType], server: str, elsewhere: str = ""
) -> list[OptionProblem]:
    """Return what is wrong with the load options of models that `server` shall hold."""
    found: list[OptionProblem] = []
    for model in models:
        for key, value in model.options.items():
            kind = known.get(key)
            place = ("models", model.name, "options", key)
            if kind is None:
                found.append(OptionProblem(place, _unknown(key, known, server) + elsewhere))
                continue
            try:
                kind.parse(value)
            except ValueError as error:
                found.append(OptionProblem(place, str(error)))
    return found


def unmade_problems(models: Iterable[HeldModel], server: str) -> list[OptionProblem]:
    """Return what is said of models that only a server which makes models could follow."""
    return [
        OptionProblem(("models", model.name, key), f"has no effect: {server} makes no models, Ollama does")
        for model in models
        for key, said in (("quantize", model.quantize), ("modelfile", model.modelfile))
        if said
    ]


def load_options(model: HeldModel, known: Mapping[str, FieldType]) -> dict[str, Any]:
    """Return the load options of a checked model as the server's own types: a number may have come out of a variable."""
    return {key: known[key].parse(value) for key, value in model.options.items() if key in known}


def _unknown(key: str, known: Mapping[str, FieldType], server: str) -> str:
    if not known:
        return f"is not known: a model held by {server} takes no options"
    near = difflib.get_close_matches(key, known, 1)
    said = f"did you mean {near[0]}?" if near else f"a model held by {server} takes {', '.join(sorted(known))}"
    return f"is not known: {said}"
