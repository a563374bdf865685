"""The options of the engine `ollama`, and the options of a load. `environment.py` renders the former as variables."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

from pydantic import Field

from fleetd.config.schema.types import Choice, FieldType, Flag, Text, Whole
from fleetd.engines.load_options import COUNT, INDEX, LARGEST, SWITCH
from fleetd.engines.option_types import (
    AnyOf,
    Count,
    Duration,
    Index,
    Lifetime,
    Names,
    PathText,
    Secret,
    Size,
    Switch,
    Word,
)
from fleetd.engines.options import Options

KV_TYPES = ("f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "iq4_nl")
# options of a request that make Ollama start a new runner where they differ from those of the loaded one
LOAD_TIME_OPTIONS: Mapping[str, FieldType] = {
    "num_ctx": COUNT,
    "num_batch": COUNT,
    "num_gpu": Whole(-1, LARGEST),
    "main_gpu": INDEX,
    "use_mmap": SWITCH,
    "num_thread": INDEX,
}


class OllamaOptions(Options):
    """Variables of `ollama serve`, typed; None leaves Ollama's default."""

    models_dir: PathText | None = Field(
        None, description="where models are stored; must exist before the server starts"
    )
    keep_alive: Lifetime = Field(
        -1.0, description="idle time before Ollama itself unloads; -1 leaves it to fleetd's ttl"
    )
    load_timeout: Duration | None = Field(None, description="longest silence of a load; 0 for no limit")
    context_length: Count = Field(4096, description="tokens per slot, for models without num_ctx")
    num_parallel: Count = Field(1, description="requests that one model processes at once")
    max_loaded_models: Count | None = Field(None, description="default: as many as the fleet needs, at least 8")
    max_queue: Count | None = Field(None, description="waiting loads before Ollama answers 503")
    kv_cache_type: Annotated[str, Choice(*KV_TYPES)] | None = Field(
        None, description="a quantised type needs flash attention"
    )
    flash_attention: Annotated[bool | str, AnyOf("auto, or true or false", Choice("auto"), Flag())] | None = Field(
        None, description="use flash attention"
    )
    sched_spread: Switch | None = Field(None, description="spread a model over all GPUs even if one suffices")
    gpu_overhead: Size | None = Field(None, description="has no effect since Ollama 0.30")
    igpu: Switch | None = Field(None, description="use integrated GPUs")
    vulkan: Switch | None = Field(None, description="use GPUs through Vulkan")
    llm_library: Word | None = Field(None, description="the only GPU library to use, such as cuda_v13 or rocm_v7_2")
    origins: Names = Field((), description="web origins allowed besides localhost")
    noprune: Switch = Field(True, description="keep unused blobs at start: another server may share the store")
    no_cloud: Switch = Field(True, description="no models and no searches on Ollama's servers")
    remotes: Names = Field((), description="hosts that remote models may be loaded from")
    api_key: Secret | None = Field(None, description="sent as a bearer token to an external server")
    go_template: Switch | None = Field(None, description="prefer the Modelfile's template to the one in the file")
    debug: Annotated[bool | int, AnyOf("true or false, 1 (debug) or 2 (trace)", Flag(), Whole(0, 2))] | None = Field(
        None, description="log level"
    )
    debug_log_requests: Switch | None = Field(None, description="write request bodies to a temporary folder")
    max_transfer_streams: Count | None = Field(None, description="parallel streams of a download")
    cache_ram: Size = Field(0, description="host memory for prompts, per loaded model; llama.cpp's own default is 8GiB")
    fit: Switch | None = Field(None, description="let llama.cpp fit layers into the free GPU memory")
    fit_target: Size | None = Field(None, description="GPU memory to leave free")
    n_gpu_layers: Index | None = Field(None, description="layers on the GPU; default: as many as fit")
    n_cpu_moe: Index | None = Field(None, description="layers whose experts stay on the CPU")
    ctx_checkpoints: Index | None = Field(None, description="context checkpoints per slot")
    hsa_override_gfx_version: (
        Annotated[str, Text(32, pattern=r"\d+\.\d+\.\d+", what="a version such as 10.3.0")] | None
    ) = Field(None, description="treat an unsupported AMD GPU as this version")
