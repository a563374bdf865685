"""Check what the types of llama.cpp's options cannot express: conflicting options, variables and flags that are set twice.

Each rule reports at most one problem, at the option to change. A missing file is not a mistake: the process is BLOCKED until
the file exists.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from fleetd.engines.base import LaunchContext, OptionProblem
from fleetd.engines.llamacpp import server_main
from fleetd.engines.llamacpp.options import LlamaCppOptions
from fleetd.engines.load_options import build_key_problems, load_option_problems
from fleetd.errors import EngineError
from fleetd.models import memory_estimate
from fleetd.models.formats import gguf

# flag -> the option of fleet.yaml that sets it; None: fleetd sets it
OWNED: dict[str, str | None] = {
    "--model": "model", "--host": None, "--port": None, "--alias": None, "--ctx-size": "context_length",
    "--parallel": "parallel", "--threads": "threads", "--threads-batch": "threads_batch", "--gpu-layers": "gpu_layers",
    "--batch-size": "batch", "--ubatch-size": "ubatch", "--cache-type-k": "cache_type_k", "--cache-type-v": "cache_type_v",
    "--flash-attn": "flash_attention", "--load-mode": "load_mode", "--no-mmap": "load_mode", "--mmap": "load_mode",
    "--mlock": "mlock", "--embeddings": "embeddings", "--pooling": "pooling", "--rerank": "rerank", "--lora": "lora",
    "--lora-scaled": "lora", "--mmproj": "mmproj", "--chat-template": "chat_template", "--jinja": "jinja",
    "--no-jinja": "jinja", "--chat-template-file": "chat_template_file", "--cache-ram": "cache_ram",
    "--split-mode": "split_mode", "--main-gpu": "main_gpu", "--tensor-split": "tensor_split", "--seed": "seed",
    "--api-key": "api_key", "--metrics": None, "--slots": None, "--no-slots": None,
}  # fmt: skip
# variable -> option; llama-server reads LLAMA_ARG_*, and its command line wins silently
ENV: dict[str, str] = {
    "LLAMA_API_KEY": "api_key", "LLAMA_ARG_MODEL": "model", "LLAMA_ARG_CTX_SIZE": "context_length",
    "LLAMA_ARG_N_PARALLEL": "parallel", "LLAMA_ARG_THREADS": "threads", "LLAMA_ARG_N_GPU_LAYERS": "gpu_layers",
    "LLAMA_ARG_BATCH": "batch", "LLAMA_ARG_UBATCH": "ubatch", "LLAMA_ARG_CACHE_TYPE_K": "cache_type_k",
    "LLAMA_ARG_CACHE_TYPE_V": "cache_type_v", "LLAMA_ARG_FLASH_ATTN": "flash_attention", "LLAMA_ARG_LOAD_MODE": "load_mode",
    "LLAMA_ARG_EMBEDDINGS": "embeddings", "LLAMA_ARG_POOLING": "pooling", "LLAMA_ARG_RERANKING": "rerank",
    "LLAMA_ARG_MMPROJ": "mmproj", "LLAMA_ARG_CHAT_TEMPLATE": "chat_template", "LLAMA_ARG_JINJA": "jinja",
    "LLAMA_ARG_CACHE_RAM": "cache_ram", "LLAMA_ARG_SPLIT_MODE": "split_mode", "LLAMA_ARG_MAIN_GPU": "main_gpu",
    "LLAMA_ARG_TENSOR_SPLIT": "tensor_split",
}  # fmt: skip
BLOCK = 32  # numbers in one block of a quantised cache
FLEETD_OWN = ("LLAMA_ARG_HOST", "LLAMA_ARG_PORT", "LLAMA_ARG_ALIAS", "LLAMA_ARG_API_PREFIX")


def problems(context: LaunchContext, options: LlamaCppOptions, *, embedded: bool) -> list[OptionProblem]:
    """Return the mistakes and warnings of an entry; `embedded` limits the flags."""
    return [
        *_exclusions(context, options),
        *_environment(context, options),
        *_arguments(context, options, embedded=embedded),
        *_file(context, options),
        *load_option_problems(context.models, {}, "llama.cpp"),
        *build_key_problems(context.models, "llama.cpp"),
    ]


def _exclusions(context: LaunchContext, options: LlamaCppOptions) -> Iterator[OptionProblem]:
    if options.chat_template is not None and options.chat_template_file is not None:
        yield OptionProblem(("chat_template_file",), "conflicts with chat_template: remove one of the two")
    if options.mmap is not None and options.load_mode not in ("auto", "mmap" if options.mmap else "read"):
        yield OptionProblem(("mmap",), f"conflicts with load_mode: {options.load_mode}")
    if options.mlock and options.load_mode == "direct":
        yield OptionProblem(("mlock",), "is not possible with load_mode: direct")
    if options.flash_attention is False and options.cache_type_v not in ("f32", "f16", "bf16"):
        yield OptionProblem(("cache_type_v",), f"{options.cache_type_v} needs flash attention, which is false here")
    if options.rerank and options.pooling not in (None, "rank"):
        yield OptionProblem(("pooling",), "reranking needs rank: leave pooling out")
    if options.pooling is not None and not (options.embeddings or options.rerank):
        yield OptionProblem(("pooling",), "has no effect without embeddings: true", warning=True)
    if options.ubatch and options.batch and options.ubatch > options.batch:
        yield OptionProblem(("ubatch",), f"{options.ubatch} is more than batch ({options.batch})")
    if context.device == "host":
        gpu = {"gpu_layers": options.gpu_layers, "main_gpu": options.main_gpu, "tensor_split": options.tensor_split}
        for field, value in gpu.items():
            if value not in ("auto", 0, None, ()):
                yield OptionProblem((field,), "conflicts with device: host, where no GPU is visible")
    if options.tensor_split and not sum(options.tensor_split):
        yield OptionProblem(("tensor_split",), "the shares add up to 0")
    if options.cache_ram and options.cache_ram < 2**20:
        yield OptionProblem(("cache_ram",), "is less than 1MiB, llama.cpp's unit: use 0 or more", warning=True)


def _environment(context: LaunchContext, options: LlamaCppOptions) -> Iterator[OptionProblem]:
    for key in context.env:
        if key in FLEETD_OWN:
            yield OptionProblem(("env", key), "fleetd sets this itself, on the command line")
        elif (option := ENV.get(key)) and option in options.model_fields_set:
            yield OptionProblem(("env", key), f"options.{option} sets it already: remove one of the two")
        elif key == "LLAMA_API_KEY":
            yield OptionProblem(("env", key), "set options.api_key instead: fleetd needs the key too")


def _arguments(context: LaunchContext, options: LlamaCppOptions, *, embedded: bool) -> Iterator[OptionProblem]:
    known = server_main.known_flags()
    for where, words in ((("extra_args",), options.extra_args), (("args",), context.args)):
        for word in words:
            flag = word.partition("=")[0]
            if not flag.startswith("-") or flag.lstrip("-").replace(".", "", 1).isdigit():
                continue
            flag = server_main.SPELLINGS.get(flag, flag)
            if flag in OWNED:
                owner = OWNED[flag]
                hint = f"use the option {owner}" if owner else "fleetd sets this itself"
                yield OptionProblem(where, f"{word}: {hint}")
            elif embedded and flag not in known:
                yield OptionProblem(
                    where, f"{word}: unknown to the embedded llama.cpp (llama-server on PATH may know it)"
                )


def _file(context: LaunchContext, options: LlamaCppOptions) -> Iterator[OptionProblem]:
    path = context.resolve(options.model)
    if path.is_dir():
        yield OptionProblem(("model",), f"{path} is a folder: give the .gguf file in it")
        return
    first = gguf.shards(path)[0]
    if first != str(path):
        yield OptionProblem(("model",), f"is a later part of a split model: give the first, {Path(first).name}")
        return
    if not path.exists():
        return
    try:
        header = gguf.read(path)
    except EngineError as error:
        # a warning, since one broken file must not reject the whole fleet: only this model fails, when it is requested
        yield OptionProblem(("model",), str(error), warning=True)
        return
    kinds = {"cache_type_k": options.cache_type_k, "cache_type_v": options.cache_type_v}
    for (field, kind), width in zip(kinds.items(), memory_estimate.head_widths(header), strict=True):
        if kind not in ("f32", "f16", "bf16") and width % BLOCK:
            yield OptionProblem(
                (field,), f"{kind} needs heads whose width is a multiple of {BLOCK}; this model's is {width}"
            )
    trained = header.number("context_length")
    if trained and options.context_length > trained:
        message = f"{options.context_length} is longer than the model was trained for ({trained})"
        yield OptionProblem(("context_length",), message, warning=True)
