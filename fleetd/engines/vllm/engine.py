"""vLLM: one process per model, with everything that makes it hard to supervise.

The rules of this file
- Any exit that nobody asked for is a failure, 0 included. After a kill of the first process its workers hold the device on.
- Nothing else starts, stops, sleeps or wakes on a device while a vLLM there is between launch and ready: it measures the free
  memory of the whole device.
- It listens on loopback only; its sleep routes ask nobody for a key, and are never proxied.
- The cache of compiled code is keyed by the environment too: variables that are hashed are the same for every instance.
- Keys are given by environment; the command line is public.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fleetd.core.data.specs import Capabilities, Footprint, Probes, ProbeSpec
from fleetd.engines.base import (
    Api,
    Asleep,
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
from fleetd.engines.load_options import held_option_problems, unmade_problems
from fleetd.engines.visible import visible_devices
from fleetd.engines.vllm import sleep as vllm_sleep
from fleetd.engines.vllm.log import learned_kv_bytes, phase, verdict
from fleetd.engines.vllm.options import VllmOptions, arguments, extra_problems, local, local_files
from fleetd.errors import EngineError
from fleetd.models import vllm_memory
from fleetd.models.formats import safetensors
from fleetd.models.formats.safetensors import ModelFolder
from fleetd.models.vllm_memory import VllmServing
from fleetd.units import expand_home, show_size

if TYPE_CHECKING:
    from aiohttp import ClientSession

DEFAULT_SEQUENCES = 256
DEFAULT_BATCHED_TOKENS = 8192
PROCESS_BYTES = 1536 << 20  # host memory of the API server and the engine's own process
CPU_PROCESS_BYTES = 2560 << 20  # on the CPU a worker process comes on top
SLEEPER_BYTES = 1536 << 20  # what a sleeper keeps on its device: context, graphs, communication buffers
PINNED_FACTOR = 1.2  # host memory of a sleeper's weights: pinned, in pools that are rounded up
DEFAULT_UTILIZATION = 0.92
LEARNED_KV = "kv_cache_memory"
PROBED_PATHS = "/health,/metrics,/ping,/v1/models,/is_sleeping"
LOOPBACK = frozenset({"127.0.0.1", "localhost", "::1"})

# The same for every instance: each is part of the key of the compile cache (but the last three, which are harmless).
CONSTANTS = {
    "VLLM_PROCESS_NAME_PREFIX": "fleetd",
    "VLLM_ENGINE_READY_TIMEOUT_S": "3600",
    "VLLM_WORKER_SHUTDOWN_TIMEOUT_SECONDS": "5",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_DO_NOT_TRACK": "1",
    "VLLM_LOGGING_COLOR": "0",
    "SPT_NOENV": "1",  # or setting the process title would overwrite the environment that fleetd finds its own by
}
# Inherited by accident, each of these breaks a start: a service named vllm in a cluster sets VLLM_PORT, launchers set ranks.
SCRUBBED = (
    "VLLM_PORT",
    "VLLM_HOST_IP",
    "VLLM_API_KEY",
    "VLLM_SERVER_DEV_MODE",
    "VLLM_KEEP_ALIVE_ON_ENGINE_DEATH",
    "PROMETHEUS_MULTIPROC_DIR",
    "RANK",
    "LOCAL_RANK",
    "WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
)
SECRETS = frozenset({"VLLM_API_KEY", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"})
_FROM_OPTIONS = {
    "VLLM_API_KEY": "api_key",
    "VLLM_SERVER_DEV_MODE": "enable_sleep_mode",
    "VLLM_CACHE_ROOT": "cache_root",
    "HF_HOME": "hf_home",
    "HF_HUB_OFFLINE": "offline",
    "TRANSFORMERS_OFFLINE": "offline",
    "VLLM_CPU_KVCACHE_SPACE": "cpu_kvcache_space",
}


class Vllm:
    """The engine `vllm`."""

    name = "vllm"
    capabilities = Capabilities(exclusive_start=True, exit_zero_is_failure=True)
    options: type[Options] = VllmOptions

    def capabilities_for(self, options: VllmOptions) -> Capabilities:
        """Return the capabilities of one entry: it can sleep where `enable_sleep_mode` says so."""
        return replace(self.capabilities, can_sleep=options.enable_sleep_mode)

    def api(self, options: Any) -> Api:  # noqa: ARG002
        return Api.OPENAI

    def concurrency(self, options: VllmOptions) -> int:
        return options.max_num_seqs or DEFAULT_SEQUENCES

    def probes(self, options: Any) -> Probes:  # noqa: ARG002
        """The deadline is for silence: every phase that the log shows (`vllm_log.phase`) counts it anew."""
        return Probes(
            startup=ProbeSpec(http="/health", period_s=0.25, timeout_s=2.0, failures=1, deadline_s=600.0),
            readiness=ProbeSpec(http="/health", period_s=2.0, timeout_s=2.0, failures=3),
            liveness=ProbeSpec(completion=True, period_s=30.0, timeout_s=20.0, failures=3),
        )

    def validate(self, context: LaunchContext) -> Sequence[OptionProblem]:
        options = _options(context)
        problems = [OptionProblem(path, message) for path, message in extra_problems(options, context.args)]
        rendered = _environment(context, options)
        for key in context.env:
            if key in rendered:
                option = _FROM_OPTIONS.get(key)
                where = f"options.{option} sets it" if option else "fleetd sets it, the same for every instance"
                problems.append(OptionProblem(("env", key), f"{where} already"))
        if context.host not in LOOPBACK:
            message = f"host {context.host}: vLLM listens on loopback only; requests come through the gateway"
            problems.append(OptionProblem((), message))
        problems += _option_problems(context, options)
        problems += [*held_option_problems(context.models, {}, "vLLM"), *unmade_problems(context.models, "vLLM")]
        return problems

    def launch(self, context: LaunchContext) -> Launch:
        options = _options(context)
        model, _ = _model(context, options)
        command = context.command or (_program(context), "serve")
        if Path(command[-1]).name == "vllm":
            command = (*command, "serve")
        by_flag = any(word.endswith("api_server") for word in command)
        argv = [*command, *(("--model", model) if by_flag else (model,))]
        argv += ["--served-model-name", *_served_names(context, options)]
        argv += ["--host", context.host, "--port", str(context.port or 8000)]
        argv += arguments(options, lambda text: _absolute(context, text))
        fraction = _fitting_utilization(context, options)
        if fraction is not None:
            argv += ["--gpu-memory-utilization", f"{fraction:g}"]
        if "disable_access_log_for_endpoints" not in {key.replace("-", "_") for key in options.extra_args}:
            argv += ["--disable-access-log-for-endpoints", PROBED_PATHS]
        env = _environment(context, options)
        unset = tuple(name for name in SCRUBBED if name not in env and name not in context.env)
        learned = context.learned.get(LEARNED_KV)
        if learned and not _kv_stated(options):
            argv += [
                "--kv-cache-memory-bytes",
                str(learned),
            ]  # spares it the measurement, and the memory it needs for that
        named = {_absolute(context, text): option for option, text in local_files(options).items()}
        return Launch((*argv, *context.args), env, unset, tuple(named), SECRETS, named)

    def estimate(self, context: LaunchContext, model: HeldModel | None) -> Footprint | None:  # noqa: ARG002
        """With explicit KV cache: weights, cache and overhead. Else vLLM takes its fraction of the whole device."""
        options = _options(context)
        device = context.device or "host"
        total = context.device_total_bytes
        needed = _needed(context, options)
        if needed is not None:
            if device in ("host", "unified"):
                return Footprint({device: needed + CPU_PROCESS_BYTES})
            return Footprint({device: needed, "host": PROCESS_BYTES})
        if total is None or options.kv_cache_memory is not None or options.cpu_kvcache_space is not None:
            return None
        share = DEFAULT_UTILIZATION if options.gpu_memory_utilization is None else options.gpu_memory_utilization
        return Footprint({device: ceil(total * share)})

    def classify_exit(self, code: int | None, signal: str | None, log_tail: Sequence[str]) -> ExitVerdict:
        return verdict(code, signal, log_tail)

    def phase(self, line: str) -> str | None:
        return phase(line)

    def learned_at_start(self, context: LaunchContext, lines: Sequence[str]) -> Mapping[str, int]:
        """Return the KV cache that it found room for; nothing where fleet.yaml states one."""
        found = None if _kv_stated(_options(context)) else learned_kv_bytes(lines)
        return {LEARNED_KV: found} if found else {}

    # -- the process is the model ---------------------------------------------------------------------------------------

    async def load(
        self,
        http: ClientSession,
        endpoint: Endpoint,
        model: HeldModel,
        timeout_s: float,  # noqa: ARG002
    ) -> Mapping[str, int]:
        """A vLLM that runs holds its model: it has to answer for it, no more."""
        names = await self.loaded(http, endpoint)
        if model.served_as and names and all(resident.served_as != model.served_as for resident in names):
            message = f"{endpoint.base_url} serves {', '.join(resident.served_as for resident in names)}, not {model.served_as}"
            raise EngineError(message, recoverable=False)
        return {}

    async def unload(self, http: ClientSession, endpoint: Endpoint, model: HeldModel, timeout_s: float) -> None:  # noqa: ARG002
        message = f"{endpoint.base_url} lets go of {model.served_as} only when its process ends"
        raise EngineError(message, recoverable=False)

    async def loaded(self, http: ClientSession, endpoint: Endpoint) -> Sequence[Resident]:
        """Return the served names, the first of which names the model in metrics."""
        reply = await call(http, endpoint, "GET", "/v1/models", timeout_s=5.0)
        return tuple(Resident(reply.word(entry, "id")) for entry in reply.expect("listing models").listing("data"))

    async def alive(
        self, http: ClientSession, endpoint: Endpoint, model: HeldModel | None, timeout_s: float
    ) -> ProbeOutcome:
        """One real token: /health is well while the engine is wedged. A sleeper is not asked, it would wait for ever."""
        try:
            if await vllm_sleep.is_sleeping(http, endpoint, timeout_s):
                return ProbeOutcome(True, "asleep", asleep=True)
            served_as = model.served_as if model is not None and model.served_as else ""
            if not served_as:
                served_as = await self._served_as(http, endpoint)
            return await _one_token(http, endpoint, served_as, timeout_s)
        except EngineError as error:
            return ProbeOutcome.failed(error)

    # -- sleep ------------------------------------------------------------------------------------------------------------

    def asleep(self, context: LaunchContext, awake: Mapping[str, int]) -> Mapping[str, int] | None:
        """At level 1 its weights are on the host, where nobody can swap them out; of its device it keeps a little at both."""
        options = _options(context)
        device = context.device or "host"
        held = awake.get(device, 0)
        if not held:
            return None
        found = {**awake, device: min(SLEEPER_BYTES, held)}
        pinned = ceil(_weights(context, options, held) * PINNED_FACTOR) if options.sleep_level == 1 else 0
        pool = device if device in ("host", "unified") else "host"
        found[pool] = found.get(pool, 0) + pinned
        return {name: size for name, size in found.items() if size}

    async def sleep(
        self, http: ClientSession, endpoint: Endpoint, options: Any, before: Asleep | None, timeout_s: float
    ) -> Asleep:
        said = before.said if before is not None else None
        if said is None:
            said = await vllm_sleep.canary(http, endpoint, await self._served_as(http, endpoint), timeout_s)
        await vllm_sleep.sleep(http, endpoint, options.sleep_level, timeout_s)
        return Asleep(options.sleep_level, said)

    async def wake(self, http: ClientSession, endpoint: Endpoint, before: Asleep, timeout_s: float) -> None:
        served_as = await self._served_as(http, endpoint)
        await vllm_sleep.wake(http, endpoint, before.level, timeout_s, served_as=served_as, expected=before.said)

    async def sleeping(self, http: ClientSession, endpoint: Endpoint, timeout_s: float) -> bool:
        return bool(await vllm_sleep.is_sleeping(http, endpoint, timeout_s))

    async def _served_as(self, http: ClientSession, endpoint: Endpoint) -> str:
        return next((resident.served_as for resident in await self.loaded(http, endpoint)), "")


ENGINE = Vllm()


def _options(context: LaunchContext) -> VllmOptions:
    if not isinstance(context.options, VllmOptions):
        raise TypeError(f"{context.name}: options of another engine: {type(context.options).__name__}")
    return context.options


def _program(context: LaunchContext) -> str:
    found = shutil.which("vllm", path=context.env.get("PATH"))
    if found is None:
        raise EngineError(
            f"{context.name}: no program named vllm on PATH",
            hint="install vLLM, or say how to start it: command: [/path/to/venv/bin/vllm, serve]",
            recoverable=False,
        )
    return found


def _model(context: LaunchContext, options: VllmOptions) -> tuple[str, str | None]:
    """Return the model's argument, and the path that must exist for it (None: a name on the hub)."""
    if not local(options.model):
        return options.model, None
    path = _absolute(context, options.model)
    return path, path


def _absolute(context: LaunchContext, text: str) -> str:
    return str(context.config_dir.absolute() / expand_home(text))


def _served_names(context: LaunchContext, options: VllmOptions) -> tuple[str, ...]:
    return options.served_model_name or ((context.served_as,) if context.served_as else (context.name,))


def _environment(context: LaunchContext, options: VllmOptions) -> dict[str, str]:
    env = dict(CONSTANTS)
    if options.api_key is not None:
        env["VLLM_API_KEY"] = options.api_key.get_secret_value()
    if _world(options) == 1:  # several devices are the user's to name: an entry has one
        env |= visible_devices(context.device_uuid, context.device)
    if options.enable_sleep_mode:
        env["VLLM_SERVER_DEV_MODE"] = "1"
    for variable, folder in (("VLLM_CACHE_ROOT", options.cache_root), ("HF_HOME", options.hf_home)):
        if folder is not None:
            env[variable] = _absolute(context, folder)
    if options.offline:
        env |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    if options.cpu_kvcache_space is not None:
        env["VLLM_CPU_KVCACHE_SPACE"] = str(options.cpu_kvcache_space)
    return env


def _kv_stated(options: VllmOptions) -> bool:
    said = {key.replace("-", "_") for key in options.extra_args}
    given = options.kv_cache_memory is not None or options.cpu_kvcache_space is not None
    return given or bool(said & {"kv_cache_memory", "kv_cache_memory_bytes"})


def _world(options: VllmOptions) -> int:
    return options.tensor_parallel_size * options.pipeline_parallel_size * (options.data_parallel_size or 1)


def _option_problems(context: LaunchContext, options: VllmOptions) -> list[OptionProblem]:
    found: list[OptionProblem] = []
    on_host = context.device == "host"
    if options.enable_sleep_mode and on_host:
        found.append(OptionProblem(("enable_sleep_mode",), "vLLM cannot sleep on the CPU; its start would fail"))
    if "sleep_level" in options.model_fields_set and not options.enable_sleep_mode:
        found.append(OptionProblem(("sleep_level",), "needs enable_sleep_mode: true"))
    if options.enable_auto_tool_choice and not options.tool_call_parser:
        found.append(OptionProblem(("enable_auto_tool_choice",), "needs tool_call_parser"))
    if options.lora_modules and not options.enable_lora:
        found.append(OptionProblem(("lora_modules",), "needs enable_lora: true"))
    limited = (options.kv_cache_memory, options.cpu_kvcache_space, options.gpu_memory_utilization)
    if all(limit is None for limit in limited):
        what = "the machine's memory" if on_host else "the device"
        message = f"without gpu_memory_utilization or kv_cache_memory vLLM takes 92% of {what}"
        found.append(OptionProblem((), message, warning=True))
    unstated = options.kv_cache_memory is not None and options.gpu_memory_utilization is None
    if unstated and _fitting_utilization(context, options) is None:
        message = (
            "set gpu_memory_utilization too: vLLM starts only where that share of the device is free, 0.92 by default"
        )
        found.append(OptionProblem(("kv_cache_memory",), message, warning=True))
    stated = _folder(context, options) if options.kv_cache_memory is not None else None
    least = vllm_memory.minimum_kv_bytes(*stated) if stated is not None else 0
    if options.kv_cache_memory is not None and options.kv_cache_memory < least:
        message = (
            f"{show_size(least)} are needed for one request of the longest length: raise it, or lower max_model_len"
        )
        found.append(OptionProblem(("kv_cache_memory",), message))
    if _world(options) > 1 and "CUDA_VISIBLE_DEVICES" not in context.env:
        message = f"{_world(options)} devices are needed: name them in env.CUDA_VISIBLE_DEVICES, by UUID"
        found.append(OptionProblem(("tensor_parallel_size",), message, warning=True))
    return found


def _folder(context: LaunchContext, options: VllmOptions) -> tuple[ModelFolder, VllmServing] | None:
    """Return the model's shape and how it will be served; None where its files are not here, or not to be read."""
    _, path = _model(context, options)
    if path is None:
        return None
    try:
        model = safetensors.read_folder(Path(path))
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


def _needed(context: LaunchContext, options: VllmOptions) -> int | None:
    """Return what it takes of its device: weights, the KV cache as stated, and overhead; None where that cannot be said."""
    if options.kv_cache_memory is None and options.cpu_kvcache_space is None:
        return None
    found = _folder(context, options)
    return vllm_memory.estimate(*found).total_bytes if found is not None else None


def _weights(context: LaunchContext, options: VllmOptions, held: int) -> int:
    """Return the bytes of all its weights; where its files are not here, the most that they can be."""
    found = _folder(context, options)
    if found is not None:
        return vllm_memory.estimate(*found).weight_bytes * _world(options)
    return max(0, held - (options.kv_cache_memory or 0))


def _fitting_utilization(context: LaunchContext, options: VllmOptions) -> float | None:
    """Return the share of the device that an explicit KV cache leaves vLLM with, rounded up; None: unknown, or stated."""
    total = context.device_total_bytes
    if options.gpu_memory_utilization is not None or options.kv_cache_memory is None or not total:
        return None
    needed = _needed(context, options)
    if needed is None or needed > total:
        return None
    return max(0.01, ceil(100 * needed / total) / 100)


async def _one_token(http: ClientSession, endpoint: Endpoint, served_as: str, timeout_s: float) -> ProbeOutcome:
    """Complete one token; a model that only pools embeds one instead."""
    payload = {"model": served_as, "prompt": "a", "max_tokens": 1, "temperature": 0}
    reply = await call(http, endpoint, "POST", "/v1/completions", payload, timeout_s=timeout_s)
    if reply.ok and reply.listing("choices"):
        return ProbeOutcome(True, f"{served_as} generated one token")
    if reply.status == 503 and "EngineDead" not in reply.text:
        return ProbeOutcome(True, f"{served_as} is busy: {reply.message}")
    if reply.status in (400, 404, 405, 501):
        pooled = {"model": served_as, "input": "a"}
        second = await call(http, endpoint, "POST", "/v1/embeddings", pooled, timeout_s=timeout_s)
        if second.ok and second.listing("data"):
            return ProbeOutcome(True, f"{served_as} embedded one token")
    return ProbeOutcome(False, f"{served_as}: HTTP {reply.status}: {reply.message}")
