"""LM Studio: one server per user that holds many models; somebody else's program, or started and stopped through `lms`.

The rules of this file
- An unknown route answers 200 with an error in its body: the shape of every answer is looked at, its status never suffices.
- Two management APIs are out: /api/v1 (from 0.4 on) loads and unloads, /api/v0 only lists. Which one is there is seen each time.
- Models are loaded explicitly: a request for a model that is absent would load it just in time and evict another one.
- Bytes are the file's size, which is all that LM Studio says; they count for the server's own device.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from fleetd.config.schema.types import FieldType
from fleetd.core.data.specs import Capabilities, ExitKind, Footprint, Probes, ProbeSpec
from fleetd.engines.base import (
    Api,
    Endpoint,
    ExitVerdict,
    HeldModel,
    Launch,
    LaunchContext,
    OptionProblem,
    Options,
    ProbeOutcome,
    Resident,
)
from fleetd.engines.http import Reply, call, until
from fleetd.engines.load_options import COUNT, SWITCH, held_option_problems, load_options, unmade_problems
from fleetd.engines.option_types import Count, Secret, Switch
from fleetd.errors import EngineError

if TYPE_CHECKING:
    from aiohttp import ClientSession

POLL_S = 0.025
LIST_TIMEOUT_S = 5.0
PLACES = ("~/.lmstudio/bin", "~/.cache/lm-studio/bin", "/opt/homebrew/bin", "/usr/local/bin")
LOAD_OPTIONS: Mapping[str, FieldType] = {
    "context_length": COUNT,
    "eval_batch_size": COUNT,
    "flash_attention": SWITCH,
    "num_experts": COUNT,
    "offload_kv_cache_to_gpu": SWITCH,
}


class LmStudioOptions(Options):
    """What a load says unless the model says otherwise, and how the server is reached."""

    context_length: Count | None = None
    eval_batch_size: Count | None = None
    flash_attention: Switch | None = None
    num_experts: Count | None = None
    offload_kv_cache_to_gpu: Switch | None = None
    concurrency: Count = Field(4, description="requests that one loaded model works on at once")
    cors: Switch = Field(False, description="answer web pages of other origins")
    api_key: Secret | None = None


class LmStudio:
    """The engine `lmstudio`."""

    name = "lmstudio"
    capabilities = Capabilities(many_models=True)
    options: type[Options] = LmStudioOptions

    def api(self, options: Any) -> Api:  # noqa: ARG002
        return Api.OPENAI

    def concurrency(self, options: LmStudioOptions) -> int:
        return options.concurrency

    def probes(self, options: Any) -> Probes:  # noqa: ARG002
        """The greeting is the one route whose answer names LM Studio."""
        return Probes(
            startup=ProbeSpec(completion=True, period_s=0.25, timeout_s=5.0, failures=1, deadline_s=120.0),
            readiness=ProbeSpec(http="/lmstudio-greeting", period_s=2.0, timeout_s=2.0, failures=3),
            liveness=ProbeSpec(completion=True, period_s=30.0, timeout_s=20.0, failures=3),
        )

    def validate(self, context: LaunchContext) -> Sequence[OptionProblem]:
        return [
            *held_option_problems(context.models, LOAD_OPTIONS, "LM Studio"),
            *unmade_problems(context.models, "LM Studio"),
        ]

    def launch(self, context: LaunchContext) -> Launch:
        """`lms` starts a server in the background, so a child of ours stands for it: it starts, watches and stops it."""
        options = _options(context)
        command = context.command or (_program(context),)
        child = Path(__file__).with_name("server_main.py")
        argv = [sys.executable, "-I", str(child), "--host", context.host, "--port", str(context.port or 1234)]
        argv += ["--cors"] if options.cors else []
        return Launch(argv=(*argv, *context.args, "--", *command))

    def estimate(self, context: LaunchContext, model: HeldModel | None) -> Footprint | None:  # noqa: ARG002
        """The server itself costs nothing that is accounted for; its models' files are its own: learned from the first load."""
        return Footprint() if model is None else None

    def classify_exit(self, code: int | None, signal: str | None, log_tail: Sequence[str]) -> ExitVerdict:
        last = next((line.strip()[:300] for line in reversed(log_tail) if line.strip()), "")
        if any("address already in use" in line.lower() or "eaddrinuse" in line.lower() for line in log_tail):
            return ExitVerdict(ExitKind.PORT_IN_USE, last or "its port is taken")
        if signal is not None:
            return ExitVerdict(ExitKind.CRASH, last)
        if code == 0:
            return ExitVerdict(ExitKind.EXPECTED)
        if code == 2:
            return ExitVerdict(ExitKind.BAD_CONFIG, last or "the command line is wrong")
        if code is None:
            return ExitVerdict(ExitKind.UNKNOWN)
        return ExitVerdict(ExitKind.CRASH, last)

    # -- models ---------------------------------------------------------------------------------------------------------

    async def load(
        self, http: ClientSession, endpoint: Endpoint, model: HeldModel, timeout_s: float
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
            what = f"LM Studio says it loaded {model.served_as}, yet does not list it as loaded"

            async def listed() -> bool:
                entry = await _find(http, endpoint, model.served_as)
                return entry is not None and bool(entry.instances)

            await until(listed, timeout_s=5.0, period_s=POLL_S, what=what)
        return {"gpu": found.size_bytes} if found.size_bytes else {}

    async def unload(self, http: ClientSession, endpoint: Endpoint, model: HeldModel, timeout_s: float) -> None:
        """Unload every instance of the model."""
        end = asyncio.get_running_loop().time() + timeout_s
        found = await _find(http, endpoint, model.served_as)
        for instance in found.instances if found is not None else ():
            left = max(0.1, end - asyncio.get_running_loop().time())
            payload = {"instance_id": instance}
            reply = await call(http, endpoint, "POST", "/api/v1/models/unload", payload, timeout_s=left)
            if reply.status != 404 and reply.mapping().get("instance_id") != instance:
                raise _failed(f"{reply.url} did not unload {instance}: {reply.message}", reply, recoverable=True)

        async def gone() -> bool:
            entry = await _find(http, endpoint, model.served_as)
            return entry is None or not entry.instances

        left = max(0.1, end - asyncio.get_running_loop().time())
        await until(gone, timeout_s=left, period_s=POLL_S, what=f"LM Studio still holds {model.served_as}")

    async def loaded(self, http: ClientSession, endpoint: Endpoint) -> Sequence[Resident]:
        return tuple(
            Resident(entry.key, {"gpu": entry.size_bytes} if entry.size_bytes else {}, entry.context_length or None)
            for entry in await _listed(http, endpoint, LIST_TIMEOUT_S)
            if entry.instances
        )

    async def alive(
        self, http: ClientSession, endpoint: Endpoint, model: HeldModel | None, timeout_s: float
    ) -> ProbeOutcome:
        """One real token from a model that is loaded, never a load just in time; when none is, the list of models."""
        try:
            entries = [entry for entry in await _listed(http, endpoint, timeout_s) if entry.instances]
            if model is not None:
                entries = [entry for entry in entries if entry.key == model.served_as]
            if not entries:
                return ProbeOutcome(True, "no model is loaded; the server answers")
            return await _one_token(http, endpoint, entries[0], timeout_s)
        except EngineError as error:
            return ProbeOutcome.failed(error)


ENGINE = LmStudio()


class _Entry:
    """One model of the server's list."""

    __slots__ = ("context_length", "embeds", "instances", "key", "size_bytes")

    def __init__(
        self, key: str, instances: tuple[str, ...], size_bytes: int, embeds: bool, context_length: int = 0
    ) -> None:
        self.key, self.instances, self.size_bytes, self.embeds = key, instances, size_bytes, embeds
        self.context_length = context_length  # of its first instance; 0: not said


def _options(context: LaunchContext) -> LmStudioOptions:
    if not isinstance(context.options, LmStudioOptions):
        raise TypeError(f"{context.name}: options of another engine: {type(context.options).__name__}")
    return context.options


def _program(context: LaunchContext) -> str:
    places = os.pathsep.join(str(Path(place).expanduser()) for place in PLACES)
    found = shutil.which("lms", path=context.env.get("PATH")) or shutil.which("lms", path=places)
    if found is None:
        raise EngineError(
            f"{context.name}: no program named lms on PATH",
            hint="install LM Studio and run `lms bootstrap`, or name a running server: external: http://127.0.0.1:1234",
            recoverable=False,
        )
    return found


def _failed(message: str, reply: Reply, *, recoverable: bool) -> EngineError:
    """Return the error of a load or an unload; a server that lacks the route is too old for both."""
    if "nexpected endpoint" in reply.message:
        message = f"{reply.url} is not there: this LM Studio is older than 0.4, which loading and unloading need"
        return EngineError(message, key="command", recoverable=False)
    return EngineError(message, recoverable=recoverable)


async def _load(http: ClientSession, endpoint: Endpoint, model: HeldModel, timeout_s: float) -> None:
    payload = {"model": model.served_as, **load_options(model, LOAD_OPTIONS)}
    reply = await call(http, endpoint, "POST", "/api/v1/models/load", payload, timeout_s=timeout_s)
    answer = reply.mapping()
    if answer.get("status") != "loaded" or not isinstance(answer.get("instance_id"), str):
        message = f"{model.name}: {reply.url} did not load {model.served_as}: {reply.message}"
        raise _failed(message, reply, recoverable=reply.status != 404)


async def _find(http: ClientSession, endpoint: Endpoint, key: str) -> _Entry | None:
    return next((entry for entry in await _listed(http, endpoint, LIST_TIMEOUT_S) if entry.key == key), None)


async def _listed(http: ClientSession, endpoint: Endpoint, timeout_s: float) -> list[_Entry]:
    """Return the server's models by whichever API it has. Raises EngineError where neither answers in its shape."""
    reply = await call(http, endpoint, "GET", "/api/v1/models", timeout_s=timeout_s)
    if isinstance(reply.data, Mapping) and isinstance(reply.data.get("models"), list):
        return list(_entries_v1(reply))
    old = await call(http, endpoint, "GET", "/api/v0/models", timeout_s=timeout_s)
    if isinstance(old.data, Mapping) and isinstance(old.data.get("data"), list):
        return list(_entries_v0(old))
    raise EngineError(
        f"{reply.url} does not list models as LM Studio does: {reply.message}",
        hint="is this LM Studio, 0.3.6 or newer?",
        key="command",
    )


def _entries_v1(reply: Reply) -> Iterator[_Entry]:
    for model in reply.listing("models"):
        instances = model.get("loaded_instances")
        if instances is not None and not (
            isinstance(instances, list) and all(isinstance(i, Mapping) for i in instances)
        ):
            raise EngineError(
                f"{reply.url} did not answer with a list of objects under 'loaded_instances': {reply.message!r}"
            )
        loaded_with = next((instance.get("config") for instance in instances or ()), None)
        yield _Entry(
            reply.word(model, "key"),
            tuple(reply.word(instance, "id") for instance in instances or ()),
            reply.count(model, "size_bytes"),
            model.get("type") == "embedding",
            reply.count(loaded_with, "context_length") if isinstance(loaded_with, Mapping) else 0,
        )


def _entries_v0(reply: Reply) -> Iterator[_Entry]:
    for model in reply.listing("data"):
        key = reply.word(model, "id")
        yield _Entry(key, (key,) if model.get("state") == "loaded" else (), 0, model.get("type") == "embeddings")


async def _one_token(http: ClientSession, endpoint: Endpoint, entry: _Entry, timeout_s: float) -> ProbeOutcome:
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
