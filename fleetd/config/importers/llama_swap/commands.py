"""Split llama-swap's commands into words and give each server its own port.

Invariants:
- Words are split as llama-swap does: comment lines are dropped, `#` inside a line is a character like any other, and a quote that is
  not closed ends with the text.
- A fixed port that several models share, or that fleetd uses itself, becomes the assigned one wherever the command states it.
"""

from __future__ import annotations

import re
import shlex
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from urllib.parse import urlsplit

from fleetd.config.importers.llama_swap.macros import PORT, joined_lines

FLEETD_PORTS = frozenset({8484, 8485})
_LOCAL = frozenset({"localhost", "0.0.0.0", "::1", "::", "[::]"})
_PORT_FLAG = re.compile(r"--?([a-z]+-)*port|-p|--publish")


@dataclass(frozen=True, slots=True)
class ProxyAddress:
    """Where llama-swap reaches a server. `port` None: the assigned one. `external` is set for another machine."""

    port: int | None = None
    external: str | None = None
    path: str = ""


def split(command: str) -> list[str]:
    """Return the words of a command."""
    text = joined_lines(command)
    for closing in ("", '"', "'", "\\"):
        try:
            return shlex.split(text + closing)
        except ValueError:
            continue
    return text.split()


def address(proxy: str) -> ProxyAddress:
    """Return the address in `proxy`. Raises ValueError if it is none."""
    parts = urlsplit(proxy if "://" in proxy else f"http://{proxy}")
    host = parts.hostname or ""
    if not host:
        raise ValueError("has no host")
    path = parts.path.rstrip("/")
    local = host in _LOCAL or host.startswith("127.") or host.endswith(".localhost")
    if local and PORT in parts.netloc:
        return ProxyAddress(path=path)
    if local and parts.scheme != "https":
        return ProxyAddress(port=parts.port or 80, path=path)
    return ProxyAddress(external=proxy.rstrip("/").removesuffix("/v1").rstrip("/"))


def stated_port(words: Sequence[str]) -> int | None:
    """Return the number after `--port`; None if there is none."""
    for word, following in zip(words, (*words[1:], ""), strict=True):
        flag, _, value = word.partition("=")
        if flag == "--port":
            number = value or following
            return int(number) if number.isdecimal() and 0 < int(number) < 65536 else None
    return None


def shared_ports(ports: Iterable[int | None]) -> set[int]:
    """Return the ports that cannot stay fixed."""
    counts = Counter(port for port in ports if port is not None)
    return {port for port, count in counts.items() if count > 1 or port in FLEETD_PORTS}


def with_assigned_port(words: Sequence[str], port: int) -> list[str]:
    """Return the words with a fixed port replaced by the assigned one."""
    number = re.compile(rf"(?<![0-9.]){port}(?![0-9.])")
    inside = re.compile(rf"(^|[:=\]]){port}(?=$|[:/])")
    result: list[str] = []
    for index, word in enumerate(words):
        flag, equals, value = word.partition("=")
        if index and _PORT_FLAG.fullmatch(words[index - 1]):
            result.append(number.sub(PORT, word, count=1))
        elif equals and _PORT_FLAG.fullmatch(flag):
            result.append(f"{flag}={number.sub(PORT, value, count=1)}")
        else:
            result.append(inside.sub(lambda found: found[1] + PORT, word) if index and word != str(port) else word)
    return result
