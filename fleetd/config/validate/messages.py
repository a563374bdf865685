"""Turn pydantic's errors into messages for the author of fleet.yaml.

Invariants:
- One problem per mistake, at the value that is wrong, or at the key where the key is wrong or something is missing.
- An unknown key names the nearest known one, or where the key belongs.
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from functools import cache
from typing import Any, get_args

from pydantic import BaseModel

from fleetd.config.schema.fleet import FleetConfig
from fleetd.config.schema.model import FORMS, EngineModel, HeldModel, RouteModel
from fleetd.config.schema.types import Misplaced
from fleetd.config.yaml.source_map import SourceMap
from fleetd.errors import Problem

_FORM_MODELS: dict[str, type[BaseModel]] = {"instance": HeldModel, "engine": EngineModel, "route": RouteModel}
_KNOWN_ELSEWHERE = {
    "script": "command", "cmd": "command", "exec_start": "command", "entrypoint": "command", "environment": "env",
    "working_dir": "cwd", "workdir": "cwd", "autorestart": "restart: {policy: always}", "instances": "replicas",
    "healthcheck": "probes", "health": "probes", "max_memory_restart": "limits: {memory: …}", "memory": "limits: {memory: …}",
    "kill_timeout": "stop: {timeout: …}", "stop_timeout": "stop: {timeout: …}", "cron_restart": "schedule: {restart: …}",
    "nice": "limits: {nice: …}", "nofile": "limits: {nofile: …}", "cpu": "limits: {cpu: …}", "affinity": "limits: {cpu: …}",
    "startup": "probes: {startup: …}", "readiness": "probes: {readiness: …}", "liveness": "probes: {liveness: …}",
    "ports": "port", "cron": "schedule: {restart: …}", "gpu": "device", "autostart": "enabled",
    "keep_alive": "ttl", "endpoint": "external", "url": "external", "listen": "gateway: {listen: …}",
}  # fmt: skip
_HINTS_AT_MOST = 50


class Messages:
    """Turns errors into problems; keeps count of the costly nearest-name searches."""

    def __init__(self, source_map: SourceMap) -> None:
        self.source_map = source_map
        self._hints = 0

    def problems(self, errors: Iterable[Any]) -> list[Problem]:
        return [self._problem(error) for error in errors]

    def _problem(self, error: Any) -> Problem:
        location = tuple(error["loc"])
        form: str | None = None
        if len(location) > 2 and location[0] == "models" and location[2] in FORMS:
            form = str(location[2])
            location = location[:2] + location[3:]
        location = tuple(part for part in location if part != "[key]")
        kind = error["type"]
        if kind == "extra_forbidden":
            return self.source_map.problem(location, self._unknown_key(location, form), at_key=True)
        if kind == "missing":
            return self.source_map.problem(location, self._missing(location))
        mistake = (error.get("ctx") or {}).get("error")
        if isinstance(mistake, Misplaced):
            location = (*location, *mistake.where)
        return self.source_map.problem(location, _sentence(kind, error))

    def nearest(self, word: str, known: Iterable[str]) -> str:
        """Return "; did you mean X?" for the nearest known name, or nothing."""
        self._hints += 1
        if self._hints > _HINTS_AT_MOST or len(word) > 80:
            return ""
        near = get_close_matches(word, list(known), n=1, cutoff=0.6)
        return f": did you mean {near[0]}?" if near else ""

    def _unknown_key(self, location: tuple[Any, ...], form: str | None) -> str:
        key = str(location[-1])
        known = _known_keys(location[:-1], form)
        if form is not None and len(location) == 3:
            others = [other for other in FORMS if other != form and key in _known_keys(location[:-1], other)]
            if key in FORMS:
                return f"cannot be used with {form}: a model has exactly one of instance, engine and route"
            if others:
                return f"is not a key of a model with {form}: it belongs to a model with {' or '.join(others)}"
        near = self.nearest(key, known)
        elsewhere = _KNOWN_ELSEWHERE.get(key)
        if elsewhere is not None and elsewhere.split(":")[0] in known:
            return f"unknown key: write {elsewhere}"
        return f"unknown key{near}" if near else f"unknown key: the keys here are {', '.join(sorted(known))}"

    def _missing(self, location: tuple[Any, ...]) -> str:
        if location[-1] == "command":
            return "is missing: a service needs a command, such as [node, index.js]"
        return "is missing"


def _sentence(kind: str, error: Any) -> str:
    context = error.get("ctx") or {}
    if "error" in context:
        return str(context["error"])
    if kind == "model_form":
        return str(error["msg"])
    if kind in ("model_type", "model_attributes_type", "dict_type", "mapping_type"):
        return "must be a mapping of keys, not " + _kind_of(error["input"])
    if kind in ("tuple_type", "list_type"):
        return "must be a list, not " + _kind_of(error["input"])
    if kind in ("too_short", "too_long"):
        low, high = context.get("min_length"), context.get("max_length")
        return f"must have at least {low} entry" if low is not None else f"must have at most {high} entries"
    message = str(error["msg"])
    return message[:1].lower() + message[1:]


def _kind_of(value: Any) -> str:
    kinds = ((bool, "true or false"), (str, "a string"), (int, "a number"), (float, "a number"), (list, "a list"))
    return next((name for kind, name in kinds if isinstance(value, kind)), "a mapping" if value else "nothing")


def _known_keys(location: tuple[Any, ...], form: str | None) -> tuple[str, ...]:
    """Return the keys of the mapping at a place of the schema."""
    return _keys_at(tuple("0" if isinstance(part, int) else str(part) for part in location), form)


@cache
def _keys_at(location: tuple[str, ...], form: str | None) -> tuple[str, ...]:
    model: type[BaseModel] | None = FleetConfig
    rest = list(location)
    if form is not None:
        model, rest = _FORM_MODELS[form], rest[2:]
    elif rest and rest[0] in ("services", "instances", "devices") and len(rest) > 1:
        model = _block_of(FleetConfig.model_fields[rest[0]].annotation)
        rest = rest[2:]
    for part in rest:
        if part == "0" or model is None:
            continue
        field = model.model_fields.get(part)
        model = _block_of(field.annotation) if field is not None else None
    if model is None:
        return ()
    return tuple(field.alias or name for name, field in model.model_fields.items())


def _block_of(annotation: Any) -> type[BaseModel] | None:
    """Return the first mapping model inside a type."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for part in get_args(annotation) if (found := _block_of(part)) is not None), None)
