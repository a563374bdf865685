"""Convert one PM2 app to one service: every field that PM2 knows.

Invariants:
- A difference between fleetd and PM2 is reported, also where fleetd does more (whole process sets, moving windows).
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fleetd.config.importers.nodejs import REGEXP
from fleetd.config.importers.pm2 import lifecycle
from fleetd.config.importers.pm2.app import Pm2App
from fleetd.config.importers.pm2.program import is_node
from fleetd.config.importers.pm2.values import duration, size_bytes, unmarked
from fleetd.units import expand_home, format_size

_COSMETIC = frozenset({
    "force", "execute_command", "windows_hide", "write", "vizion", "pmx", "automation", "trace", "disable_trace", "v8",
    "event_loop_inspector", "deep_monitoring", "io", "install_url", "post_update", "name_prefix",
    "append_env_to_name", "disable_source_map_support", "kill_retry_time", "pid_file",
})  # fmt: skip


_MOST_REPLICAS = 256


def convert(app: Pm2App) -> dict[str, Any]:
    """Return the entry for `services`, or for `instances` where the app is one."""
    app.begin()
    for step in _STEPS:
        step(app)
    _rest(app)
    app.finish()
    return app.entry


def _rest(app: Pm2App) -> None:
    for field, value in app.fields.items():
        if value in (False, None, "", []):
            continue
        if field in _COSMETIC:
            app.refused(field, "has no meaning here")
        else:
            app.refused(field, _REFUSED.get(field, "is not a field that PM2 knows either"))


_REFUSED = {
    "namespace": "there are no groups: fleetctl takes names with * instead",
    "filter_env": "say what the process needs in env",
    "log_file": "fleetd writes output and errors to one file, logs/NAME.log",
    "log_date_format": "the times in the log have one form, RFC 3339",
    "log_type": "say logs: {capture: pipe} for JSON with times",
    "disable_logs": "logs are rotated, so they stay small",
    "merge_logs": "every replica has its own log; fleetctl logs NAME shows them together",
    "gid": "the group is the user's own",
    "source_map_support": "say env: {NODE_OPTIONS: --enable-source-maps}",
    "watch_options": "polling and links are chosen by fleetd",
    "ignore_watch": "nothing is watched",
    "watch_delay": "nothing is watched",
}


def _replicas(app: Pm2App) -> None:
    mode, count = app.take("exec_mode"), app.take("instances")
    # PM2 runs a Node script as a cluster as soon as a number of instances is set.
    cluster = str(mode).startswith("cluster") if mode is not None else count is not None and is_node(app.words)
    number = _instances(count)
    if count is not None and number is None:
        app.refused("instances", f"{count!r} is not a number")
    elif number is not None and (str(count) in ("max", "0") or str(count).startswith("-")):
        app.differs("instances", f"{count} means {number} on this machine: say the number you want")
    elif number is not None and number != _number(count):
        app.differs("instances", f"{count} is beyond the limits here: {number}")
    counted = _counted(app, number or 1)
    if cluster and (number or 1) > 1 and not counted:
        detail = (
            f"{number} workers share one port under PM2, which replicas cannot: imported as one process; say replicas: {number} "
            "if each may have a port of its own"
        )
        app.warn("exec_mode" if mode is not None else "instances", detail)
        app.number_instances(1)
        return
    app.number_instances(number or 1)
    if cluster and (number or 1) == 1:
        app.differs("exec_mode", "cluster with one worker: started as a plain process")
    if number is not None and number > 1:
        app.entry["replicas"] = number
        app.mapped("instances", f"replicas: {number}")
        if "port" in app.entry and not counted:
            app.warn("instances", "each replica gets the next port; under PM2 all had the same one")


def _counted(app: Pm2App, instances: int) -> bool:
    """Return whether PM2 gives each instance the next port."""
    variable = app.take("increment_var")
    if variable is None:
        return False
    if variable != "PORT":
        app.refused("increment_var", "only PORT is counted up")
    elif "port" not in app.entry:
        app.refused("increment_var", "there is no PORT to count up from")
    elif instances == 1:
        app.refused("increment_var", "there is one process: nothing is counted up")
    else:
        app.mapped("increment_var", "every replica gets the next port, in PORT")
        return True
    return False


def _instances(count: Any) -> int | None:
    cores = os.cpu_count() or 1
    if count is None or isinstance(count, bool):
        return None
    if count in ("max", "0", 0):
        return cores
    number = _number(count)
    if number is None:
        return None
    return max(1, cores + number) if number < 0 else min(number, _MOST_REPLICAS)


def _number(count: Any) -> int | None:
    try:
        return int(count)
    except (TypeError, ValueError, OverflowError):
        return None


def _limits(app: Pm2App) -> None:
    size = size_bytes(app.take("max_memory_restart"))
    if size and app.is_instance:
        detail = (
            f"{format_size(size)} is left out: PM2 looked at `ollama serve` alone, and the models are in its children; "
            "devices.host.budget limits those"
        )
        app.warn("max_memory_restart", detail)
    elif size:
        app.entry["limits"] = {"memory": format_size(size)}
        detail = f"limits.memory: {format_size(size)} of the whole process set; PM2 looked at its first process only"
        app.differs("max_memory_restart", detail)


def _watch(app: Pm2App) -> None:
    watch = app.take("watch")
    ignored = app.fields.get("ignore_watch")
    if not watch:
        return
    said = [str(path) for path in watch] if isinstance(watch, list) else [watch] if isinstance(watch, str) else ["."]
    paths = [path for path in said if not path.startswith(REGEXP)]
    for path in said:
        if path not in paths:
            app.refused("watch", f"{unmarked(path)} is a regular expression: name the folders in watch.paths")
    if not paths:
        return
    ignore = ignored if isinstance(ignored, list) else [ignored] if isinstance(ignored, str) else ["node_modules", ".*"]
    entry: dict[str, Any] = {"paths": paths, "ignore": [glob for one in ignore if (glob := _glob(app, str(one)))]}
    delay = lifecycle.time_ms(app, "watch_delay", lifecycle.HOUR_MS, 10)
    if delay:
        entry["debounce"] = duration(delay)
    app.take("ignore_watch")
    app.entry["watch"] = entry
    app.mapped("watch", f"watch.paths: {', '.join(paths)}")


def _glob(app: Pm2App, ignored: str) -> str | None:
    """Return the pattern of an ignored path; a regular expression only where a pattern is equivalent."""
    if not ignored.startswith(REGEXP):
        return ignored
    shown = unmarked(ignored)
    ending, word = re.fullmatch(r"/\\\.([\w-]+)\$/", shown), re.fullmatch(r"/([\w-]+)/", shown)
    if ending or word:
        glob = f"*.{ending[1]}" if ending else f"*{word[1]}*" if word else ""
        app.differs("ignore_watch", f"{shown} is a regular expression: the pattern {glob}")
        return glob
    app.refused("ignore_watch", f"{shown} is a regular expression: say it as a pattern such as '*.log' in watch.ignore")
    return None


def _logs(app: Pm2App) -> None:
    files = [str(name) for name in (app.take("out_file"), app.take("error_file")) if name]
    if files:
        app.differs("out_file", f"{' and '.join(files)}: fleetd writes both to logs/{app.name}.log and rotates it")
    if app.take("time"):
        app.entry["logs"] = {"capture": "pipe"}
        app.mapped("time", "logs.capture: pipe, every line with its time")


def _identity(app: Pm2App) -> None:
    user, env_file = app.take("user"), app.take("env_file")
    if user is not None:
        app.entry["user"] = str(user)
        app.mapped("user", str(user))
    if isinstance(env_file, str):
        path = Path(expand_home(env_file))
        app.entry["env_file"] = str(path if path.is_absolute() or app.folder is None else app.folder / path)
        app.mapped("env_file", app.entry["env_file"])


_STEPS: tuple[Callable[[Pm2App], None], ...] = (
    _replicas,
    lifecycle.restart,
    lifecycle.stop,
    lifecycle.ready,
    _limits,
    lifecycle.schedule,
    _watch,
    _logs,
    _identity,
)
