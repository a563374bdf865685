"""The memory ledger: bytes reserved per device, by model and process.

Invariants:
- A reservation lasts from the decision to load until its memory was seen to be free.
- `reserve` and `grow` raise CapacityError if the bytes are not free: decisions never exceed a budget.
- `correct` enters a measurement, even over the budget; `excess` then reports by how much, and models are evicted.
- A device without a configured budget has no limit and is still counted.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from fleetd.core.data.specs import DeviceSpec
from fleetd.errors import CapacityError

Key = tuple[str, str]  # (model, process)


@dataclass(slots=True)
class Ledger:
    devices: Mapping[str, DeviceSpec] = field(default_factory=dict)
    reservations: dict[Key, Mapping[str, int]] = field(default_factory=dict)
    over: bool = False  # whether any device is over its budget
    _sums: dict[str, int] = field(default_factory=dict)

    def limit(self, devices: Mapping[str, DeviceSpec]) -> None:
        """Replace the budgets; reservations stay, even over the new ones."""
        self.devices = devices
        self.over = bool(self.excess())

    def reserved_bytes(self, device: str) -> int:
        return self._sums.get(device, 0)

    def free_bytes(self, device: str) -> int | None:
        """Return the bytes that a new reservation may take, at least 0; None: no limit."""
        spec = self.devices.get(device)
        return None if spec is None else max(0, spec.budget_bytes - self.reserved_bytes(device))

    def lacking(self, need: Mapping[str, int]) -> dict[str, int]:
        """Return, per device, how many bytes of `need` are not free."""
        lack: dict[str, int] = {}
        for device, size in need.items():
            free = self.free_bytes(device)
            if free is not None and size > free:
                lack[device] = size - free
        return lack

    def never_fits(self, need: Mapping[str, int]) -> dict[str, tuple[int, int]]:
        """Return (needed, budget) for every device whose whole budget is too small."""
        return {
            device: (size, self.devices[device].budget_bytes)
            for device, size in need.items()
            if device in self.devices and size > self.devices[device].budget_bytes
        }

    def reserve(self, key: Key, need: Mapping[str, int]) -> None:
        """Reserve `need`. Raises CapacityError if not free, or the key has one already."""
        if key in self.reservations:
            raise CapacityError(f"{key[0]} on {key[1]} has a reservation already")
        lack = self.lacking(need)
        if lack:
            raise CapacityError(
                f"{key[0]} lacks " + ", ".join(f"{size} bytes on {device}" for device, size in lack.items())
            )
        self._set(key, need)

    def grow(self, key: Key, more: Mapping[str, int]) -> None:
        """Raise a reservation to at least `more`. Raises CapacityError if not free."""
        held = self.reservations.get(key, {})
        lack = self.lacking({device: size - held.get(device, 0) for device, size in more.items()})
        if lack:
            raise CapacityError(
                f"{key[0]} lacks " + ", ".join(f"{size} bytes on {device}" for device, size in lack.items())
            )
        self._set(key, {device: max(held.get(device, 0), more.get(device, 0)) for device in {**held, **more}})

    def correct(self, key: Key, measured: Mapping[str, int]) -> None:
        """Replace a reservation by a measurement, even over the budget or for a new key."""
        self._set(key, measured)

    def release(self, key: Key) -> None:
        self._set(key, {})
        self.reservations.pop(key, None)

    def excess(self) -> dict[str, int]:
        """Return bytes above the budget, per device that is over."""
        return {
            name: self.reserved_bytes(name) - spec.budget_bytes
            for name, spec in self.devices.items()
            if self.reserved_bytes(name) > spec.budget_bytes
        }

    def _set(self, key: Key, need: Mapping[str, int]) -> None:
        for device, size in self.reservations.get(key, {}).items():
            self._sums[device] -= size
        for device, size in need.items():
            self._sums[device] = self._sums.get(device, 0) + size
        self.reservations[key] = dict(need)
        self.over = bool(self.excess())
