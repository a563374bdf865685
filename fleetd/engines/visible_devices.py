"""The environment that decides which GPUs a server sees."""

from __future__ import annotations

import re

_NVIDIA = re.compile(r"(GPU|MIG)-[0-9a-fA-F]{8}-[0-9a-fA-F-]+|GPU-[0-9a-fA-F]{8}")


def visible_devices(uuid: str | None, device: str | None) -> dict[str, str]:
    """Return the variables that show a server only its own device.

    GPUs are named by UUID, since NVIDIA and AMD renumber them after a change of hardware or driver. A server on `host` must
    see no GPU, or it would take memory that the ledger does not account for.
    """
    if device == "host":
        return {"CUDA_VISIBLE_DEVICES": "-1", "ROCR_VISIBLE_DEVICES": "-1", "GGML_VK_VISIBLE_DEVICES": "-1"}
    if not uuid:
        return {}
    if _NVIDIA.fullmatch(uuid):
        return {"CUDA_VISIBLE_DEVICES": uuid, "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
    return {"ROCR_VISIBLE_DEVICES": uuid}
