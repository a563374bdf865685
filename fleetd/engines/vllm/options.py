"""The command line of `vllm serve`: typed options, and how each becomes words.

The rules of this file
- Everything is visible on the command line, but keys: those go into the environment, where other users cannot read them.
- A field's name is vLLM's own; what vLLM spells otherwise stands in `_SPELLING`.
- true → `--x`, false → `--no-x`, a list → `--x a b c`, a mapping → `--x '{"a": 1}'`; None leaves vLLM's default.
- vLLM drops options between versions: those it would refuse are refused here, with what to write instead.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Annotated, Any, ClassVar

from pydantic import Field

from fleetd.config.schema.types import Choice, FieldType, Real, Schema, Strings, Whole
from fleetd.engines.base import Options
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
            raise ValueError(f"must be from 1 to {LARGEST}, or -1 for as much as fits, not {shown(value)}")
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
    "swap_space": "vLLM has no swap space any more; for KV cache in host memory use kv_offloading_size",
    "disable_log_requests": "request logging is off by default now; use enable_log_requests to switch it on",
    "use_v2_block_manager": "vLLM has one block manager now",
    "num_lookahead_slots": "it belongs into speculative_config now",
    "speculative_model": "it belongs into speculative_config now: {model: …, num_speculative_tokens: …}",
    "num_speculative_tokens": "it belongs into speculative_config now",
    "worker_use_ray": "use distributed_executor_backend: ray",
    "engine_use_ray": "use distributed_executor_backend: ray",
    "max_context_len_to_capture": "use compilation_config or cudagraph_capture_sizes",
    "max_seq_len_to_capture": "use compilation_config or cudagraph_capture_sizes",
    "device": "the device comes from the entry's `device`",
    "task": "use runner (and convert)",
    "guided_decoding_backend": "use structured_outputs_config",
    "kv_cache_memory_bytes": "it is named kv_cache_memory here",
}
# what fleetd says itself
OWNED = {
    "host": "fleetd binds vLLM to its own address",
    "port": "it is the entry's `port`",
    "uds": "fleetd reaches vLLM over TCP on loopback",
    "hf_token": "a command line is public: put HF_TOKEN into env_file",
    "config": "fleetd writes every argument itself, so that it can be seen and compared",
    "headless": "fleetd runs the API server",
    "grpc": "fleetd speaks HTTP",
    "data_parallel_multi_port_external_lb": "its servers would escape fleetd's process group",
}


class VllmOptions(Options):
    """The arguments of `vllm serve`, and a little of its environment."""

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
        1, description="1 keeps the weights in host memory, 2 reads them again"
    )
    shutdown_timeout: Duration = Field(0.0, description="seconds that requests in flight get at SIGTERM")
    uvicorn_log_level: Annotated[str, Choice("debug", "info", "warning", "error", "critical", "trace")] | None = None
    disable_log_stats: Switch | None = None
    enable_log_requests: Switch | None = None
    # the environment
    api_key: Secret | None = Field(None, description="given as VLLM_API_KEY, never on the command line")
    cache_root: PathText | None = Field(None, description="VLLM_CACHE_ROOT: compiled code, worth sharing")
    hf_home: PathText | None = None
    offline: Switch = Field(False, description="never ask the hub: HF_HUB_OFFLINE and TRANSFORMERS_OFFLINE")
    cpu_kvcache_space: Count | None = Field(None, description="GiB of KV cache of a CPU build")
    extra_args: Annotated[dict[str, Any], ArgumentsType()] = Field(
        default_factory=dict, description="any other argument, by its name without the dashes"
    )


_SPELLING = {"kv_cache_memory": "kv-cache-memory-bytes"}
_NOT_ARGUMENTS = frozenset(
    {
        "model", "served_model_name", "sleep_level", "api_key", "cache_root", "hf_home", "offline", "cpu_kvcache_space",
        "extra_args",
    }
)  # fmt: skip
_WHEN_SET = frozenset({"enable_sleep_mode"})  # false is vLLM's default and has no `--no-` worth saying
_ONE = frozenset({"tensor_parallel_size", "pipeline_parallel_size"})


def words(name: str, value: Any) -> list[str]:
    """Return the words of one argument. `name` may have dashes or underscores; None gives none."""
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
    """Say whether a name of a model, a tokenizer, a template is a path of this machine; else it is looked up on the hub."""
    return text.startswith(("/", "./", "../", "~"))


def local_files(options: VllmOptions) -> dict[str, str]:
    """Return option → path for everything on this machine that the options name, as it was written."""
    named = {name: getattr(options, name) for name in ("model", "tokenizer", "chat_template", "generation_config")}
    for index, said in enumerate(options.lora_modules or ()):
        named[f"lora_modules[{index}]"] = said.partition("=")[2]
    named["speculative_config.model"] = (options.speculative_config or {}).get("model")
    return {name: text for name, text in named.items() if isinstance(text, str) and _one_path(text)}


def _one_path(text: str) -> bool:
    """A template may be the text itself, which has lines and braces."""
    return local(text) and "\n" not in text and "{" not in text


def arguments(options: VllmOptions, absolute: Callable[[str], str] = str) -> list[str]:
    """Return every argument that the options set, in the order of the fields, `extra_args` last; paths as `absolute` gives them."""
    found: list[str] = []
    files = local_files(options)
    for name in type(options).model_fields:
        value = _placed(name, getattr(options, name), files, absolute)
        if name in _NOT_ARGUMENTS or (name in _WHEN_SET and not value) or (name in _ONE and value == 1):
            continue
        if name == "shutdown_timeout":
            found += words(name, round(value)) if value else []
        else:
            found += words(_SPELLING.get(name, name), value)
    for name, value in options.extra_args.items():
        found += words(name, value)
    return found


def _placed(name: str, value: Any, files: Mapping[str, str], absolute: Callable[[str], str]) -> Any:
    """Return a value with what it names on this machine as an absolute path."""
    if name in files:
        return absolute(files[name])
    if name == "lora_modules" and value:
        return tuple(
            f"{said.partition('=')[0]}={absolute(files[key])}" if (key := f"{name}[{index}]") in files else said
            for index, said in enumerate(value)
        )
    if name == "speculative_config" and f"{name}.model" in files:
        return {**value, "model": absolute(files[f"{name}.model"])}
    return value


def extra_problems(options: VllmOptions, args: tuple[str, ...]) -> list[tuple[tuple[str | int, ...], str]]:
    """Return what `extra_args` and `args` may not say: removed options, those of fleetd, and those that are fields here."""
    found: list[tuple[tuple[str | int, ...], str]] = []
    fields = set(type(options).model_fields) - {"extra_args"}
    seen: list[tuple[tuple[str | int, ...], str]] = [(("extra_args", key), key) for key in options.extra_args]
    seen += [(("args",), word[2:].split("=")[0]) for word in args if word.startswith("--")]
    for path, written in seen:
        name = written.replace("-", "_")
        bare = name.removeprefix("no_")
        if reason := REMOVED.get(name) or OWNED.get(name):
            found.append((path, f"--{written}: {reason}"))
        elif bare in fields or name == "kv_cache_memory_bytes":
            found.append((path, f"--{written}: there is an option {bare} for it"))
    short = (word for word in args if re.fullmatch(r"-(tp|pp|dp|q|O[0-3]?)", word))
    return [*found, *((("args",), f"{word}: there is an option for it, by its long name") for word in short)]
