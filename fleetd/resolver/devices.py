"""Devices of the machine and of fleet.yaml, and the default device of an entry.

Invariants:
- Without a stated budget the host keeps a fifth of its memory for everything else, a GPU a tenth.
- A stated device that this machine does not have is a warning: the same file is checked on other machines.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from fleetd.config.load import LoadedConfig
from fleetd.core.data.specs import DeviceSpec
from fleetd.resolver.resolved import MachineDevice
from fleetd.units import show_size

SHARES = {"host": 0.80, "unified": 0.80, "gpu": 0.90}

Warn = Callable[[tuple[str | int, ...], str], None]


def device_specs(loaded: LoadedConfig, present: Sequence[MachineDevice], warn: Warn) -> dict[str, DeviceSpec]:
    """Return the pools of the ledger."""
    specs: dict[str, DeviceSpec] = {}
    stated = loaded.config.devices
    for device in _named(loaded, present):
        keys = stated.get(device.name)
        if keys is not None and keys.budget is not None:
            budget = keys.budget.of(device.total_bytes)
            if keys.budget.size_bytes is not None and keys.budget.size_bytes > device.total_bytes:
                warn(
                    ("devices", device.name, "budget"),
                    f"exceeds the {show_size(device.total_bytes)} of {device.name}",
                )
        else:
            budget = int(device.total_bytes * SHARES[device.kind])
        specs[device.name] = DeviceSpec(device.name, device.kind, device.total_bytes, budget)
    for name, keys in stated.items():
        if name in specs:
            continue
        warn(("devices", name), f"this machine has no device {name!r}")
        size = keys.budget.size_bytes if keys.budget is not None else None
        if size is not None:
            specs[name] = DeviceSpec(name, name.rstrip("0123456789"), size, size)
    return specs


def _named(loaded: LoadedConfig, present: Sequence[MachineDevice]) -> list[MachineDevice]:
    """Return the devices by their names in fleet.yaml; a UUID binds a name to a card."""
    by_uuid = {keys.uuid: name for name, keys in loaded.config.devices.items() if keys.uuid is not None}
    bound = {device.uuid for device in present if device.uuid in by_uuid}
    result = []
    for device in present:
        if device.uuid in bound:
            result.append(MachineDevice(by_uuid[device.uuid], device.kind, device.total_bytes, device.uuid))
        elif device.name not in by_uuid.values():
            result.append(device)
    return result


def default_device(engine: str | None, devices: dict[str, DeviceSpec]) -> str:
    """Return the device of an entry that names none."""
    if "unified" in devices:
        return "unified"
    if engine not in (None, "process", "external") and "gpu0" in devices and devices["gpu0"].kind == "gpu":
        return "gpu0"
    return "host"
