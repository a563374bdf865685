"""Convert one service of a compose file: an engine in a container, or a service in a container.

Invariants:
- The image and its volumes stay: ollama, vLLM and llama.cpp become engines with `runtime.docker`, everything else a service.
- A service that reaches another one by its name runs on the host's network, and the name becomes 127.0.0.1.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fleetd.config.importers.compose.values import ComposeValues
from fleetd.config.importers.emit import literal
from fleetd.config.importers.llama_server import LlamaServer, read_llama_server
from fleetd.config.importers.pm2.ollama import to_instance
from fleetd.config.importers.report import Report
from fleetd.config.importers.vllm_server import read_vllm

_ENGINES = (
    ("ollama", re.compile(r"(^|/)ollama/ollama(:|@|$)|(^|/)ollama(:|@|$)"), 11434),
    ("vllm", re.compile(r"(^|/)vllm-(openai|cpu)[^/:]*(:|@|$)"), 8000),
    ("llamacpp", re.compile(r"(^|/)llama\.cpp(:|@|$)|(^|/)llama-?server(:|@|$)"), 8080),
)
_WEBUI = re.compile(r"(^|/)open-webui(:|@|$)")
_IGNORED = frozenset({"image", "container_name", "networks", "tty", "stdin_open", "init", "pull_policy", "platform", "expose", "links",
                      "version", "profiles", "scale", "attach"})  # fmt: skip
_ARGUMENTS = {
    "shm_size": "--shm-size", "ipc": "--ipc", "mem_limit": "--memory", "cpus": "--cpus", "user": "--user", "pid": "--pid",
    "working_dir": "--workdir", "hostname": "--hostname", "mem_reservation": "--memory-reservation",
    "memswap_limit": "--memory-swap",
}  # fmt: skip
_LISTED = {
    "cap_add": "--cap-add", "cap_drop": "--cap-drop", "security_opt": "--security-opt", "devices": "--device", "group_add": "--group-add",
    "extra_hosts": "--add-host", "tmpfs": "--tmpfs", "dns": "--dns",
}  # fmt: skip
_SWITCHES = {"privileged": "--privileged", "read_only": "--read-only", "oom_kill_disable": "--oom-kill-disable"}
_CONDITIONS = {"service_started": "started", "service_healthy": "ready", "service_completed_successfully": "completed"}
_URL = re.compile(r"https?://(?:localhost|127\.0\.0\.1|0\.0\.0\.0|\[::1\])(?::\S*?)?(/[^\s\"'|;]*)?(?=$|[\s\"'|;])")


@dataclass(slots=True)
class ComposeService:
    """One service as read; `section` is where its entry belongs."""

    name: str
    key: str
    raw: Mapping[str, Any]
    engine: str | None
    ports: list[tuple[int, int]]
    entry: dict[str, Any] = field(default_factory=dict)
    section: str = "services"

    @property
    def port(self) -> int | None:
        return self.ports[0][0] if self.ports else None


def engine_of(image: str) -> tuple[str | None, int]:
    """Return the engine of an image and its port inside; None for any other image."""
    return next(((engine, port) for engine, pattern, port in _ENGINES if pattern.search(image)), (None, 0))


class ServiceReader:
    """Reads the services of one file."""

    def __init__(self, values: ComposeValues, services: Mapping[str, ComposeService], report: Report) -> None:
        self.values, self.services, self.report = values, services, report

    def read(self, one: ComposeService) -> None:
        """Complete the entry of a service."""
        raw, values = one.raw, self.values
        docker: dict[str, Any] = {"image": values.text(raw.get("image", ""))}
        mounts, arguments = self._mounts(one)
        gpus = self._gpus(raw)
        if gpus:
            docker["gpus"] = gpus
        if mounts:
            docker["mounts"] = mounts
        arguments += self._arguments(raw)
        if arguments:
            docker["args"] = arguments
        if raw.get("pull_policy") in ("always", "never", "missing"):
            docker["pull"] = raw["pull_policy"]
        stated = {key: literal(value) for key, value in values.environment(raw.get("environment")).items()}
        env = self._references(one, stated)
        command = values.words(raw.get("command"))
        if one.engine is not None and not raw.get("entrypoint") and self._engine(one, command, env, mounts):
            pass
        else:
            self._service(one, command, env, docker)
        one.entry["runtime"] = {"docker": docker}
        self._supervision(one)

    def _mounts(self, one: ComposeService) -> tuple[list[str], list[str]]:
        mounts: list[str] = []
        arguments: list[str] = []
        for item in _list(one.raw.get("volumes")):
            try:
                mount, words = self.values.mount(item)
            except ValueError as error:
                self.report.refused(one.name, "volumes", str(error))
                continue
            if mount is not None:
                mounts.append(mount)
            arguments += words
        return list(dict.fromkeys(mounts)), arguments

    def _gpus(self, raw: Mapping[str, Any]) -> list[str]:
        stated = raw.get("gpus")
        resources = _mapping(_mapping(_mapping(raw.get("deploy")).get("resources")).get("reservations"))
        devices = _list(resources.get("devices")) + (_list(stated) if isinstance(stated, list) else [])
        if stated == "all" or raw.get("runtime") == "nvidia":
            return ["all"]
        found: list[str] = []
        for device in map(_mapping, devices):
            if device.get("device_ids"):
                found += [self.values.concrete(one) for one in _list(device["device_ids"])]
            elif "gpu" in _list(device.get("capabilities")) or device.get("driver") == "nvidia":
                return ["all"]
        return found

    def _arguments(self, raw: Mapping[str, Any]) -> list[str]:
        words: list[str] = []
        for key, flag in _ARGUMENTS.items():
            if raw.get(key) is not None:
                words += [flag, self.values.text(raw[key])]
        for key, flag in _LISTED.items():
            stated = raw.get(key)
            items = [f"{name}:{to}" for name, to in stated.items()] if isinstance(stated, dict) else _list(stated)
            words += [word for item in items for word in (flag, self.values.text(item))]
        words += [flag for key, flag in _SWITCHES.items() if raw.get(key) is True]
        for name, limit in _mapping(raw.get("ulimits")).items():
            text = f"{limit.get('soft')}:{limit.get('hard')}" if isinstance(limit, dict) else str(limit)
            words += ["--ulimit", f"{name}={text}"]
        return words

    def _references(self, one: ComposeService, env: dict[str, str]) -> dict[str, str]:
        """Replace the names of other services by this machine's address."""
        result = {}
        for variable, value in env.items():
            text = str(value)
            for other in self.services.values():
                inside = rf"(?<=//){re.escape(other.name)}(?::(\d+))?(?=$|[/;,])"

                def here(found: re.Match[str], other: ComposeService = other) -> str:
                    port = int(found[1]) if found[1] else 80
                    return f"127.0.0.1:{next((here for here, target in other.ports if target == port), other.port or port)}"

                text = re.sub(inside, here, text)
            if text != str(value):
                self.report.approximated(
                    one.name, f"environment.{variable}", f"{text}: services have no names of their own here"
                )
            result[variable] = type(value)(text)
        return result

    def _engine(self, one: ComposeService, command: list[str], env: dict[str, str], mounts: list[str]) -> bool:
        """Write a typed entry; return False where the command is none that the engine can run."""
        entry: dict[str, Any] | None = None
        if one.engine == "ollama" and command in ([], ["serve"]):
            entry = to_instance(
                one.name, ["ollama", "serve"], {**env, "OLLAMA_HOST": f"127.0.0.1:{one.port or 11434}"}, self.report
            )
            entry.pop("requires", None)
            one.section = "instances"
            self.report.warn(
                one.name,
                "",
                "its models are not in this file: fleetctl import ollama, with the output of `ollama list`",
            )
        elif one.engine == "vllm":
            read = read_vllm(command)
            if isinstance(read, str):
                self.report.warn(one.name, "command", f"stays a service: it {read}")
                return False
            options, served = read
            entry = {"engine": "vllm", "options": options, **({"env": env} if env else {})}
            entry |= {"served_as": served[0]} if served and served[0] != one.key else {}
            aliases = [name for name in (*served, options["model"]) if name != one.key]
            entry |= (
                {"aliases": list(dict.fromkeys(aliases))}
                if aliases and not served
                else {"aliases": served}
                if served
                else {}
            )
        elif one.engine == "llamacpp":
            words = command[1:] if command[:1] in (["--server"], ["-s"]) else command
            typed = read_llama_server(["llama-server", *words], env)
            if not isinstance(typed, LlamaServer):
                self.report.warn(one.name, "command", f"stays a service: it {typed}")
                return False
            entry = {"engine": "llamacpp", "command": ["/app/llama-server"], "options": _on_host(typed.options, mounts)}
            entry |= {"env": typed.env} if typed.env else {}
            entry |= (
                {"served_as": typed.alias, "aliases": [typed.alias]} if typed.alias and typed.alias != one.key else {}
            )
            if typed.context is not None:
                self.report.mapped(one.name, "command", "engine: llamacpp with typed options")
        if entry is None:
            return False
        if one.engine != "ollama":
            one.section = "models"
            entry |= {"start": "always", "preload": True, "ttl": 0}
            if one.port is not None:
                entry["port"] = one.port
        one.entry = entry
        return True

    def _service(self, one: ComposeService, command: list[str], env: dict[str, str], docker: dict[str, Any]) -> None:
        entry: dict[str, Any] = {}
        entrypoint = [literal(word) for word in self.values.words(one.raw.get("entrypoint"))]
        command = [literal(word) for word in command]
        if entrypoint:
            entry["command"] = [*entrypoint, *command]
        elif command:
            entry["args"] = command
        if env:
            entry["env"] = env
        image = str(docker["image"])
        reaches = any("127.0.0.1:" in value for value in env.values())
        stated = str(one.raw.get("network_mode") or "")
        if one.port is not None:
            entry["port"] = one.port
        if stated == "host" or (reaches and not stated):
            inside = one.ports[0][1] if one.ports else None
            if inside is not None and inside != one.port and not _WEBUI.search(image):
                entry["port"] = inside
                detail = f"port {inside} instead of {one.port}: on the host's network the program's own port counts"
                self.report.approximated(one.name, "ports", detail)
        else:
            docker["network"] = "bridge"
            if one.ports and one.ports[0][0] != one.ports[0][1]:
                docker["container_port"] = one.ports[0][1]
        for here, inside in one.ports[1:]:
            self.report.refused(one.name, "ports", f"{here}:{inside}: an entry has one port")
        one.entry = entry

    def _supervision(self, one: ComposeService) -> None:
        raw, entry = one.raw, one.entry
        files = [item.get("path") if isinstance(item, dict) else item for item in _list(raw.get("env_file"))]
        if files:
            entry["env_file"] = [self.values.path(self.values.concrete(text)) for text in files]
        self._depends(one)
        policy = str(
            raw.get("restart") or _mapping(_mapping(raw.get("deploy")).get("restart_policy")).get("condition") or "no"
        )
        if policy in ("no", "none", "false", "False"):
            entry["restart"] = {"policy": "never"}
        elif policy.startswith("on-failure"):
            entry["restart"] = {"policy": "on-failure"}
        stop = {}
        if raw.get("stop_grace_period"):
            stop["timeout"] = str(raw["stop_grace_period"])
        if raw.get("stop_signal"):
            stop["signal"] = str(raw["stop_signal"])
        if stop:
            entry["stop"] = stop
        self._health(one)
        if raw.get("profiles"):
            entry["enabled"] = False
            self.report.approximated(one.name, "profiles", "enabled: false, since compose does not start it by default")
        read = {"command", "entrypoint", "environment", "env_file", "volumes", "ports", "depends_on", "restart", "deploy", "gpus",
                "runtime", "healthcheck", "stop_grace_period", "stop_signal", "ulimits", "network_mode"}  # fmt: skip
        for key in raw:
            known = key in read | _IGNORED | set(_ARGUMENTS) | set(_LISTED) | set(_SWITCHES) or str(key).startswith(
                "x-"
            )
            if not known:
                self.report.refused(one.name, str(key), "has no equivalent")

    def _depends(self, one: ComposeService) -> None:
        stated = one.raw.get("depends_on")
        pairs = stated.items() if isinstance(stated, dict) else [(name, None) for name in _list(stated)]
        depends = {}
        for name, how in pairs:
            other = self.services.get(str(name))
            if other is None:
                self.report.refused(one.name, "depends_on", f"{name} is not imported")
            else:
                depends[other.key] = _CONDITIONS.get(str(_mapping(how).get("condition")), "started")
        if depends:
            one.entry["depends_on"] = depends

    def _health(self, one: ComposeService) -> None:
        check = _mapping(one.raw.get("healthcheck"))
        if not check or check.get("disable") is True or one.engine is not None:
            return
        test = check.get("test")
        text = " ".join(map(str, test)) if isinstance(test, list) else str(test or "")
        found = _URL.search(text)
        if found is None or one.port is None:
            self.report.refused(
                one.name, "healthcheck", "runs inside the container: state probes.readiness with http or tcp"
            )
            return
        probe: dict[str, Any] = {"http": found[1] or "/"}
        for key, name in (("interval", "period"), ("timeout", "timeout")):
            if check.get(key):
                probe[name] = str(check[key])
        if isinstance(check.get("retries"), int) and check["retries"] > 0:
            probe["failures"] = check["retries"]
        one.entry["probes"] = {"readiness": probe}


def _on_host(options: dict[str, Any], mounts: list[str]) -> dict[str, Any]:
    """Return options with files inside the container as files of this machine, where a mount covers them."""
    bound = [mount.split(":")[:2] for mount in mounts if mount.startswith("/")]

    def here(path: Any) -> Any:
        for source, target in bound:
            if isinstance(path, str) and path.startswith(target.rstrip("/") + "/"):
                return source.rstrip("/") + path[len(target.rstrip("/")) :]
        return path

    files = {"model", "mmproj", "chat_template_file"}
    return {key: here(value) if key in files else value for key, value in options.items()}


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None or isinstance(value, dict) else [value]
