"""Field types that several engines' options share: durations and sizes, as fleet.yaml writes them."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator, Field, WithJsonSchema

from fleetd import units


def _lifetime(value: Any) -> Any:
    """-1 and `forever` are the same; other negative numbers are no duration."""
    if value in ("forever", "-1", -1) and value is not True:
        return -1.0
    return units.parse_duration(value)


_TEXT_OR_NUMBER = {"anyOf": [{"type": "string"}, {"type": "integer"}]}

Size = Annotated[
    int, BeforeValidator(units.parse_size), WithJsonSchema({**_TEXT_OR_NUMBER, "description": "2GiB, 512MiB, or bytes"})
]
Duration = Annotated[
    float, BeforeValidator(units.parse_duration), WithJsonSchema({"type": "string", "description": "30s, 5m, 1h30m"})
]
Lifetime = Annotated[
    float, BeforeValidator(_lifetime), WithJsonSchema({**_TEXT_OR_NUMBER, "description": "5m, or -1 for ever"})
]
Count = Annotated[int, Field(ge=1)]
