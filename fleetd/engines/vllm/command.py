"""Write the command line and the environment of `vllm serve`."""

from __future__ import annotations

from pathlib import Path

from fleetd.engines.base import Launch, LaunchContext
from fleetd.engines.program import find_program
from fleetd.engines.visible_devices import visible_devices
from fleetd.engines.vllm import memory
from fleetd.engines.vllm.options import VllmOptions, arguments, local, local_files

_HINT = "install vLLM, or set its path: command: [/path/to/venv/bin/vllm, serve]"
LEARNED_KV = "kv_cache_memory"
PROBED_PATHS = "/health,/metrics,/ping,/v1/models,/is_sleeping"

# The same for every instance, since all but the last three are part of the key of the compile cache.
CONSTANTS = {
    "VLLM_PROCESS_NAME_PREFIX": "fleetd",
    "VLLM_ENGINE_READY_TIMEOUT_S": "3600",
    "VLLM_WORKER_SHUTDOWN_TIMEOUT_SECONDS": "5",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_DO_NOT_TRACK": "1",
    "VLLM_LOGGING_COLOR": "0",
    "SPT_NOENV": "1",  # or setting the process title overwrites the environment by which fleetd finds its processes
}
# Inherited by accident, each of these breaks a start: a Kubernetes service named vllm sets VLLM_PORT, launchers set ranks.
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


def launch(context: LaunchContext, options: VllmOptions) -> Launch:
    """Return the launch. Raises EngineError when there is no vLLM on PATH."""

    def absolute(path: str) -> str:
        return str(context.resolve(path))

    model = absolute(options.model) if local(options.model) else options.model
    command = context.command or (find_program(context, "vllm", _HINT), "serve")
    if Path(command[-1]).name == "vllm":
        command = (*command, "serve")
    by_flag = any(word.endswith("api_server") for word in command)
    argv = [*command, *(("--model", model) if by_flag else (model,))]
    argv += ["--served-model-name", *(options.served_model_name or (context.served_as or context.name,))]
    argv += ["--host", context.host, "--port", str(context.port or 8000)]
    argv += arguments(options, absolute)
    fraction = memory.fitting_utilization(context, options)
    if fraction is not None:
        argv += ["--gpu-memory-utilization", f"{fraction:g}"]
    if "disable_access_log_for_endpoints" not in {key.replace("-", "_") for key in options.extra_args}:
        argv += ["--disable-access-log-for-endpoints", PROBED_PATHS]
    learned = context.learned.get(LEARNED_KV)
    if learned and not options.sets_kv_cache:  # saves vLLM the measurement, and the memory that the measurement needs
        argv += ["--kv-cache-memory-bytes", str(learned)]
    env = environment(context, options)
    unset = tuple(name for name in SCRUBBED if name not in env and name not in context.env)
    named = {absolute(path): option for option, path in local_files(options).items()}
    return Launch((*argv, *context.args), env, unset, tuple(named), SECRETS, named)


def environment(context: LaunchContext, options: VllmOptions) -> dict[str, str]:
    """Return the variables that the engine sets."""
    env = dict(CONSTANTS)
    if options.api_key is not None:
        env["VLLM_API_KEY"] = options.api_key.get_secret_value()
    if options.world_size == 1:  # an entry has one device: for several, the user sets the variable
        env |= visible_devices(context.device_uuid, context.device)
    if options.enable_sleep_mode:
        env["VLLM_SERVER_DEV_MODE"] = "1"
    for variable, folder in (("VLLM_CACHE_ROOT", options.cache_root), ("HF_HOME", options.hf_home)):
        if folder is not None:
            env[variable] = str(context.resolve(folder))
    if options.offline:
        env |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    if options.cpu_kvcache_space is not None:
        env["VLLM_CPU_KVCACHE_SPACE"] = str(options.cpu_kvcache_space)
    return env
