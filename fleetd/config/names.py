"""Names of entries in fleet.yaml, derived from the names that other programs use.

Invariants:
- A derived name is valid for a process, and `free_name` always finds a name that is free and no longer than the limit.
"""

from __future__ import annotations

import re
from collections.abc import Container

RESERVED_NAMES = frozenset({"all", "fleetd", "fleetctl"})
PROCESS_NAME_MAX = 63
_NOT_IN_PROCESS = re.compile(r"[^A-Za-z0-9._-]+")


def process_name(text: str, default: str, longest: int = PROCESS_NAME_MAX) -> str:
    """Return a text as the name of a process; `default` if nothing of it can stay."""
    return _NOT_IN_PROCESS.sub("-", text).strip("-._")[:longest] or default


def free_name(wanted: str, *taken: Container[str], longest: int = PROCESS_NAME_MAX) -> str:
    """Return a name, or with the first free number: NAME-2, NAME-3. A long name is cut for the number."""
    name, number = wanted, 2
    while any(name in names for names in taken):
        suffix = f"-{number}"
        name, number = wanted[: longest - len(suffix)] + suffix, number + 1
    return name
