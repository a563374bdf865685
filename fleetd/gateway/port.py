"""The interface from the gateway to the fleet: the daemon implements `FleetPort`, tests use fakes.

Invariants:
- Every call is made on the event loop's thread and does not block; callbacks are plain calls, no tasks.
- `admit` is answered by exactly one callback, unless `cancel` comes first; it may call back before it returns.
- A granted request ends with exactly one `finish`; one that was not granted yet with `cancel`.
- No call raises for a request, except where its docstring says so.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from fleetd.core.data.commands import Grant, Reject
from fleetd.gateway.target import ModelTarget

OnGrant = Callable[[Grant], None]
OnReject = Callable[[Reject], None]


@dataclass(frozen=True, slots=True)
class ModelEntry:
    """One entry of GET /v1/models.

    `created` is Unix seconds; `instance` and `engine` are None if unknown.
    """

    id: str
    state: str
    engine: str | None = None
    instance: str | None = None
    memory_bytes: int = 0
    created: int = 0


class FleetPort(Protocol):
    """The fleet, as a request sees it."""

    def take(self, model: str) -> tuple[int, ModelTarget] | None:
        """Grant a request at once if `model` is in memory and has a free slot.

        Returns the request's id, for `finish`, and its target; None: use `admit`.
        """
        ...

    def admit(self, model: str, on_grant: OnGrant, on_reject: OnReject, avoid: tuple[str, ...] = ()) -> int:
        """Ask for `model` on behalf of a new request and return the request's id.

        One of the callbacks fires once, with the core's own Grant or Reject; possibly before this returns, so take the
        id from the Grant. `avoid` names processes that already failed the same client request.
        """
        ...

    def cancel(self, request_id: int) -> None:
        """Withdraw a request before its grant; no callback follows, nothing is loaded."""
        ...

    def stop_reason(self, process: str) -> str | None:
        """Return why a process is being stopped, or was, on request; None: it was not."""
        ...

    def finish(self, request_id: int, failed: bool = False, refused: str = "") -> None:
        """End a granted request.

        `failed`: the upstream broke it. `refused`: why the upstream accepted no connection.
        """
        ...

    def target(self, model: str, process: str) -> ModelTarget:
        """Return the target of a grant. Raises KeyError if model or process is gone."""
        ...

    def models(self) -> Sequence[ModelEntry]:
        """Return models, aliases and routes, in the order of fleet.yaml."""
        ...

    def names(self) -> Mapping[str, str]:
        """Return every name a request may use, mapped to the model's own name."""
        ...

    def ready(self) -> tuple[bool, Sequence[str]]:
        """Return whether the fleet is as fleet.yaml asks, and a sentence per deviation."""
        ...
