"""The base of every mapping in fleet.yaml, and the common value types.

Invariants:
- Closed and frozen: an unknown key is a mistake; a loaded configuration never changes.
- An empty value (`stop:` with nothing after it) means "not set": the default applies.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, model_validator

from fleetd.config.schema.types import CommandType, DurationType, Flag, Size, Strings, Text, Whole


class Block(BaseModel):
    """One mapping with known keys."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _drop_empty_values(cls, data: Any) -> Any:
        if data is None:
            return {}
        if isinstance(data, dict) and None in data.values():
            return {key: value for key, value in data.items() if value is not None}
        return data


PROCESS_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}"
MODEL_NAME = r"[A-Za-z0-9][A-Za-z0-9._:/@+-]{0,199}"

Bool = Annotated[bool, Flag()]
Port = Annotated[int, Whole(1, 65535)]
Seconds = Annotated[float, DurationType("1ms", "365d")]
SecondsOrZero = Annotated[float, DurationType("1ms", "365d", zero=True)]
Bytes = Annotated[int, Size()]
Word = Annotated[str, Text(255)]
PathText = Annotated[str, Text(4096, what="a path")]
Words = Annotated[tuple[str, ...], Strings()]
Argv = Annotated[tuple[str, ...], CommandType()]
ModelName = Annotated[str, Text(what="the name of a model", pattern=MODEL_NAME)]
