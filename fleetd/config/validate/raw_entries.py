"""Index the entries of a configuration that may be invalid, for the checks across entries.

Invariants:
- It works on plain data that may be wrong anywhere: a value of the wrong type counts as missing; another check reports it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from fleetd.config.schema.process import process_names
from fleetd.config.schema.types import FieldType, Flag, Whole
from fleetd.config.yaml.source_map import Path_

_MOST_REPLICAS = 256
_REPLICAS = Whole(1, _MOST_REPLICAS)
_PORT = Whole(1, 65535)
_FLAG = Flag()


@dataclass(frozen=True, slots=True)
class ProcessEntry:
    """One entry that is a process, and the `names` of its processes."""

    key: str
    path: Path_
    data: dict[str, Any]
    names: tuple[str, ...]
    port: int | None
    enabled: bool

    def may_have(self, name: str) -> bool:
        """Return whether a name may be one of its replicas when `replicas` is invalid."""
        replicas = self.data.get("replicas")
        return (
            replicas is not None
            and read(_REPLICAS, replicas) is None
            and name in process_names(self.key, _MOST_REPLICAS)
        )


@dataclass(slots=True)
class Index:
    """All entries by name."""

    processes: list[ProcessEntry] = field(default_factory=list)
    by_key: dict[str, ProcessEntry] = field(default_factory=dict)
    by_name: dict[str, ProcessEntry] = field(default_factory=dict)
    instances: dict[str, ProcessEntry] = field(default_factory=dict)
    models: dict[str, dict[str, Any]] = field(default_factory=dict)
    aliases: dict[str, str] = field(default_factory=dict)


def build_index(data: Any) -> Index:
    """Return the index of plain data. The first of two equal names counts."""
    index = Index()
    for section in ("services", "instances", "models"):
        for key, entry in mapping(mapping(data).get(section)).items():
            if section == "models":
                index.models[key] = mapping(entry)
                for alias in strings(mapping(entry).get("aliases")):
                    index.aliases.setdefault(alias, key)
                if "engine" not in mapping(entry):
                    continue
            _add(index, section, key, mapping(entry))
    return index


def _add(index: Index, section: str, key: str, entry: dict[str, Any]) -> None:
    replicas = read(_REPLICAS, entry.get("replicas")) or 1
    names = process_names(key, replicas)
    enabled = read(_FLAG, entry.get("enabled"))
    process = ProcessEntry(key, (section, key), entry, names, read(_PORT, entry.get("port")), enabled is not False)
    index.processes.append(process)
    index.by_key.setdefault(key, process)
    for name in names:
        index.by_name.setdefault(name, process)
    if section == "instances":
        for name in (key, *names):
            index.instances.setdefault(name, process)


def mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def strings(value: Any) -> tuple[str, ...]:
    """Return the strings of one string or a list."""
    items: Iterable[Any] = value if isinstance(value, list) else (value,)
    return tuple(item for item in items if isinstance(item, str))


def read(kind: FieldType, value: Any) -> Any:
    """Return a parsed value, or None where it is missing or invalid."""
    if value is None:
        return None
    try:
        return kind.parse(value)
    except ValueError:
        return None
