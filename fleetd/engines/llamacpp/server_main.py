"""Run the HTTP server of llama.cpp out of the `xllamacpp` wheel, with the command line of llama-server.

    python -I fleetd/engines/llamacpp/server_main.py --model tiny.gguf --port 8080 --alias tiny --ctx-size 4096 --parallel 2

Invariants:
- It runs by its path and imports nothing of fleetd and nothing heavy, since the user waits for its start.
- The flags are those of llama-server, so one command line starts both. An unknown flag is an error.
- SIGTERM kills it at once, also during a load: loading holds the interpreter, so no Python handler would run until it is done.
- Exit codes: 0 stopped on request, 1 llama.cpp failed, 2 wrong command line or model file. The last line of the log says why.
"""

from __future__ import annotations

import os
import signal
import sys
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any

MAGIC = b"GGUF"


class UsageError(Exception):
    """The command line or the model file is wrong; the text is one sentence."""


def _constant(prefix: str, enum: str, **names: str) -> Callable[[Any, str], Any]:
    """Return a reader that maps one of `names` to an enumeration of the library."""

    def read(library: Any, text: str) -> Any:
        if text not in names:
            raise UsageError(f"must be one of {', '.join(names)}, not {text!r}")
        return getattr(getattr(library, enum), prefix + names[text])

    return read


def _whole(library: Any, text: str) -> int:  # noqa: ARG001
    try:
        return int(text)
    except ValueError:
        raise UsageError(f"must be a whole number, not {text!r}") from None


def _number(library: Any, text: str) -> float:  # noqa: ARG001
    try:
        return float(text)
    except ValueError:
        raise UsageError(f"must be a number, not {text!r}") from None


def _text(library: Any, text: str) -> str:  # noqa: ARG001
    return text


_KV = ("f32", "f16", "bf16", "q8_0", "q4_0", "q4_1", "iq4_nl", "q5_0", "q5_1")
_CACHE_TYPE = _constant("GGML_TYPE_", "ggml_type", **{name: name.upper() for name in _KV})
_FLASH = _constant("LLAMA_FLASH_ATTN_TYPE_", "llama_flash_attn_type", on="ENABLED", off="DISABLED", auto="AUTO")
_SPLIT = _constant("LLAMA_SPLIT_MODE_", "llama_split_mode", none="NONE", layer="LAYER", row="ROW", tensor="TENSOR")
_LOAD_NAMES = {
    "auto": "AUTO",
    "none": "NONE",
    "mmap": "MMAP",
    "mlock": "MLOCK",
    "mmap+mlock": "MMAP_MLOCK",
    "dio": "DIRECT_IO",
}
_LOAD = _constant("LLAMA_LOAD_MODE_", "llama_load_mode", **_LOAD_NAMES)
_POOLING_NAMES = {name: name.upper() for name in ("none", "mean", "cls", "last", "rank")}
_POOLING = _constant("LLAMA_POOLING_TYPE_", "llama_pooling_type", **_POOLING_NAMES)

# flag -> (path of attributes below CommonParams, reader of its value)
VALUED: dict[str, tuple[tuple[str, ...], Callable[[Any, str], Any]]] = {
    "--model": (("model", "path"), _text),
    "--port": (("port",), _whole),
    "--ctx-size": (("n_ctx",), _whole),
    "--parallel": (("n_parallel",), _whole),
    "--threads": (("cpuparams", "n_threads"), _whole),
    "--threads-batch": (("cpuparams_batch", "n_threads"), _whole),
    "--threads-http": (("n_threads_http",), _whole),
    "--gpu-layers": (("n_gpu_layers",), _whole),
    "--batch-size": (("n_batch",), _whole),
    "--ubatch-size": (("n_ubatch",), _whole),
    "--cache-type-k": (("cache_type_k",), _CACHE_TYPE),
    "--cache-type-v": (("cache_type_v",), _CACHE_TYPE),
    "--flash-attn": (("flash_attn_type",), _FLASH),
    "--load-mode": (("load_mode",), _LOAD),
    "--split-mode": (("split_mode",), _SPLIT),
    "--main-gpu": (("main_gpu",), _whole),
    "--seed": (("sampling", "seed"), _whole),
    "--mmproj": (("mmproj", "path"), _text),
    "--chat-template": (("chat_template",), _text),
    "--cache-ram": (("cache_ram_mib",), _whole),
    "--cache-reuse": (("n_cache_reuse",), _whole),
    "--ctx-checkpoints": (("n_ctx_checkpoints",), _whole),
    "--pooling": (("pooling_type",), _POOLING),
    "--n-predict": (("n_predict",), _whole),
    "--slot-prompt-similarity": (("slot_prompt_similarity",), _number),
    "--rope-freq-base": (("rope_freq_base",), _number),
    "--rope-freq-scale": (("rope_freq_scale",), _number),
    "--temp": (("sampling", "temp"), _number),
    "--top-k": (("sampling", "top_k"), _whole),
    "--top-p": (("sampling", "top_p"), _number),
    "--min-p": (("sampling", "min_p"), _number),
    "--timeout": (("timeout_read",), _whole),
    "--verbosity": (("verbosity",), _whole),
}
SWITCHES: dict[str, tuple[tuple[str, ...], Any]] = {
    "--embeddings": (("embedding",), True),
    "--jinja": (("use_jinja",), True),
    "--no-jinja": (("use_jinja",), False),
    "--metrics": (("endpoint_metrics",), True),
    "--slots": (("endpoint_slots",), True),
    "--no-slots": (("endpoint_slots",), False),
    "--props": (("endpoint_props",), True),
    "--offline": (("offline",), True),
    "--no-ui": (("ui",), False),
    "--no-warmup": (("warmup",), False),
    "--swa-full": (("swa_full",), True),
    "--kv-unified": (("kv_unified",), True),
    "--context-shift": (("ctx_shift",), True),
    "--no-kv-offload": (("no_kv_offload",), True),
    "--no-mmproj-offload": (("mmproj_use_gpu",), False),
    "--check-tensors": (("check_tensors",), True),
}
# flags that need more than one attribute
SPECIAL = ("--host", "--alias", "--lora", "--lora-scaled", "--tensor-split", "--chat-template-file", "--rerank")
SPELLINGS = {
    "-m": "--model", "-c": "--ctx-size", "-np": "--parallel", "-t": "--threads", "-tb": "--threads-batch", "-a": "--alias",
    "-ngl": "--gpu-layers", "--n-gpu-layers": "--gpu-layers", "-b": "--batch-size", "-ub": "--ubatch-size",
    "-ctk": "--cache-type-k", "-ctv": "--cache-type-v", "-fa": "--flash-attn", "-sm": "--split-mode", "-mg": "--main-gpu",
    "-ts": "--tensor-split", "-s": "--seed", "-cram": "--cache-ram", "-mm": "--mmproj", "--embedding": "--embeddings",
    "--reranking": "--rerank", "--no-webui": "--no-ui", "-n": "--n-predict", "--predict": "--n-predict", "-lv": "--verbosity",
    "--no-mmproj-gpu": "--no-mmproj-offload", "-nkvo": "--no-kv-offload", "-kvu": "--kv-unified", "-to": "--timeout",
}  # fmt: skip


def known_flags() -> frozenset[str]:
    """Return every flag that this program accepts, short spellings included."""
    return frozenset((*VALUED, *SWITCHES, *SPECIAL, *SPELLINGS))


def parse(argv: Sequence[str]) -> list[tuple[str, str]]:
    """Return (flag, value) in order, "" for a switch. Raises UsageError."""
    pairs: list[tuple[str, str]] = []
    words = iter(argv)
    for word in words:
        flag, equals, value = word.partition("=") if word.startswith("--") else (word, "", "")
        flag = SPELLINGS.get(flag, flag)
        if flag in SWITCHES or flag == "--rerank":
            pairs.append((flag, ""))
        elif flag in VALUED or flag in SPECIAL:
            given = value if equals else next(words, None)
            if given is None:
                raise UsageError(f"argument {word} needs a value")
            pairs.append((flag, given))
        else:
            raise UsageError(f"unknown argument: {word}")
    return pairs


def _set(params: Any, path: tuple[str, ...], value: Any) -> None:
    for part in path[:-1]:
        params = getattr(params, part)
    setattr(params, path[-1], value)


def _set_special(library: Any, params: Any, flag: str, value: str) -> None:
    if flag == "--host":
        params.hostnames = [value]
    elif flag == "--alias":
        params.model_alias = {value}
    elif flag in ("--lora", "--lora-scaled"):
        adapter = library.CommonAdapterLoraInfo()
        path, _, scale = value.rpartition(":") if flag == "--lora-scaled" else (value, "", "1.0")
        adapter.path, adapter.scale = path, _number(library, scale)
        params.lora_adapters = [*params.lora_adapters, adapter]
    elif flag == "--tensor-split":
        parts = [_number(library, part) for part in value.replace("/", ",").split(",")]
        params.tensor_split = parts + [0.0] * (len(params.tensor_split) - len(parts))
    elif flag == "--chat-template-file":
        try:
            with open(value, encoding="utf-8") as file:  # noqa: PTH123
                params.chat_template = file.read(1 << 20)
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"cannot be read: {error}") from None
    else:  # --rerank
        params.embedding = True
        params.pooling_type = library.llama_pooling_type.LLAMA_POOLING_TYPE_RANK


def configure(library: Any, pairs: Sequence[tuple[str, str]], api_key: str | None) -> Any:
    """Return the library's parameters for parsed flags. Raises UsageError."""
    params = library.CommonParams()
    for flag, value in pairs:
        try:
            if flag in VALUED:
                path, read = VALUED[flag]
                _set(params, path, read(library, value))
            elif flag in SWITCHES:
                _set(params, *SWITCHES[flag])
            else:
                _set_special(library, params, flag, value)
        except UsageError as error:
            raise UsageError(f"{flag} {error}") from None
        except (AttributeError, TypeError, ValueError, OverflowError) as error:
            raise UsageError(f"{flag} {value} is not supported by this xllamacpp: {error}") from None
    if api_key:
        params.api_keys = [api_key]
    return params


def check_model(path: str) -> None:
    """Check the first bytes, to report common mistakes plainly. Raises UsageError."""
    if not path:
        raise UsageError("--model is required")
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except OSError as error:
        raise UsageError(f"failed to load model '{path}': {error.strerror}") from None
    try:
        head = os.read(handle, 4)
    except OSError as error:
        raise UsageError(f"failed to load model '{path}': {error.strerror}") from None
    finally:
        os.close(handle)
    if head != MAGIC:
        raise UsageError(f"failed to load model '{path}': not a GGUF file")


class _LazyModule(type(sys)):  # type: ignore[misc]
    """A module imported on first use; constants read at import time are built in."""

    CO_OPTIMIZED, CO_NEWLOCALS, CO_VARARGS, CO_VARKEYWORDS, CO_NESTED, CO_GENERATOR = 1, 2, 4, 8, 16, 32
    CO_COROUTINE, CO_ITERABLE_COROUTINE, CO_ASYNC_GENERATOR = 128, 256, 512

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if sys.modules.get(self.__name__) is self:
            del sys.modules[self.__name__]
        return getattr(__import__(self.__name__), name)


def load_library() -> Any:
    """Import the extension module alone; if that fails, in the ordinary way.

    The package around it, and the `inspect` and `orjson` that it uses in calls never made here, take longer to import than
    everything else together.
    """
    deferred = [name for name in ("inspect", "orjson") if name not in sys.modules]
    package = type(sys)("xllamacpp")
    package.__path__ = [f"{folder}/xllamacpp" for folder in sys.path if os.path.isdir(f"{folder}/xllamacpp")]  # noqa: PTH112
    sys.modules["xllamacpp"] = package
    for name in deferred:
        sys.modules[name] = _LazyModule(name)
    try:
        import xllamacpp.xllamacpp as library

        library.CommonParams, library.Server  # noqa: B018
        return library
    except (ImportError, AttributeError):
        for name in [name for name in sys.modules if name.partition(".")[0] == "xllamacpp"]:
            del sys.modules[name]
    finally:
        for name in deferred:
            if isinstance(sys.modules.get(name), _LazyModule):
                del sys.modules[name]
    import xllamacpp

    return xllamacpp


def log(line: str) -> None:
    os.write(2, line.encode("utf-8", "backslashreplace") + b"\n")


def serve(argv: Sequence[str]) -> int:
    """Load the model and serve until a signal. Returns the exit code."""
    begun = time.monotonic()
    try:
        pairs = parse(argv)
        check_model(dict(pairs).get("--model", ""))
        library = load_library()
        params = configure(library, pairs, os.environ.get("LLAMA_API_KEY"))
    except UsageError as error:
        log(f"error: {error}")
        return 2
    except ImportError as error:
        hint = " (apt install libgomp1, or dnf install libgomp)" if "libgomp" in str(error) else ""
        log(f"error: the xllamacpp wheel cannot be imported: {error}{hint}")
        return 2
    try:
        server = library.Server(params)
    except (RuntimeError, MemoryError) as error:
        log(
            f"error: llama.cpp did not start with '{params.model.path}' ({str(error).rstrip('.')}): see the lines above"
        )
        return 1

    def stop(number: int, frame: object) -> None:  # noqa: ARG001
        log(f"main: got signal {number}, exiting")
        os._exit(0)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    log(f"main: model loaded in {time.monotonic() - begun:.3f} s")
    log(f"main: server is listening on {server.listening_address}")
    while True:
        signal.pause()


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    code = serve(sys.argv[1:])
    signal.alarm(5)  # an ordinary exit flushes llama.cpp's log; the alarm kills the process if that hangs
    sys.exit(code)


if __name__ == "__main__":
    main()
