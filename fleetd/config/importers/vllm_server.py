"""Read the arguments of `vllm serve` as the options of the engine `vllm`.

Invariants:
- An argument without an option is in `extra_args` under its own name; none is lost.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

WHOLE = frozenset({
    "block_size", "max_num_seqs", "max_num_batched_tokens", "tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size",
    "max_loras", "max_lora_rank", "seed", "api_server_count", "max_num_queued_reqs", "num_gpu_blocks_override",
})  # fmt: skip
REAL = frozenset({"gpu_memory_utilization", "cpu_offload_gb", "kv_offloading_size"})
TEXTS = frozenset({
    "dtype", "quantization", "tokenizer", "revision", "kv_cache_dtype", "load_format", "download_dir", "chat_template",
    "chat_template_content_format", "tool_call_parser", "reasoning_parser", "runner", "convert", "generation_config",
    "distributed_executor_backend", "uvicorn_log_level", "api_key", "max_model_len",
})  # fmt: skip
FLAGS = frozenset({
    "trust_remote_code", "enable_prefix_caching", "enforce_eager", "enable_expert_parallel", "enable_auto_tool_choice",
    "enable_lora", "disable_log_stats", "enable_log_requests", "enable_sleep_mode",
})  # fmt: skip
JSON = frozenset({
    "hf_overrides", "compilation_config", "speculative_config", "limit_mm_per_prompt", "default_chat_template_kwargs",
    "model_loader_extra_config", "kv_transfer_config",
})  # fmt: skip
REMOVED = frozenset({"swap_space", "disable_log_requests", "use_v2_block_manager", "worker_use_ray", "engine_use_ray"})
_SHORT = {
    "-tp": "tensor_parallel_size",
    "-pp": "pipeline_parallel_size",
    "-dp": "data_parallel_size",
    "-q": "quantization",
}


def read_vllm(words: Sequence[str]) -> tuple[dict[str, Any], list[str]] | str:
    """Return the options and the served names, or the reason why the engine cannot run this command line."""
    options: dict[str, Any] = {}
    extra: dict[str, Any] = {}
    served: list[str] = []
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if not word.startswith("-"):
            if "model" in options:
                return f"has {word!r}, which belongs to no argument"
            options["model"] = word
            continue
        flag, equals, value = word.partition("=")
        name = _SHORT.get(flag) or (flag[2:].replace("-", "_") if flag.startswith("--") else "")
        if not name:
            return f"has the argument {word}"
        values = [value] if equals else []
        while (
            not equals
            and rest
            and not _is_flag(rest[0])
            and (not values or name in ("served_model_name", "lora_modules"))
        ):
            values.append(rest.pop(0))
        if name == "served_model_name":
            served = values
        elif name in ("host", "port") or name in REMOVED:
            continue
        else:
            try:
                _set(options, extra, name, values)
            except ValueError:
                return f"has {flag} {' '.join(values)}"
    if not options.get("model"):
        return "names no model"
    if extra:
        options["extra_args"] = extra
    return options, served


def _is_flag(word: str) -> bool:
    return word.startswith("-") and not word[1:].replace(".", "", 1).isdigit()


def _set(options: dict[str, Any], extra: dict[str, Any], name: str, values: list[str]) -> None:
    if name.startswith("no_") and name[3:] in FLAGS:
        options[name[3:]] = False
    elif name in FLAGS:
        options[name] = not values or values[0].lower() in ("true", "1")
    elif name == "lora_modules":
        options[name] = values
    elif name in WHOLE | REAL | TEXTS | JSON | {"model"}:
        text = values[0] if values else ""
        if not text:
            raise ValueError
        read: Any = int if name in WHOLE else float if name in REAL else json.loads if name in JSON else str
        options[name] = int(text) if name == "max_model_len" and text.isdecimal() else read(text)
    else:
        extra[name] = values[0] if values else True


__all__ = ["FLAGS", "JSON", "REAL", "REMOVED", "TEXTS", "WHOLE", "read_vllm"]
