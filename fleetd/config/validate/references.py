"""Check the references between entries: dependencies, holders, routes, fallbacks, aliases.

Invariants:
- Every unknown name gets the nearest known one as a hint.
- A cycle is reported once, as the path of names that closes it.
- With an invalid `replicas` the names are unknown: a name that may be a replica's is not a second mistake.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from fleetd.config.schema.process import DependsOn
from fleetd.config.validate.messages import Messages
from fleetd.config.validate.raw_entries import Index, ProcessEntry, mapping, read, strings
from fleetd.config.yaml.source_map import Path_, SourceMap
from fleetd.errors import Problem

_DEPENDS_ON = DependsOn()


def check_references(index: Index, source_map: SourceMap, messages: Messages) -> Iterator[Problem]:
    """Return the problems of names that refer to other names."""
    yield from _dependencies(index, source_map, messages)
    for name, model in index.models.items():
        if "instance" in model:
            yield from _holders(index, source_map, messages, name, model)
        if "route" in model:
            yield from _routes(index, source_map, messages, name, model)
        yield from _fallback(index, source_map, messages, name, model)
    yield from _route_cycles(index, source_map)
    yield from _aliases(index, source_map)
    yield from _served_twice(index, source_map)


def _unknown(what: str, name: str, known: Iterable[str], messages: Messages) -> str:
    return f"there is no {what} named {name!r}{messages.nearest(name, known)}"


def _may_be_replica(processes: Mapping[str, ProcessEntry], name: str) -> bool:
    process = processes.get(name.rpartition("-")[0])
    return process is not None and process.may_have(name)


def _dependencies(index: Index, source_map: SourceMap, messages: Messages) -> Iterator[Problem]:
    graph: dict[str, list[str]] = {}
    for process in index.processes:
        depends_on = read(_DEPENDS_ON, process.data.get("depends_on")) or {}
        for name in depends_on:
            target = index.by_name.get(name) or index.by_key.get(name)
            path = (*process.path, "depends_on", _position(process.data["depends_on"], name))
            if target is None and _may_be_replica(index.by_key, name):
                continue
            if target is None:
                held = name in index.models
                hint = ": it is a model (a process can wait only for a process)" if held else ""
                text = _unknown("process", name, {**index.by_key, **index.by_name}, messages) if not held else ""
                yield source_map.problem(path, text or f"there is no process named {name!r}{hint}")
            elif target is process:
                yield source_map.problem(path, "a process cannot wait for itself")
            else:
                graph.setdefault(process.key, []).append(target.key)
                mistake = _never_completes(name, depends_on[name], target)
                if mistake is not None:
                    yield source_map.problem(path, mistake)
    for cycle in _cycles(graph):
        start = index.by_key[cycle[0]]
        yield source_map.problem((*start.path, "depends_on"), f"waits for itself: {' → '.join(cycle)}")


def _position(value: Any, name: str) -> str | int:
    """Return the index of a name in a list, or the name as a key."""
    return value.index(name) if isinstance(value, list) else name


def _names_under(name: str, model: dict[str, Any], key: str) -> Iterator[tuple[Path_, str]]:
    """Yield the names under a key of a model, one or a list, each with its path."""
    for number, other in enumerate(strings(model.get(key))):
        yield ("models", name, key, *([number] if isinstance(model[key], list) else [])), other


def _never_completes(name: str, condition: str, target: ProcessEntry) -> str | None:
    """Return the problem of waiting for `completed` of a process that always restarts."""
    if condition == "completed" and mapping(target.data.get("restart")).get("policy", "always") == "always":
        return f"{name!r} never completes: its restart policy is always (set restart: {{policy: on-failure}} there)"
    return None


def _cycles(graph: Mapping[str, list[str]]) -> list[list[str]]:
    """Return each cycle once, from a name back to it. Iterative: chains may be long."""
    found: list[list[str]] = []
    done: set[str] = set()
    for root in graph:
        if root in done:
            continue
        trail: list[str] = []
        on_trail: dict[str, int] = {}
        stack: list[tuple[str, Iterator[str]]] = [(root, iter(graph.get(root, ())))]
        trail.append(root)
        on_trail[root] = 0
        while stack:
            name, others = stack[-1]
            other = next(others, None)
            if other is None:
                stack.pop()
                trail.pop()
                del on_trail[name]
                done.add(name)
            elif other in on_trail:
                found.append([*trail[on_trail[other] :], other])
            elif other not in done:
                on_trail[other] = len(trail)
                trail.append(other)
                stack.append((other, iter(graph.get(other, ()))))
    return found


def _holders(
    index: Index, source_map: SourceMap, messages: Messages, name: str, model: dict[str, Any]
) -> Iterator[Problem]:
    for path, holder in _names_under(name, model, "instance"):
        if holder in index.instances or _may_be_replica(index.instances, holder):
            continue
        process = index.by_name.get(holder) or index.by_key.get(holder)
        if process is not None:
            yield source_map.problem(
                path, f"{holder!r} is under {process.path[0]}: only an entry of instances can hold a model"
            )
        else:
            yield source_map.problem(path, _unknown("instance", holder, index.instances, messages))


def _routes(
    index: Index, source_map: SourceMap, messages: Messages, name: str, model: dict[str, Any]
) -> Iterator[Problem]:
    routes = model["route"] if isinstance(model["route"], list) else []
    seen: set[str] = set()
    total = 0
    for number, route in enumerate(routes):
        to = mapping(route).get("to")
        weight = mapping(route).get("weight", 1)
        total += weight if isinstance(weight, int) and not mapping(route).get("shadow") else 0
        if not isinstance(to, str):
            continue
        path: Path_ = ("models", name, "route", number, "to")
        if to not in index.models:
            yield source_map.problem(path, _unknown_model(index, to, messages))
        elif to in seen:
            yield source_map.problem(path, f"{to!r} is listed twice (give it one weight)")
        seen.add(to)
    weights = [mapping(route).get("weight", 1) for route in routes]
    if routes and total == 0 and all(isinstance(weight, int) and weight >= 0 for weight in weights):
        yield source_map.problem(
            ("models", name, "route"),
            "all weights are 0: no model would get a request (give one entry a weight above 0)",
        )


def _unknown_model(index: Index, name: str, messages: Messages) -> str:
    if name in index.aliases:
        return f"{name!r} is an alias (write {index.aliases[name]})"
    return _unknown("model", name, index.models, messages)


def _fallback(
    index: Index, source_map: SourceMap, messages: Messages, name: str, model: dict[str, Any]
) -> Iterator[Problem]:
    for path, other in _names_under(name, model, "fallback"):
        if other == name:
            yield source_map.problem(path, "a model cannot be its own fallback")
        elif "route" in index.models.get(index.aliases.get(other, other), {}):
            yield source_map.problem(path, f"{other!r} is a route ({_instead_of_route(index, other, name)})")
        elif other not in index.models:
            yield source_map.problem(path, _unknown_model(index, other, messages))


def _instead_of_route(index: Index, route: str, name: str) -> str:
    """Return what to name instead of a route: the models behind it."""
    entries = index.models[index.aliases.get(route, route)]["route"]
    targets = strings([mapping(entry).get("to") for entry in entries] if isinstance(entries, list) else [])
    others = [to for to in dict.fromkeys(targets) if to != name]
    return f"name the models it routes to: {', '.join(others)}" if others else "only a model can be a fallback"


def _route_cycles(index: Index, source_map: SourceMap) -> Iterator[Problem]:
    graph: dict[str, list[str]] = {}
    for name, model in index.models.items():
        routes = model.get("route")
        targets = [mapping(route).get("to") for route in routes] if isinstance(routes, list) else []
        graph[name] = [to for to in targets if isinstance(to, str) and to in index.models]
    for cycle in _cycles(graph):
        yield source_map.problem(("models", cycle[0], "route"), f"routes to itself: {' → '.join(cycle)}")


def _aliases(index: Index, source_map: SourceMap) -> Iterator[Problem]:
    owners: dict[str, str] = {}
    for name, model in index.models.items():
        for path, alias in _names_under(name, model, "aliases"):
            if alias in index.models:
                whose = "its own name" if alias == name else f"the name of models.{alias}"
                yield source_map.problem(path, f"the alias {alias!r} is {whose}")
            elif owners.setdefault(alias, name) != name:
                yield source_map.problem(path, f"the alias {alias!r} is already an alias of models.{owners[alias]}")


def _served_twice(index: Index, source_map: SourceMap) -> Iterator[Problem]:
    served: dict[tuple[str, str], str] = {}
    for name, model in index.models.items():
        if "instance" not in model:
            continue
        served_as = model.get("served_as") if isinstance(model.get("served_as"), str) else name
        for holder in strings(model["instance"]):
            process = index.instances.get(holder)
            names = process.names if process is not None and holder == process.key else (holder,)
            first = next((served[(one, str(served_as))] for one in names if (one, str(served_as)) in served), None)
            if first is not None and first != name:
                message = (
                    f"{holder!r} already serves {str(served_as)!r} as models.{first} (make this name an alias of it)"
                )
                yield source_map.problem(("models", name, "served_as"), message)
                break
            for one in names:
                served[(one, str(served_as))] = name
