"""The options of the engine `llamacpp`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

from pydantic import Field, ValidationError

from fleetd.config.schema.types import Arguments, Choice, FieldType, Flag, Misplaced, Real, Schema, Whole
from fleetd.engines.load_options import LARGEST
from fleetd.engines.option_types import AnyOf, Count, Index, PathText, Secret, Several, Size, Switch, Template
from fleetd.engines.options import Options
from fleetd.units import shown

KvType = Annotated[str, Choice("f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "iq4_nl")]


class Lora(Options):
    """An adapter: its GGUF file and its weight."""

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
            messages = {"missing": "is required", "extra_forbidden": "unknown key: an adapter has path and scale"}
            where = item["loc"] if isinstance(value, Mapping) else ()
            raise Misplaced(messages.get(item["type"], str(mistake or item["msg"])), *where) from None

    def json_schema(self) -> Schema:
        return {"type": ["string", "object"]}


class LlamaCppOptions(Options):
    """Options of llama-server. A field that is None leaves llama.cpp's own default."""

    model: PathText = Field(description="a GGUF file; of a split model the first part")
    context_length: Count = Field(4096, description="tokens that one request may use; memory is taken for every slot")
    parallel: Annotated[int, Whole(1, 256)] = Field(1, description="slots: requests processed at once")
    threads: Count | None = Field(None, description="for generation")
    threads_batch: Count | None = Field(None, description="for prompts")
    gpu_layers: Annotated[int | str, AnyOf("auto, or a whole number from 0", Choice("auto"), Whole(0, LARGEST))] = (
        Field("auto", description="layers on the GPU; auto: as many as fit")
    )
    batch: Count | None = Field(None, description="tokens of one logical batch; llama.cpp: 2048")
    ubatch: Count | None = Field(None, description="tokens of one compute step; the compute buffer grows with it")
    cache_type_k: KvType = Field("f16", description="type of the keys in the KV cache")
    cache_type_v: KvType = Field("f16", description="type of the values in the KV cache")
    flash_attention: Annotated[bool | str, AnyOf("auto, or true or false", Choice("auto"), Flag())] = Field(
        "auto", description="needed by a quantised value cache"
    )
    load_mode: Annotated[str, Choice("auto", "mmap", "read", "direct")] = Field(
        "auto", description="how the file is loaded into memory"
    )
    mmap: Switch | None = Field(None, description="false is short for load_mode: read")
    mlock: Switch = Field(False, description="lock the weights in memory, never swapped")
    embeddings: Switch = Field(False, description="serve embeddings instead of completions")
    pooling: Annotated[str, Choice("none", "mean", "cls", "last", "rank")] | None = Field(
        None, description="pooling of embeddings; default: the model's"
    )
    rerank: Switch = Field(False, description="serve reranking instead of completions")
    lora: Annotated[tuple[Lora, ...], Several(LoraType())] = Field(
        (), description="adapters: paths, or {path: …, scale: 0.5}"
    )
    mmproj: PathText | None = Field(None, description="the projector of a vision or audio model")
    chat_template: Template | None = Field(None, description="a Jinja template, or the name of a built-in")
    chat_template_file: PathText | None = Field(None, description="a file with the chat template")
    jinja: Switch | None = Field(None, description="render chat templates with Jinja")
    cache_ram: Size = Field(0, description="host memory for cached prompts")
    split_mode: Annotated[str, Choice("none", "layer", "row", "tensor")] | None = Field(
        None, description="how a model is split over several GPUs"
    )
    main_gpu: Index | None = Field(None, description="index of the GPU for small tensors")
    tensor_split: Annotated[tuple[float, ...], Several(Real(0, 1e9))] = Field(
        (), description="share of each GPU, such as [3, 1]"
    )
    seed: Annotated[int, Whole(0, 2**32 - 1)] | None = Field(None, description="seed of the sampler; default: random")
    api_key: Secret | None = Field(None, description="required of every request; passed in the environment")
    extra_args: Annotated[tuple[str, ...], Arguments()] = Field(
        (), description="further flags of llama-server, passed unchanged"
    )

    @property
    def layers(self) -> int | None:
        """The number of layers on the GPU; None: as many as fit."""
        return self.gpu_layers if isinstance(self.gpu_layers, int) else None
