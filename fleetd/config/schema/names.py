"""Names of processes: what a key of fleet.yaml becomes when it has replicas."""

from __future__ import annotations


def process_names(key: str, replicas: int) -> tuple[str, ...]:
    """Return the names of an entry's processes: the key itself, or key-1 … key-N with more than one replica."""
    if replicas <= 1:
        return (key,)
    return tuple(f"{key}-{replica}" for replica in range(1, replicas + 1))
