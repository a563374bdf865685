"""The schema of the whole fleet.yaml.

Invariants:
- One frozen model per mapping; checks across mappings are in `config/validate/`.
- Defaults are the documented ones. Paths are text as written; `LoadedConfig.resolve` makes them absolute.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, field_validator

from fleetd.config.schema.base import MODEL_NAME, PROCESS_NAME, Block, Bool, PathText, Word
from fleetd.config.schema.model import AnyModel, EngineModel, HeldModel, ModelEntry, ModelKeys, RouteModel
from fleetd.config.schema.process import EngineKeys, Instance, PlacedKeys, ProcessKeys, Service
from fleetd.config.schema.types import (
    Address,
    AddressType,
    Budget,
    BudgetType,
    DeviceName,
    DurationType,
    Size,
    Strings,
    Text,
    Whole,
)
from fleetd.units import shown

DEFAULT_LISTEN = Address("127.0.0.1", 8484)
DEFAULT_ADMIN = Address("127.0.0.1", 8485)


class Version(Whole):
    """The version of the format."""

    def __init__(self) -> None:
        super().__init__(1, 1)

    def parse(self, value: object) -> int:
        if value != 1 or isinstance(value, bool):
            raise ValueError(f"must be 1, the only version there is, not {shown(value)}")
        return 1

    def json_schema(self) -> dict[str, Any]:
        return {"const": 1}


class PathsKeys(Block):
    state: PathText = "~/.local/state/fleetd"
    run: PathText = "~/.fleetd/run"
    logs: PathText = "~/.local/state/fleetd/logs"


class TlsKeys(Block):
    cert: PathText
    key: PathText


class GatewayQueueKeys(Block):
    """`max_wait` is the fairness bound."""

    max: Annotated[int, Whole(0, 1_000_000)] = 512
    timeout: Annotated[float, DurationType("1ms", "1d")] = 120.0
    max_wait: Annotated[float, DurationType("1ms", "1d")] = 30.0


class RetryKeys(Block):
    attempts: Annotated[int, Whole(1, 10)] = 2


class GatewayKeys(Block):
    listen: Annotated[Address, AddressType()] = DEFAULT_LISTEN
    tls: TlsKeys | None = None
    keys_file: PathText | None = None
    allowed_hosts: Annotated[tuple[str, ...], Strings(Text(255, pattern=r"[^\s/]+", what="the name of a host"))] = ()
    max_body: Annotated[int, Size("1KiB", "64GiB")] = 64 * 2**20
    queue: GatewayQueueKeys = GatewayQueueKeys()
    retry: RetryKeys = RetryKeys()
    insecure: Bool = False


class AdminKeys(Block):
    listen: Annotated[Address, AddressType()] = DEFAULT_ADMIN


class DeviceKeys(Block):
    budget: Annotated[Budget, BudgetType()] | None = None
    uuid: Annotated[str, Text(128, pattern=r"[A-Za-z0-9-]+", what="the UUID of a GPU")] | None = None


class DefaultsKeys(Block):
    """Defaults that are merged into every process and model before they are checked."""

    process: ProcessKeys = ProcessKeys()
    model: ModelKeys = ModelKeys()


class FleetConfig(Block):
    """fleet.yaml with its includes, after interpolation and defaults."""

    version: Annotated[int, Version()] = 1
    name: Word | None = None
    include: Annotated[tuple[str, ...], Strings(what="a path")] = ()
    paths: PathsKeys = PathsKeys()
    gateway: GatewayKeys = GatewayKeys()
    admin: AdminKeys = AdminKeys()
    devices: dict[Annotated[str, DeviceName()], DeviceKeys] = Field(default_factory=dict)
    defaults: DefaultsKeys = DefaultsKeys()
    services: dict[str, Service] = Field(default_factory=dict)
    instances: dict[str, Instance] = Field(default_factory=dict)
    models: dict[str, ModelEntry] = Field(default_factory=dict)
    watch: Bool = True

    @field_validator("devices")
    @classmethod
    def _one_pool(cls, devices: dict[str, DeviceKeys]) -> dict[str, DeviceKeys]:
        if "unified" in devices and len(devices) > 1:
            others = ", ".join(sorted(name for name in devices if name != "unified"))
            raise ValueError(f"{others} cannot be used with unified: it is the only pool of a machine that has it")
        return devices

    def processes(self) -> dict[str, Service | Instance | EngineModel]:
        """Return the entries that are processes: services, instances, engine models."""
        own = {name: model for name, model in self.models.items() if isinstance(model, EngineModel)}
        return {**self.services, **self.instances, **own}


__all__ = [
    "MODEL_NAME",
    "PROCESS_NAME",
    "AnyModel",
    "EngineKeys",
    "EngineModel",
    "FleetConfig",
    "HeldModel",
    "Instance",
    "PlacedKeys",
    "ProcessKeys",
    "RouteModel",
    "Service",
]
