"""The options of the engine `process`, read where fleet.yaml is."""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import Field

from fleetd.config.schema.types import Text
from fleetd.engines.base import Api
from fleetd.engines.option_types import Count, Dialect
from fleetd.engines.options import Options


class ProcessOptions(Options):
    """What fleetd must be told of a program that it does not know."""

    travels_plain: ClassVar[bool] = True

    api: Dialect = Field(
        Api.OPENAI, description="the dialect of its port; none: it is supervised, and nothing is routed to it"
    )
    concurrency: Count = Field(4, description="requests that it works on at once")
    health: Annotated[str, Text(2048, pattern=r"/[!-~]*", what="a path such as /health")] | None = Field(
        None, description="a path that answers 2xx once it is ready"
    )
