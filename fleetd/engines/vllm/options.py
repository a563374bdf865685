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
    dtype: Annotated[str, Choice("auto", "half", "float16", "bfloat16", "float", "float32")] | None = None
    quantization: Word | None = None
    max_model_len: Length | None = None
    tokenizer: PathText | None = None
    trust_remote_code: Switch | None = None
    revision: Word | None = None
    hf_overrides: Json | None = None
    generation_config: PathText | None = None
    runner: Annotated[str, Choice("auto", "generate", "pooling", "draft")] | None = None
    convert: Word | None = None
    seed: Annotated[int, Whole(0, 2**32 - 1)] | None = None  # numpy's bounds
    load_format: Word | None = None
    model_loader_extra_config: Json | None = None
    safetensors_load_strategy: Annotated[str, Choice("lazy", "eager", "prefetch", "torchao")] | None = None
    download_dir: PathText | None = None
    # memory and scheduling
    gpu_memory_utilization: Annotated[float, Real(0.001, 1)] | None = Field(
        None, description="fraction of the whole device; vLLM: 0.92"
    )
    kv_cache_memory: Size | None = Field(None, description="bytes of KV cache, instead of what is left")
    kv_cache_dtype: Word | None = None
    block_size: Count | None = None
    num_gpu_blocks_override: Count | None = None
    enable_prefix_caching: Switch | None = None
    max_num_seqs: Count | None = None
    max_num_batched_tokens: Count | None = None
    max_num_queued_reqs: Count | None = None
    cpu_offload_gb: Annotated[float, Real(0, 1e6)] | None = None
    kv_offloading_size: Annotated[float, Real(0.001, 1e6)] | None = Field(
        None, description="GiB of host memory for KV cache"
    )
    kv_offloading_backend: Annotated[str, Choice("native", "lmcache")] | None = None
    enforce_eager: Switch | None = None
    optimization_level: Annotated[int, Whole(0, 3)] | None = None
    compilation_config: Json | None = None
    cudagraph_capture_sizes: Annotated[tuple[int, ...], Several(Whole(1, LARGEST))] | None = None
    # several devices
    tensor_parallel_size: Count = 1
    pipeline_parallel_size: Count = 1
    data_parallel_size: Count | None = None
    enable_expert_parallel: Switch | None = None
    distributed_executor_backend: Annotated[str, Choice("ray", "mp", "uni", "external_launcher")] | None = None
    # what it serves
    chat_template: Template | None = None
    chat_template_content_format: Annotated[str, Choice("auto", "string", "openai")] | None = None
    default_chat_template_kwargs: Json | None = None
    enable_auto_tool_choice: Switch | None = None
    tool_call_parser: Word | None = None
    reasoning_parser: Word | None = None
    enable_lora: Switch | None = None
    lora_modules: Names | None = None
    max_loras: Count | None = None
    max_lora_rank: Count | None = None
    speculative_config: Json | None = None
    kv_transfer_config: Json | None = None
    limit_mm_per_prompt: Json | None = None
    api_server_count: Count | None = None
    # sleep, shutdown, logs
    enable_sleep_mode: Switch = False
    sleep_level: Annotated[int, Whole(1, 2)] = Field(
        1, description="1 keeps the weights in host memory, 2 reloads them"
    )
    shutdown_timeout: Duration = Field(0.0, description="grace for requests in flight at SIGTERM")
    uvicorn_log_level: Annotated[str, Choice("debug", "info", "warning", "error", "critical", "trace")] | None = None
    disable_log_stats: Switch | None = None
    enable_log_requests: Switch | None = None
    # the environment
    api_key: Secret | None = Field(None, description="passed as VLLM_API_KEY, never on the command line")
    cache_root: PathText | None = Field(
        None, description="VLLM_CACHE_ROOT: compiled code, best shared by all instances"
    )
    hf_home: PathText | None = None
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
    """Return one argument as words of a command line, none for None. `name` may have dashes or underscores."""
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
    """Return whether a name of a model, tokenizer or template is a path on this machine, not a name on the hub."""
    return text.startswith(("/", "./", "../", "~"))


def local_files(options: VllmOptions) -> dict[str, str]:
    """Return option → path as written, for all files on this machine that the options name."""
    named = {name: getattr(options, name) for name in ("model", "tokenizer", "chat_template", "generation_config")}
    for index, module in enumerate(options.lora_modules or ()):
        named[f"lora_modules[{index}]"] = module.partition("=")[2]
    named["speculative_config.model"] = (options.speculative_config or {}).get("model")
    return {name: text for name, text in named.items() if isinstance(text, str) and _one_path(text)}


def _one_path(text: str) -> bool:
    """Return whether the text is a path: a template may be the text itself, which has lines and braces."""
    return local(text) and "\n" not in text and "{" not in text


def arguments(options: VllmOptions, absolute: Callable[[str], str] = str) -> list[str]:
    """Return all arguments in the order of the fields, `extra_args` last; paths are mapped by `absolute`."""
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
    """Return a value with its path on this machine, if it names one, mapped by `absolute`."""
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
