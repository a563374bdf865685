"""Compare two configurations: the changes behind `fleetctl diff` and `apply`.

Invariants:
- Pure: two configurations in, a list of changes out, in the order of the new file; removals last.
- Meaning is compared, not text: `7m` and `420s` are equal. Entries that are equal are not in the plan.
- Values under secret names are redacted here.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from fleetd.config.schema.base import Block
from fleetd.config.schema.change_effects import Effect, effect_of
from fleetd.config.schema.fleet import FleetConfig
from fleetd.config.schema.model import EngineModel, HeldModel, RouteModel
from fleetd.config.schema.process import Instance, Service
from fleetd.config.secrets import HIDDEN, is_secret, redact

_KINDS: tuple[tuple[type[Block], str], ...] = (
    (EngineModel, "engine model"),
    (HeldModel, "held model"),
    (RouteModel, "route"),
    (Instance, "instance"),
    (Service, "service"),
)
_SECTIONS = ("services", "instances", "models")
# `defaults` are already merged into the entries; the list of files is not a change of the fleet.
_NOT_COMPARED = frozenset({*_SECTIONS, "defaults", "include"})


class Action(StrEnum):
    ADD = "add"
    CHANGE = "change"
    REMOVE = "remove"


@dataclass(frozen=True, slots=True)
class FieldChange:
    """One changed key: texts with secrets redacted; None: the key is not set there."""

    path: str
    old: str | None
    new: str | None
    effect: Effect


@dataclass(frozen=True, slots=True)
class ConfigChange:
    """One entry that is added, changed or removed.

    `section` is services, instances, models or fleet (all other keys).
    """

    action: Action
    section: str
    name: str
    kind: str
    fields: tuple[FieldChange, ...] = ()


def diff(old: FleetConfig | None, new: FleetConfig) -> tuple[ConfigChange, ...]:
    """Return the changes from the old configuration (None: none) to the new one."""
    before = old if old is not None else FleetConfig()
    return (*_fleet(before, new), *_entries(before, new))


def _fleet(old: FleetConfig, new: FleetConfig) -> Iterator[ConfigChange]:
    fields: list[FieldChange] = []
    for key in FleetConfig.model_fields:
        if key not in _NOT_COMPARED and getattr(old, key) != getattr(new, key):
            fields += _fields("fleet", _plain_key(old, key), _plain_key(new, key), (key,))
    if fields:
        yield ConfigChange(Action.CHANGE, "fleet", "", "fleet", tuple(fields))


def _plain_key(config: FleetConfig, key: str) -> Any:
    return config.model_dump(mode="json", by_alias=True, include={key})[key]


def _entries(old: FleetConfig, new: FleetConfig) -> Iterator[ConfigChange]:
    for section in _SECTIONS:
        before: Mapping[str, Block] = getattr(old, section)
        after: Mapping[str, Block] = getattr(new, section)
        for name, entry in after.items():
            earlier = before.get(name)
            if earlier is None:
                yield ConfigChange(Action.ADD, section, name, _kind(entry))
            elif type(earlier) is not type(entry):
                yield ConfigChange(Action.REMOVE, section, name, _kind(earlier))
                yield ConfigChange(Action.ADD, section, name, _kind(entry))
            elif earlier != entry:
                fields = tuple(_fields(_kind(entry), _plain(earlier), _plain(entry), ()))
                if fields:
                    yield ConfigChange(Action.CHANGE, section, name, _kind(entry), fields)
    for section in _SECTIONS:
        before, after = getattr(old, section), getattr(new, section)
        for name in before:
            if name not in after:
                yield ConfigChange(Action.REMOVE, section, name, _kind(before[name]))


def _kind(entry: Block) -> str:
    return next(kind for model, kind in _KINDS if isinstance(entry, model))


def _plain(entry: Block) -> Any:
    return entry.model_dump(mode="json", by_alias=True)


def _fields(kind: str, old: Any, new: Any, path: tuple[str, ...]) -> Iterator[FieldChange]:
    """Yield the keys that differ, down to the deepest mapping."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in _keys(old, new):
            if old.get(key) != new.get(key):
                yield from _fields(kind, old.get(key), new.get(key), (*path, key))
        return
    if isinstance(new, dict) and old is None:
        old = {}
        yield from _fields(kind, {}, {key: value for key, value in new.items() if value is not None}, path)
        return
    if isinstance(old, dict) and new is None:
        yield from _fields(kind, {key: value for key, value in old.items() if value is not None}, {}, path)
        return
    yield FieldChange(".".join(path), _text(path, old), _text(path, new), effect_of(kind, path))


def _keys(old: dict[str, Any], new: dict[str, Any]) -> Iterable[str]:
    return dict.fromkeys((*old, *new))


def _text(path: tuple[str, ...], value: Any) -> str | None:
    if value is None:
        return None
    # Names of models and processes are keys too, but never of a secret: only keys below the entry count.
    if any(is_secret(part) for part in path):
        return HIDDEN
    shown = redact(value)
    text = (
        shown if isinstance(shown, str) and shown and shown == shown.strip() else json.dumps(shown, ensure_ascii=False)
    )
    return text if len(text) <= 200 else text[:197] + "..."
