"""Decide by its name whether a value is a secret, and redact it."""

from __future__ import annotations

import re
from typing import Any

HIDDEN = "••••"
_SECRET = re.compile(
    r"(?:^|[^a-z])(?:key|keys|token|secret|password|passwords|passwd|pass|private|credential|credentials|auth|apikey)(?:$|[^a-z])"
)
_WORD_BREAK = re.compile(r"(?<=[a-z0-9])(?=[A-Z])")
_CREDENTIAL_URL = re.compile(r"(?<=://)[^/@\s:]+:[^/@\s]+(?=@)")
_HARMLESS = frozenset({"keys_file", "max_tokens", "num_keys"})


def is_secret(name: str) -> bool:
    """Return whether a key, variable or flag of this name holds a secret."""
    lower = _WORD_BREAK.sub("_", name).lower()
    return lower not in _HARMLESS and _SECRET.search(lower) is not None


def redact(value: Any, name: str = "") -> Any:
    """Return a plain value without secrets, including words after a secret flag."""
    if isinstance(value, dict):
        return {key: redact(item, str(key)) for key, item in value.items()}
    if name and is_secret(name) and value is not None and not isinstance(value, bool):
        return HIDDEN
    if isinstance(value, list | tuple):
        return _redact_words(list(value))
    return _CREDENTIAL_URL.sub(HIDDEN, value) if isinstance(value, str) else value


def _redact_words(words: list[Any]) -> list[Any]:
    shown: list[Any] = []
    hide_next = False
    for word in words:
        if not isinstance(word, str):
            shown.append(redact(word))
        elif hide_next and not word.startswith("-"):
            shown.append(HIDDEN)
        elif "=" in word and is_secret(word.split("=", 1)[0]):
            shown.append(f"{word.split('=', 1)[0]}={HIDDEN}")
        else:
            shown.append(redact(word))
        hide_next = isinstance(word, str) and word.startswith("-") and "=" not in word and is_secret(word)
    return shown
