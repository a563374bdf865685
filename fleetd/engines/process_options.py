"""The options of the engine `process`, read where fleet.yaml is."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from fleetd.engines.base import Api
from fleetd.engines.fields import Count
from fleetd.engines.options import Options


class ProcessOptions(Options):
    """What fleetd must be told of a program that it does not know."""

    travels_plain: ClassVar[bool] = True

    api: Api = Field(
        Api.OPENAI, description="the dialect of its port; none: it is supervised, and nothing is routed to it"
    )
    concurrency: Count = Field(4, description="requests that it works on at once")
    health: str | None = Field(None, pattern=r"^/", description="a path that answers 2xx once it is ready")
