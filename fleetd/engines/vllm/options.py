"""The options of the engine `vllm`, and how each is written on the command line of `vllm serve`.

Invariants:
- A field has vLLM's own name; `_SPELLING` lists the exceptions.
- true → `--x`, false → `--no-x`, a list → `--x a b c`, a mapping → `--x '{"a": 1}'`; None leaves vLLM's default.
- Keys are passed in the environment, which other users cannot read.
- Options that current versions of vLLM no longer have are rejected with their replacement.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Annotated, Any, ClassVar

from pydantic import Field

from fleetd.config.schema.types import Choice, FieldType, Real, Schema, Strings, Whole
from fleetd.engines.load_options import LARGEST
from fleetd.engines.option_types import (
    ArgumentsType,
    Count,
    Duration,
    Json,
    Names,
    PathText,
    Secret,
    Several,
    Size,
    Switch,
    Template,
    Word,
)
from fleetd.engines.options import Options
from fleetd.units import shown

_TOKENS = re.compile(r"\d+(\.\d+)?[kKmMgGtT]?")
_DECIMAL = {"k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


class LengthType(FieldType):
    """Tokens: a number, `8k` (8000), `8K` (8192), -1 or auto."""

    def parse(self, value: object) -> int | str:
        if value in ("auto", "-1"):
            return str(value)
        if isinstance(value, int) and not isinstance(value, bool):
            if value == -1 or 0 < value <= LARGEST:
                return value
            raise ValueError(f"must be from 1 to {LARGEST}, or -1 for the longest that fits, not {shown(value)}")
        if not isinstance(value, str) or not _TOKENS.fullmatch(value):
            raise ValueError(f"must be a number of tokens such as 8192 or 8K, or auto, not {shown(value)}")
        tokens = int(float(value[:-1]) * _DECIMAL[value[-1]]) if value[-1] in _DECIMAL else int(float(value))
        if not 0 < tokens <= LARGEST:
            raise ValueError(f"must be from 1 to {LARGEST}, not {shown(value)}")
        return tokens

    def json_schema(self) -> Schema:
        return {"type": ["string", "integer"]}


Length = Annotated[int | str, LengthType()]

REMOVED = {
    "swap_space": "vLLM no longer has swap space: for KV cache in host memory use kv_offloading_size",
    "disable_log_requests": "request logging is off by default now: use enable_log_requests to enable it",
    "use_v2_block_manager": "vLLM has only one block manager now",
    "num_lookahead_slots": "set it in speculative_config",
    "speculative_model": "set it in speculative_config: {model: …, num_speculative_tokens: …}",
    "num_speculative_tokens": "set it in speculative_config",
    "worker_use_ray": "use distributed_executor_backend: ray",
    "engine_use_ray": "use distributed_executor_backend: ray",
    "max_context_len_to_capture": "use compilation_config or cudagraph_capture_sizes",
    "max_seq_len_to_capture": "use compilation_config or cudagraph_capture_sizes",
    "device": "the device comes from the entry's `device`",
    "task": "use runner (and convert)",
    "guided_decoding_backend": "use structured_outputs_config",
    "kv_cache_memory_bytes": "its name here is kv_cache_memory",
}
# arguments that fleetd sets
OWNED = {
    "host": "fleetd chooses the address",
    "port": "set the entry's `port`",
    "uds": "fleetd reaches vLLM over TCP on loopback",
    "hf_token": "a command line is public: set HF_TOKEN in env_file",
    "config": "fleetd passes every argument itself, so that it can show and compare them",
    "headless": "fleetd runs the API server",
    "grpc": "fleetd uses HTTP",
    "data_parallel_multi_port_external_lb": "its servers would leave fleetd's process group",
}


class VllmOptions(Options):
    """The arguments of `vllm serve`, and some variables of its environment."""

    refused: ClassVar[Mapping[str, str]] = {**REMOVED, **OWNED}

    model: PathText = Field(description="a folder, or a name on the hub")
    served_model_name: Annotated[tuple[str, ...], Strings(at_least=1)] | None = Field(
        None, description="default: the entry's served_as and aliases"
    )
    # loading
    dtype: Annotated[str, Choice("auto", "half", "float16", "bfloat16", "float", "float32")] | None = Field(
        None, description="type of weights and activations"
    )
    quantization: Word | None = Field(None, description="method; default: that of the model")
    max_model_len: Length | None = Field(None, description="tokens of a request: 8192, 8K, or auto")
    tokenizer: PathText | None = Field(None, description="a folder or a name; default: the model's")
    trust_remote_code: Switch | None = Field(None, description="run Python code that comes with the model")
    revision: Word | None = Field(None, description="branch, tag or commit on the hub")
    hf_overrides: Json | None = Field(None, description="overrides of the model's config.json")
    generation_config: PathText | None = Field(None, description="folder of defaults for sampling; auto, vllm")
    runner: Annotated[str, Choice("auto", "generate", "pooling", "draft")] | None = Field(
        None, description="generate text, or pool embeddings"
    )
    convert: Word | None = Field(None, description="adapter from one kind of model to another")
    seed: Annotated[int, Whole(0, 2**32 - 1)] | None = Field(None, description="seed of the sampler")  # numpy's bounds
    load_format: Word | None = Field(None, description="format of the weights, such as safetensors")
    model_loader_extra_config: Json | None = Field(None, description="options of the loader")
    safetensors_load_strategy: Annotated[str, Choice("lazy", "eager", "prefetch", "torchao")] | None = Field(
        None, description="how weights are read from the file"
    )
    download_dir: PathText | None = Field(None, description="folder for downloads; default: the hub's cache")
    # memory and scheduling
    gpu_memory_utilization: Annotated[float, Real(0.001, 1)] | None = Field(
        None, description="fraction of the whole device; vLLM: 0.92"
    )
    kv_cache_memory: Size | None = Field(None, description="bytes of KV cache, instead of what is left")
    kv_cache_dtype: Word | None = Field(None, description="type of the KV cache, such as fp8")
    block_size: Count | None = Field(None, description="tokens of one block of the KV cache")
    num_gpu_blocks_override: Count | None = Field(None, description="number of blocks, instead of the measured one")
    enable_prefix_caching: Switch | None = Field(None, description="reuse the cache of equal prompt beginnings")
    max_num_seqs: Count | None = Field(None, description="requests processed at once; vLLM: 256")
    max_num_batched_tokens: Count | None = Field(None, description="tokens of one step; vLLM: 8192")
    max_num_queued_reqs: Count | None = Field(None, description="waiting requests before vLLM rejects more")
    cpu_offload_gb: Annotated[float, Real(0, 1e6)] | None = Field(None, description="GiB of weights in host memory")
    kv_offloading_size: Annotated[float, Real(0.001, 1e6)] | None = Field(
        None, description="GiB of host memory for KV cache"
    )
    kv_offloading_backend: Annotated[str, Choice("native", "lmcache")] | None = Field(
        None, description="implementation of KV cache offloading"
    )
    enforce_eager: Switch | None = Field(None, description="no CUDA graphs: less memory, slower")
    optimization_level: Annotated[int, Whole(0, 3)] | None = Field(None, description="0 starts fastest, 3 runs fastest")
    compilation_config: Json | None = Field(None, description="options of torch.compile")
    cudagraph_capture_sizes: Annotated[tuple[int, ...], Several(Whole(1, LARGEST))] | None = Field(
        None, description="batch sizes to capture graphs for"
    )
    # several devices
    tensor_parallel_size: Count = Field(1, description="devices that share each layer")
    pipeline_parallel_size: Count = Field(1, description="devices that share the layers in sequence")
    data_parallel_size: Count | None = Field(None, description="copies of the model in one server")
    enable_expert_parallel: Switch | None = Field(None, description="distribute experts over the devices")
    distributed_executor_backend: Annotated[str, Choice("ray", "mp", "uni", "external_launcher")] | None = Field(
        None, description="how workers are started"
    )
    # what it serves
    chat_template: Template | None = Field(None, description="a template, or a path to one")
    chat_template_content_format: Annotated[str, Choice("auto", "string", "openai")] | None = Field(
        None, description="how message content is passed to the template"
    )
    default_chat_template_kwargs: Json | None = Field(None, description="arguments of the chat template")
    enable_auto_tool_choice: Switch | None = Field(None, description="let the model choose tools; needs a parser")
    tool_call_parser: Word | None = Field(None, description="parser of tool calls, such as hermes")
    reasoning_parser: Word | None = Field(None, description="parser of reasoning, such as qwen3")
    enable_lora: Switch | None = Field(None, description="allow adapters")
    lora_modules: Names | None = Field(None, description="adapters: NAME=PATH; needs enable_lora")
    max_loras: Count | None = Field(None, description="adapters in one batch")
    max_lora_rank: Count | None = Field(None, description="largest rank of an adapter")
    speculative_config: Json | None = Field(None, description="speculative decoding: {model: …, …}")
    kv_transfer_config: Json | None = Field(None, description="transfer of KV cache between servers")
    limit_mm_per_prompt: Json | None = Field(None, description="images, videos, audios of a prompt")
    api_server_count: Count | None = Field(None, description="processes that serve HTTP")
    # sleep, shutdown, logs
    enable_sleep_mode: Switch = Field(False, description="release the memory instead of stopping")
    sleep_level: Annotated[int, Whole(1, 2)] = Field(
        1, description="1 keeps the weights in host memory, 2 reloads them"
    )
    shutdown_timeout: Duration = Field(0.0, description="grace for requests in flight at SIGTERM")
    uvicorn_log_level: Annotated[str, Choice("debug", "info", "warning", "error", "critical", "trace")] | None = Field(
        None, description="log level of the HTTP server"
    )
    disable_log_stats: Switch | None = Field(None, description="do not log throughput")
    enable_log_requests: Switch | None = Field(None, description="log every request")
    # the environment
    api_key: Secret | None = Field(None, description="passed as VLLM_API_KEY, never on the command line")
    cache_root: PathText | None = Field(
        None, description="VLLM_CACHE_ROOT: compiled code, best shared by all instances"
    )
    hf_home: PathText | None = Field(None, description="HF_HOME: cache of the hub")
    offline: Switch = Field(False, description="never contact the hub: HF_HUB_OFFLINE and TRANSFORMERS_OFFLINE")
    cpu_kvcache_space: Count | None = Field(None, description="GiB of KV cache of a CPU build")
    extra_args: Annotated[dict[str, Any], ArgumentsType()] = Field(
        default_factory=dict, description="any other argument, by its name without the dashes"
    )

    @property
    def world_size(self) -> int:
        """The number of devices that one server uses."""
        return self.tensor_parallel_size * self.pipeline_parallel_size * (self.data_parallel_size or 1)

    @property
    def sets_kv_cache(self) -> bool:
        """Whether the size of the KV cache is configured rather than measured by vLLM."""
        names = {key.replace("-", "_") for key in self.extra_args}
        configured = self.kv_cache_memory is not None or self.cpu_kvcache_space is not None
        return configured or bool(names & {"kv_cache_memory", "kv_cache_memory_bytes"})


_SPELLING = {"kv_cache_memory": "kv-cache-memory-bytes"}
_NOT_ARGUMENTS = frozenset(
    {
        "model", "served_model_name", "sleep_level", "api_key", "cache_root", "hf_home", "offline", "cpu_kvcache_space",
        "extra_args",
    }
)  # fmt: skip
_WHEN_SET = frozenset({"enable_sleep_mode"})  # false is vLLM's default: no `--no-` is needed
_ONE = frozenset({"tensor_parallel_size", "pipeline_parallel_size"})


def words(name: str, value: Any) -> list[str]:
    """Return one argument as words, none for None; `name` may have underscores."""
    flag = "--" + name.replace("_", "-").lstrip("-")
    if value is None:
        return []
    if isinstance(value, bool):
        return [flag if value else "--no-" + flag[2:]]
    if isinstance(value, Mapping):
        return [flag, json.dumps(value, ensure_ascii=False, separators=(",", ":"))]
    if isinstance(value, (list, tuple)):
        if not value:
            return []
        return [flag, *(json.dumps(item) if isinstance(item, Mapping) else _word(item) for item in value)]
    text = _word(value)
    return [f"{flag}={text}"] if text.startswith("-") else [flag, text]


def _word(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}" if value != int(value) else str(int(value))
    return str(value)


def local(text: str) -> bool:
    """Return whether a name is a path on this machine, not a name on the hub."""
    return text.startswith(("/", "./", "../", "~"))


def local_files(options: VllmOptions) -> dict[str, str]:
    """Return option → path as written, for all files that the options name."""
    named = {name: getattr(options, name) for name in ("model", "tokenizer", "chat_template", "generation_config")}
    for index, module in enumerate(options.lora_modules or ()):
        named[f"lora_modules[{index}]"] = module.partition("=")[2]
    named["speculative_config.model"] = (options.speculative_config or {}).get("model")
    return {name: text for name, text in named.items() if isinstance(text, str) and _one_path(text)}


def _one_path(text: str) -> bool:
    """Return whether the text is a path, not a template with lines and braces."""
    return local(text) and "\n" not in text and "{" not in text


def arguments(options: VllmOptions, absolute: Callable[[str], str] = str) -> list[str]:
    """Return all arguments in field order, `extra_args` last, paths made absolute."""
    found: list[str] = []
    files = local_files(options)
    for name in type(options).model_fields:
        value = _with_path(name, getattr(options, name), files, absolute)
        if name in _NOT_ARGUMENTS or (name in _WHEN_SET and not value) or (name in _ONE and value == 1):
            continue
        if name == "shutdown_timeout":
            found += words(name, round(value)) if value else []
        else:
            found += words(_SPELLING.get(name, name), value)
    for name, value in options.extra_args.items():
        found += words(name, value)
    return found


def _with_path(name: str, value: Any, files: Mapping[str, str], absolute: Callable[[str], str]) -> Any:
    """Return a value with its local path, if any, mapped by `absolute`."""
    if name in files:
        return absolute(files[name])
    if name == "lora_modules" and value:
        return tuple(
            f"{module.partition('=')[0]}={absolute(files[key])}" if (key := f"{name}[{index}]") in files else module
            for index, module in enumerate(value)
        )
    if name == "speculative_config" and f"{name}.model" in files:
        return {**value, "model": absolute(files[f"{name}.model"])}
    return value
