"""What the control plane asks of the models' stores and of the volumes, as a protocol beside ControlPort.

The rules of this file
- As in `port.py`: mistakes are FleetErrors, and who hangs up stops waiting, not the work.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any, Protocol


class LibraryPort(Protocol):
    """The stores of the fleet."""

    async def diff(self) -> Mapping[str, Any]:
        """Return {stores: [{store, instances, error, steps: [{name, served_as, change, reason, failure?}]}], differences}.

        `change` is none | create | update | delete | foreign | missing | blocked; `error` says why a store was not compared.
        """

    async def show(self, name: str) -> Mapping[str, Any]:
        """Return one held model: {model, served_as, store, instances, loaded: [{process, state}], state, modelfile,
        modelfile_error, from, quantize, size_bytes, made, present, digest, link_to, stored_bytes}. Raises ApiError 404, 409.
        """

    def sync(self, names: Sequence[str]) -> int:
        """Begin to make what differs (of `names`, or all); return the number of this sync. Raises ApiError 404."""

    def progress(self, number: int) -> AsyncIterator[Mapping[str, Any]]:
        """Yield {what: making | made | failed | done, name, store, detail, done_bytes, total_bytes}; the last is done, with
        the counts unchanged, made and failed. Raises ApiError 404."""

    async def prune(self, dry_run: bool) -> Mapping[str, Any]:
        """Delete what fleetd made and fleet.yaml no longer names: {results: [{store, name, result, reason}]}, or {doomed}."""

    def volumes(self) -> Mapping[str, Any]:
        """Return {volumes: [{path, identity, problem, needed_by}]}."""

    def accept_volume(self, path: str) -> Mapping[str, Any]:
        """Take what is mounted there now as the right volume. Raises ApiError 404."""
