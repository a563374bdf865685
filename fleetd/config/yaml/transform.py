"""Work on whole node trees: put variables in, join files, lay defaults under entries, and make plain values.

Invariants:
- A mapping that several places share (anchors) is never changed in place once it was read.
- `env`, `command`, `args` and their like keep the text that was written: `args: [--port, 08]` gives "08".
- `options`, `modelfile` and `request` are passed on unchanged.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from fleetd.config.schema.model import ModelKeys
from fleetd.config.schema.process import ProcessKeys
from fleetd.config.yaml.interpolate import interpolate
from fleetd.config.yaml.parser import Node
from fleetd.config.yaml.scalars import resolve
from fleetd.config.yaml.source_map import path_text
from fleetd.errors import Problem

ENTRY_SECTIONS = ("services", "instances", "models", "devices")
_TEXT_KEYS = frozenset({"env", "command", "args", "exec", "umask", "pre_start", "post_stop"})
_VERBATIM_KEYS = frozenset({"options", "modelfile", "request"})
_PROCESS_KEYS = tuple(ProcessKeys.model_fields)
_MODEL_KEYS = tuple(ModelKeys.model_fields)
_WHOLE_KEYS = frozenset({"memory"})
_PROBE_WAYS = frozenset({"http", "tcp", "exec", "log_line", "completion", "message"})
_EXTERNAL_KEYS = ("probes", "enabled")

Report = Callable[[Problem], None]


def put_variables_in(root: Node, env: Mapping[str, str], report: Report) -> None:
    """Interpolate every scalar of a new tree; report each mistake at its scalar."""
    seen: set[int] = set()
    pending: list[tuple[Node, tuple[str | int, ...]]] = [(root, ())]
    while pending:
        node, path = pending.pop()
        value = node.value
        if type(value) is str:
            if "$" in value and node.raw is None:
                _put_in(node, path, env, report)
        elif id(value) not in seen:
            seen.add(id(value))
            children = value.items() if type(value) is dict else enumerate(value)
            pending.extend((child, (*path, key)) for key, child in children)


def _put_in(node: Node, path: tuple[str | int, ...], env: Mapping[str, str], report: Report) -> None:
    try:
        result = interpolate(node.value, env)
    except ValueError as error:
        report(node.problem(str(error), path_text(path)))
        node.raw = node.value
        return
    node.raw, node.value = node.value, result


def join(target: Node, other: Node, report: Report, path: tuple[str, ...] = ()) -> None:
    """Merge an included file's tree; report a key that both define."""
    for key, value in other.value.items():
        here = (*path, key)
        mine = target.value.get(key)
        if not path and key == "include":
            continue
        if mine is None or mine.is_null:
            target.value[key] = value
        elif not path and key == "version" and mine.value == value.value:
            continue
        elif type(mine.value) is dict and type(value.value) is dict and not (path and path[0] in ENTRY_SECTIONS):
            merged = mine.copy()
            merged.value = dict(mine.value)
            target.value[key] = merged
            join(merged, value, report, here)
        elif not value.is_null:
            first = f"{mine.source.shown}:{mine.key_line}:{mine.key_column}"
            report(value.problem(f"is defined twice: first at {first}", path_text(here), at_key=True))


def lay_defaults(root: Node) -> Node:
    """Return a tree with `defaults` merged under its entries; `root` is unchanged."""
    defaults = root.value.get("defaults")
    if defaults is None or type(defaults.value) is not dict:
        return root
    process, model = (_known(defaults.value.get(name), keys)
                      for name, keys in (("process", _PROCESS_KEYS), ("model", _MODEL_KEYS)))  # fmt: skip
    result = root.copy()
    result.value = dict(root.value)
    for section in ("services", "instances", "models"):
        entries = root.value.get(section)
        if entries is None or type(entries.value) is not dict:
            continue
        twin = entries.copy()
        twin.value = {name: _with_defaults(section, entry, process, model) for name, entry in entries.value.items()}
        result.value[section] = twin
    return result


def _known(node: Node | None, keys: tuple[str, ...]) -> dict[str, Node]:
    if node is None or type(node.value) is not dict:
        return {}
    return {key: value for key, value in node.value.items() if key in keys}


def _with_defaults(section: str, entry: Node, process: dict[str, Node], model: dict[str, Node]) -> Node:
    if type(entry.value) is not dict:
        return entry
    under: dict[str, Node] = {}
    if section != "models" or "engine" in entry.value:
        under.update(process)
    if "external" in entry.value:
        under = {key: value for key, value in under.items() if key in _EXTERNAL_KEYS}
    if section == "models" and "route" not in entry.value:
        under.update(model)
    return _overlay(under, entry) if under else entry


def _overlay(under: dict[str, Node], over: Node, path: tuple[str, ...] = ()) -> Node:
    """Return `over` completed from `under`: mappings deeply, anything else replaced."""
    if len(path) == 2 and path[0] == "probes" and _PROBE_WAYS & over.value.keys():
        under = {key: value for key, value in under.items() if key not in _PROBE_WAYS}
    result = over.copy()
    result.value = {**under, **over.value}
    for key, value in over.value.items():
        below = under.get(key)
        if below is not None and key not in _WHOLE_KEYS and type(below.value) is dict and type(value.value) is dict:
            result.value[key] = _overlay(below.value, value, (*path, key))
    return result


def plain(root: Node) -> Any:
    """Return the tree as plain Python values."""
    return _plain(root, 0, text=False, verbatim=False)


def _plain(node: Node, depth: int, *, text: bool, verbatim: bool) -> Any:
    value = node.value
    if type(value) is str:
        if not node.plain or node.raw is not None:
            return value
        resolved = resolve(value)
        return value if text and resolved is not None else resolved
    if type(value) is list:
        return [_plain(item, depth + 1, text=text, verbatim=verbatim) for item in value]
    if text or verbatim or depth < 2:
        return {key: _plain(item, depth + 1, text=text, verbatim=verbatim) for key, item in value.items()}
    return {
        key: _plain(item, depth + 1, text=key in _TEXT_KEYS, verbatim=key in _VERBATIM_KEYS)
        for key, item in value.items()
    }
