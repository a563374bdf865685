"""Explain why llama.cpp exited. Both programs log alike; the embedded one adds a line that starts with `error:`."""

from __future__ import annotations

import re
from collections.abc import Sequence

from fleetd.core.data.specs import ExitKind
from fleetd.engines import exit_text
from fleetd.engines.base import ExitVerdict
from fleetd.engines.llamacpp.validate import OWNED as OPTION_OF

# in order of precedence
_CAUSES: tuple[tuple[ExitKind, tuple[str, ...]], ...] = (
    (ExitKind.BAD_CONFIG, ("xllamacpp wheel cannot be imported",)),  # whichever library is missing
    (ExitKind.PORT_IN_USE, ("couldn't bind http server socket", "address already in use")),
    (
        ExitKind.OOM,
        (
            "out of memory",
            "cudamalloc failed",
            "unable to allocate",
            "failed to allocate",
            "bad_alloc",
            "erroroutofdevicememory",
            "insufficient memory",
            "kiogpucommandbuffercallbackerroroutofmemory",
        ),
    ),
    # worth a retry: a drive is unplugged, or a copy is in progress
    (ExitKind.CRASH, ("no such file or directory", "input/output error", "stale file handle")),
    (
        ExitKind.BAD_CONFIG,
        (
            "unknown argument",
            "error: invalid argument",
            "error while handling argument",
            "needs a value",
            "error: --",
            "unknown model architecture",
            "not a gguf file",
            "invalid magic",
            "chat template parsing error",
            "failed to initialize chat template",
            "quantized v cache requires",
            "does not divide n_embd_head",
            "failed to load lora",
            "is a directory",
            "permission denied",
            "not within the file bounds",
            "model is corrupted",
            "failed to read magic",
            "tensor data is not within",
        ),
    ),
    (
        ExitKind.BAD_CONFIG,
        ("error loading model", "failed to load model", "failed to create_context", "failed to create context"),
    ),
)
_UNKNOWN_FLAG = re.compile(r"(?:invalid|unknown) argument:? (--[\w-]+)")
# flags that fleetd always passes; every build that can read today's models knows them
_ALWAYS = frozenset(
    {"--metrics", "--slots", "--offline", "--no-webui", "--cache-ram", "--alias", "--ctx-size", "--parallel"}
)


def _unknown_flag(log_tail: Sequence[str]) -> ExitVerdict | None:
    """Return the verdict for a rejected flag, with the key that it comes from."""
    flag = next((found[1] for line in reversed(log_tail) if (found := _UNKNOWN_FLAG.search(line))), "")
    if flag in _ALWAYS:
        return ExitVerdict(
            ExitKind.BAD_CONFIG, f"command: this llama-server is too old: it does not know {flag}, which fleetd needs"
        )
    option = OPTION_OF.get(flag)
    if option is None:
        return None
    reason = f"this llama-server does not know {flag}: it is older than the flag, or no longer has it"
    return ExitVerdict(ExitKind.BAD_CONFIG, f"options.{option}: {reason}")


def classify(code: int | None, signal: str | None, log_tail: Sequence[str]) -> ExitVerdict:
    """Return why it exited; the log counts only for a failure that it can explain."""
    if code == 0:
        return exit_text.from_status(code, None)
    if found := _unknown_flag(log_tail):
        return found
    if signal in (None, "SIGABRT", "SIGSEGV", "SIGBUS", "SIGKILL") and (found := exit_text.from_log(_CAUSES, log_tail)):
        return found
    last = exit_text.last_line(log_tail) if code else ""
    if code == 2 and signal is None:
        return ExitVerdict(ExitKind.BAD_CONFIG, last)
    return exit_text.from_status(code, signal, last)
