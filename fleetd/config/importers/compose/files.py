"""Convert a compose file to a fleet: its model servers as engines, its other services as services, each in its container.

Invariants:
- Only services with an image are converted; one that is built from a Dockerfile is refused.
- The volumes of compose keep their names (project_volume), so that the data is found again.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from fleetd.config.importers.compose.services import ComposeService, ServiceReader, engine_of
from fleetd.config.importers.compose.values import ComposeValues
from fleetd.config.importers.emit import to_yaml
from fleetd.config.importers.report import Imported, Report
from fleetd.config.names import free_name, process_name
from fleetd.config.yaml.parser import Source, compose
from fleetd.config.yaml.transform import plain
from fleetd.errors import ConfigError, Problem

_LINE = re.compile(r"\s*(?:export\s+)?([A-Za-z_][A-Za-z0-9_]*)\s*=\s*(.*?)\s*")
_LONGEST = 256 * 1024


def import_compose(text: str, *, shown: str = "compose.yaml") -> Imported:
    """Return the entries of every service with an image. Raises ConfigError."""
    document = plain(compose(Source(shown, Path(shown), text=text)))
    found = document.get("services") if isinstance(document, dict) else None
    if not isinstance(found, dict) or not found:
        raise ConfigError([Problem(shown, 0, 0, "", "has no services: is it a compose file?")])
    folder = Path(shown).absolute().parent if shown != "-" else Path.cwd()
    report = Report()
    volumes = document.get("volumes")
    stated = _dotenv(folder / ".env")
    values = ComposeValues(folder, "", stated, volumes if isinstance(volumes, dict) else {})
    project = values.concrete(document.get("name") or "") or folder.name
    values = ComposeValues(folder, re.sub(r"[^a-z0-9_-]", "", project.lower()).lstrip("_-"), stated, values.volumes)
    services = _services(found, values, report)
    reader = ServiceReader(values, services, report)
    data: dict[str, Any] = {"version": 1}
    for one in services.values():
        try:
            reader.read(one)
        except ValueError as error:
            report.refused(one.name, "command", f"cannot be split into words: {error}")
            one.section = ""
    for section in ("services", "instances", "models"):
        entries = {one.key: one.entry for one in services.values() if one.section == section}
        if entries:
            data[section] = entries
    if len(data) == 1:
        raise ConfigError([Problem(shown, 0, 0, "services", "has no service with an image")])
    for key in document:
        if key not in ("services", "volumes", "version", "name", "networks") and not str(key).startswith("x-"):
            report.refused("", str(key), "has no equivalent")
    if values.withheld:
        names = ", ".join(sorted(values.withheld))
        report.warn("", ".env", f"fleetd does not read it: set {names} in fleetd's environment, or use env_file")
    report.approximated(
        "", "", "compose must not run the same services: docker compose down, before fleetd starts them"
    )
    return Imported(to_yaml(data, {"": [f"{len(services)} services from {shown}"]}), data, report)


def _services(found: dict[str, Any], values: ComposeValues, report: Report) -> dict[str, ComposeService]:
    services: dict[str, ComposeService] = {}
    keys: set[str] = set()
    for name, raw in found.items():
        if not isinstance(raw, dict) or not raw.get("image"):
            what = (
                "is built from a Dockerfile: give it an image"
                if isinstance(raw, dict) and raw.get("build")
                else "has no image"
            )
            report.refused(str(name), "", what)
            continue
        engine, inside = engine_of(values.concrete(raw["image"]))
        try:
            ports = values.ports(raw.get("ports"))
        except ValueError as error:
            report.refused(str(name), "ports", str(error))
            ports = []
        if engine is not None:
            ports.sort(key=lambda pair: pair[1] != inside)
        key = free_name(process_name(str(name), "service"), keys)
        keys.add(key)
        services[str(name)] = ComposeService(str(name), key, raw, engine, ports)
    return services


def _dotenv(path: Path) -> dict[str, str]:
    """Return the variables of the file `.env` next to a compose file; empty if there is none."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except OSError:
        return {}
    with os.fdopen(descriptor, "rb") as file:
        if not path.is_file():
            return {}
        lines = file.read(_LONGEST).decode("utf-8", "replace").splitlines()
    found = [match for match in map(_LINE.fullmatch, lines) if match is not None]
    return {match[1]: match[2].strip("\"'") for match in found}
