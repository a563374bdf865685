"""Load and unload models in a running Ollama server.

Invariants:
- A loaded model stays until fleetd unloads it (keep_alive -1). Loads run on fleetd's own connection, since Ollama aborts a
  load whose client disconnects.
- A model is loaded when /api/ps lists it, and unloaded when it no longer does.
- Measured bytes are reported under `gpu`, the server's own device, and `host`.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fleetd.engines.base import Endpoint, ProbeOutcome, Resident, ServedModel
from fleetd.engines.http import Deadline, Reply, call, until
from fleetd.engines.load_options import load_options
from fleetd.engines.ollama.options import LOAD_TIME_OPTIONS
from fleetd.errors import EngineError
from fleetd.models.memory_estimate import PROCESS_BYTES
from fleetd.models.ollama import store

if TYPE_CHECKING:
    from aiohttp import ClientSession

GENERATE_REFUSED = "does not support generate"
POLL_S = 0.015
LIST_TIMEOUT_S = 5.0
OLDEST = (0, 5, 5)  # the first version whose /api/create takes files by their digest
_HOPELESS = (  # phrases of errors that a retry cannot fix
    "unable to load model",
    "unsupported model architecture",
    "unknown model architecture",
    "unsupported cache type",
    "must be of type",
    "invalid model name",
)


class OllamaServer:
    """Loads and unloads models by requests without a prompt."""

    async def load(
        self, http: ClientSession, endpoint: Endpoint, model: ServedModel, timeout_s: float
    ) -> Mapping[str, int]:
        """Load without a prompt, then wait until the server lists the model and its bytes."""
        deadline = Deadline(timeout_s)
        _check_load(await _request_load(http, endpoint, model, timeout_s), model, endpoint)

        def listed() -> Awaitable[Mapping[str, Any] | None]:
            return _entry(http, endpoint, model.served_as, deadline.left())

        what = f"{endpoint.base_url} loaded {model.served_as}, but /api/ps does not list it"
        try:
            entry = await until(listed, timeout_s=min(2.0, deadline.left()), period_s=POLL_S, what=what)
        except EngineError as error:
            error.hint = "two names of one blob share a runner in Ollama, which lists one of them: give each a `from:`"
            raise
        return device_bytes(entry)

    async def unload(self, http: ClientSession, endpoint: Endpoint, model: ServedModel, timeout_s: float) -> None:
        """Unload, then poll the list: Ollama answers before the runner has exited."""
        deadline = Deadline(timeout_s)
        payload = {"model": model.served_as, "keep_alive": 0, "stream": False}
        reply = await call(http, endpoint, "POST", "/api/generate", payload, timeout_s=timeout_s)
        if reply.status != 404:  # a model that was deleted from the store may still be resident: the poll decides
            reply.expect(f"unloading {model.served_as}")

        async def gone() -> bool:
            return await _entry(http, endpoint, model.served_as, deadline.left()) is None

        what = f"{endpoint.base_url} still has {model.served_as} in memory"
        await until(gone, timeout_s=deadline.left(), period_s=POLL_S, what=what)

    async def loaded(self, http: ClientSession, endpoint: Endpoint) -> Sequence[Resident]:
        """Return the models of /api/ps by canonical name, without those still loading."""
        return tuple(
            Resident(self.canonical_name(_name(entry)), device_bytes(entry), entry["context_length"] or None)
            for entry in await _entries(http, endpoint, LIST_TIMEOUT_S)
        )

    def canonical_name(self, served_as: str) -> str:
        """Return the short form that `loaded` uses, without implied parts and `:latest`."""
        try:
            return store.ModelName.parse(served_as).short.removesuffix(":latest")
        except ValueError:
            return served_as


async def alive(http: ClientSession, endpoint: Endpoint, model: ServedModel | None, timeout_s: float) -> ProbeOutcome:
    """Request one token, or the version if no model is loaded. Never causes a load."""
    entries = await _entries(http, endpoint, timeout_s)
    if model is not None:
        entries = [entry for entry in entries if store.same_name(_name(entry), model.served_as)]
    if not entries:
        version = await _check_version(http, endpoint, timeout_s)
        return ProbeOutcome(True, f"no model is loaded; the server answers, version {version}")
    return await _one_token(http, endpoint, entries[0], model, timeout_s)


def device_bytes(entry: Mapping[str, Any]) -> dict[str, int]:
    """Return the bytes of an /api/ps entry on "gpu", the server's device, and "host".

    The memory of the runner's process, which Ollama does not count, is added to "host".
    """
    size, vram = entry["size"], entry["size_vram"]
    parts = {"gpu": min(size, vram), "host": max(0, size - vram) + PROCESS_BYTES}
    return {name: count for name, count in parts.items() if count}


def pinned_options(model: ServedModel) -> dict[str, Any]:
    """Return the load options that each request must carry to prevent a reload."""
    return load_options(model, LOAD_TIME_OPTIONS)


def _name(entry: Mapping[str, Any]) -> str:
    return str(entry["name"])


async def _entries(http: ClientSession, endpoint: Endpoint, timeout_s: float) -> list[Mapping[str, Any]]:
    """Return the loaded models, each with its name and its counts (0: not reported)."""
    reply = await call(http, endpoint, "GET", "/api/ps", timeout_s=timeout_s)
    entries = reply.expect("listing loaded models").listing("models")
    counted = ("size", "size_vram", "context_length")
    return [
        {"name": reply.word(entry, "model", "name"), **{key: reply.count(entry, key) for key in counted}}
        for entry in entries
    ]


async def _check_version(http: ClientSession, endpoint: Endpoint, timeout_s: float) -> str:
    """Return the server's version (0.0.0: development). Raises EngineError if too old."""
    reply = (await call(http, endpoint, "GET", "/api/version", timeout_s=timeout_s)).expect("reading the version")
    text = reply.word(reply.mapping(), "version")
    found = re.match(r"v?(\d+)\.(\d+)\.(\d+)", text)
    version = tuple(map(int, found.groups())) if found is not None else (0, 0, 0)
    if (0, 0, 0) < version < OLDEST:
        oldest = ".".join(map(str, OLDEST))
        message = f"{reply.url} reports Ollama {text}; fleetd needs {oldest} or newer"
        raise EngineError(message, key="command", recoverable=False)
    return text


async def _entry(http: ClientSession, endpoint: Endpoint, served_as: str, timeout_s: float) -> Mapping[str, Any] | None:
    entries = await _entries(http, endpoint, timeout_s)
    return next((entry for entry in entries if store.same_name(_name(entry), served_as)), None)


async def _request_load(http: ClientSession, endpoint: Endpoint, model: ServedModel, timeout_s: float) -> Reply:
    """Request a load by an empty prompt; embedding models have their own route."""
    payload = {"model": model.served_as, "keep_alive": -1, "options": pinned_options(model), "stream": False}
    if not model.embedding:
        reply = await call(http, endpoint, "POST", "/api/generate", payload, timeout_s=timeout_s)
        if reply.status != 400 or GENERATE_REFUSED not in reply.message:
            return reply
    del payload["stream"]
    return await call(http, endpoint, "POST", "/api/embed", payload, timeout_s=timeout_s)


def _check_load(reply: Reply, model: ServedModel, endpoint: Endpoint) -> None:
    """Raise EngineError unless the model is loaded, recoverable if a retry can help."""
    if reply.ok:
        reply.mapping()
        return
    message = reply.message
    lowered = message.lower()
    if reply.status == 404:
        hint = f"ollama pull {model.served_as} (with OLLAMA_HOST={endpoint.base_url}), or set its file: models.{model.name}.from"
        raise EngineError(
            f"{model.name}: {endpoint.base_url} has no model {model.served_as}", hint=hint, recoverable=False
        )
    if reply.status == 400 and GENERATE_REFUSED in lowered:
        hint = "its file may be missing: is the drive mounted? Otherwise create the model again"
        raise EngineError(f"{model.name}: {message}", hint=hint, recoverable=False)
    recoverable = reply.status >= 499 and not any(needle in lowered for needle in _HOPELESS)
    raise EngineError(
        f"{model.name}: {endpoint.base_url} cannot load {model.served_as}: {message}", recoverable=recoverable
    )


async def _one_token(
    http: ClientSession, endpoint: Endpoint, entry: Mapping[str, Any], model: ServedModel | None, timeout_s: float
) -> ProbeOutcome:
    """Generate one token with the loaded model's options, which prevents a reload."""
    name = _name(entry)
    options = pinned_options(model) if model is not None else {}
    context_length = entry["context_length"]
    if context_length:
        options["num_ctx"] = context_length
    payload: dict[str, Any] = {"model": name, "keep_alive": -1, "options": options}
    if model is None or not model.embedding:
        generate = {**payload, "prompt": "a", "raw": True, "stream": False, "options": {**options, "num_predict": 1}}
        reply = await call(http, endpoint, "POST", "/api/generate", generate, timeout_s=timeout_s)
        if reply.ok:
            return ProbeOutcome(reply.mapping().get("done") is True, f"{name} generated one token")
        if reply.status == 503:
            return ProbeOutcome(True, f"{name} is busy: {reply.message}")
        if reply.status != 400 or GENERATE_REFUSED not in reply.message:
            return ProbeOutcome(False, f"{name}: HTTP {reply.status}: {reply.message}")
    reply = await call(http, endpoint, "POST", "/api/embed", {**payload, "input": "a"}, timeout_s=timeout_s)
    return ProbeOutcome(reply.ok, f"{name} embedded one token" if reply.ok else f"{name}: {reply.message}")
