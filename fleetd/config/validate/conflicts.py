"""Check for conflicts between entries: names, ports, listeners.

Invariants:
- Each check takes the index and returns problems; none stops another. References are in `references.py`.
- Replica ranges count port by port. A disabled process and an external server take no port.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from fleetd.config.names import RESERVED_NAMES
from fleetd.config.schema.base import MODEL_NAME, PROCESS_NAME
from fleetd.config.schema.fleet import DEFAULT_ADMIN, DEFAULT_LISTEN
from fleetd.config.schema.types import Address, AddressType, Flag
from fleetd.config.schema.unsupported import is_unsupported
from fleetd.config.validate.messages import Messages
from fleetd.config.validate.raw_entries import Index, ProcessEntry, build_index, mapping, read
from fleetd.config.validate.references import check_references
from fleetd.config.yaml.source_map import SourceMap, path_text
from fleetd.errors import Problem
from fleetd.units import shown

_PROCESS_NAME = re.compile(PROCESS_NAME)
_MODEL_NAME = re.compile(MODEL_NAME)


def check(data: Any, source_map: SourceMap, messages: Messages) -> list[Problem]:
    """Return the problems across entries of plain data that may be invalid elsewhere."""
    index = build_index(data)
    return [
        *_names(index, source_map),
        *_duplicates(index, source_map),
        *_ports(data, index, source_map),
        *_listeners(data, source_map),
        *_service_probes(data, source_map),
        *check_references(index, source_map, messages),
    ]


def _names(index: Index, source_map: SourceMap) -> Iterator[Problem]:
    for process in index.processes:
        if not _PROCESS_NAME.fullmatch(process.key):
            hint = " (give the model that name as an alias)" if process.path[0] == "models" else ""
            rule = "use letters, digits, '.', '_' and '-', at most 63, a letter or digit first"
            message = f"invalid process name {shown(process.key)}: {rule}{hint}"
            yield source_map.problem(process.path, message, at_key=True)
        elif process.key in RESERVED_NAMES:
            yield source_map.problem(process.path, f"the name {process.key!r} is reserved", at_key=True)
    for name, entry in index.models.items():
        if "engine" not in entry and not _MODEL_NAME.fullmatch(name):
            rule = "use letters, digits and '._:/@+-', at most 200, a letter or digit first"
            yield source_map.problem(("models", name), f"invalid model name {shown(name)}: {rule}", at_key=True)


def _duplicates(index: Index, source_map: SourceMap) -> Iterator[Problem]:
    owners: dict[str, ProcessEntry] = {}
    for process in index.processes:
        for name in dict.fromkeys((process.key, *process.names)):
            first = owners.setdefault(name, process)
            if first is not process:
                message = f"the process name {name!r} is already used by {path_text(first.path)}"
                yield source_map.problem(process.path, message, at_key=True)
                break


def _ports(data: Any, index: Index, source_map: SourceMap) -> Iterator[Problem]:
    taken: dict[int, str] = {}
    for section, default in (("gateway", DEFAULT_LISTEN), ("admin", DEFAULT_ADMIN)):
        listen = _listen(data, section, default)
        if listen.port and listen.port in taken:
            written, other = (section, "gateway") if section in mapping(data) else ("gateway", section)
            yield source_map.problem((written, "listen"), f"port {listen.port} is already used by {other}.listen")
        elif listen.port:
            taken[listen.port] = f"{section}.listen"
    for process in index.processes:
        if process.port is not None and process.enabled and "external" not in process.data:
            yield from _ports_of(process, process.port, taken, source_map)


def _ports_of(process: ProcessEntry, first: int, taken: dict[int, str], source_map: SourceMap) -> Iterator[Problem]:
    path = (*process.path, "port")
    if first + len(process.names) - 1 > 65535:
        yield source_map.problem(path, f"{len(process.names)} replicas from port {first} go beyond port 65535")
        return
    label = path_text(process.path)
    clashes = []
    for port, name in enumerate(process.names, start=first):
        if port in taken:
            clashes.append(f"port {port} is already used by {taken[port]}")
        else:
            taken[port] = label if name == process.key else f"{label} ({name})"
    if clashes:
        more = f", and {len(clashes) - 1} more" if len(clashes) > 1 else ""
        yield source_map.problem(path, clashes[0] + more)


def _listen(data: Any, section: str, default: Address) -> Address:
    address = read(AddressType(), mapping(mapping(data).get(section)).get("listen"))
    return address if isinstance(address, Address) else default


def _listeners(data: Any, source_map: SourceMap) -> Iterator[Problem]:
    gateway = mapping(mapping(data).get("gateway"))
    listen = _listen(data, "gateway", DEFAULT_LISTEN)
    insecure = read(Flag(), gateway.get("insecure"))
    if not listen.is_loopback and not insecure and "keys_file" not in gateway:
        keys = "set keys_file, or" if not is_unsupported(("gateway", "keys_file")) else "set"
        message = f"other machines can reach {listen.host!r} without a key ({keys} insecure: true to allow this)"
        yield source_map.problem(("gateway", "listen"), message)
    admin = _listen(data, "admin", DEFAULT_ADMIN)
    if not admin.is_loopback and "keys_file" not in gateway:
        message = (
            f"other machines can reach {admin.host!r} without a key (use a loopback address, or set gateway.keys_file)"
        )
        yield source_map.problem(("admin", "listen"), message)


def _service_probes(data: Any, source_map: SourceMap) -> Iterator[Problem]:
    for name, service in mapping(mapping(data).get("services")).items():
        for kind, probe in mapping(mapping(service).get("probes")).items():
            if read(Flag(), mapping(probe).get("completion")):
                path = ("services", name, "probes", kind, "completion")
                yield source_map.problem(path, "a service has no engine to request a completion from (use http or tcp)")
