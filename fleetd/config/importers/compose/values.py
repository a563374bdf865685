"""Read values of a compose file: variables, ports, mounts, environments, words.

Invariants:
- A variable stays one where fleet.yaml can hold it, since its value may be secret; a number or a path that the importer must know is
  read from the file `.env` next to the compose file, or from its default.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fleetd.config.importers.emit import Variable
from fleetd.config.secrets import is_secret
from fleetd.units import expand_home

_VARIABLE = re.compile(
    r"\$(?:(?P<escaped>\$)|\{(?P<braced>[A-Za-z_][A-Za-z0-9_]*)(?:(?P<how>:?[-?+])(?P<text>[^{}]*))?\}|(?P<bare>[A-Za-z_][A-Za-z0-9_]*))"
)
_PUBLISHED = re.compile(
    r"(?:(?P<host>[^:\[\]]*|\[[^\]]+\]):)?(?:(?P<published>\d+)?:)?(?P<target>\d+)(?:/(?P<protocol>tcp|udp))?"
)


@dataclass(frozen=True, slots=True)
class ComposeValues:
    """What variables are replaced with: `stated` is the content of `.env`; `folder` is where relative paths start."""

    folder: Path
    project: str
    stated: Mapping[str, str]
    volumes: Mapping[str, Any]
    withheld: set[str] = field(default_factory=set)  # names of secrets in `.env`, which stay variables

    def text(self, value: Any) -> str:
        """Return a text of fleet.yaml."""
        raw = _plain(value)
        if "$" not in raw:
            return raw
        changed = False

        def put(found: re.Match[str]) -> str:
            nonlocal changed
            if found["escaped"]:
                return "$$"
            name = found["braced"] or found["bare"]
            if name in self.stated and not is_secret(name):
                return self._known(found).replace("$", "$$")
            if name in self.stated:
                self.withheld.add(name)
            changed = True
            how, text = found["how"] or ":-", found["text"] or ""
            return f"${{{name}{how}{text}}}" if "+" not in how else f"${{{name}:-}}"

        result = _VARIABLE.sub(put, raw)
        return Variable(result) if changed else result.replace("$$", "$")

    def concrete(self, value: Any) -> str:
        """Return a text with every variable replaced: from `.env`, by its default, or by nothing."""
        return _VARIABLE.sub(lambda found: "$" if found["escaped"] else self._known(found), _plain(value))

    def _known(self, found: re.Match[str]) -> str:
        value = self.stated.get(found["braced"] or found["bare"], "")
        how, text = found["how"] or "", found["text"] or ""
        if "+" in how:
            return text if value else ""
        return value or (text if "-" in how else "")

    def words(self, value: Any) -> list[str]:
        """Return a command: a list, or a text that is split like a shell splits words. Raises ValueError."""
        if isinstance(value, list):
            return [self.text(word) for word in value]
        if value is None:
            return []
        raw = _plain(value)
        return [self.text(word) for word in shlex.split(raw)]

    def environment(self, value: Any) -> dict[str, str]:
        """Return variables of a list or a mapping; one without a value is taken from fleetd's environment."""
        if isinstance(value, list):
            pairs = [str(item).partition("=") for item in value]
            items = [(name, text if equals else None) for name, equals, text in pairs]
        else:
            items = [(str(name), text) for name, text in value.items()] if isinstance(value, dict) else []
        return {name: Variable(f"${{{name}:-}}") if text is None else self.text(text) for name, text in items if name}

    def path(self, text: str) -> str:
        """Return an absolute path."""
        return str((self.folder / expand_home(text)).absolute()) if not text.startswith("/") else text

    def volume(self, name: str) -> str:
        """Return the name that compose gives a volume: with the project's before it, unless the file states one."""
        stated = self.volumes.get(name)
        if isinstance(stated, dict):
            if stated.get("name"):
                return self.concrete(stated["name"])
            if stated.get("external"):
                return name
        return f"{self.project}_{name}"

    def mount(self, value: Any) -> tuple[str | None, list[str]]:
        """Return a mount of `runtime.docker`, or arguments of docker for another kind. Raises ValueError."""
        if isinstance(value, dict):
            kind, target = str(value.get("type", "volume")), self.concrete(value.get("target", ""))
            source, mode = self.concrete(value.get("source") or ""), ":ro" if value.get("read_only") else ""
            if kind not in ("bind", "volume"):
                return None, ["--mount", f"type={kind},target={target}"]
        else:
            parts = self.concrete(value).split(":")
            source, target = (parts[0], parts[1]) if len(parts) > 1 else ("", parts[0])
            mode = ":ro" if "ro" in (parts[2].split(",") if len(parts) > 2 else ()) else ""
            kind = "bind" if source.startswith(("/", ".", "~")) else "volume"
        if not target.startswith("/") or "," in source + target or ":" in source + target:
            raise ValueError(f"{_plain(value)!r} is not a mount that fleetd can write")
        if not source:
            return None, ["--mount", f"type=volume,target={target}"]
        return f"{self.path(source) if kind == 'bind' else self.volume(source)}:{target}{mode}", []

    def ports(self, value: Any) -> list[tuple[int, int]]:
        """Return (port here, port inside) of every published TCP port. Raises ValueError."""
        found = []
        for item in value if isinstance(value, list) else [] if value is None else [value]:
            if isinstance(item, dict):
                target = int(self.concrete(item.get("target", "")))
                found.append((int(self.concrete(item.get("published") or target)), target))
                continue
            match = _PUBLISHED.fullmatch(self.concrete(item))
            if match is None:
                raise ValueError(f"{_plain(item)!r} is not one port")
            if match["protocol"] != "udp":
                here = match["published"] or (
                    match["host"] if match["host"] and match["host"].isdecimal() else match["target"]
                )
                found.append((int(here), int(match["target"])))
        return found


def _plain(value: Any) -> str:
    return ("true" if value else "false") if isinstance(value, bool) else "" if value is None else str(value)
