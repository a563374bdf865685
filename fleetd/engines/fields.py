"""Field types that several engines' options share: durations, sizes and device identifiers, as fleet.yaml writes them."""

from __future__ import annotations

import re
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, WithJsonSchema

from fleetd import units

_NVIDIA = re.compile(r"(GPU|MIG)-[0-9a-fA-F]{8}-[0-9a-fA-F-]+|GPU-[0-9a-fA-F]{8}")


def _lifetime(value: Any) -> Any:
    """-1 and `forever` are the same; other negative numbers are no duration."""
    if value in ("forever", "-1", -1) and value is not True:
        return -1.0
    return units.parse_duration(value)


_TEXT_OR_NUMBER = {"anyOf": [{"type": "string"}, {"type": "integer"}]}

Size = Annotated[
    int, BeforeValidator(units.parse_size), WithJsonSchema({**_TEXT_OR_NUMBER, "description": "2GiB, 512MiB, or bytes"})
]
Duration = Annotated[
    float, BeforeValidator(units.parse_duration), WithJsonSchema({"type": "string", "description": "30s, 5m, 1h30m"})
]
Lifetime = Annotated[
    float, BeforeValidator(_lifetime), WithJsonSchema({**_TEXT_OR_NUMBER, "description": "5m, or -1 for ever"})
]
Count = Annotated[int, Field(ge=1)]


def visible_devices(uuid: str | None, device: str | None) -> dict[str, str]:
    """Return the environment that shows a server its own device only.

    NVIDIA and AMD number their GPUs anew after a change of hardware or driver; the UUID stays. A server on `host` must see no
    GPU at all, or its memory would be taken from a device where nobody accounts for it.
    """
    if device == "host":
        return {"CUDA_VISIBLE_DEVICES": "-1", "ROCR_VISIBLE_DEVICES": "-1", "GGML_VK_VISIBLE_DEVICES": "-1"}
    if not uuid:
        return {}
    if _NVIDIA.fullmatch(uuid):
        return {"CUDA_VISIBLE_DEVICES": uuid, "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
    return {"ROCR_VISIBLE_DEVICES": uuid}
