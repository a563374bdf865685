"""Convert PM2's files to fleet.yaml: ecosystem files in all forms, `~/.pm2/dump.pm2`, and the output of `pm2 jlist`.

Invariants:
- Fields are in `fields.py`; this module has the forms of files, names, and checks across apps.
- A dump contains the whole environment of the shell that started PM2. Only variables that the app seems to need are kept, and
  a secret becomes a reference to a variable instead of a value in a file.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from fleetd.config.importers import nodejs
from fleetd.config.importers.emit import Variable, to_yaml
from fleetd.config.importers.pm2.app import Pm2App
from fleetd.config.importers.pm2.fields import convert
from fleetd.config.importers.relaxed_json import parse_relaxed
from fleetd.config.importers.report import Imported, Report
from fleetd.config.names import RESERVED_NAMES, free_name
from fleetd.config.schema.fleet import DEFAULT_ADMIN, DEFAULT_LISTEN
from fleetd.config.secrets import holds_secret
from fleetd.config.yaml.parser import Source, compose, read_source
from fleetd.config.yaml.transform import plain
from fleetd.errors import ConfigError, Problem

_REFERRED = "is a secret: fleet.yaml refers to the variable, so set it where fleetd starts"
Evaluate = Callable[[Path], tuple[Any, list[str]]]
_SCRIPTS = (".js", ".cjs", ".mjs")
_SHELL = re.compile(
    r"(PATH|HOME|SHELL|TERM|PWD|OLDPWD|USER|LOGNAME|LANG|LANGUAGE|TZ|MAIL|EDITOR|PAGER|HOSTNAME|SHLVL|_|LS_COLORS|COLORTERM|DISPLAY"
    r"|TMPDIR|PS1|HISTSIZE|XPC_.*|LC_.*|SSH_.*|XDG_.*|DBUS_.*|TERM_.*|Apple_.*|COMMAND_MODE|__CF.*|SUDO_.*|NVM_.*|PM2_.*|npm_.*"
    r"|NODE_APP_INSTANCE|unique_id|axm_.*|vizion_running|status|pm_.*|km_link|LESS.*|ZSH|INIT_CWD|SECURITYSESSIONID|LaunchInstanceID)"
)
_DUMPED = {
    "pm_exec_path": "script", "pm_cwd": "cwd", "exec_interpreter": "interpreter", "pm_out_log_path": "out_file",
    "pm_err_log_path": "error_file", "node_args": "node_args", "args": "args", "name": "name", "exec_mode": "exec_mode",
    "autorestart": "autorestart", "watch": "watch", "ignore_watch": "ignore_watch", "max_memory_restart": "max_memory_restart",
    "kill_timeout": "kill_timeout", "cron_restart": "cron_restart", "restart_delay": "restart_delay",
    "exp_backoff_restart_delay": "exp_backoff_restart_delay", "max_restarts": "max_restarts", "min_uptime": "min_uptime",
    "stop_exit_codes": "stop_exit_codes", "treekill": "treekill", "wait_ready": "wait_ready", "uid": "user",
    "shutdown_with_message": "shutdown_with_message",
    "log_date_format": "log_date_format", "namespace": "namespace",
}  # fmt: skip
# Values that PM2 writes into every dump, set by the user or not.
_DUMP_DEFAULTS: Mapping[str, Any] = {
    "autorestart": True, "watch": False, "treekill": True, "wait_ready": False,
    "shutdown_with_message": False, "namespace": "default", "node_args": [],
    "kill_timeout": 1600, "max_restarts": 16, "min_uptime": 1000, "exec_interpreter": None, "instances": 1,
}  # fmt: skip


def import_pm2(
    path: Path, *, profile: str | None = None, secrets: bool = False, evaluate: Evaluate | None = None
) -> Imported:
    """Return the fleet of a PM2 file: .js .cjs .mjs (by Node), .json, .yaml, dump.pm2 or jlist output. Raises ConfigError.

    `profile` is the PROFILE of `pm2 start --env PROFILE`; with `secrets`, a JavaScript file sees the values of secrets.
    """
    evaluate = evaluate or partial(nodejs.evaluate, secrets=secrets)
    report = Report()
    if path.suffix in _SCRIPTS:
        if not path.is_file():
            raise ConfigError([Problem(str(path), 0, 0, "", "there is no such file")])
        document, read = evaluate(path)
        for name in read:
            _report_variable(name, report, secrets=secrets)
    else:
        source = read_source(path, str(path))
        document = _parse(path, source)
    folder = None if path.name.startswith("dump") else Path.cwd() / path.parent
    return import_document(document, shown=path.name, folder=folder, profile=profile, report=report)


def _report_variable(name: str, report: Report, *, secrets: bool) -> None:
    if not secrets and holds_secret(name, os.environ.get(name, "")) and os.environ.get(name):
        report.warn("", f"process.env.{name}", _REFERRED)
    else:
        report.warn("", f"process.env.{name}", "was read during the import: the result contains its current value")


def _parse(path: Path, source: Source) -> Any:
    if path.suffix in (".yaml", ".yml"):
        return plain(compose(source))
    try:
        return parse_relaxed(source.text)
    except ValueError as error:
        raise ConfigError([Problem(source.shown, 0, 0, "", f"is not JSON: {error}")]) from None


def import_document(
    document: Any,
    *,
    shown: str = "pm2",
    folder: Path | None = None,
    profile: str | None = None,
    report: Report | None = None,
    timezone: str | None = None,
) -> Imported:
    """Return the fleet of a parsed document, such as the output of `pm2 jlist`."""
    report = report if report is not None else Report()
    apps = _apps(document, shown, report)
    sections: dict[str, dict[str, Any]] = {"services": {}, "instances": {}}
    taken: set[str] = set()
    chosen = profile is None
    for raw in apps:
        app = Pm2App(raw, folder, profile, timezone or local_timezone(), report)
        app.name = _free(app.name, taken, report)
        entry = convert(app)
        chosen |= app.has_profile
        if "command" in entry or app.is_instance:
            sections["instances" if app.is_instance else "services"][app.name] = entry
            taken.add(app.name)
    if not chosen:
        report.warn("", f"env_{profile}", "no app has it: every environment is that of env alone")
    _across(sections, report)
    data = {
        "version": 1,
        **_gateway(sections, report),
        **{section: entries for section, entries in sections.items() if entries},
    }
    head = [f"From PM2's {shown}. The report of the import says what could not be carried over."]
    if sections["instances"]:
        head += [
            "Clients of an Ollama port may go on using it. Requests through the gateway, at /v1, are routed, and counted when memory",
            "is needed.",
        ]
    return Imported(to_yaml(data, {"": head}), data, report)


def _apps(document: Any, shown: str, report: Report) -> list[dict[str, Any]]:
    if isinstance(document, dict):
        for key in ("apps", "pm2"):
            if key in document:
                for other in document:
                    if other in ("deploy", "static"):
                        report.refused("", other, "fleetd does not deploy or serve files")
                inner = document[key]
                document = inner if isinstance(inner, list) else _apps(inner, shown, report)
                break
        else:
            document = [document] if {"script", "exec", "cmd", "pm_exec_path"} & document.keys() else None
    if not isinstance(document, list) or not document:
        raise ConfigError([Problem(shown, 0, 0, "", "has no apps: looked for {apps: [...]}, a list, or one app")])
    apps: list[dict[str, Any]] = []
    for number, one in enumerate(document):
        if not isinstance(one, dict):
            report.refused("", f"apps[{number}]", "is not a mapping")
        elif "pm2_env" in one or "pm_exec_path" in one:
            _add_dumped(apps, one.get("pm2_env", one), one, report)
        else:
            apps.append(one)
    return apps


def _add_dumped(apps: list[dict[str, Any]], dumped: Any, outer: dict[str, Any], report: Report) -> None:
    """Add a process of a dump as an app; further processes of the same name count its instances up."""
    if not isinstance(dumped, dict) or dumped.get("pmx_module"):
        return
    name = dumped.get("name", outer.get("name"))
    twin = next(
        (app for app in apps if app.get("name") == name and app.get("script") == dumped.get("pm_exec_path")), None
    )
    if twin is not None:
        twin["instances"] = twin.get("instances", 1) + 1
        if dumped.get("status") != "stopped":
            twin.pop("autostart", None)
        return
    app = {
        field: dumped[key]
        for key, field in _DUMPED.items()
        if dumped.get(key) is not None and dumped[key] != _DUMP_DEFAULTS.get(key, object())
    }
    app["name"] = name
    if dumped.get("status") == "stopped":
        app["autostart"] = False
        report.approximated(str(name), "status", "is stopped in PM2: enabled: false")
    app["env"] = _own_env(str(name), dumped.get("env"), report)
    for key in ("out_file", "error_file"):
        if "/.pm2/logs/" in str(app.get(key, "")):
            app.pop(key)
    apps.append(app)


def _own_env(name: str, env: Any, report: Report) -> dict[str, str]:
    kept: dict[str, str] = {}
    dropped: list[str] = []
    for key, value in env.items() if isinstance(env, dict) else ():
        if _SHELL.fullmatch(key) or isinstance(value, dict | list) or str(value) == os.environ.get(key) or key == name:
            dropped.append(key)
        elif holds_secret(key, str(value)):
            kept[key] = Variable(f"${{{key}}}")
            report.warn(name, f"env.{key}", _REFERRED)
        else:
            kept[key] = str(value)
    if dropped:
        report.approximated(
            name,
            "env",
            f"{len(dropped)} variables of the shell that started PM2 were left out: {', '.join(sorted(dropped)[:8])} …",
        )
    return kept


def _free(name: str, taken: set[str], report: Report) -> str:
    free = free_name(name, taken, RESERVED_NAMES)
    if free != name:
        report.approximated(name, "name", f"is taken: {free}")
    return free


def _across(sections: Mapping[str, Mapping[str, Any]], report: Report) -> None:
    """Let an app whose port another one has keep PORT as a plain variable: PM2 starts both, and often one of them listens."""
    owners: dict[int, str] = {}
    for section in ("instances", "services"):
        for name, entry in sections[section].items():
            first = entry.get("port")
            ports = range(first, first + entry.get("replicas", 1)) if first else range(0)
            taken = next((port for port in ports if port in owners), None)
            if taken is None or section == "instances":
                owners.update((port, name) for port in ports if port not in owners)
                continue
            del entry["port"]
            entry["env"] = {"PORT": str(first), **entry.get("env", {})}
            detail = f"{taken} is also the port of {owners[taken]}: it stays the variable PORT here; change one if both listen"
            report.warn(name, "port", detail)


def _gateway(sections: Mapping[str, Mapping[str, Any]], report: Report) -> dict[str, Any]:
    """Return another port for the gateway if an app has its default one."""
    entries = [entry for section in sections.values() for entry in section.values() if "port" in entry]
    ports = {entry["port"] + number for entry in entries for number in range(entry.get("replicas", 1))}
    if DEFAULT_LISTEN.port not in ports:
        return {}
    ports.add(DEFAULT_ADMIN.port)
    free = next(port for port in range(DEFAULT_LISTEN.port, 65536) if port not in ports)
    report.warn("gateway", "listen", f"an app has port {DEFAULT_LISTEN.port}, its default: {free} is written")
    return {"gateway": {"listen": f"{DEFAULT_LISTEN.host}:{free}"}}


def local_timezone() -> str | None:
    """Return the IANA name of this machine's time zone, if it has one."""
    if re.fullmatch(r"[A-Za-z]+(?:/[A-Za-z_+-]+)+|UTC", os.environ.get("TZ", "")):
        return os.environ["TZ"]
    target = os.path.realpath("/etc/localtime")
    _, marker, name = target.partition("zoneinfo/")
    return name.removeprefix("posix/").removeprefix("Etc/") if marker else None
