"""Which GPUs a server is shown."""

from __future__ import annotations

import re

_NVIDIA = re.compile(r"(GPU|MIG)-[0-9a-fA-F]{8}-[0-9a-fA-F-]+|GPU-[0-9a-fA-F]{8}")


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
