"""What the gateway needs of the fleet, and nothing more. The daemon implements `FleetPort`; tests have small stand-ins.

The rules of this file
- Everything here is called on the event loop's thread, for every request: plain calls and plain callbacks, no tasks.
- `take` is for what is in memory; whatever else there is to decide goes through `admit`.
- `admit` is answered by exactly one callback, unless `cancel` comes first; it may call back before it returns.
- A granted request is ended by exactly one `finish`; a request that was not granted yet by `cancel` alone.
- No call blocks. None raises for a request of its own, save where its docstring says so.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from fleetd.core.data.commands import Grant, Reject

OnGrant = Callable[[Grant], None]
OnReject = Callable[[Reject], None]


@dataclass(frozen=True, slots=True)
class Upstream:
    """Where a process listens, and what it speaks.

    `apis` holds dialect names: "openai", "ollama". `base_path` comes before the route's own path ("" for most; no
    trailing slash). `headers` are added to every request, such as the engine's own key. Return the same object until
    something changes: the gateway keeps one connection pool per process and compares by identity first.
    """

    host: str
    port: int
    apis: frozenset[str] = frozenset({"openai"})
    headers: tuple[tuple[str, str], ...] = ()
    base_path: str = ""
    tls: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class Seat:
    """A model on a process that has it in memory. Return the same object until something changes: it is a key by identity."""

    model: str
    process: str
    upstream: Upstream
    served_name: str


@dataclass(frozen=True, slots=True)
class ModelEntry:
    """One entry of GET /v1/models. `created` is Unix seconds; `instance`, `engine`: None where there is none yet."""

    id: str
    state: str
    engine: str | None = None
    instance: str | None = None
    memory_bytes: int = 0
    created: int = 0


class FleetPort(Protocol):
    """The fleet, as a request sees it."""

    def take(self, model: str) -> tuple[int, Seat] | None:
        """Grant a new request at once, without callbacks, where `model` is in memory and has room; None: use `admit`.

        The id in the answer is the request's, for `finish`.
        """
        ...

    def admit(self, model: str, on_grant: OnGrant, on_reject: OnReject, avoid: tuple[str, ...] = ()) -> int:
        """Ask for `model` on behalf of a new request and return the request's id.

        One of the callbacks fires once, with the core's own Grant or Reject; possibly before this returns, so take the
        id from the Grant. `avoid` names processes that already failed the same client request.
        """
        ...

    def cancel(self, request_id: int) -> None:
        """The client left before a grant. No callback fires after this, and nothing is loaded for the request."""
        ...

    def finish(self, request_id: int, failed: bool = False, refused: str = "") -> None:
        """A granted request is over; `failed` when the upstream broke it, `refused` why it took no connection."""
        ...

    def upstream(self, process: str) -> Upstream:
        """Return where `process` listens. Raises KeyError when it is gone."""
        ...

    def served_name(self, model: str, process: str) -> str:
        """Return the name that `process` knows `model` by. Raises KeyError when either is gone."""
        ...

    def models(self) -> Sequence[ModelEntry]:
        """Return what GET /v1/models lists: models, aliases and routes, in the order of fleet.yaml."""
        ...

    def names(self) -> Mapping[str, str]:
        """Return every name a request may use, with the model's own; membership is quick."""
        ...

    def ready(self) -> tuple[bool, Sequence[str]]:
        """Return whether the fleet is what fleet.yaml asks for, and one sentence for everything that is not."""
        ...
