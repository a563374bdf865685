"""Convert one PM2 app to one service: every field that PM2 knows.

Invariants:
- A field is read once and reported once. A field that PM2 itself does not know is reported as such.
- A difference between fleetd and PM2 is reported, also where fleetd does more (whole process sets, moving windows).
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any

from fleetd.config.importers.nodejs import REGEXP
from fleetd.config.importers.pm2.ollama import is_ollama, to_instance
from fleetd.config.importers.pm2.values import duration, env_texts, milliseconds, size_bytes, unmarked, words_of
from fleetd.config.importers.report import Report
from fleetd.units import expand_home, format_size

_ALIASES = {
    "exec": "script", "cmd": "script", "command": "script", "exec_interpreter": "interpreter", "interpreter_args": "node_args",
    "out": "out_file", "output": "out_file", "out_log": "out_file", "error": "error_file", "err": "error_file",
    "err_file": "error_file", "err_log": "error_file", "log": "log_file", "pid": "pid_file", "cron": "cron_restart",
    "combine_logs": "merge_logs", "uid": "user", "username": "user",
}  # fmt: skip
_BY_SUFFIX = {
    ".js": "node", ".mjs": "node", ".cjs": "node", ".py": "python3", ".sh": "bash", ".rb": "ruby", ".php": "php", ".pl": "perl",
    ".ts": "bun", ".tsx": "bun", ".coffee": "coffee", ".ls": "lsc",
}  # fmt: skip
_PATTERNS = frozenset({"watch", "ignore_watch"})  # characters that make a regular expression more than its text
_COSMETIC = frozenset({
    "force", "execute_command", "windows_hide", "write", "vizion", "pmx", "automation", "trace", "disable_trace", "v8",
    "event_loop_inspector", "deep_monitoring", "io", "install_url", "post_update", "instance_var", "name_prefix",
    "append_env_to_name", "disable_source_map_support", "kill_retry_time", "pid_file",
})  # fmt: skip


def snake(key: str) -> str:
    """Return the name that PM2's documents use for a field: maxMemoryRestart → max_memory_restart, cmd → script."""
    name = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", key).lower() if not key.startswith("env_") else key
    return _ALIASES.get(name, name)


class Pm2App:
    """One app during its conversion. `take(field)` reads a field once; fields that are never taken are reported at the end."""

    def __init__(
        self, raw: dict[str, Any], folder: Path | None, profile: str | None, timezone: str | None, report: Report
    ) -> None:
        fields = {snake(str(key)): value for key, value in raw.items()}
        self.fields = {key: value if key in _PATTERNS else unmarked(value) for key, value in fields.items()}
        self.folder, self.profile, self.timezone, self.report = folder, profile, timezone, report
        self.name, said = _name(self.fields), self.fields.get("name")
        if said not in (None, "") and str(said) != self.name:
            self.differs("name", f"{said!r} becomes {self.name}: letters, digits and ._- only")
        self.entry: dict[str, Any] = {}
        self.is_instance = self.has_profile = False

    def take(self, field: str) -> Any:
        value = self.fields.pop(field, None)
        return None if value in ("", []) else value

    def mapped(self, field: str, detail: str) -> None:
        self.report.mapped(self.name, field, detail)

    def differs(self, field: str, detail: str) -> None:
        self.report.approximated(self.name, field, detail)

    def refused(self, field: str, detail: str) -> None:
        self.report.refused(self.name, field, detail)

    def read(self) -> dict[str, Any]:
        """Return the entry for `services`, or for `instances` where `is_instance` is set."""
        self.take("name")
        env = self._env()
        words = self._command()
        if is_ollama(words):
            self.is_instance = True
            self.entry = to_instance(self.name, words, env, self.report)
            self.take("port")
        else:
            self.entry = {"command": words} if words else {}
            self._python(env, words)
            self._port(env)
            if env:
                self.entry["env"] = env
        self._cwd()
        for step in _STEPS:
            step(self)
        self._rest()
        return self.entry

    # -- what is started -------------------------------------------------------------------------------------------

    def _command(self) -> list[str]:
        script, args = self.take("script"), self.take("args")
        interpreter, options = self.take("interpreter"), words_of(self.take("node_args"))
        if not isinstance(script, str):
            self.refused("script", "is missing: there is nothing to start")
            return []
        rest = words_of(args)
        if " " in script and not rest and script.split()[0].rsplit("/", 1)[-1] == "ollama":
            return script.split()
        if " " in script:
            self.differs("script", "has blanks, so PM2 ran it with bash -c: kept as that")
            return ["bash", "-c", " ".join([script, *map(shlex.quote, rest)])]
        program = self._interpreter(script, interpreter)
        if program is None and "/" not in script and self.folder is not None and (self.folder / script).is_file():
            script = f"./{script}"
        words = [*([program, *options] if program else []), script, *rest]
        if options and not program:
            self.refused("node_args", "belong to an interpreter, and there is none")
        self.mapped("script", shlex.join(words))
        self._speaks_to_pm2(script)
        return words

    def _interpreter(self, script: str, said: Any) -> str | None:
        if said == "none":
            return None
        if isinstance(said, str) and said:
            if "@" in said:
                self.report.warn(
                    self.name, "interpreter", f"{said} was chosen by nvm: write the whole path of that node"
                )
                return said.split("@", 1)[0]
            return said
        return _BY_SUFFIX.get(PurePosixPath(script).suffix)

    def _speaks_to_pm2(self, script: str) -> None:
        path = (self.folder or Path()) / str(self.fields.get("cwd") or ".") / script
        try:
            with path.open("rb") as stream:
                text = stream.read(1 << 20)
        except (OSError, ValueError):
            return
        has_channel = any(self.fields.get(field) in (True, "true") for field in ("shutdown_with_message", "wait_ready"))
        if b"process.send(" in text and not has_channel:
            self.report.warn(
                self.name,
                "script",
                "calls process.send, which is there under PM2, and here with stop.message or a startup message: else guard it",
            )

    def _python(self, env: dict[str, str], words: list[str]) -> None:
        if words and words[0].startswith("python"):
            env.setdefault("PYTHONUNBUFFERED", "1")

    def _cwd(self) -> None:
        cwd = self.take("cwd")
        if isinstance(cwd, str):
            path = Path(expand_home(cwd))
            self.entry["cwd"] = str(path if path.is_absolute() or self.folder is None else self.folder / path)
            self.mapped("cwd", self.entry["cwd"])
        elif self.folder is not None and not self.is_instance:
            self.entry["cwd"] = str(self.folder)
            self.differs("cwd", f"not set: PM2 used the folder it was started in; here it is {self.folder}")

    # -- environment and ports -------------------------------------------------------------------------------------

    def _env(self) -> dict[str, str]:
        said = self.take("env")
        if said is not None and not isinstance(said, dict):
            self.refused("env", "is not a mapping")
        env = env_texts(said)
        profiles = [key[4:] for key in self.fields if key.startswith("env_") and key != "env_file"]
        for profile in profiles:
            values = self.take(f"env_{profile}")
            if profile == self.profile and isinstance(values, dict):
                env.update(env_texts(values))
                self.has_profile = True
                self.mapped(f"env_{profile}", "laid over env")
            else:
                detail = f"not applied, as by `pm2 start` without --env: import with the profile {profile} to use it"
                self.report.warn(self.name, f"env_{profile}", detail)
        if env:
            self.mapped("env", ", ".join(env))
        return env

    def _port(self, env: dict[str, str]) -> None:
        port = self.take("port")
        if port is None and re.fullmatch(r"\d{1,5}", env.get("PORT", "")) and 0 < int(env["PORT"]) < 65536:
            port = env.pop("PORT")
            self.mapped("env.PORT", f"port: {port}; fleetd sets PORT")
        if port is not None and str(port).isdigit():
            self.entry["port"] = int(port)
            self.mapped("port", str(port))

    # -- the rest --------------------------------------------------------------------------------------------------

    def _rest(self) -> None:
        for field, value in self.fields.items():
            if field in _COSMETIC:
                self.refused(field, "has no meaning here")
            elif field in _REFUSED:
                if value not in (False, None, "", []):
                    self.refused(field, _REFUSED[field])
            else:
                self.refused(field, "is not a field that PM2 knows either")


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
    cluster = str(mode).startswith("cluster") if mode is not None else count is not None and _is_node(app)
    number = _instances(count)
    if count is not None and number is None:
        app.refused("instances", f"{count!r} is not a number")
    elif number is not None and (str(count) in ("max", "0") or str(count).startswith("-")):
        app.differs("instances", f"{count} means {number} on this machine: say the number you want")
    counted = _counted(app, number or 1)
    if cluster and (number or 1) > 1 and not counted:
        detail = (
            f"{number} workers share one port under PM2, which replicas cannot: imported as one process; say replicas: {number} "
            "if each may have a port of its own"
        )
        app.report.warn(app.name, "exec_mode" if mode is not None else "instances", detail)
        return
    if cluster and (number or 1) == 1:
        app.differs("exec_mode", "cluster with one worker: started as a plain process")
    if number is not None and number > 1:
        app.entry["replicas"] = number
        app.mapped("instances", f"replicas: {number}")
        if "port" in app.entry and not counted:
            app.report.warn(app.name, "instances", "each replica gets the next port; under PM2 all had the same one")


def _is_node(app: Pm2App) -> bool:
    words = app.entry.get("command") or [""]
    return PurePosixPath(words[0]).name in ("node", "nodejs")


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
    try:
        number = int(count)
    except (TypeError, ValueError):
        return None
    return max(1, cores + number) if number < 0 else min(number, 256)


def _restart(app: Pm2App) -> None:
    restart: dict[str, Any] = {}
    codes = app.take("stop_exit_codes")
    if app.take("autorestart") is False:
        restart["policy"] = "never"
        app.mapped("autorestart", "restart.policy: never")
    elif codes is not None:
        listed = [int(code) for code in (codes if isinstance(codes, list) else [codes]) if str(code).isdigit()]
        restart |= {"policy": "on-failure", "success_codes": listed}
        app.mapped("stop_exit_codes", f"restart.success_codes: {listed}")
    fixed, growing = milliseconds(app.take("restart_delay")), milliseconds(app.take("exp_backoff_restart_delay"))
    if growing:
        restart["backoff"] = {"initial": duration(growing), "factor": 1.5, "max": "15s"}
        app.mapped("exp_backoff_restart_delay", "restart.backoff")
    elif fixed:
        restart["backoff"] = {"initial": duration(fixed), "factor": 1, "max": duration(fixed), "jitter": 0}
        app.mapped("restart_delay", "restart.backoff with factor 1")
    uptime, most = milliseconds(app.take("min_uptime")), app.take("max_restarts")
    if uptime:
        restart["stable_after"] = duration(uptime)
        app.mapped("min_uptime", f"restart.stable_after: {duration(uptime)}")
    if isinstance(most, int | str) and str(most).isdigit() and int(most) > 0:
        window = duration(max(60_000, int(most) * 2 * (uptime or 1000)))
        restart["crash_loop"] = {"count": int(most), "window": window}
        app.differs(
            "max_restarts", f"restart.crash_loop: {most} deaths within {window}; PM2 counts short runs in a row"
        )
    elif most is not None:
        app.refused(
            "max_restarts", f"{most!r} is no count of deaths: say restart.policy or restart.crash_loop as it is meant"
        )
    if restart:
        app.entry["restart"] = restart
    if app.take("autostart") is False:
        app.entry["enabled"] = False
        app.mapped("autostart", "enabled: false")


def _stop(app: Pm2App) -> None:
    stop: dict[str, Any] = {} if app.is_instance else {"signal": "SIGINT"}
    timeout = milliseconds(app.take("kill_timeout"))
    if timeout:
        stop["timeout"] = duration(timeout)
        app.mapped("kill_timeout", f"stop.timeout: {stop['timeout']}")
    elif not app.is_instance:
        app.differs("kill_timeout", "not set: PM2 kills after 1.6 s, fleetd after 10 s")
    if app.take("shutdown_with_message") in (True, "true"):
        _message(app, stop)
    if app.take("treekill") is False:
        stop["kill"] = "leader"
        app.mapped("treekill", "stop.kill: leader")
    if stop:
        app.entry["stop"] = stop


def _message(app: Pm2App, stop: dict[str, Any]) -> None:
    """Convert a stop by message: fleetd sends it over the same channel as PM2."""
    if app.is_instance:
        app.refused("shutdown_with_message", "Ollama ends at a signal")
        return
    stop["message"] = "shutdown"
    app.mapped("shutdown_with_message", "stop.message: shutdown; SIGINT where the program has closed the channel")
    words = app.entry.get("command") or [""]
    if PurePosixPath(words[0]).name not in ("node", "bun", "nodejs"):
        detail = f"{words[0] or 'the program'} is not Node: it has to read the channel itself, or is killed after the timeout"
        app.report.warn(app.name, "shutdown_with_message", detail)


def _ready(app: Pm2App) -> None:
    said, limit = app.take("wait_ready"), app.take("listen_timeout")
    timeout = milliseconds(limit)
    if said not in (True, "true"):
        if limit is not None:
            app.refused(
                "listen_timeout", "only a start with wait_ready waits; any other is limited by probes.startup.deadline"
            )
        return
    deadline = duration(timeout or 30_000)
    if timeout:
        app.mapped("listen_timeout", f"probes.startup.deadline: {deadline}")
    app.entry["probes"] = {"startup": {"message": "ready", "deadline": deadline}}
    app.differs(
        "wait_ready",
        f"probes.startup: waits for process.send('ready') for {deadline}; unlike in PM2, silence is a failure",
    )


def _limits(app: Pm2App) -> None:
    size = size_bytes(app.take("max_memory_restart"))
    if size:
        app.entry["limits"] = {"memory": format_size(size)}
        detail = f"limits.memory: {format_size(size)} of the whole process set; PM2 looked at its first process only"
        app.differs("max_memory_restart", detail)


def _schedule(app: Pm2App) -> None:
    cron = app.take("cron_restart")
    if not isinstance(cron, str) or cron in ("0", "false"):
        return
    fields = cron.split()
    if len(fields) == 6 and fields[0] == "0":
        fields = fields[1:]
    if len(fields) != 5:
        app.refused("cron_restart", f"{cron!r}: five fields are needed, without seconds")
        return
    app.entry["schedule"] = {"restart": " ".join(fields), "timezone": app.timezone or "UTC"}
    if app.timezone:
        app.mapped("cron_restart", f"schedule.restart, in {app.timezone} as this machine")
    else:
        app.report.warn(
            app.name, "cron_restart", "PM2 means this machine's time, whose zone is not known: UTC is written"
        )


def _watch(app: Pm2App) -> None:
    watch = app.take("watch")
    ignored, delay = app.fields.get("ignore_watch"), milliseconds(app.fields.get("watch_delay"))
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
    if delay:
        entry["debounce"] = duration(max(delay, 10))
    for field in ("ignore_watch", "watch_delay"):
        app.take(field)
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
    _restart,
    _stop,
    _ready,
    _limits,
    _schedule,
    _watch,
    _logs,
    _identity,
)


def _name(fields: dict[str, Any]) -> str:
    name = fields.get("name") or PurePosixPath(str(fields.get("script") or "app").split(" ")[0]).stem
    return re.sub(r"[^A-Za-z0-9._-]+", "-", str(name)).strip("-._")[:63] or "app"
