"""Check what the types of vLLM's options cannot express: options that need each other, and arguments that are set twice."""

from __future__ import annotations

import re
from collections.abc import Iterator

from fleetd.engines.base import LaunchContext, OptionProblem
from fleetd.engines.load_options import build_key_problems, load_option_problems
from fleetd.engines.vllm import memory
from fleetd.engines.vllm.command import environment
from fleetd.engines.vllm.options import OWNED, REMOVED, VllmOptions
from fleetd.models import vllm_memory
from fleetd.units import show_size

LOOPBACK = frozenset({"127.0.0.1", "localhost", "::1"})
_OPTION_OF = {
    "VLLM_API_KEY": "api_key",
    "VLLM_SERVER_DEV_MODE": "enable_sleep_mode",
    "VLLM_CACHE_ROOT": "cache_root",
    "HF_HOME": "hf_home",
    "HF_HUB_OFFLINE": "offline",
    "TRANSFORMERS_OFFLINE": "offline",
    "VLLM_CPU_KVCACHE_SPACE": "cpu_kvcache_space",
}


def problems(context: LaunchContext, options: VllmOptions) -> list[OptionProblem]:
    """Return every mistake and warning of an entry."""
    return [
        *_arguments(options, context.args),
        *_environment(context, options),
        *_requirements(context, options),
        *_memory(context, options),
        *load_option_problems(context.models, {}, "vLLM"),
        *build_key_problems(context.models, "vLLM"),
    ]


def _arguments(options: VllmOptions, args: tuple[str, ...]) -> Iterator[OptionProblem]:
    """Yield the arguments that `extra_args` and `args` must not contain."""
    fields = set(type(options).model_fields) - {"extra_args"}
    written: list[tuple[tuple[str, ...], str]] = [(("extra_args", key), key) for key in options.extra_args]
    written += [(("args",), word[2:].split("=")[0]) for word in args if word.startswith("--")]
    for path, word in written:
        name = word.replace("-", "_")
        bare = name.removeprefix("no_")
        if reason := REMOVED.get(name) or OWNED.get(name):
            yield OptionProblem(path, f"--{word}: {reason}")
        elif bare in fields or name == "kv_cache_memory_bytes":
            yield OptionProblem(path, f"--{word}: use the option {bare}")
    for word in args:
        if re.fullmatch(r"-(tp|pp|dp|q|O[0-3]?)", word):
            yield OptionProblem(("args",), f"{word}: use the option with its long name")


def _environment(context: LaunchContext, options: VllmOptions) -> Iterator[OptionProblem]:
    rendered = environment(context, options)
    for key in context.env:
        if key in rendered:
            option = _OPTION_OF.get(key)
            owner = f"options.{option} sets it" if option else "fleetd sets it, the same for every instance"
            yield OptionProblem(("env", key), f"{owner} already")
    if context.host not in LOOPBACK:
        message = f"host {context.host}: vLLM listens on loopback only; requests come through the gateway"
        yield OptionProblem((), message)


def _requirements(context: LaunchContext, options: VllmOptions) -> Iterator[OptionProblem]:
    if options.enable_sleep_mode and context.device == "host":
        yield OptionProblem(("enable_sleep_mode",), "vLLM cannot sleep on the CPU; its start would fail")
    if "sleep_level" in options.model_fields_set and not options.enable_sleep_mode:
        yield OptionProblem(("sleep_level",), "needs enable_sleep_mode: true")
    if options.enable_auto_tool_choice and not options.tool_call_parser:
        yield OptionProblem(("enable_auto_tool_choice",), "needs tool_call_parser")
    if options.lora_modules and not options.enable_lora:
        yield OptionProblem(("lora_modules",), "needs enable_lora: true")
    if options.world_size > 1 and "CUDA_VISIBLE_DEVICES" not in context.env:
        message = f"{options.world_size} devices are needed: list them in env.CUDA_VISIBLE_DEVICES, by UUID"
        yield OptionProblem(("tensor_parallel_size",), message, warning=True)


def _memory(context: LaunchContext, options: VllmOptions) -> Iterator[OptionProblem]:
    cache = options.kv_cache_memory
    limits = (cache, options.cpu_kvcache_space, options.gpu_memory_utilization)
    if all(limit is None for limit in limits):
        whole = "the machine's memory" if context.device == "host" else "the device"
        message = f"without gpu_memory_utilization or kv_cache_memory vLLM takes 92% of {whole}"
        yield OptionProblem((), message, warning=True)
    if cache is None:
        return
    if options.gpu_memory_utilization is None and memory.fitting_utilization(context, options) is None:
        message = (
            "set gpu_memory_utilization too: vLLM starts only where that share of the device is free, 0.92 by default"
        )
        yield OptionProblem(("kv_cache_memory",), message, warning=True)
    found = memory.model_folder(context, options)
    least = vllm_memory.minimum_kv_bytes(*found) if found is not None else 0
    if cache < least:
        message = f"one request of the longest length needs {show_size(least)}: raise it, or lower max_model_len"
        yield OptionProblem(("kv_cache_memory",), message)
