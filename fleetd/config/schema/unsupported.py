"""The list of keys that are valid but have no effect yet. A configuration that uses one is rejected.

Invariants:
- A pattern is a path; `*` matches any name or index. The reason completes "not supported yet: ".
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from fleetd.config.yaml.source_map import Path_, SourceMap
from fleetd.errors import Problem

UNSUPPORTED: tuple[tuple[tuple[str, ...], str], ...] = (
    (("gateway", "tls"), "the gateway serves plain HTTP (put a proxy with TLS in front of it)"),
    (("gateway", "keys_file"), "the gateway does not check keys (listen on loopback, or set insecure: true)"),
    (("admin", "listen"), "there is no admin listener (use fleetctl)"),
    (("models", "*", "request"), "requests are forwarded unchanged"),
    (("models", "*", "route", "*", "shadow"), "each request goes to one model"),
    (("defaults", "model", "request"), "requests are forwarded unchanged"),
)
# Writing the default value requests nothing.
HARMLESS: dict[tuple[str, ...], tuple[object, ...]] = {("admin", "listen"): ("127.0.0.1:8485", "localhost:8485")}


def is_unsupported(pattern: tuple[str, ...]) -> bool:
    """Return whether a path pattern is in the list."""
    return any(pattern == listed for listed, _ in UNSUPPORTED)


def find_unsupported(data: Any, source_map: SourceMap) -> list[Problem]:
    """Return a problem for every value at an unsupported path, if not empty or false."""
    found = []
    for pattern, reason in UNSUPPORTED:
        for path, value in _at(data, pattern, ()):
            if value is not None and value is not False and value not in HARMLESS.get(pattern, ()):
                found.append(source_map.problem(path, f"is not supported yet: {reason}", at_key=True))
    return found


def _at(data: Any, pattern: tuple[str, ...], path: Path_) -> Iterator[tuple[Path_, Any]]:
    if not pattern:
        yield path, data
        return
    head, rest = pattern[0], pattern[1:]
    if isinstance(data, list) and head == "*":
        for index, item in enumerate(data):
            yield from _at(item, rest, (*path, index))
    elif isinstance(data, dict):
        for key in data if head == "*" else (head,) if head in data else ():
            yield from _at(data[key], rest, (*path, key))
