"""Load and unload models in a running LM Studio server.

Invariants:
- An unknown route answers 200 with an error in its body: every answer is checked for its shape, never for its status alone.
- There are two management APIs: /api/v1 (since 0.4) loads and unloads, /api/v0 only lists. Each call finds out which one exists.
- Models are loaded explicitly: a request for a model that is not loaded makes LM Studio load it and evict another one.
- Bytes are the size of the file, the only figure that LM Studio reports; they count for the server's own device.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fleetd.engines.base import Endpoint, ProbeOutcome, Resident, ServedModel
from fleetd.engines.http import Deadline, Reply, call, until
from fleetd.engines.lmstudio.options import LOAD_OPTIONS
from fleetd.engines.load_options import load_options
from fleetd.errors import EngineError

if TYPE_CHECKING:
    from aiohttp import ClientSession

POLL_S = 0.025
LIST_TIMEOUT_S = 5.0


@dataclass(frozen=True, slots=True)
class ListedModel:
    """One listed model; `context_length` is that of its first loaded copy, 0: unknown."""

    key: str
    instances: tuple[str, ...]
    size_bytes: int
    embeds: bool
    context_length: int = 0


class LmStudioServer:
    """Loads and unloads models by the management API."""

    async def load(
        self, http: ClientSession, endpoint: Endpoint, model: ServedModel, timeout_s: float
    ) -> Mapping[str, int]:
        """Load unless it is loaded, and return once the server lists it."""
        found = await _find(http, endpoint, model.served_as)
        if found is None:
            hint = f"lms get {model.served_as}, or `lms import FILE --symbolic-link`; `lms ls` shows the names"
            raise EngineError(
                f"{model.name}: LM Studio at {endpoint.base_url} has no model {model.served_as}",
                hint=hint,
                recoverable=False,
            )
        if not found.instances:
            await _load(http, endpoint, model, timeout_s)
            what = f"LM Studio loaded {model.served_as}, but does not list it as loaded"

            async def listed() -> bool:
                entry = await _find(http, endpoint, model.served_as)
                return entry is not None and bool(entry.instances)

            await until(listed, timeout_s=5.0, period_s=POLL_S, what=what)
        return {"gpu": found.size_bytes} if found.size_bytes else {}

    async def unload(self, http: ClientSession, endpoint: Endpoint, model: ServedModel, timeout_s: float) -> None:
        """Unload every instance of the model."""
        deadline = Deadline(timeout_s)
        found = await _find(http, endpoint, model.served_as)
        for instance in found.instances if found is not None else ():
            payload = {"instance_id": instance}
            reply = await call(http, endpoint, "POST", "/api/v1/models/unload", payload, timeout_s=deadline.left())
            if reply.status != 404 and reply.mapping().get("instance_id") != instance:
                raise _failed(f"{reply.url} did not unload {instance}: {reply.message}", reply, recoverable=True)

        async def gone() -> bool:
            entry = await _find(http, endpoint, model.served_as)
            return entry is None or not entry.instances

        await until(
            gone, timeout_s=deadline.left(), period_s=POLL_S, what=f"LM Studio still has {model.served_as} in memory"
        )

    async def loaded(self, http: ClientSession, endpoint: Endpoint) -> Sequence[Resident]:
        return tuple(
            Resident(entry.key, {"gpu": entry.size_bytes} if entry.size_bytes else {}, entry.context_length or None)
            for entry in await _listed(http, endpoint, LIST_TIMEOUT_S)
            if entry.instances
        )

    def canonical_name(self, served_as: str) -> str:
        return served_as


async def alive(http: ClientSession, endpoint: Endpoint, model: ServedModel | None, timeout_s: float) -> ProbeOutcome:
    """Request one token, or the list if no model is loaded. Never causes a load."""
    entries = [entry for entry in await _listed(http, endpoint, timeout_s) if entry.instances]
    if model is not None:
        entries = [entry for entry in entries if entry.key == model.served_as]
    if not entries:
        return ProbeOutcome(True, "no model is loaded; the server answers")
    return await _one_token(http, endpoint, entries[0], timeout_s)


def _failed(message: str, reply: Reply, *, recoverable: bool) -> EngineError:
    """Return the error of a load or unload; without the route, the server is too old."""
    if "nexpected endpoint" in reply.message:
        message = f"{reply.url} does not exist: LM Studio is older than 0.4, which loading and unloading need"
        return EngineError(message, key="command", recoverable=False)
    return EngineError(message, recoverable=recoverable)


async def _load(http: ClientSession, endpoint: Endpoint, model: ServedModel, timeout_s: float) -> None:
    payload = {"model": model.served_as, **load_options(model, LOAD_OPTIONS)}
    reply = await call(http, endpoint, "POST", "/api/v1/models/load", payload, timeout_s=timeout_s)
    answer = reply.mapping()
    if answer.get("status") != "loaded" or not isinstance(answer.get("instance_id"), str):
        message = f"{model.name}: {reply.url} did not load {model.served_as}: {reply.message}"
        raise _failed(message, reply, recoverable=reply.status != 404)


async def _find(http: ClientSession, endpoint: Endpoint, key: str) -> ListedModel | None:
    return next((entry for entry in await _listed(http, endpoint, LIST_TIMEOUT_S) if entry.key == key), None)


async def _listed(http: ClientSession, endpoint: Endpoint, timeout_s: float) -> list[ListedModel]:
    """Return the server's models by the API that it has. Raises EngineError."""
    reply = await call(http, endpoint, "GET", "/api/v1/models", timeout_s=timeout_s)
    if isinstance(reply.data, Mapping) and isinstance(reply.data.get("models"), list):
        return list(_entries_v1(reply))
    old = await call(http, endpoint, "GET", "/api/v0/models", timeout_s=timeout_s)
    if isinstance(old.data, Mapping) and isinstance(old.data.get("data"), list):
        return list(_entries_v0(old))
    raise EngineError(
        f"{reply.url} does not list models in the format of LM Studio: {reply.message}",
        hint="is this LM Studio, 0.3.6 or newer?",
        key="command",
    )


def _entries_v1(reply: Reply) -> Iterator[ListedModel]:
    for model in reply.listing("models"):
        instances = model.get("loaded_instances")
        if instances is not None and not (
            isinstance(instances, list) and all(isinstance(i, Mapping) for i in instances)
        ):
            raise EngineError(
                f"{reply.url} did not answer with a list of objects under 'loaded_instances': {reply.message!r}"
            )
        loaded_with = next((instance.get("config") for instance in instances or ()), None)
        yield ListedModel(
            reply.word(model, "key"),
            tuple(reply.word(instance, "id") for instance in instances or ()),
            reply.count(model, "size_bytes"),
            model.get("type") == "embedding",
            reply.count(loaded_with, "context_length") if isinstance(loaded_with, Mapping) else 0,
        )


def _entries_v0(reply: Reply) -> Iterator[ListedModel]:
    for model in reply.listing("data"):
        key = reply.word(model, "id")
        yield ListedModel(key, (key,) if model.get("state") == "loaded" else (), 0, model.get("type") == "embeddings")


async def _one_token(http: ClientSession, endpoint: Endpoint, entry: ListedModel, timeout_s: float) -> ProbeOutcome:
    name = entry.instances[0]
    if entry.embeds:
        payload: dict[str, Any] = {"model": name, "input": "a"}
        reply = await call(http, endpoint, "POST", "/v1/embeddings", payload, timeout_s=timeout_s)
        good = isinstance(reply.data, Mapping) and isinstance(reply.data.get("data"), list)
        return ProbeOutcome(good, f"{name} embedded one token" if good else f"{name}: {reply.message}")
    payload = {"model": name, "messages": [{"role": "user", "content": "a"}], "max_tokens": 1}
    reply = await call(http, endpoint, "POST", "/v1/chat/completions", payload, timeout_s=timeout_s)
    good = isinstance(reply.data, Mapping) and bool(reply.data.get("choices"))
    return ProbeOutcome(good, f"{name} generated one token" if good else f"{name}: {reply.message}")
