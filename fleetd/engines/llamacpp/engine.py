"""llama.cpp: one process per model, `llama-server` from PATH or the embedded one of the `xllamacpp` wheel.

The rules of this file
- Both programs take one command line; `llamacpp_child.py` understands the flags that are written here.
- `context_length` is what one request gets. llama.cpp's own `--ctx-size` is the pool of all slots: their product.
- Nothing costs memory that was not asked for: llama.cpp's prompt cache (8 GiB of host memory by default) is off.
- The model answers under its fleet name (`--alias`), so `model` in an answer is what the client asked for.
- Secrets go through the environment, never through the command line.
"""

from __future__ import annotations

import asyncio
import importlib.util
import os
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field, ValidationError

from fleetd.config.schema.types import Arguments, Choice, FieldType, Flag, Misplaced, Real, Schema, Whole
from fleetd.core.data.specs import Capabilities, Footprint, Probes, ProbeSpec
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
from fleetd.engines.http import call
from fleetd.engines.llamacpp import server_main
from fleetd.engines.llamacpp.exits import classify
from fleetd.engines.llamacpp.validate import absolute, problems
from fleetd.engines.load_options import LARGEST
from fleetd.engines.option_types import AnyOf, Count, Index, PathText, Secret, Several, Size, Switch, Template
from fleetd.engines.visible import visible_devices
from fleetd.errors import EngineError
from fleetd.models import memory_estimate
from fleetd.models.formats import gguf
from fleetd.units import shown

if TYPE_CHECKING:
    from aiohttp import ClientSession

PROGRAM = "llama-server"
CHILD = Path(server_main.__file__)
KvType = Annotated[str, Choice("f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "iq4_nl")]
SCRUBBED = (
    "LLAMA_API_KEY", "LLAMA_ARG_API_KEY_FILE", "LLAMA_ARG_API_PREFIX", "LLAMA_ARG_SSL_KEY_FILE", "LLAMA_ARG_SSL_CERT_FILE",
    "LLAMA_ARG_HOST", "LLAMA_ARG_PORT", "LLAMA_ARG_ALIAS", "LLAMA_ARG_MODEL", "LLAMA_ARG_HF_REPO", "LLAMA_ARG_MODEL_URL",
)  # fmt: skip


class Lora(Options):
    """An adapter: its GGUF file and how strongly it acts."""

    path: PathText
    scale: Annotated[float, Real(-1000, 1000)] = 1.0


class LoraType(FieldType):
    """A path, or `{path: …, scale: 0.5}`."""

    def parse(self, value: object) -> Lora:
        given = {"path": value} if isinstance(value, str) else value
        if isinstance(given, Lora):
            return given
        if not isinstance(given, Mapping):
            raise ValueError(f"must be a path, or {{path: …, scale: …}}, not {shown(value)}")
        try:
            return Lora(**given)
        except ValidationError as error:
            item = error.errors(include_url=False)[0]
            mistake = (item.get("ctx") or {}).get("error")
            said = {"missing": "is required", "extra_forbidden": "unknown key: an adapter has path and scale"}
            where = item["loc"] if isinstance(value, Mapping) else ()
            raise Misplaced(said.get(item["type"], str(mistake or item["msg"])), *where) from None

    def json_schema(self) -> Schema:
        return {"type": ["string", "object"]}


class LlamaCppOptions(Options):
    """What llama.cpp is told. A field that is None leaves llama.cpp's own default."""

    model: PathText = Field(description="a GGUF file; of a split model the first part")
    context_length: Count = Field(4096, description="tokens that one request may use; memory is taken for every slot")
    parallel: Annotated[int, Whole(1, 256)] = Field(1, description="slots: requests worked on at once")
    threads: Count | None = Field(None, description="for generation")
    threads_batch: Count | None = Field(None, description="for prompts")
    gpu_layers: Annotated[int | str, AnyOf("auto, or a whole number from 0", Choice("auto"), Whole(0, LARGEST))] = (
        "auto"
    )
    batch: Count | None = None
    ubatch: Count | None = Field(None, description="tokens of one compute step; the compute buffer grows with it")
    cache_type_k: KvType = "f16"
    cache_type_v: KvType = "f16"
    flash_attention: Annotated[bool | str, AnyOf("auto, or true or false", Choice("auto"), Flag())] = "auto"
    load_mode: Annotated[str, Choice("auto", "mmap", "read", "direct")] = Field(
        "auto", description="how the file comes into memory"
    )
    mmap: Switch | None = Field(None, description="false is short for load_mode: read")
    mlock: Switch = Field(False, description="keep the weights in memory, never swapped")
    embeddings: Switch = Field(False, description="serve embeddings instead of completions")
    pooling: Annotated[str, Choice("none", "mean", "cls", "last", "rank")] | None = None
    rerank: Switch = False
    lora: Annotated[tuple[Lora, ...], Several(LoraType())] = ()
    mmproj: PathText | None = Field(None, description="the projector of a model that sees or hears")
    chat_template: Template | None = None
    chat_template_file: PathText | None = None
    jinja: Switch | None = None
    cache_ram: Size = Field(0, description="host memory for prompts seen before")
    split_mode: Annotated[str, Choice("none", "layer", "row", "tensor")] | None = None
    main_gpu: Index | None = None
    tensor_split: Annotated[tuple[float, ...], Several(Real(0, 1e9))] = ()
    seed: Annotated[int, Whole(0, 2**32 - 1)] | None = None
    api_key: Secret | None = Field(None, description="asked of every request; passed in the environment")
    extra_args: Annotated[tuple[str, ...], Arguments()] = Field(
        (), description="further flags of llama-server, as they are"
    )


class LlamaCpp:
    """The engine `llamacpp`."""

    name = "llamacpp"
    capabilities = Capabilities(exit_zero_is_failure=True)
    options: type[Options] = LlamaCppOptions

    def api(self, options: Any) -> Api:  # noqa: ARG002
        return Api.OPENAI

    def concurrency(self, options: LlamaCppOptions) -> int:
        return options.parallel

    def probes(self, options: Any) -> Probes:  # noqa: ARG002
        """A tiny model is up in 40 ms, a large one on a slow disk in many minutes: poll fast, wait long."""
        return Probes(
            startup=ProbeSpec(http="/health", period_s=0.025, timeout_s=2.0, failures=1, deadline_s=900.0),
            readiness=ProbeSpec(http="/health", period_s=2.0, timeout_s=2.0, failures=3),
            liveness=ProbeSpec(completion=True, period_s=30.0, timeout_s=20.0, failures=3),
        )

    # -- configuration --------------------------------------------------------------------------------------------------

    def validate(self, context: LaunchContext) -> Sequence[OptionProblem]:
        embedded = not context.command and _server(context) is None
        return problems(context, _options(context), embedded=embedded)

    def launch(self, context: LaunchContext) -> Launch:
        options = _options(context)
        if context.port is None:
            raise EngineError(f"{context.name}: llamacpp serves on a port, and none was assigned", recoverable=False)
        env = visible_devices(context.device_uuid, context.device)
        if options.api_key is not None:
            env["LLAMA_API_KEY"] = options.api_key.get_secret_value()
        unset = tuple(key for key in SCRUBBED if key not in context.env and key not in env)
        return Launch(
            argv=(*_program(context), *_flags(context, options), *options.extra_args, *context.args),
            env={key: value for key, value in env.items() if key not in context.env},
            unset_env=unset,
            requires=tuple(required := _required(context, options)),
            secret_env=frozenset({"LLAMA_API_KEY"}),
            named=required,
        )

    def estimate(self, context: LaunchContext, model: HeldModel | None) -> Footprint | None:  # noqa: ARG002
        """Return the bytes by the file's header, None while it cannot be read."""
        options = _options(context)
        try:
            sizes = memory_estimate.estimate_gguf(
                [Path(path) for path in gguf.shards(absolute(context, options.model))],
                memory_estimate.GgufServing(
                    context_length=options.context_length,
                    slots=options.parallel,
                    cache_type_k=options.cache_type_k,
                    cache_type_v=options.cache_type_v,
                    flash_attention=options.flash_attention is not False,
                    ubatch=min(options.ubatch or 512, options.batch or 2048),
                    logits=not (options.embeddings or options.rerank),
                    gpu_layers=0 if context.device in (None, "host") else _layers(options),
                    unified=context.device == "unified",
                    extra_files=tuple(Path(path) for path in _extra_files(context, options)),
                    prompt_cache_bytes=options.cache_ram,
                ),
            )
        except EngineError:
            return None
        device = context.device or "host"
        amounts = (
            {device: sizes.device_bytes + sizes.host_bytes}
            if device in ("host", "unified")
            else {
                device: sizes.device_bytes,
                "host": sizes.host_bytes,
            }
        )
        return Footprint({name: size for name, size in amounts.items() if size})

    def classify_exit(self, code: int | None, signal: str | None, log_tail: Sequence[str]) -> ExitVerdict:
        return classify(code, signal, log_tail)

    # -- models ---------------------------------------------------------------------------------------------------------

    async def load(
        self,
        http: ClientSession,  # noqa: ARG002
        endpoint: Endpoint,
        model: HeldModel,
        timeout_s: float,  # noqa: ARG002
    ) -> Mapping[str, int]:
        raise EngineError(f"{endpoint.base_url} serves one model: {model.name} is loaded by starting its process")

    async def unload(
        self,
        http: ClientSession,  # noqa: ARG002
        endpoint: Endpoint,
        model: HeldModel,
        timeout_s: float,  # noqa: ARG002
    ) -> None:
        raise EngineError(f"{endpoint.base_url} serves one model: {model.name} is unloaded by stopping its process")

    async def loaded(self, http: ClientSession, endpoint: Endpoint) -> Sequence[Resident]:
        """Return the one model, under its alias, once it is loaded."""
        health = await call(http, endpoint, "GET", "/health", timeout_s=5.0)
        if not health.ok:
            return ()
        reply = (await call(http, endpoint, "GET", "/v1/models", timeout_s=5.0)).expect("listing the model")
        return tuple(Resident(reply.word(entry, "id")) for entry in reply.listing("data"))

    async def alive(
        self, http: ClientSession, endpoint: Endpoint, model: HeldModel | None, timeout_s: float
    ) -> ProbeOutcome:
        """One token, or one vector. A server with every slot busy is alive: its slots are answered by the loop that works."""
        begun = asyncio.get_running_loop().time()
        try:
            slots = await call(http, endpoint, "GET", "/slots?fail_on_no_slot=1", timeout_s=timeout_s)
            if slots.status == 503 and "slot" in slots.message.lower():
                return ProbeOutcome(True, "all slots are busy")
            left = timeout_s - (asyncio.get_running_loop().time() - begun)
            return await _one_token(http, endpoint, model, left)
        except EngineError as error:
            return ProbeOutcome.failed(error)


ENGINE = LlamaCpp()


def _options(context: LaunchContext) -> LlamaCppOptions:
    assert isinstance(context.options, LlamaCppOptions)
    return context.options


def _extra_files(context: LaunchContext, options: LlamaCppOptions) -> dict[str, str]:
    """Return the files beside the model that take memory: path → option."""
    named = {"mmproj": options.mmproj} if options.mmproj else {}
    named |= {f"lora[{index}]": adapter.path for index, adapter in enumerate(options.lora)}
    return {str(absolute(context, path)): option for option, path in named.items()}


def _required(context: LaunchContext, options: LlamaCppOptions) -> dict[str, str]:
    """Return the files that have to be there, each with the option that names it."""
    files = dict.fromkeys(gguf.shards(absolute(context, options.model)), "model") | _extra_files(context, options)
    if options.chat_template_file:
        files[str(absolute(context, options.chat_template_file))] = "chat_template_file"
    return files


def _layers(options: LlamaCppOptions) -> int | None:
    return options.gpu_layers if isinstance(options.gpu_layers, int) else None


def _lately(what: tuple[str, str | None], look: Callable[[], Any]) -> Any:
    """Return what a look found within the last second: thousands of entries ask for one program."""
    known, now = _LATELY.get(what), time.monotonic()
    if known is None or now - known[0] > 1.0:
        if len(_LATELY) > 64:
            _LATELY.clear()
        known = _LATELY[what] = (now, look())
    return known[1]


_LATELY: dict[tuple[str, str | None], tuple[float, Any]] = {}


def _server(context: LaunchContext) -> str | None:
    path = context.env.get("PATH", os.environ.get("PATH"))
    found: str | None = _lately(("server", path), lambda: shutil.which(PROGRAM, path=path))
    return found


def _program(context: LaunchContext) -> tuple[str, ...]:
    """Return the user's command, llama-server from PATH, or the embedded server. Raises EngineError when there is none."""
    if context.command:
        return context.command
    if found := _server(context):
        return (found,)
    if _lately(("embedded", None), lambda: importlib.util.find_spec("xllamacpp")) is not None:
        return (sys.executable, "-I", str(CHILD))
    raise EngineError(
        f"{context.name}: there is no {PROGRAM} on PATH and no embedded llama.cpp",
        hint="pip install 'fleetd[llamacpp]'",
        recoverable=False,
    )


def _flags(context: LaunchContext, options: LlamaCppOptions) -> list[str]:
    flags = ["--model", str(absolute(context, options.model)), "--host", context.host, "--port", str(context.port)]
    flags += ["--alias", context.served_as or context.name]
    flags += ["--ctx-size", str(options.context_length * options.parallel), "--parallel", str(options.parallel)]
    layers = 0 if context.device == "host" and options.gpu_layers == "auto" else _layers(options)
    valued = {
        "--threads": options.threads, "--threads-batch": options.threads_batch, "--gpu-layers": layers,
        "--batch-size": options.batch, "--ubatch-size": options.ubatch,
        "--cache-type-k": None if options.cache_type_k == "f16" else options.cache_type_k,
        "--cache-type-v": None if options.cache_type_v == "f16" else options.cache_type_v,
        "--flash-attn": {True: "on", False: "off"}.get(options.flash_attention is True)
        if options.flash_attention != "auto" else None,
        "--load-mode": _load_mode(options), "--pooling": options.pooling,
        "--split-mode": options.split_mode, "--main-gpu": options.main_gpu,
        "--tensor-split": ",".join(f"{share:g}" for share in options.tensor_split) or None,
        "--mmproj": str(absolute(context, options.mmproj)) if options.mmproj else None,
        "--chat-template": options.chat_template,
        "--chat-template-file": str(absolute(context, options.chat_template_file)) if options.chat_template_file else None,
        "--cache-ram": options.cache_ram // 2**20, "--seed": options.seed,
    }  # fmt: skip
    for flag, value in valued.items():
        if value is not None:
            flags += [flag, str(value)]
    for adapter in options.lora:
        flags += ["--lora-scaled", f"{absolute(context, adapter.path)}:{adapter.scale:g}"]
    switches = {"--embeddings": options.embeddings and not options.rerank, "--rerank": options.rerank}
    switches |= {"--jinja": options.jinja is True, "--no-jinja": options.jinja is False}
    return [*flags, *(flag for flag, on in switches.items() if on), "--metrics", "--slots", "--offline", "--no-webui"]


def _load_mode(options: LlamaCppOptions) -> str | None:
    """Return llama.cpp's word for the way of loading, None for its default."""
    mode = options.load_mode
    if mode == "auto" and options.mmap is not None:
        mode = "mmap" if options.mmap else "read"
    if options.mlock:
        return "mlock" if mode == "read" else "mmap+mlock"
    return {"auto": None, "mmap": "mmap", "read": "none", "direct": "dio"}[mode]


async def _one_token(
    http: ClientSession, endpoint: Endpoint, model: HeldModel | None, timeout_s: float
) -> ProbeOutcome:
    """Ask for a completion, and for an embedding where the server makes only those."""
    loop = asyncio.get_running_loop()
    end = loop.time() + timeout_s
    tries: list[tuple[str, Mapping[str, Any]]] = [("/embeddings", {"content": "a"})]
    if model is None or not model.embedding:
        tries.insert(0, ("/completion", {"prompt": "a", "n_predict": 1, "cache_prompt": False}))
    for path, payload in tries:
        reply = await call(http, endpoint, "POST", path, payload, timeout_s=max(0.001, end - loop.time()))
        if reply.ok:
            done = isinstance(reply.data, (Mapping, list)) and bool(reply.data)
            return ProbeOutcome(done, "" if done else f"{reply.url} answered without work: {reply.message}")
        if reply.status not in (400, 404, 501):
            break
    return ProbeOutcome(False, f"HTTP {reply.status}: {reply.message}")
