"""The options of the engine `external`."""

from __future__ import annotations

from pydantic import Field

from fleetd.engines.base import Api
from fleetd.engines.option_types import Count, Dialect, Secret
from fleetd.engines.options import Options


class ExternalOptions(Options):
    """How the server is addressed."""

    api: Dialect = Field(Api.OPENAI, description="the dialect of its port")
    api_key: Secret | None = Field(None, description="sent as a bearer token; write it as ${NAME}")
    concurrency: Count = Field(16, description="requests sent to it at once")
