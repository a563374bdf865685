"""Find the valid part of an invalid configuration, so that one mistake does not hide the later ones.

Invariants:
- A wrong key that no other check reads is left out of its entry; otherwise the whole entry is. Outside of entries, the whole
  section is left out.
- An instance that is left out is replaced by a stand-in of the same engine, so that the models that it holds are checked.
"""

from __future__ import annotations

from typing import Any

from pydantic import ValidationError

from fleetd.config.schema.fleet import FleetConfig, Instance
from fleetd.config.schema.model import ModelKeys
from fleetd.config.schema.process import ProcessKeys
from fleetd.config.validate.raw_entries import mapping
from fleetd.config.yaml.source_map import Path_
from fleetd.config.yaml.transform import ENTRY_SECTIONS

# No engine reads these.
_APART = frozenset({*ModelKeys.model_fields, *ProcessKeys.model_fields, "aliases", "depends_on"} - {"env", "env_file"})
_STAND_IN = ("engine", "replicas")


def typed(data: Any) -> tuple[FleetConfig | None, list[Any]]:
    """Return the configuration, or its type errors."""
    try:
        return FleetConfig.model_validate(data), []
    except ValidationError as error:
        return None, error.errors(include_url=False)


def valid_part(data: Any, errors: list[Any]) -> tuple[FleetConfig | None, frozenset[Path_]]:
    """Return the configuration without its `errors`, and the paths of its stand-ins."""
    left = {section: dict(found) if isinstance(found, dict) else found for section, found in data.items()}
    stand_ins: set[Path_] = set()
    for (section, *name), keys in _wrong_keys(errors).items():
        if not name or not isinstance(left.get(section), dict):
            left.pop(section, None)
            continue
        entry = mapping(left[section].pop(name[0], None))
        if keys <= _APART:
            left[section][name[0]] = {key: value for key, value in entry.items() if key not in keys}
        elif section == "instances" and _is_instance(instead := {key: entry[key] for key in _STAND_IN if key in entry}):
            left[section][name[0]] = instead
            stand_ins.add((section, name[0]))
    return typed(left)[0], frozenset(stand_ins)


def _wrong_keys(errors: list[Any]) -> dict[Path_, set[Any]]:
    """Return the wrong keys by entry or section; "" is the entry itself."""
    found: dict[Path_, set[Any]] = {}
    for location in (error["loc"] for error in errors):
        if location[0] not in ENTRY_SECTIONS:
            found.setdefault(location[:1], set())
            continue
        rest = location[3:] if location[0] == "models" else location[2:]  # the form of a model is in between
        found.setdefault(location[:2], set()).add(rest[0] if rest else "")
    return found


def _is_instance(entry: dict[str, Any]) -> bool:
    try:
        Instance.model_validate(entry)
    except ValidationError:
        return False
    return True
