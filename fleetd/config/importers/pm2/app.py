"""One PM2 app during its conversion: its fields, its command, its environment and its port.

Invariants:
- A field is read once and reported once. A field that PM2 itself does not know is reported as such.
- Values of secrets never enter the result: they are references such as ${TOKEN}. Braces of the program's own stay literal.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any

from fleetd.config.importers.emit import Variable
from fleetd.config.importers.nodejs import named_secrets, secret_mark
from fleetd.config.importers.pm2.ollama import is_ollama, to_instance
from fleetd.config.importers.pm2.program import BY_SUFFIX, command_of, head_of, main_file, starts_node
from fleetd.config.importers.pm2.values import env_texts, literal, unmarked, words_of
from fleetd.config.importers.report import Report
from fleetd.config.names import process_name
from fleetd.units import expand_home

_ALIASES = {
    "exec": "script", "cmd": "script", "command": "script", "exec_interpreter": "interpreter", "interpreter_args": "node_args",
    "out": "out_file", "output": "out_file", "out_log": "out_file", "error": "error_file", "err": "error_file",
    "err_file": "error_file", "err_log": "error_file", "log": "log_file", "pid": "pid_file", "cron": "cron_restart",
    "combine_logs": "merge_logs", "uid": "user", "username": "user",
}  # fmt: skip
_PATTERNS = frozenset({"watch", "ignore_watch"})  # characters that make a regular expression more than its text
INDEX = Variable("{index}")  # the placeholder of fleetd
_PORT = re.compile(r"[1-9]\d{0,4}")


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
        self.words: list[str] = []  # the command, before placeholders are escaped
        self.is_instance = self.has_profile = False
        self._has_cwd = self._had_no_cwd = False
        self.ends = False  # it is not always restarted: a schedule starts it

    def take(self, field: str) -> Any:
        value = self.fields.pop(field, None)
        return None if value in ("", []) else value

    def mapped(self, field: str, detail: str) -> None:
        self.report.mapped(self.name, field, named_secrets(detail))

    def differs(self, field: str, detail: str) -> None:
        self.report.approximated(self.name, field, named_secrets(detail))

    def refused(self, field: str, detail: str) -> None:
        self.report.refused(self.name, field, named_secrets(detail))

    def warn(self, field: str, detail: str) -> None:
        self.report.warn(self.name, field, named_secrets(detail))

    def clamped(self, field: str, value: int, lowest: int, highest: int, show: Callable[[int], str]) -> int:
        """Return a number inside the limits of fleet.yaml; a change is reported."""
        inside = min(max(value, lowest), highest)
        if inside != value:
            self.differs(field, f"{show(value)} is beyond the limits here: {show(inside)}")
        return inside

    def begin(self) -> None:
        """Read what is started: an entry for `services`, or for `instances` where `is_instance` is set."""
        self.take("name")
        env = self._env()
        self._cwd()
        words = self._command(env)
        if is_ollama(words):
            self.is_instance = True
            self.entry = {**to_instance(self.name, words, env, self.report), **self._cwd_of_instance()}
            self.take("port")
            return
        if self._had_no_cwd:
            self.differs("cwd", f"not set: PM2 used the folder it was started in; here it is {self.folder}")
        self.words = words
        self.entry = {**({"command": words} if words else {}), **self.entry}
        self._port(env)
        if env:
            self.entry["env"] = env

    def finish(self) -> None:
        """Write texts as fleetd reads them: secrets as references, braces as they are."""
        braced = ("command", "env")
        self.entry = {key: literal(value, braces=key in braced) for key, value in self.entry.items()}

    # -- what is started -------------------------------------------------------------------------------------------

    def folder_of_cwd(self) -> Path | None:
        """Return the folder that the app runs in; None: unknown."""
        cwd = self.entry.get("cwd")
        return Path(cwd) if cwd is not None else self.folder

    def _cwd(self) -> None:
        cwd = self.take("cwd")
        if isinstance(cwd, str):
            path = Path(expand_home(cwd))
            self.entry["cwd"] = str(path if path.is_absolute() or self.folder is None else self.folder / path)
            self.mapped("cwd", self.entry["cwd"])
            self._has_cwd = True
        elif self.folder is not None:
            self.entry["cwd"] = str(self.folder)
            self._had_no_cwd = True

    def _cwd_of_instance(self) -> dict[str, Any]:
        return {"cwd": self.entry["cwd"]} if self._has_cwd else {}

    def _command(self, env: dict[str, str]) -> list[str]:
        script, args = self.take("script"), self.take("args")
        interpreter, options = self.take("interpreter"), words_of(self.take("node_args"))
        if not isinstance(script, str):
            self.refused("script", "is missing: there is nothing to start")
            return []
        rest = words_of(args)
        if " " in script and not rest and script.split()[0].rsplit("/", 1)[-1] == "ollama":
            return script.split()
        cwd = self.folder_of_cwd()
        if " " in script and not (cwd is not None and (cwd / script).exists()):
            self.mapped("script", "has blanks, so PM2 ran it with bash -c: kept as that")
            return ["bash", "-c", " ".join([script, *map(shlex.quote, rest)])]
        program = self._interpreter(interpreter)
        words = command_of(script, program, options, rest, cwd)
        if options and options[0] not in words[1:2]:
            self.refused("node_args", "belong to an interpreter, and there is none")
        if "python" in str(program or BY_SUFFIX.get(Path(script).suffix) or "") or "python" in Path(words[0]).name:
            env["PYTHONUNBUFFERED"] = "1"
        self.mapped("script", shlex.join(words))
        self._speaks_to_pm2(main_file(words, cwd))
        return words

    def _interpreter(self, said: Any) -> str | None:
        if not isinstance(said, str) or not said:
            return None
        if said.startswith("node@"):
            self.warn("interpreter", f"{said} was chosen by nvm: write the whole path of that node")
            return "node"
        return said

    def _speaks_to_pm2(self, path: Path | None) -> None:
        has_channel = any(self.fields.get(field) in (True, "true") for field in ("shutdown_with_message", "wait_ready"))
        if path is not None and not has_channel and b"process.send(" in head_of(path):
            self.warn(
                "script",
                "calls process.send, which is there under PM2, and here with stop.message or a startup message: else guard it",
            )

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
                self.warn(f"env_{profile}", detail)
        self._drop_inherited(env)
        if env:
            self.mapped("env", ", ".join(env))
        return env

    def _drop_inherited(self, env: dict[str, str]) -> None:
        """Leave out what `...process.env` copied: a process inherits the environment anyway."""
        own = {key for key, value in env.items() if value in (os.environ.get(key), secret_mark(key))}
        if not own & {"PATH", "HOME"}:
            return
        own |= env.keys() & {"PWD", "OLDPWD", "SHLVL", "_"}  # the shell that runs Node sets them
        for key in own:
            del env[key]
        self.differs("env", f"{len(own)} variables of this shell were left out: a process inherits those of fleetd")

    def _port(self, env: dict[str, str]) -> None:
        port, field = self.take("port"), "port"
        if port is None and _PORT.fullmatch(env.get("PORT", "")) and int(env["PORT"]) < 65536:
            port, field = env["PORT"], "env.PORT"
        if port is None:
            return
        if not _PORT.fullmatch(str(port)) or int(port) > 65535:
            env.setdefault("PORT", str(port))
            self.warn(field, f"{port} is no port from 1 to 65535: it stays a variable")
            return
        env.pop("PORT", None)
        self.entry["port"] = int(port)
        self.mapped(field, f"port: {port}; fleetd sets PORT")

    def number_instances(self, count: int) -> None:
        """Write the variable in which PM2 numbers instances from 0, where the program may look at it."""
        said = self.take("instance_var")
        variable = str(said) if said else "NODE_APP_INSTANCE"
        if self.is_instance or not (said or count > 1 or starts_node(self.words)):
            return
        env = self.entry.setdefault("env", {})
        if variable not in env:
            env[variable] = INDEX if count > 1 else "0"
            self.mapped("instance_var", f"env.{variable}")


def _name(fields: dict[str, Any]) -> str:
    name = fields.get("name") or PurePosixPath(str(fields.get("script") or "app").split(" ")[0]).stem
    return process_name(str(name), "app")
