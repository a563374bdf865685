"""The base class of every engine's options; a module of its own, since importing it loads pydantic."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, TypeVar

from pydantic import BaseModel, ConfigDict, model_validator

OwnOptions = TypeVar("OwnOptions", bound="Options")


class Options(BaseModel):
    """Typed options of one entry: closed and frozen. An empty value (`threads:` with nothing after it) means "not set".

    `travels_plain`: only the values are read after validation, so the config worker sends the daemon a plain object with the
    same attributes. `refused` maps keys that users may expect to the sentence that rejects them.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    travels_plain: ClassVar[bool] = False
    refused: ClassVar[Mapping[str, str]] = {}

    @model_validator(mode="before")
    @classmethod
    def _drop_empty_values(cls, data: Any) -> Any:
        if isinstance(data, dict) and None in data.values():
            return {key: value for key, value in data.items() if value is not None}
        return data


def narrow(options: Options, kind: type[OwnOptions]) -> OwnOptions:
    """Return `options` as the type of the engine that they were validated for. Raises TypeError for another engine's."""
    if not isinstance(options, kind):
        raise TypeError(f"{type(options).__name__} where {kind.__name__} is expected: options of another engine")
    return options
