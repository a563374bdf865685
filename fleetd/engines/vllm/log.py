"""Read vLLM's log: the phase of a start, the room for KV cache, and why the process exited.

Invariants:
- Unknown lines are ignored; vLLM's wording changes between versions, so nothing depends on a single line.
- An exit that only an edit of fleet.yaml can fix is BAD_CONFIG, since each restart would waste a minute of start-up; its reason
  begins with the key to change.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from fleetd.core.data.specs import ExitKind
from fleetd.engines import exit_text
from fleetd.engines.base import ExitVerdict
from fleetd.engines.vllm.options import VllmOptions

_PHASES = (
    (re.compile(r"Loading [\w ]*checkpoint shards:\s+(\d+)%"), "loading weights {}%"),
    (re.compile(r"Fetching \d+ files:\s+(\d+)%|Downloading .*?(\d+)%"), "downloading {}%"),
    (re.compile(r"Downloading|Time spent downloading"), "downloading"),
    (re.compile(r"Starting to load model"), "loading weights"),
    (re.compile(r"Loading weights took|Model loading took"), "weights loaded"),
    (
        re.compile(
            r"bytecode transform time|torch\.compile took|Directly load|Compiling a graph|cache dir.*torch.compile"
        ),
        "compiling",
    ),
    (re.compile(r"Available KV cache memory|GPU KV cache size|CPU KV cache size"), "memory measured"),
    (re.compile(r"Capturing CUDA graphs?.*?(\d+)%"), "capturing graphs {}%"),
    (re.compile(r"Capturing CUDA graph|Graph capturing finished"), "capturing graphs"),
    (re.compile(r"init engine \(profile"), "engine initialised"),
    (re.compile(r"Starting vLLM (API )?server|Started server process|Application startup complete"), "serving"),
    (re.compile(r"Initializing a V\d LLM engine|non-default args|vLLM API server version"), "initialising"),
)

_FITS = re.compile(r"--kv-cache-memory(?:-bytes)?=(\d+)`?[^`]{0,40}?to fit into requested memory")
_AVAILABLE = re.compile(r"Available KV cache memory: ([\d.]+) GiB|Auto set \(([\d.]+)/[\d.]+\) GiB for KV cache")
_ROUNDING_GIB = 0.01  # it prints two decimals

_CAUSES: tuple[tuple[re.Pattern[str], ExitKind, str], ...] = tuple(
    (re.compile(pattern, re.IGNORECASE), kind, key)
    for pattern, kind, key in (
        (r"address already in use|\[Errno 98\]|\[Errno 48\]", ExitKind.PORT_IN_USE, "port"),
        (r"is less than desired (GPU|CPU) memory utilization", ExitKind.BAD_CONFIG, "options.gpu_memory_utilization"),
        (r"No available memory for the cache blocks", ExitKind.BAD_CONFIG, "options.gpu_memory_utilization"),
        (
            r"To serve at least one request with|estimated maximum model length",
            ExitKind.BAD_CONFIG,
            "options.max_model_len",
        ),
        (r"User-specified max_model_len .* is greater than", ExitKind.BAD_CONFIG, "options.max_model_len"),
        (r"Sleep mode is not supported", ExitKind.BAD_CONFIG, "options.enable_sleep_mode"),
        (
            r"unrecognized arguments|the following arguments are required",
            ExitKind.BAD_CONFIG,
            "options.extra_args or args",
        ),
        (r"error: argument |invalid choice", ExitKind.BAD_CONFIG, "options"),
        (r"GatedRepoError|gated repo|\b(401|403) Client Error", ExitKind.BAD_CONFIG, "options.model, or env.HF_TOKEN"),
        (r"Repository Not Found|\b404 Client Error", ExitKind.BAD_CONFIG, "options.model"),
        (r"is not a local folder and is not a valid model identifier", ExitKind.BAD_CONFIG, "options.model"),
        (
            r"Can't load (the configuration|tokenizer)|Invalid repository ID or local directory",
            ExitKind.BAD_CONFIG,
            "options.model",
        ),
        (
            r"Model architectures? .* (is|are) not supported|Head size \d+ is not supported",
            ExitKind.BAD_CONFIG,
            "options.model",
        ),
        (r"trust_remote_code=True", ExitKind.BAD_CONFIG, "options.trust_remote_code"),
        (r"Failed to infer device type|PackageNotFoundError|No module named '?vllm", ExitKind.BAD_CONFIG, "command"),
        (
            r"Total number of attention heads .* must be divisible|World size .* is larger than",
            ExitKind.BAD_CONFIG,
            "options.tensor_parallel_size",
        ),
        (
            r"CUDA out of memory|OutOfMemoryError|HIP out of memory|std::bad_alloc|Cannot allocate memory",
            ExitKind.OOM,
            "",
        ),
        (r"Error in memory profiling", ExitKind.CRASH, ""),
        (r"EngineDeadError|EngineCore encountered a fatal error|Engine core proc .* died", ExitKind.CRASH, ""),
        (r"validation errors? for \w+|Value error, ", ExitKind.BAD_CONFIG, "options"),
    )
)
_UNKNOWN_ARGUMENTS = re.compile(r"^.*unrecognized arguments:")
_VERSION = re.compile(r"\bvLLM (?:API server )?version:? v?(\d+\.\d+[\w.+]*)")
OLDEST = "0.16"
OWN_ARGUMENTS = frozenset({"disable_access_log_for_endpoints"})  # fleetd always passes these
_ANY_ERROR = re.compile(r"\b([A-Z]\w*(Error|Exception))\b: \S")
_USELESS = re.compile(r"See root cause above|Engine core initialization failed")
_PREFIX = re.compile(r"^(\(\w+ pid=\d+\) )?(\w+ [\d-]+ [\d:.]+ \[[^\]]*\] )?")


def phase(line: str) -> str | None:
    """Return the phase that a line reports, such as `loading weights 50%`; None: none."""
    for pattern, text in _PHASES:
        match = pattern.search(line)
        if match:
            number = next((group for group in match.groups() if group), "") if match.groups() else ""
            return text.format(number)
    return None


def learned_kv_bytes(lines: Iterable[str]) -> int | None:
    """Return the bytes of KV cache that fit: vLLM's advice, else its measurement."""
    advised = measured = None
    for line in lines:
        if found := _FITS.search(line):
            advised = int(found[1])
        elif found := _AVAILABLE.search(line):
            measured = max(0, int((float(found[1] or found[2]) - _ROUNDING_GIB) * 2**30))
    return advised or measured


def verdict(code: int | None, signal: str | None, log_tail: Sequence[str]) -> ExitVerdict:
    """Return why it exited. Every exit counts as a failure, code 0 included."""
    if found := _unknown_argument(log_tail):
        return found
    for pattern, kind, key in _CAUSES:
        line = next((line for line in reversed(log_tail) if pattern.search(line)), None)
        if line is not None:
            return ExitVerdict(kind, f"{key}: {_sentence(line)}" if key else _sentence(line))
    last = next((line for line in reversed(log_tail) if _ANY_ERROR.search(line) and not _USELESS.search(line)), None)
    cause = _sentence(last) if last is not None else ""
    because = f": {cause}" if cause else ""
    if code == 0 and signal is None:
        return ExitVerdict(ExitKind.CRASH, f"without a stop request: its engine process died{because}")
    if code == 2 and signal is None:
        return ExitVerdict(ExitKind.BAD_CONFIG, f"options.extra_args or args: vLLM rejects an argument{because}")
    return exit_text.from_status(code, signal, cause)


def _unknown_argument(log_tail: Sequence[str]) -> ExitVerdict | None:
    """Return the verdict for a rejected argument, with the key that it comes from."""
    line = next((line for line in reversed(log_tail) if _UNKNOWN_ARGUMENTS.search(line)), "")
    flags = [word.partition("=")[0] for word in _UNKNOWN_ARGUMENTS.sub("", line).split() if word.startswith("--")]
    for flag in flags if line else ():
        name = flag[2:].replace("-", "_")
        if name in OWN_ARGUMENTS:
            version = next((f" {found[1]}" for line in reversed(log_tail) if (found := _VERSION.search(line))), "")
            needed = f"it does not know {flag}, which came with {OLDEST}; fleetd needs {OLDEST} or newer"
            return ExitVerdict(ExitKind.BAD_CONFIG, f"command: this vLLM{version} is too old: {needed}")
        for spelled in (name, name.removeprefix("no_")):
            option = {"kv_cache_memory_bytes": "kv_cache_memory"}.get(spelled, spelled)
            if option in VllmOptions.model_fields:
                reason = f"this vLLM does not know {flag}: it is older than the flag, or no longer has it"
                return ExitVerdict(ExitKind.BAD_CONFIG, f"options.{option}: {reason}")
    return None


def _sentence(line: str) -> str:
    return _PREFIX.sub("", line.strip())[:400]
