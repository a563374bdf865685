"""Mistakes that only show when two places are looked at together: names, ports, listeners.

Invariants:
- Each check takes the index and returns problems; none stops another. References are in `references.py`.
- Replica ranges count port by port. A disabled process and an external server take no port.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from fleetd.config.schema.base import MODEL_NAME, PROCESS_NAME
from fleetd.config.schema.fleet import DEFAULT_ADMIN, DEFAULT_LISTEN
from fleetd.config.schema.types import Address, AddressType, Flag
from fleetd.config.schema.unsupported import is_unsupported
from fleetd.config.validate.messages import Messages
from fleetd.config.validate.raw_entries import Index, ProcessEntry, build_index, mapping, read
from fleetd.config.validate.references import check_references
from fleetd.config.yaml.source_map import Marks, path_text
from fleetd.errors import Problem

_PROCESS_NAME = re.compile(PROCESS_NAME)
_MODEL_NAME = re.compile(MODEL_NAME)
RESERVED_NAMES = frozenset({"all", "fleetd", "fleetctl"})


def check(data: Any, marks: Marks, messages: Messages) -> list[Problem]:
    """Return the problems across entries of a configuration in plain data, which may have other mistakes too."""
    index = build_index(data)
    return [
        *_names(index, marks),
        *_duplicates(index, marks),
        *_ports(data, index, marks),
        *_listeners(data, marks),
        *_service_probes(data, marks),
        *check_references(index, marks, messages),
    ]


def _names(index: Index, marks: Marks) -> Iterator[Problem]:
    for process in index.processes:
        if not _PROCESS_NAME.fullmatch(process.key):
            hint = "; give the model that name as an alias" if process.path[0] == "models" else ""
            message = (
                f"a process is named with letters, digits, '.', '_' and '-', 63 at most, a letter or digit first{hint}"
            )
            yield marks.problem(process.path, message, at_key=True)
        elif process.key in RESERVED_NAMES:
            yield marks.problem(process.path, f"the name {process.key} is reserved", at_key=True)
    for name, entry in index.models.items():
        if "engine" not in entry and not _MODEL_NAME.fullmatch(name):
            message = "a model is named with letters, digits and '._:/@+-', 200 at most, a letter or digit first"
            yield marks.problem(("models", name), message, at_key=True)


def _duplicates(index: Index, marks: Marks) -> Iterator[Problem]:
    owners: dict[str, ProcessEntry] = {}
    for process in index.processes:
        for name in dict.fromkeys((process.key, *process.names)):
            first = owners.setdefault(name, process)
            if first is not process:
                message = f"the process name {name} is taken by {path_text(first.path)}"
                yield marks.problem(process.path, message, at_key=True)
                break


def _ports(data: Any, index: Index, marks: Marks) -> Iterator[Problem]:
    taken: dict[int, str] = {}
    for section, default in (("gateway", DEFAULT_LISTEN), ("admin", DEFAULT_ADMIN)):
        listen = _listen(data, section, default)
        if listen.port and listen.port in taken:
            said, other = (section, "gateway") if section in mapping(data) else ("gateway", section)
            yield marks.problem((said, "listen"), f"port {listen.port} is already the port of {other}.listen")
        elif listen.port:
            taken[listen.port] = f"{section}.listen"
    for process in index.processes:
        if process.port is not None and process.enabled and "external" not in process.data:
            yield from _ports_of(process, process.port, taken, marks)


def _ports_of(process: ProcessEntry, first: int, taken: dict[int, str], marks: Marks) -> Iterator[Problem]:
    path = (*process.path, "port")
    if first + len(process.names) - 1 > 65535:
        yield marks.problem(path, f"{len(process.names)} replicas from port {first} go beyond port 65535")
        return
    label = path_text(process.path)
    clashes = []
    for port, name in enumerate(process.names, start=first):
        if port in taken:
            clashes.append(f"port {port} is already the port of {taken[port]}")
        else:
            taken[port] = label if name == process.key else f"{label} ({name})"
    if clashes:
        more = f", and {len(clashes) - 1} more" if len(clashes) > 1 else ""
        yield marks.problem(path, clashes[0] + more)


def _listen(data: Any, section: str, default: Address) -> Address:
    said = read(AddressType(), mapping(mapping(data).get(section)).get("listen"))
    return said if isinstance(said, Address) else default


def _listeners(data: Any, marks: Marks) -> Iterator[Problem]:
    gateway = mapping(mapping(data).get("gateway"))
    listen = _listen(data, "gateway", DEFAULT_LISTEN)
    insecure = read(Flag(), gateway.get("insecure"))
    if not listen.is_loopback and not insecure and "keys_file" not in gateway:
        keys = "set keys_file, or say" if not is_unsupported(("gateway", "keys_file")) else "say"
        message = f"{listen.host} can be reached from other machines by anybody: {keys} insecure: true"
        yield marks.problem(("gateway", "listen"), message)
    admin = _listen(data, "admin", DEFAULT_ADMIN)
    if not admin.is_loopback and "keys_file" not in gateway:
        message = f"{admin.host} can be reached from other machines: without keys_file it must be a loopback address"
        yield marks.problem(("admin", "listen"), message)


def _service_probes(data: Any, marks: Marks) -> Iterator[Problem]:
    for name, service in mapping(mapping(data).get("services")).items():
        for kind, probe in mapping(mapping(service).get("probes")).items():
            if read(Flag(), mapping(probe).get("completion")):
                path = ("services", name, "probes", kind, "completion")
                yield marks.problem(
                    path, "only a process with an engine can be asked for a completion: use http or tcp"
                )
