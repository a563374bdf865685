"""The target of granted requests: a model in memory on a process, the engine's address, and the header lines that name both."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

_NO_WAIT: Final = b"X-Fleet-Queue-Ms: 0\r\nX-Fleet-Load-Ms: 0\r\n"


@dataclass(frozen=True, slots=True)
class Upstream:
    """The address of a process and the dialects it speaks.

    `apis` holds dialect names: "openai", "ollama". `base_path` precedes the route's own path ("" for most; no trailing slash).
    `headers` are added to every request, such as the engine's own key. The gateway keeps
    one connection pool per process and address.
    """

    host: str
    port: int
    apis: frozenset[str] = frozenset({"openai"})
    headers: tuple[tuple[str, str], ...] = ()
    base_path: str = ""
    tls: bool = False


class ModelTarget:
    """A model on a process that has it in memory.

    Compared by identity: return the same object until something changes.
    """

    __slots__ = ("_names", "model", "names_no_wait", "process", "served_name", "upstream")

    def __init__(self, model: str, process: str, upstream: Upstream, served_name: str) -> None:
        self.model = model
        self.process = process
        self.upstream = upstream
        self.served_name = served_name
        self._names = b"X-Fleet-Model: %b\r\nX-Fleet-Instance: %b\r\n" % (_header_value(model), _header_value(process))
        self.names_no_wait = self._names + _NO_WAIT  # header lines of a request that did not wait

    def names_after(self, queued_s: float, load_s: float) -> bytes:
        """Return the header lines of a request that waited, `load_s` of it for a load."""
        if not queued_s and not load_s:
            return self.names_no_wait
        waits = (int(queued_s * 1000), int(load_s * 1000))
        return self._names + b"X-Fleet-Queue-Ms: %d\r\nX-Fleet-Load-Ms: %d\r\n" % waits


def rejection_lines(model: str | None, queued_s: float) -> bytes:
    """Return the header lines of a rejected request; `model` None: no such model."""
    if model is None:
        return b""
    return b"X-Fleet-Model: %b\r\nX-Fleet-Queue-Ms: %d\r\n" % (_header_value(model), int(queued_s * 1000))


def _header_value(text: str) -> bytes:
    return "".join(c if c.isprintable() else "?" for c in text).encode()
