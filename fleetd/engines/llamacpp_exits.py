"""Why llama.cpp ended, from its last lines. Both programs log alike; the embedded one adds a line that starts with `error:`."""

from __future__ import annotations

from collections.abc import Sequence

from fleetd.core.contract import ExitKind
from fleetd.engines.base import ExitVerdict

# the first row with a match in any line decides; within a row the last line that matches is the reason
# fmt: off
_ROWS: tuple[tuple[ExitKind, tuple[str, ...]], ...] = (
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
    # the file may come back: a drive was pulled out, a copy is under way
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
            "xllamacpp wheel cannot be imported",
        ),
    ),
    (
        ExitKind.BAD_CONFIG,
        ("error loading model", "failed to load model", "failed to create_context", "failed to create context"),
    ),
)
# fmt: on
_LONGEST = 300


def classify(code: int | None, signal: str | None, log_tail: Sequence[str]) -> ExitVerdict:
    """Return the kind and a sentence. A line counts only when the process failed: code not 0, or a signal of its own making."""
    if code == 0:
        return ExitVerdict(ExitKind.EXPECTED, "ended with code 0")
    if signal in (None, "SIGABRT", "SIGSEGV", "SIGBUS", "SIGKILL"):
        for kind, needles in _ROWS:
            for line in reversed(log_tail):
                if any(needle in line.lower() for needle in needles):
                    return ExitVerdict(kind, line.strip()[:_LONGEST])
    if signal is not None:
        return ExitVerdict(ExitKind.CRASH, f"ended by {signal}")
    if code is None:
        return ExitVerdict(ExitKind.UNKNOWN, "died while nobody watched")
    kind = ExitKind.BAD_CONFIG if code == 2 else ExitKind.CRASH
    last = next((line.strip()[:_LONGEST] for line in reversed(log_tail) if line.strip()), "")
    return ExitVerdict(kind, f"ended with code {code}" + (f": {last}" if last else ""))
