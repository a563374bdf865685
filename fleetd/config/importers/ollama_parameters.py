"""The parameters of Ollama's models, with their types, for importers.

Invariants:
- The names are those that `check` accepts in `modelfile.parameters`; a test compares the two.
"""

from __future__ import annotations

import math
from typing import Any

WHOLE = frozenset({
    "num_ctx", "num_batch", "num_gpu", "main_gpu", "num_thread", "draft_num_predict", "num_keep", "seed", "num_predict", "top_k",
    "repeat_last_n",
})  # fmt: skip
REAL = frozenset(
    {"top_p", "min_p", "typical_p", "temperature", "repeat_penalty", "presence_penalty", "frequency_penalty"}
)
FLAGS = frozenset({"use_mmap"})
PARAMETERS = frozenset({*WHOLE, *REAL, *FLAGS, "stop"})
# Ollama ignores these in a Modelfile since the versions that removed them.
REMOVED = frozenset({
    "penalize_newline", "low_vram", "f16_kv", "logits_all", "vocab_only", "use_mlock", "mirostat", "mirostat_tau", "mirostat_eta",
    "numa", "tfs_z", "num_gqa", "rope_frequency_base", "rope_frequency_scale", "embedding_only",
})  # fmt: skip
_FLAG_TEXTS = {"1": True, "t": True, "true": True, "0": False, "f": False, "false": False}


def parameter(name: str, value: Any) -> Any:
    """Return a value in Ollama's type; texts are read as in a Modelfile. Raises ValueError with the reason."""
    if name in REMOVED:
        raise ValueError("Ollama no longer has this parameter and ignores it")
    if name not in PARAMETERS:
        raise ValueError("is no parameter of a Modelfile")
    if name == "stop":
        found = list(value) if isinstance(value, list | tuple) else [value]
        if not found or not all(isinstance(one, str) and one for one in found):
            raise ValueError("must be a text or a list of texts")
        return found
    if name in FLAGS:
        flag = _FLAG_TEXTS.get(value.lower()) if isinstance(value, str) else value
        if not isinstance(flag, bool):
            raise ValueError(f"{value!r} is neither true nor false")
        return flag
    return _number(value, whole=name in WHOLE)


def _number(value: Any, *, whole: bool) -> int | float:
    kind = "a whole number" if whole else "a number"
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError(f"must be {kind}")
    try:
        number = float(value)
        if whole and number == int(number):
            return (
                int(value) if isinstance(value, str) and "." not in value and "e" not in value.lower() else int(number)
            )
    except (ValueError, OverflowError):
        raise ValueError(f"{value!r} is not {kind}") from None
    if whole or not math.isfinite(number):
        raise ValueError(f"{value!r} is not {kind}")
    return int(number) if isinstance(value, int) else number
