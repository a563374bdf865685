"""Serve models from a server that fleetd did not start: it holds what it lists, and nothing is loaded or unloaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from fleetd.engines.base import Endpoint, Resident, ServedModel
from fleetd.engines.http import call
from fleetd.errors import EngineError

if TYPE_CHECKING:
    from aiohttp import ClientSession

LIST_TIMEOUT_S = 10.0
_SHOWN_NAMES = 8


class ListedModels:
    """The model server of an external server that speaks OpenAI's dialect."""

    async def load(
        self, http: ClientSession, endpoint: Endpoint, model: ServedModel, timeout_s: float
    ) -> Mapping[str, int]:
        """Verify that the server lists the model; a server without a list is trusted."""
        names = await listed_names(http, endpoint, timeout_s)
        if names and model.served_as not in names:
            shown = ", ".join(sorted(names)[:_SHOWN_NAMES]) + (" …" if len(names) > _SHOWN_NAMES else "")
            raise EngineError(
                f"{model.name}: {endpoint.base_url} has no model {model.served_as}; it lists {shown}", recoverable=False
            )
        return {}

    async def unload(self, http: ClientSession, endpoint: Endpoint, model: ServedModel, timeout_s: float) -> None:
        """Do nothing: the server's memory is not managed here."""

    async def loaded(self, http: ClientSession, endpoint: Endpoint) -> Sequence[Resident]:
        return tuple(Resident(name) for name in await listed_names(http, endpoint, LIST_TIMEOUT_S))

    def canonical_name(self, served_as: str) -> str:
        return served_as


async def listed_names(http: ClientSession, endpoint: Endpoint, timeout_s: float) -> tuple[str, ...]:
    """Return the models that /v1/models lists. Raises EngineError."""
    reply = await call(http, endpoint, "GET", "/v1/models", timeout_s=timeout_s)
    return tuple(reply.word(entry, "id") for entry in reply.expect("listing models").listing("data"))


LISTED_MODELS = ListedModels()
