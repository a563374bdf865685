"""The options of the engine `process`."""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import Field

from fleetd.config.schema.types import Text
from fleetd.engines.base import Api
from fleetd.engines.option_types import Count, Dialect
from fleetd.engines.options import Options


class ProcessOptions(Options):
    """What fleetd needs to know about a program."""

    travels_plain: ClassVar[bool] = True

    api: Dialect = Field(
        Api.OPENAI, description="the dialect of its port; none: supervised, and nothing is routed to it"
    )
    concurrency: Count = Field(4, description="requests it processes at once")
    health: Annotated[str, Text(2048, pattern=r"/[!-~]*", what="a path such as /health")] | None = Field(
        None, description="a path that answers 2xx when it is ready"
    )
