"""The base of every engine's options. Apart from the contract, so that a daemon whose engines need no pydantic loads none."""

from __future__ import annotations

from typing import ClassVar

from pydantic import BaseModel, ConfigDict


class Options(BaseModel):
    """Closed and frozen.

    `travels_plain` says that nothing but the values is read of them once they were checked: a running daemon is then handed
    a plain object with the same attributes.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    travels_plain: ClassVar[bool] = False
