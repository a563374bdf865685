"""Convert the programs of a supervisord.conf to services, or to engines where they run model servers.

Invariants:
- Expressions such as %(ENV_NAME)s stay variables: their values may be secret.
- A setting that fleetd has no key for is in the report.
"""

from __future__ import annotations

import configparser
import re
import shlex
from pathlib import Path
from typing import Any

from fleetd.config.importers.emit import Variable, literal, to_yaml
from fleetd.config.importers.report import Imported, Report
from fleetd.config.importers.servers import server_entry
from fleetd.config.names import process_name
from fleetd.errors import ConfigError, Problem

_EXPRESSION = re.compile(r"%\(([A-Za-z_][A-Za-z0-9_]*)\)(?:0?\d*[sd])|%%")
_PAIR = re.compile(r"""\s*([A-Za-z_][A-Za-z0-9_]*)\s*=\s*("[^"]*"|'[^']*'|[^,]*?)\s*(?:,|$)""")
_SILENT = frozenset({
    "command", "directory", "environment", "autostart", "autorestart", "exitcodes", "startsecs", "startretries", "stopsignal",
    "stopwaitsecs", "user", "numprocs", "numprocs_start", "process_name", "umask", "priority", "stopasgroup", "killasgroup",
    "redirect_stderr", "stdout_logfile", "stderr_logfile", "stdout_logfile_maxbytes", "stderr_logfile_maxbytes",
    "stdout_logfile_backups", "stderr_logfile_backups",
})  # fmt: skip


def import_supervisord(text: str, *, shown: str = "supervisord.conf") -> Imported:
    """Return an entry for every program. Raises ConfigError."""
    parser = configparser.RawConfigParser(strict=False, inline_comment_prefixes=(";",))
    try:
        parser.read_string(text, shown)
    except configparser.Error as error:
        line = getattr(error, "lineno", 0) or 0
        message = str(error).splitlines()[0].partition("'")[0].strip() or "cannot be read"
        raise ConfigError([Problem(shown, line, 0, "", f"is no supervisord.conf: {message}")]) from None
    programs = [section for section in parser.sections() if section.startswith("program:")]
    if not programs:
        raise ConfigError([Problem(shown, 0, 0, "", "has no [program:NAME]: is it a supervisord.conf?")])
    report = Report()
    data: dict[str, Any] = {"version": 1}
    for section in sorted(programs, key=lambda one: _whole(parser[one].get("priority")) or 999):
        name = process_name(section.partition(":")[2].strip(), "program")
        try:
            place, entry = _ProgramReader(name, dict(parser[section]), Path(shown), report).entry()
        except ValueError as error:
            report.refused(name, "", str(error))
            continue
        data.setdefault(place, {})[name] = entry
    for section in parser.sections():
        kind = section.partition(":")[0]
        if kind in ("group", "include", "eventlistener", "fcgi-program"):
            report.refused(
                "", f"[{section}]", "import each file by itself" if kind == "include" else "has no equivalent"
            )
    if len(data) == 1:
        raise ConfigError([Problem(shown, 0, 0, "", "has no program that can be converted")])
    report.warn("", "", "supervisord must not run the same programs: supervisorctl stop all")
    return Imported(to_yaml(data, {"": [f"{len(programs)} programs from {shown}"]}), data, report)


class _ProgramReader:
    def __init__(self, name: str, settings: dict[str, str], path: Path, report: Report) -> None:
        self.name, self.settings, self.path, self.report = name, settings, path, report

    def _text(self, text: str) -> str:
        variable, text = False, literal(text)

        def put(found: re.Match[str]) -> str:
            nonlocal variable
            key = found[1]
            if key is None:
                return "%"
            if key.startswith("ENV_"):
                variable = True
                return f"${{{key[4:]}:-}}"
            values = {
                "program_name": self.name,
                "group_name": self.name,
                "process_num": "{index}",
                "here": str(self.path.absolute().parent),
                "numprocs": self.settings.get("numprocs", "1"),
            }
            return values.get(key, found[0])

        result = _EXPRESSION.sub(put, text)
        return Variable(_EXPRESSION.sub(put, text.replace("$", "$$"))) if variable else result

    def entry(self) -> tuple[str, dict[str, Any]]:
        """Return the section and the entry of a program. Raises ValueError."""
        command = self.settings.get("command", "")
        words = [self._text(word) for word in shlex.split(command)]
        if not words:
            raise ValueError("has no command")
        env = {
            name: self._text(value.strip("\"'")) for name, value in _PAIR.findall(self.settings.get("environment", ""))
        }
        section, entry = server_entry(self.name, words, env, self.report)
        for key, name in (("directory", "cwd"), ("user", "user"), ("umask", "umask")):
            if self.settings.get(key):
                entry[name] = self._text(self.settings[key])
        count = _whole(self.settings.get("numprocs")) or 1
        if count > 1:
            entry["replicas"] = min(count, 256)
        self._supervision(entry)
        if self.settings.get("autostart", "true").lower() in ("false", "0", "no", "off"):
            entry["enabled"] = False
        for key in self.settings:
            if key not in _SILENT:
                self.report.refused(self.name, key, "has no equivalent")
        return section, entry

    def _supervision(self, entry: dict[str, Any]) -> None:
        restart: dict[str, Any] = {}
        policy = self.settings.get("autorestart", "unexpected").lower()
        if policy in ("false", "0", "no", "off"):
            restart["policy"] = "never"
        elif policy == "unexpected":
            restart["policy"] = "on-failure"
            codes = [int(code) for code in re.findall(r"\d+", self.settings.get("exitcodes", "0")) if int(code) < 256]
            if codes != [0]:
                restart["success_codes"] = list(dict.fromkeys(codes))
        seconds = _whole(self.settings.get("startsecs"))
        if seconds is not None:
            restart["stable_after"] = f"{seconds}s" if seconds else 0
        retries = _whole(self.settings.get("startretries"))
        if retries:
            restart["crash_loop"] = {"count": min(retries + 1, 100_000)}
        if restart:
            entry["restart"] = restart
        stop: dict[str, Any] = {}
        if self.settings.get("stopsignal"):
            stop["signal"] = "SIG" + self.settings["stopsignal"].upper().removeprefix("SIG")
        wait = _whole(self.settings.get("stopwaitsecs"))
        if wait is not None:
            stop["timeout"] = f"{min(wait, 86_400)}s" if wait else 0
        if stop:
            entry["stop"] = stop


def _whole(text: str | None) -> int | None:
    return int(text) if text is not None and re.fullmatch(r"\d{1,9}", text.strip()) else None
