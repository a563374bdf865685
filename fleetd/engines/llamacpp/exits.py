"""Why llama.cpp ended, from its last lines. Both programs log alike; the embedded one adds a line that starts with `error:`."""

from __future__ import annotations

import re
from collections.abc import Sequence

from fleetd.core.data.specs import ExitKind
from fleetd.engines.base import ExitVerdict
from fleetd.engines.llamacpp.validate import OWNED as OPTION_OF

# the first row with a match in any line decides; within a row the last line that matches is the reason
# fmt: off
_ROWS: tuple[tuple[ExitKind, tuple[str, ...]], ...] = (
    (ExitKind.BAD_CONFIG, ("xllamacpp wheel cannot be imported",)),  # whatever file it misses
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
        ),
    ),
    (
        ExitKind.BAD_CONFIG,
        ("error loading model", "failed to load model", "failed to create_context", "failed to create context"),
    ),
)
# fmt: on
_LONGEST = 300
_REFUSED_FLAG = re.compile(r"(?:invalid|unknown) argument:? (--[\w-]+)")
# what fleetd says whatever the options are; each is older than any build that reads today's models
_ALWAYS = frozenset(
    {"--metrics", "--slots", "--offline", "--no-webui", "--cache-ram", "--alias", "--ctx-size", "--parallel"}
)


def _refused_flag(log_tail: Sequence[str]) -> ExitVerdict | None:
    """Return which key of fleet.yaml a flag comes from that the program does not know."""
    flag = next((found[1] for line in reversed(log_tail) if (found := _REFUSED_FLAG.search(line))), "")
    if flag in _ALWAYS:
        return ExitVerdict(
            ExitKind.BAD_CONFIG, f"command: this llama-server is too old: it does not know {flag}, which fleetd needs"
        )
    option = OPTION_OF.get(flag)
    if option is None:
        return None
    said = f"this llama-server does not know {flag}: it is too old for it, or has it no longer"
    return ExitVerdict(ExitKind.BAD_CONFIG, f"options.{option}: {said}")


def classify(code: int | None, signal: str | None, log_tail: Sequence[str]) -> ExitVerdict:
    """Return the kind and a sentence. A line counts only when the process failed: code not 0, or a signal of its own making."""
    if code == 0:
        return ExitVerdict(ExitKind.EXPECTED)
    if found := _refused_flag(log_tail):
        return found
    if signal in (None, "SIGABRT", "SIGSEGV", "SIGBUS", "SIGKILL"):
        for kind, needles in _ROWS:
            for line in reversed(log_tail):
                if any(needle in line.lower() for needle in needles):
                    return ExitVerdict(kind, line.strip()[:_LONGEST])
    if signal is not None:
        return ExitVerdict(ExitKind.CRASH)
    if code is None:
        return ExitVerdict(ExitKind.UNKNOWN)
    kind = ExitKind.BAD_CONFIG if code == 2 else ExitKind.CRASH
    last = next((line.strip()[:_LONGEST] for line in reversed(log_tail) if line.strip()), "")
    return ExitVerdict(kind, last)
