"""Carry over what llama-swap says across models: groups, priorities, preloads, selectors and peers.

Invariants:
- SwapNames are model IDs or aliases, as llama-swap accepts both.
- The values of keys (`apiKeys`, `peers.*.apiKey`) are in no report.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from fleetd.config.importers.llama_swap.commands import FLEETD_PORTS
from fleetd.config.importers.llama_swap.macros import has_variable, written
from fleetd.config.importers.llama_swap.names import SwapNames
from fleetd.config.importers.report import Report
from fleetd.units import listed

_PERSISTENT = 100  # the priority of models that swap among themselves only
_LEFT_OUT = {
    "matrix": "fleetd places models by bytes: state memory where it is not known", "profiles": "has no equivalent",
    "apiKeys": "the gateway listens on loopback and knows no keys yet",
}  # fmt: skip
_READ = frozenset({"models", "macros", "healthCheckTimeout", "globalTTL", "unloadTimeout", "startPort", "hooks", "groups", "routing",
                   "peers", "selectors"})  # fmt: skip


def apply(
    document: Mapping[str, Any],
    models: dict[str, Any],
    instances: dict[str, Any],
    names: SwapNames,
    sized: set[str],
    report: Report,
) -> None:
    """Add to `models` and `instances` what the document says across them, and report the rest."""
    across = _Across(document, models, names, report)
    across.preloads()
    across.priorities()
    across.groups(sized)
    across.peers(instances)
    across.selectors()
    detail = (
        f"llama-swap's own address is an option of its program: clients find fleetd at 127.0.0.1:{min(FLEETD_PORTS)}"
    )
    report.approximated("", "listen", f"{detail}, or state gateway.listen")
    for field in document:
        if field in _LEFT_OUT:
            report.refused("", field, _LEFT_OUT[field])
        elif field not in _READ:
            report.refused("", field, "concerns llama-swap itself")


class _Across:
    def __init__(self, document: Mapping[str, Any], models: dict[str, Any], names: SwapNames, report: Report) -> None:
        self.document, self.models, self.names, self.report = document, models, names, report
        self.routing = _mapping(document.get("routing"))
        self.router = _mapping(self.routing.get("router"))

    def _key(self, name: Any) -> str | None:
        key = self.names.keys.get(str(name).strip())
        return key if key in self.models else None

    def preloads(self) -> None:
        started = _mapping(_mapping(self.document.get("hooks")).get("on_startup"))
        for name in _items(started.get("preload")):
            key = self._key(name)
            if key is None:
                self.report.refused("", f"hooks.on_startup.preload.{name}", "no model has this name")
            else:
                self.models[key]["preload"] = True
                self.report.mapped("", f"hooks.on_startup.preload.{name}", "preload: true")

    def priorities(self) -> None:
        scheduler = _mapping(self.routing.get("scheduler"))
        stated = _mapping(_mapping(_mapping(scheduler.get("settings")).get("fifo")).get("priority"))
        for name, number in stated.items():
            key = self._key(name)
            if key is None or isinstance(number, bool) or not isinstance(number, int):
                self.report.refused("", f"routing.scheduler.settings.fifo.priority.{name}", "no model has this name")
                continue
            self.models[key]["priority"] = max(-1000, min(1000, number))
            if abs(number) > 1000:
                self.report.approximated(
                    name, "priority", f"{number} is beyond fleetd's limit: {self.models[key]['priority']}"
                )
            else:
                self.report.mapped(name, "priority", f"priority: {number}")

    def _groups(self) -> dict[str, Any]:
        settings = _mapping(self.router.get("settings"))
        return _mapping(self.document.get("groups")) or (
            _mapping(settings.get("groups")) if self.router.get("use") != "matrix" else {}
        )

    def groups(self, sized: set[str]) -> None:
        together: set[str] = set()
        for name, group in self._groups().items():
            group = _mapping(group)
            members = [key for key in map(self._key, _items(group.get("members"))) if key is not None]
            alone = group.get("swap") is not False
            if not alone:
                together.update(members)
            if group.get("persistent") is True:
                for key in members:
                    self._persistent(str(name), key, alone=alone and len(members) > 1)
        matrix = self.document.get("matrix") or (
            _mapping(self.router.get("settings")).get("matrix") if self.router.get("use") == "matrix" else None
        )
        if matrix and "matrix" not in self.document:
            self.report.refused("", "routing.router.settings.matrix", _LEFT_OUT["matrix"])
        unknown = [
            key for key, entry in self.models.items()
            if key not in sized and key not in together and not ({"external", "instance", "route"} & set(entry))
        ]  # fmt: skip
        if unknown and len(self.models) > 1:
            detail = (
                "llama-swap runs one model at a time; fleetd keeps what fits, and cannot know the memory of "
                f"{listed(unknown, 5)}: they stay loaded together until you state it, such as memory: 8GiB"
            )
            self.report.warn("", "memory", detail)

    def _persistent(self, group: str, key: str, *, alone: bool) -> None:
        if alone:
            self.models[key]["priority"] = max(_PERSISTENT, self.models[key].get("priority", 0))
            detail = (
                f"priority: {self.models[key]['priority']}: evicted last; the members of {group} may replace each other"
            )
            self.report.approximated(key, "persistent", detail)
        else:
            self.models[key]["pin"] = True
            self.report.mapped(key, "persistent", "pin: true")

    def peers(self, instances: dict[str, Any]) -> None:
        peers = {
            str(name): peer for name, peer in _mapping(self.document.get("peers")).items() if isinstance(peer, dict)
        }
        offered = [str(model) for peer in peers.values() for model in _items(peer.get("models"))]
        for name, peer in peers.items():
            proxy = str(peer.get("proxy") or "")
            if not proxy.startswith(("http://", "https://")):
                self.report.refused("", f"peers.{name}", "has no address")
                continue
            server = self.names.reserve(name)
            instances[server] = {"engine": "external", "external": written(proxy.rstrip("/").removesuffix("/v1"))}
            key = str(peer.get("apiKey") or "")
            if key:
                instances[server]["options"] = {"api_key": written(key)}
                if not has_variable(key):
                    self.report.warn("", f"peers.{name}.apiKey", "is written in the file: use a variable, ${NAME}")
            if peer.get("filters"):
                self.report.refused("", f"peers.{name}.filters", "fleetd passes requests on as they are")
            for model in map(str, _items(peer.get("models"))):
                entry: dict[str, Any] = {"instance": server, "served_as": written(model)}
                self.names.keys.setdefault(f"{name}/{model}", own := self.names.reserve(f"{name}-{model}"))
                unique = offered.count(model) == 1 and model not in self.names.keys
                entry["aliases"] = self.names.aliases(f"{name}/{model}", [model] if unique else [])
                self.models[own] = entry
            self.report.mapped("", f"peers.{name}", f"instances.{server}, an external server")

    def selectors(self) -> None:
        for name, selector in _mapping(self.document.get("selectors")).items():
            targets = [key for key in map(self._key, _items(_mapping(selector).get("targets"))) if key is not None]
            if not targets:
                self.report.refused("", f"selectors.{name}", "has no target that is a model here")
                continue
            key = self.names.reserve(str(name))
            entry: dict[str, Any] = {"route": [{"to": targets[0]}]}
            self.names.keys[str(name)] = key
            aliases = self.names.aliases(str(name), [])
            if aliases:
                entry["aliases"] = aliases
            strategy = str(_mapping(selector).get("strategy") or "pin")
            if strategy != "pin" and targets[1:]:
                entry["fallback"] = targets[1:]
                detail = f"strategy {strategy}: routes to {targets[0]}, and to the others only when it cannot answer"
                self.report.approximated("", f"selectors.{name}", detail)
            else:
                self.report.mapped("", f"selectors.{name}", f"routes to {targets[0]}")
            self.models[key] = entry


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _items(value: Any) -> Iterator[Any]:
    yield from value if isinstance(value, list) else ([value] if isinstance(value, str) else [])
