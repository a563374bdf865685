"""Read a command line of llama-server as the options of the engine `llamacpp`.

Invariants:
- Every word is an option, in `extra_args`, or in `dropped` because fleetd sets it; a value that no option can express makes the
  whole command one for the engine `process`, with the reason.
- `context_length` is what one request gets: llama-server's `--ctx-size` divided by its slots.
- Variables LLAMA_ARG_* are read like flags; a flag wins over its variable.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

_WRAPPERS = frozenset({"env", "numactl", "taskset", "nice", "ionice", "chrt", "stdbuf", "exec"})
_KV = ("f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "iq4_nl")
_FLASH = {"on": True, "1": True, "true": True, "enabled": True, "off": False, "0": False, "false": False, "disabled": False,
          "auto": None, "-1": None}  # fmt: skip
_LOCKED = ("mlock", "mmap+mlock")
_TRUE = ("1", "true", "on", "enabled")
# flags without a value → the option and its value; None: fleetd sets it itself, or it is the default
SWITCHES: Mapping[str, tuple[str, Any] | None] = {
    "--no-mmap": ("mmap", False), "--mmap": None, "--mlock": ("mlock", True), "--embeddings": ("embeddings", True),
    "--embedding": ("embeddings", True), "--rerank": ("rerank", True), "--reranking": ("rerank", True),
    "--jinja": ("jinja", True), "--no-jinja": ("jinja", False), "--metrics": None, "--slots": None, "--no-slots": None,
    "--offline": None, "--no-webui": None, "--no-ui": None,
}  # fmt: skip
_ENV_FLAGS = {
    "MODEL": "--model", "CTX_SIZE": "--ctx-size", "N_PARALLEL": "--parallel", "THREADS": "--threads", "N_GPU_LAYERS": "--gpu-layers",
    "BATCH": "--batch-size", "UBATCH": "--ubatch-size", "CACHE_TYPE_K": "--cache-type-k", "CACHE_TYPE_V": "--cache-type-v",
    "FLASH_ATTN": "--flash-attn", "LOAD_MODE": "--load-mode", "POOLING": "--pooling", "MMPROJ": "--mmproj",
    "CHAT_TEMPLATE": "--chat-template", "CACHE_RAM": "--cache-ram", "SPLIT_MODE": "--split-mode", "MAIN_GPU": "--main-gpu",
    "TENSOR_SPLIT": "--tensor-split", "HOST": "--host", "PORT": "--port", "ALIAS": "--alias", "EMBEDDINGS": "--embeddings",
    "RERANKING": "--rerank", "JINJA": "--jinja",
}  # fmt: skip
# words that make the command one that the engine cannot run: the model is not a file, or clients must speak differently
_UNSUITABLE = {
    "-hf": "downloads its model", "-hfr": "downloads its model", "--hf-repo": "downloads its model", "-mu": "downloads its model",
    "--model-url": "downloads its model", "-dr": "downloads its model", "--docker-repo": "downloads its model",
    "--models-dir": "serves a folder of models", "--models-preset": "serves several models",
    "--ssl-key-file": "serves TLS", "--ssl-cert-file": "serves TLS", "--api-prefix": "has a path before its routes",
}  # fmt: skip


@dataclass(slots=True)
class LlamaServer:
    """The parts of a model with the engine `llamacpp`. `context` is the whole pool as stated; None: the model's own."""

    program: list[str]
    options: dict[str, Any] = field(default_factory=dict)
    alias: str | None = None
    host: str | None = None
    port: str | None = None
    context: int | None = None
    env: dict[str, str] = field(default_factory=dict)  # the variables that are left
    notes: list[tuple[str, str]] = field(default_factory=list)  # (option, difference)


def program_at(words: Sequence[str]) -> int | None:
    """Return the index of llama-server in a command line that begins with it or with a wrapper such as numactl."""
    for index, word in enumerate(words):
        name = PurePosixPath(word).name
        if name.removesuffix(".exe") == "llama-server" or name.startswith("llama-server-"):
            return index
        if index == 0 and name not in _WRAPPERS:
            return None
    return None


def read_llama_server(words: Sequence[str], env: Mapping[str, str]) -> LlamaServer | str:
    """Return the options of a command line that `program_at` accepts, or the reason why the engine cannot run it."""
    index = program_at(words)
    if index is None:
        return "is not llama-server"
    found = LlamaServer([*words[: index + 1]])
    reader = _FlagReader(found)
    try:
        reader.read([*_flags_of(env, found), *words[index + 1 :]])
        reader.finish()
    except ValueError as error:
        return str(error)
    return found


def _flags_of(env: Mapping[str, str], found: LlamaServer) -> list[str]:
    flags: list[str] = []
    for key, value in env.items():
        flag = "--api-key" if key == "LLAMA_API_KEY" else _ENV_FLAGS.get(key.removeprefix("LLAMA_ARG_"))
        if flag is None or not key.startswith("LLAMA_"):
            found.env[key] = value
        elif flag in SWITCHES:
            flags += [flag] if value.lower() in _TRUE else []
        else:
            flags += [flag, value]
    return flags


class _FlagReader:
    def __init__(self, found: LlamaServer) -> None:
        self.found = found
        self.options = found.options
        self.extra: list[str] = []
        self.parallel: int | None = None

    def read(self, words: Sequence[str]) -> None:
        rest = list(words)
        while rest:
            word = rest.pop(0)
            flag, equals, inline = word.partition("=") if word.startswith("--") else (word, "", "")
            if flag in _UNSUITABLE:
                raise ValueError(f"{_UNSUITABLE[flag]} ({flag})")
            if flag in SWITCHES:
                switch = SWITCHES[flag]
                if switch is not None:
                    self.options[switch[0]] = switch[1]
            elif flag in ("-fa", "--flash-attn") and not (equals or (rest and rest[0].lower() in _FLASH)):
                self.options["flash_attention"] = True  # llama-server before September 2025 takes no value
            elif flag in VALUED:
                if not equals and not rest:
                    raise ValueError(f"{flag} has no value")
                self._valued(flag, inline if equals else rest.pop(0), rest)
            else:
                self.extra.append(word)

    def _valued(self, flag: str, value: str, rest: list[str]) -> None:
        try:
            self._set(VALUED[flag], value, rest)
        except (ValueError, OverflowError):
            raise ValueError(f"{flag} {value!r} has no equal among the options") from None

    def _set(self, option: str, value: str, rest: list[str]) -> None:
        found, options = self.found, self.options
        if option in ("host", "port", "alias"):
            setattr(found, option, value)
        elif option == "context":
            found.context = int(value) or None
        elif option == "parallel":
            self.parallel = int(value)
        elif option == "flash_attention":
            flash = _FLASH[value.lower()] if value.lower() in _FLASH else int(value)
            options.pop(option, None)
            if flash is not None:
                options[option] = bool(flash)
        elif option == "lora":
            options.setdefault("lora", []).extend(value.split(",") if "," in value else [value])
        elif option == "lora-scaled":
            path, _, scale = value.rpartition(":")
            if not path:
                path, scale = value, rest.pop(0) if rest else ""
            options.setdefault("lora", []).append({"path": path, "scale": float(scale)})
        else:
            read = _READERS.get(option, str)
            parsed = read(value)
            options.pop(option, None)
            if parsed is not None:
                options[option] = parsed

    def finish(self) -> None:
        found, options = self.found, self.options
        if not options.get("model"):
            raise ValueError("names no model file")
        if options.get("load_mode") in _LOCKED:
            options["mlock"] = True
            if options.pop("load_mode") == "mlock":
                options["load_mode"] = "read"
        slots = self.parallel if self.parallel is not None and self.parallel > 0 else 1
        if slots > 1:
            options["parallel"] = slots
        elif self.parallel is None or self.parallel <= 0:
            found.notes.append(
                ("parallel", "1 slot; llama-server of 2026 has 4 that share the context: state parallel for more")
            )
        if found.context is not None:
            if found.context < slots:
                raise ValueError(f"--ctx-size {found.context} has no equal among the options")
            options["context_length"] = found.context // slots
            if found.context % slots:
                found.notes.append(("context_length", f"{found.context} tokens do not divide by {slots} slots"))
        if any(word in ("-md", "--model-draft", "-hfd", "-hfrd", "--hf-repo-draft") for word in self.extra):
            found.notes.append(("memory", "the draft model is not in the estimate: state memory"))
        if self.extra:
            options["extra_args"] = self.extra


def _natural(text: str) -> int | None:
    """Return a count; None for llama-server's own default (-1)."""
    number = int(text)
    if number == 0:
        raise ValueError
    return number if number > 0 else None


def _layers(text: str) -> int | None:
    if text.lower() == "auto":
        return None
    return 999 if text.lower() == "all" else None if int(text) < 0 else int(text)


def _index(text: str) -> int:
    if int(text) < 0:
        raise ValueError
    return int(text)


def _seed(text: str) -> int | None:
    number = int(text)
    if number >= 2**32:
        raise ValueError
    return number if number >= 0 else None


def _one_of(*allowed: str) -> Callable[[str], str]:
    def read(text: str) -> str:
        if text not in allowed:
            raise ValueError
        return text

    return read


def _shares(text: str) -> list[float]:
    shares = [float(part) for part in text.replace("/", ",").split(",") if part.strip()]
    if not all(math.isfinite(share) and share >= 0 for share in shares) or not sum(shares):
        raise ValueError
    return [int(share) if share.is_integer() else share for share in shares]


def _cache_ram(text: str) -> str | None:
    if int(text) < 0:
        raise ValueError
    return f"{int(text)}MiB" if int(text) else None


def _load_mode(text: str) -> str | None:
    modes = {"mmap": "mmap", "none": "read", "dio": "direct"}
    return modes[text] if text in modes else _one_of(*_LOCKED)(text)


_READERS: Mapping[str, Callable[[str], Any]] = {
    "threads": _natural, "threads_batch": _natural, "gpu_layers": _layers, "batch": _natural, "ubatch": _natural,
    "cache_type_k": _one_of(*_KV), "cache_type_v": _one_of(*_KV), "load_mode": _load_mode,
    "pooling": _one_of("none", "mean", "cls", "last", "rank"), "cache_ram": _cache_ram,
    "split_mode": _one_of("none", "layer", "row", "tensor"), "main_gpu": _index, "tensor_split": _shares, "seed": _seed,
}  # fmt: skip
_SPELLED = {
    "model": "-m --model", "host": "--host", "port": "--port", "alias": "-a --alias", "context": "-c --ctx-size",
    "parallel": "-np --parallel", "threads": "-t --threads", "threads_batch": "-tb --threads-batch",
    "gpu_layers": "-ngl --gpu-layers --n-gpu-layers", "batch": "-b --batch-size", "ubatch": "-ub --ubatch-size",
    "cache_type_k": "-ctk --cache-type-k", "cache_type_v": "-ctv --cache-type-v", "flash_attention": "-fa --flash-attn",
    "load_mode": "--load-mode", "pooling": "--pooling", "lora": "--lora", "lora-scaled": "--lora-scaled", "mmproj": "-mm --mmproj",
    "chat_template": "--chat-template", "chat_template_file": "--chat-template-file", "cache_ram": "-cram --cache-ram",
    "split_mode": "-sm --split-mode", "main_gpu": "-mg --main-gpu", "tensor_split": "-ts --tensor-split", "seed": "-s --seed",
    "api_key": "--api-key",
}  # fmt: skip
# flag with a value → option
VALUED: Mapping[str, str] = {flag: option for option, flags in _SPELLED.items() for flag in flags.split()}
