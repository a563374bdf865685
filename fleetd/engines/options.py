"""The base of every engine's options. Apart from the contract, so that a daemon whose engines need no pydantic loads none."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, model_validator


class Options(BaseModel):
    """Closed and frozen; an empty value (`threads:` with nothing after it) means "not said".

    `travels_plain` says that nothing but the values is read of them once they were checked: a running daemon is then handed
    a plain object with the same attributes. `refused` says of keys that people may know from elsewhere what to write instead.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    travels_plain: ClassVar[bool] = False
    refused: ClassVar[Mapping[str, str]] = {}

    @model_validator(mode="before")
    @classmethod
    def _empty_is_absent(cls, data: Any) -> Any:
        if isinstance(data, dict) and None in data.values():
            return {key: value for key, value in data.items() if value is not None}
        return data
