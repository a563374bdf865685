"""Estimate the memory of a vLLM process, awake and asleep, from the headers of its model's files."""

from __future__ import annotations

from collections.abc import Mapping
from math import ceil

from fleetd.core.data.specs import Footprint
from fleetd.engines.base import LaunchContext
from fleetd.engines.options import narrow
from fleetd.engines.vllm.options import VllmOptions, local
from fleetd.errors import EngineError
from fleetd.models import vllm_memory
from fleetd.models.formats import safetensors
from fleetd.models.formats.safetensors import ModelFolder
from fleetd.models.vllm_memory import VllmServing

DEFAULT_SEQUENCES = 256
DEFAULT_BATCHED_TOKENS = 8192
DEFAULT_UTILIZATION = 0.92
PROCESS_BYTES = 1536 << 20  # host memory of the API server and the engine's own process
CPU_PROCESS_BYTES = 2560 << 20  # the same on the CPU, where a worker process is added
SLEEPER_BYTES = 1536 << 20  # device memory of a sleeping process: context, graphs, communication buffers
PINNED_FACTOR = 1.2  # pinned host memory of the weights of a sleeping process; its pools are rounded up


def estimate(context: LaunchContext) -> Footprint | None:
    """Return weights, KV cache and overhead; without a set cache, vLLM's share."""
    options = narrow(context.options, VllmOptions)
    device = context.device or "host"
    needed = needed_bytes(context, options)
    if needed is not None:
        if device in ("host", "unified"):
            return Footprint({device: needed + CPU_PROCESS_BYTES})
        return Footprint({device: needed, "host": PROCESS_BYTES})
    total = context.device_total_bytes
    if total is None or options.kv_cache_memory is not None or options.cpu_kvcache_space is not None:
        return None
    share = DEFAULT_UTILIZATION if options.gpu_memory_utilization is None else options.gpu_memory_utilization
    return Footprint({device: ceil(total * share)})


def asleep_bytes(context: LaunchContext, awake: Mapping[str, int]) -> Mapping[str, int] | None:
    """Return the bytes per device of a sleeping process; None: unknown.

    At level 1 the weights are in pinned host memory, which cannot be swapped out. At both levels the device keeps a little.
    """
    options = narrow(context.options, VllmOptions)
    device = context.device or "host"
    taken = awake.get(device, 0)
    if not taken:
        return None
    found = {**awake, device: min(SLEEPER_BYTES, taken)}
    pinned = ceil(_weight_bytes(context, options, taken) * PINNED_FACTOR) if options.sleep_level == 1 else 0
    pool = device if device in ("host", "unified") else "host"
    found[pool] = found.get(pool, 0) + pinned
    return {name: size for name, size in found.items() if size}


def needed_bytes(context: LaunchContext, options: VllmOptions) -> int | None:
    """Return bytes on its device: weights, set KV cache, overhead; None: unknown."""
    if options.kv_cache_memory is None and options.cpu_kvcache_space is None:
        return None
    found = model_folder(context, options)
    return vllm_memory.estimate(*found).total_bytes if found is not None else None


def fitting_utilization(context: LaunchContext, options: VllmOptions) -> float | None:
    """Return the share for a set KV cache, rounded up; None: unknown, or itself set."""
    total = context.device_total_bytes
    if options.gpu_memory_utilization is not None or options.kv_cache_memory is None or not total:
        return None
    needed = needed_bytes(context, options)
    if needed is None or needed > total:
        return None
    return max(0.01, ceil(100 * needed / total) / 100)


def model_folder(context: LaunchContext, options: VllmOptions) -> tuple[ModelFolder, VllmServing] | None:
    """Return the model's shape and use; None if its files cannot be read here."""
    if not local(options.model):
        return None
    try:
        model = safetensors.read_folder(context.resolve(options.model))
    except (EngineError, OSError):
        return None
    space = options.cpu_kvcache_space
    length = options.max_model_len
    serving = VllmServing(
        max_model_len=length if isinstance(length, int) and length > 0 else None,
        max_num_seqs=options.max_num_seqs or DEFAULT_SEQUENCES,
        max_num_batched_tokens=options.max_num_batched_tokens or DEFAULT_BATCHED_TOKENS,
        tensor_parallel=options.tensor_parallel_size * options.pipeline_parallel_size,
        block_size=options.block_size or (128 if context.device == "host" else 16),
        dtype=options.dtype or "auto",
        kv_dtype=options.kv_cache_dtype or "auto",
        weight_factor=0.55 if options.quantization == "fp8" and "quantization_config" not in model.config else 1.0,
        enforce_eager=bool(options.enforce_eager) or options.optimization_level == 0,
        kv_cache_bytes=options.kv_cache_memory if space is None else space << 30,
    )
    return model, serving


def _weight_bytes(context: LaunchContext, options: VllmOptions, taken: int) -> int:
    """Return the bytes of all weights, or an upper bound without the files."""
    found = model_folder(context, options)
    if found is not None:
        return vllm_memory.estimate(*found).weight_bytes * options.world_size
    return max(0, taken - (options.kv_cache_memory or 0))
