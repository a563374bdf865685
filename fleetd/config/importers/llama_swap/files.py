"""Convert a llama-swap configuration to models with an engine of their own.

Invariants:
- Every command is kept, under the engine `process`: a server with a port. The report names commands for which a typed engine is
  better; nothing is guessed.
- Groups and the matrix state by hand which models fit together; fleetd counts bytes, so memory must be declared or learned.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlsplit

from fleetd.config.importers.emit import Variable, to_yaml
from fleetd.config.importers.report import Imported, Report
from fleetd.config.yaml.parser import Source, compose
from fleetd.config.yaml.transform import plain
from fleetd.errors import ConfigError, Problem

_MACRO = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_.-]*)\}")
_NAME = re.compile(r"[^A-Za-z0-9._-]+")
_TYPED = {"llama-server": "llamacpp", "vllm": "vllm", "ollama": "ollama"}
_LEFT_OUT = {
    "name": "models have no titles", "description": "models have no descriptions", "metadata": "models carry no metadata",
    "unlisted": "every model is listed", "filters": "requests are passed on as they are",
    "sendLoadingState": "waiting streams get comments, never invented content",
    "timeouts": "the gateway has its own", "compat": "no equivalent", "capabilities": "the engine tells",
    "unloadTimeout": "see stop.timeout", "healthCheckTimeout": "llama-swap itself overwrites it by the global one",
}  # fmt: skip
_GLOBAL_LEFT_OUT = {
    "groups": "fleetd places models by bytes: declare memory where it is not learned yet",
    "matrix": "fleetd places models by bytes: declare memory where it is not learned yet",
    "routing": "fleetd places models by bytes; order of service is models.NAME.priority",
    "apiKeys": "the gateway listens on loopback and knows no keys yet", "startPort": "ports are assigned and kept per name",
    "peers": "write each as a model with an engine and external: http://…", "profiles": "see models with route",
    "selectors": "see models with route and fallback",
}  # fmt: skip


def import_llama_swap(text: str, *, shown: str = "config.yaml") -> Imported:
    """Return a model for every model of llama-swap. Raises ConfigError."""
    document = plain(compose(Source(shown, Path(shown), text=text)))
    entries = document.get("models") if isinstance(document, dict) else None
    if not isinstance(entries, dict) or not entries:
        raise ConfigError([Problem(shown, 0, 0, "", "has no models: is it a configuration of llama-swap?")])
    reader = _LlamaSwapReader(document)
    models: dict[str, Any] = {}
    for name, raw in entries.items():
        key = _NAME.sub("-", name).strip("-._")[:63] or "model"
        while key in models:
            key += "-2"
        if isinstance(raw, dict):
            models[key] = reader.model(name, key, raw)
        else:
            reader.report.refused(name, "", "is not a mapping")
    reader.globals(models)
    ttl = document.get("globalTTL") or 0
    data = {"version": 1, "defaults": {"model": {"ttl": f"{ttl}s" if ttl else 0}}, "models": models}
    return Imported(to_yaml(data, {"": [f"{len(models)} models from llama-swap's {shown}"]}), data, reader.report)


class _LlamaSwapReader:
    def __init__(self, document: dict[str, Any]) -> None:
        self.document = document
        self.report = Report()
        self.keys: dict[str, str] = {}

    def model(self, name: str, key: str, raw: Mapping[str, Any]) -> dict[str, Any]:
        self.keys[name] = key
        macros = {
            **_strings(self.document.get("macros")),
            **_strings(raw.get("macros")),
            "MODEL_ID": name,
            "PORT": "{port}",
        }
        entry: dict[str, Any] = {"engine": "process"}
        words = self._words(name, "cmd", raw.get("cmd"), macros)
        self._address(name, raw.get("proxy"), bool(words), macros, entry)
        if words and "external" not in entry:
            entry["command"] = words
            self._typed(name, words)
        env = dict(str(one).split("=", 1) for one in raw.get("env") or () if "=" in str(one))
        if env:
            entry["env"] = {variable: self._text(value, macros) for variable, value in env.items()}
        self._probe(name, raw.get("checkEndpoint", "/health"), entry)
        if raw.get("cmdStop") and "external" not in entry:
            stop = self._words(name, "cmdStop", raw["cmdStop"], {**macros, "PID": "$MAINPID"})
            if any("$MAINPID" in word for word in stop):
                self.report.refused(name, "cmdStop", "names the process: a signal reaches the whole set anyway")
            elif stop:
                entry["stop"] = {"command": stop}
        self._rest(name, key, raw, entry)
        return entry

    def _text(self, text: Any, macros: Mapping[str, str]) -> str:
        """Return a text with its macros replaced; `${env.X}` becomes a variable of fleet.yaml."""
        value = str(text)
        for _ in range(10):
            put = _MACRO.sub(lambda found: macros.get(found[1], found[0]), value)
            if put == value:
                break
            value = put
        if "${env." not in value:
            return value
        doubled = value.replace("$", "$$")
        return Variable(re.sub(r"\$\$\{env\.([A-Za-z_][A-Za-z0-9_]*)\}", r"${\1}", doubled))

    def _words(self, name: str, field: str, command: Any, macros: Mapping[str, str]) -> list[str]:
        if not isinstance(command, str) or not command.strip():
            return []
        text = self._text(command, macros)
        try:
            words = shlex.split(text.replace("\\\n", " "), comments=True)
        except ValueError as error:
            self.report.refused(name, field, f"cannot be split into words: {error}")
            return []
        return [Variable(word) if isinstance(text, Variable) else word for word in words]

    def _address(
        self, name: str, proxy: Any, has_command: bool, macros: Mapping[str, str], entry: dict[str, Any]
    ) -> None:
        text = self._text(proxy or "http://localhost:{port}", macros)
        if "{port}" in text:
            return
        try:
            parts = urlsplit(text)
            host, port = parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80)
        except ValueError:
            self.report.refused(name, "proxy", f"{text!r} is not an address")
            return
        if has_command and host in ("localhost", "127.0.0.1", "::1", "[::1]"):
            entry["port"] = port
            self.report.mapped(name, "proxy", f"port: {port}")
        else:
            address = text.rstrip("/").removesuffix("/v1").rstrip("/")
            entry["external"] = Variable(address) if isinstance(text, Variable) else address
            what = "; fleetd does not start what is on another machine" if has_command else ""
            self.report.approximated(name, "proxy", f"external: {address}{what}")

    def _typed(self, name: str, words: list[str]) -> None:
        engine = _TYPED.get(PurePosixPath(words[0]).name)
        if engine is not None:
            detail = f"runs {PurePosixPath(words[0]).name}: with engine: {engine} and its options, memory is estimated by itself"
            self.report.warn(name, "cmd", detail)
        else:
            self.report.warn(name, "memory", "nothing to estimate it from: say memory, until it is learned")

    def _probe(self, name: str, endpoint: Any, entry: dict[str, Any]) -> None:
        deadline = self.document.get("healthCheckTimeout") or 120
        probe: dict[str, Any] = {"tcp": True} if endpoint == "none" else {"http": str(endpoint)}
        if isinstance(deadline, int) and "external" not in entry:
            probe["deadline"] = f"{max(15, deadline)}s"
        entry["probes"] = {"startup": probe}
        self.report.mapped(name, "checkEndpoint", f"probes.startup: {endpoint}")

    def _rest(self, name: str, key: str, raw: Mapping[str, Any], entry: dict[str, Any]) -> None:
        ttl = raw.get("ttl")
        if isinstance(ttl, int) and not isinstance(ttl, bool) and ttl >= 0:
            entry["ttl"] = f"{ttl}s" if ttl else 0
        limit = raw.get("concurrencyLimit")
        if isinstance(limit, int) and limit > 0:
            entry["concurrency"] = limit
        if raw.get("useModelName"):
            entry["served_as"] = str(raw["useModelName"])
        aliases = [name] if key != name else []
        aliases += [str(alias) for alias in raw.get("aliases") or ()]
        if aliases:
            entry["aliases"] = list(dict.fromkeys(aliases))
        for field in raw:
            if field in _LEFT_OUT:
                self.report.refused(name, field, _LEFT_OUT[field])
            elif field not in _READ:
                self.report.refused(name, field, "not understood")
            elif field in ("ttl", "concurrencyLimit", "useModelName", "aliases", "env", "cmdStop"):
                self.report.mapped(name, field, "carried over")

    def globals(self, models: dict[str, Any]) -> None:
        for field, value in self.document.items():
            if field == "hooks":
                started = value.get("on_startup") if isinstance(value, dict) else None
                for name in (started.get("preload") if isinstance(started, dict) else None) or ():
                    if self.keys.get(str(name)) in models:
                        models[self.keys[str(name)]]["preload"] = True
                        self.report.mapped("", f"hooks.on_startup.preload.{name}", "preload: true")
            elif field in _GLOBAL_LEFT_OUT:
                self.report.refused("", field, _GLOBAL_LEFT_OUT[field])
            elif field not in ("models", "macros", "healthCheckTimeout", "globalTTL"):
                self.report.refused("", field, "concerns llama-swap itself")


_READ = frozenset(
    {"cmd", "cmdStop", "proxy", "env", "checkEndpoint", "ttl", "aliases", "useModelName", "concurrencyLimit", "macros"}
)


def _strings(value: Any) -> dict[str, str]:
    return {str(key): str(item) for key, item in value.items()} if isinstance(value, dict) else {}
