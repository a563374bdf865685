"""Convert a systemd service unit to a service, or to an engine where it runs a model server.

Invariants:
- Commands are split as systemd does: quotes, backslashes at the end of a line, prefixes such as `-`, specifiers such as %h.
- A setting that fleetd has no key for is in the report.
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

from fleetd.config.importers.emit import Variable, literal, to_yaml
from fleetd.config.importers.report import Imported, Report
from fleetd.config.importers.servers import server_entry
from fleetd.config.names import process_name
from fleetd.errors import ConfigError, Problem

_SECTION = re.compile(r"\[([^\]]+)\]")
_VARIABLE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)\}|\$([A-Za-z_][A-Za-z0-9_]*)")
_SPAN = re.compile(r"(\d+)\s*(ms|s|sec|seconds?|m|min|minutes?|h|hr|hours?|d|days?)?")
_UNITS = {"ms": "ms", "s": "s", "m": "m", "h": "h", "d": "d"}
_POLICY = {"always": "always", "on-success": "always", "no": "never"}
_SILENT = frozenset({
    "Description", "Documentation", "Type", "Wants", "WantedBy", "RequiredBy", "Alias", "SyslogIdentifier", "StandardOutput",
    "StandardError", "TimeoutStartSec", "StartLimitIntervalSec", "StartLimitBurst", "DefaultDependencies",
})  # fmt: skip
_READ = frozenset({
    "ExecStart", "Environment", "EnvironmentFile", "WorkingDirectory", "User", "Restart", "RestartSec", "TimeoutStopSec", "TimeoutSec",
    "KillSignal", "LimitNOFILE", "Nice", "MemoryMax", "UMask", "ExecStop", "ExecStartPre", "ExecStopPost", "SuccessExitStatus",
})  # fmt: skip


def import_systemd(text: str, *, shown: str = "model.service") -> Imported:
    """Return the entry of a unit. Raises ConfigError."""
    settings = _settings(text, shown)
    if not settings.get("ExecStart"):
        raise ConfigError([Problem(shown, 0, 0, "", "has no ExecStart: is it a service unit?")])
    report = Report()
    name = process_name(Path(shown).name.removesuffix(".service"), "service")
    reader = _UnitReader(name, settings, report)
    section, entry = reader.entry()
    data = {"version": 1, section: {name: entry}}
    report.warn(name, "", f"systemd must not start it too: systemctl disable --now {Path(shown).name}")
    return Imported(to_yaml(data, {"": [f"the unit {shown}"]}), data, report)


def _settings(text: str, shown: str) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    section, pending, pending_line = "", "", 0
    for number, raw in enumerate(text.splitlines(), start=1):
        line = raw.strip()
        if not line or line[0] in "#;":
            continue
        if line.endswith("\\"):
            pending, pending_line = pending + line[:-1] + " ", pending_line or number
            continue
        line, number, pending, pending_line = pending + line, pending_line or number, "", 0
        header = _SECTION.fullmatch(line)
        if header is not None:
            section = header[1]
            continue
        key, equals, value = line.partition("=")
        if not equals or not section:
            raise ConfigError([Problem(shown, number, 0, "", f"{line[:60]!r} is no setting of a unit")])
        values = found.setdefault(key.strip(), [])
        if value.strip():
            values.append(value.strip())
        else:
            values.clear()  # an empty value resets the list
    return found


class _UnitReader:
    def __init__(self, name: str, settings: dict[str, list[str]], report: Report) -> None:
        self.name, self.settings, self.report = name, settings, report
        self.env: dict[str, str] = {}

    def entry(self) -> tuple[str, dict[str, Any]]:
        for line in self.settings.get("Environment", ()):
            for pair in self._split("Environment", line):
                variable, equals, value = pair.partition("=")
                if equals:
                    self.env[variable] = value
        starts = self.settings["ExecStart"]
        if len(starts) > 1:
            self.report.refused(self.name, "ExecStart", "only the first of several commands is converted")
        env = {variable: literal(value) for variable, value in self.env.items()}
        section, entry = server_entry(self.name, self._command("ExecStart", starts[0]), env, self.report)
        self._places(entry)
        self._supervision(entry)
        for key in self.settings:
            if key not in _READ | _SILENT:
                self.report.refused(self.name, key, "has no equivalent")
        return section, entry

    def _split(self, key: str, line: str) -> list[str]:
        home = str(Path.home())
        line = (
            line.replace("%%", "\0").replace("%h", home).replace("%n", f"{self.name}.service").replace("%N", self.name)
        )
        line = line.replace("\0", "%")
        try:
            return shlex.split(line)
        except ValueError as error:
            self.report.refused(self.name, key, f"cannot be split into words: {error}")
            return []

    def _command(self, key: str, line: str) -> list[str]:
        words: list[str] = []
        for word in self._split(key, line.lstrip("-@:+!|")):
            bare = re.fullmatch(r"\$([A-Za-z_][A-Za-z0-9_]*)", word)
            if bare is not None and bare[1] in self.env:  # systemd splits this form into words
                words += [literal(part) for part in self.env[bare[1]].split()]
                continue
            known = _VARIABLE.sub(lambda found: self.env.get(found[1] or found[2], found[0]), word).replace("$$", "$")
            known = literal(known)
            missing = _VARIABLE.search(known)
            put = _VARIABLE.sub(lambda found: f"${{{found[1] or found[2]}:-}}", known)
            words.append(Variable(put) if missing is not None else known)
        return words

    def _last(self, key: str) -> str | None:
        values = self.settings.get(key)
        return values[-1] if values else None

    def _places(self, entry: dict[str, Any]) -> None:
        files = list(self.settings.get("EnvironmentFile", ()))
        if files:
            entry["env_file"] = [one.lstrip("-") for one in files]
            if any(one.startswith("-") for one in files):
                self.report.approximated(self.name, "EnvironmentFile", "a file that is missing blocks the start")
        folder = self._last("WorkingDirectory")
        if folder:
            entry["cwd"] = folder.lstrip("-").replace("%h", str(Path.home()))
        for key, name in (("User", "user"), ("UMask", "umask")):
            if self._last(key):
                entry[name] = self._last(key)
        limits: dict[str, Any] = {}
        nofile, nice, memory = self._last("LimitNOFILE"), self._last("Nice"), self._last("MemoryMax")
        if nofile and nofile.split(":")[0].isdecimal():
            limits["nofile"] = min(int(nofile.split(":")[0]), 10_000_000)
        if nice and re.fullmatch(r"-?\d+", nice):
            limits["nice"] = int(nice)
        if memory and re.fullmatch(r"\d+[KMGT]?", memory):
            limits["memory"] = f"{memory}iB" if memory[-1].isalpha() else int(memory)
        if limits:
            entry["limits"] = limits

    def _supervision(self, entry: dict[str, Any]) -> None:
        policy = self._last("Restart") or "no"
        restart: dict[str, Any] = {"policy": _POLICY.get(policy, "on-failure")}
        pause = _span(self._last("RestartSec"))
        if pause is not None and policy != "no":
            restart["backoff"] = {"initial": pause}
        if restart != {"policy": "always"}:
            entry["restart"] = restart
        stop: dict[str, Any] = {}
        timeout = _span(self._last("TimeoutStopSec") or self._last("TimeoutSec"))
        if timeout is not None:
            stop["timeout"] = timeout
        signal = self._last("KillSignal")
        if signal:
            stop["signal"] = signal
        command = self._last("ExecStop")
        if command:
            stop["command"] = self._command("ExecStop", command)
        if stop:
            entry["stop"] = stop
        hooks: dict[str, Any] = {}
        for key, name in (("ExecStartPre", "pre_start"), ("ExecStopPost", "post_stop")):
            lines = self.settings.get(key, [])
            if lines:
                hooks[name] = self._command(key, lines[0])
            if len(lines) > 1:
                self.report.refused(self.name, key, "only the first of several commands is converted")
        if hooks:
            entry["hooks"] = hooks


def _span(text: str | None) -> str | None:
    """Return a time span of systemd as a duration; None if there is none, or it has no end."""
    found = _SPAN.fullmatch(text.strip()) if text else None
    if found is None:
        return None
    unit = found[2] or "s"
    return found[1] + _UNITS.get(unit, _UNITS.get(unit[0], "s"))
