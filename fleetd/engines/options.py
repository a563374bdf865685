"""The base class of every engine's options; a module of its own, since importing it loads pydantic."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

from pydantic import BaseModel, ConfigDict, SecretStr, model_validator

OwnOptions = TypeVar("OwnOptions", bound="Options")


@dataclass(frozen=True, slots=True)
class SharedOptions:
    """The options that fleetd itself reads, for every engine that has them."""

    api_key: str | None  # sent as a bearer token with every request
    model: str | None  # the model of a process that serves one
    embeddings: bool
    context_length: int | None  # tokens per request


class Options(BaseModel):
    """Typed options of one entry: closed and frozen. An empty value means "not set".

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

    def shared(self) -> SharedOptions:
        """Return the options that fleetd reads: key, model, embeddings, context length."""
        values = dict(self)
        key, model = values.get("api_key"), values.get("model")
        length = values.get("context_length") or values.get("max_model_len")
        return SharedOptions(
            api_key=key.get_secret_value() if isinstance(key, SecretStr) else None,
            model=model if isinstance(model, str) else None,
            embeddings=values.get("embeddings") is True,
            context_length=length if isinstance(length, int) and length > 0 else None,
        )


def narrow(options: Options, kind: type[OwnOptions]) -> OwnOptions:
    """Return `options` as its engine's type. Raises TypeError for another engine's."""
    if not isinstance(options, kind):
        raise TypeError(f"{type(options).__name__} where {kind.__name__} is expected: options of another engine")
    return options
