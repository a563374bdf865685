"""Convert one model of llama-swap to a model of fleet.yaml with an engine of its own.

Invariants:
- `llama-server` becomes the engine `llamacpp` with typed options, so that its memory is known from its file; every other command is
  kept under the engine `process`.
- What llama-swap does by default is stated where fleetd's default differs (10 requests at once).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

from fleetd.config.importers.llama_server import LlamaServer, program_at, read_llama_server
from fleetd.config.importers.llama_swap.commands import ProxyAddress, address, split, stated_port, with_assigned_port
from fleetd.config.importers.llama_swap.macros import (
    PORT,
    has_variable,
    shown,
    unknown,
    variables,
    written,
    written_word,
)
from fleetd.config.importers.llama_swap.names import SwapNames
from fleetd.config.importers.report import Report
from fleetd.config.schema.unsupported import is_unsupported

CONCURRENCY = 10  # llama-swap's own limit where a model states none
_UNLOAD_TIMEOUT_S = 10
_TYPED = {"vllm": "vllm", "ollama": "ollama"}
_KILL = re.compile(r"-(?:s\s*)?(?:SIG)?([A-Z0-9]+)")
_SIGNALS = {"9": "KILL", "15": "TERM", "2": "INT", "3": "QUIT", "1": "HUP"}
LEFT_OUT = {
    "metadata": "models carry no metadata", "unlisted": "every model is listed",
    "sendLoadingState": "waiting streams get comments, never invented content", "timeouts": "the gateway has its own",
    "compat": "has no equivalent", "capabilities": "the engine reports them",
    "healthCheckTimeout": "llama-swap itself replaces it by the global one",
}  # fmt: skip
_READ = frozenset({
    "cmd", "cmdStop", "proxy", "env", "checkEndpoint", "ttl", "aliases", "useModelName", "concurrencyLimit", "macros", "name",
    "description", "filters", "unloadTimeout",
})  # fmt: skip

TrainedContext = Callable[[str], int | None]


@dataclass(slots=True)
class SwapModel:
    """One model as read: its words and environment with marks, and where its server listens."""

    name: str
    key: str
    raw: Mapping[str, Any]
    words: list[str] = field(default_factory=list)
    env: dict[str, str] = field(default_factory=dict)
    at: ProxyAddress = ProxyAddress()


class ModelReader:
    """Reads the models of one file. `trained_context` returns the context length in a GGUF file's header, None if unknown."""

    def __init__(
        self, document: Mapping[str, Any], names: SwapNames, report: Report, trained_context: TrainedContext | None
    ) -> None:
        self.document, self.names, self.report = document, names, report
        self.trained_context = trained_context
        self.left_out: dict[str, list[str]] = {}
        self.sized: set[str] = set()  # keys whose memory is known from a file

    def read(self, name: str, raw: Mapping[str, Any]) -> SwapModel:
        """Return the command, the environment and the address of a model."""
        model = SwapModel(name, self.names.keys[name], raw)
        for macro in dict.fromkeys(unknown({key: value for key, value in raw.items() if key != "cmdStop"})):
            self.report.warn(name, "", f"the macro ${{{macro}}} is not defined: llama-swap rejects the file")
        model.words = split(raw["cmd"]) if isinstance(raw.get("cmd"), str) else []
        for word in model.words:
            if has_variable(word) and shown(word) == f"${{env.{variables(word)[0]}}}":
                self.report.warn(name, "cmd", f"{shown(word)} is one word here; llama-swap splits its value")
        for one in _list(raw.get("env")):
            variable, equals, value = str(one).partition("=")
            if equals and variable:
                model.env[variable] = value
            else:
                self.report.refused(name, "env", f"{shown(str(one))!r} is not NAME=value")
        model.at = self._address(model)
        return model

    def _address(self, model: SwapModel) -> ProxyAddress:
        proxy = str(model.raw.get("proxy") or "")
        try:
            found = address(proxy) if proxy else ProxyAddress()
        except ValueError:
            self.report.refused(model.name, "proxy", f"{shown(proxy)!r} is not an address")
            found = ProxyAddress()
        if found.path:
            self.report.refused(model.name, "proxy", f"the path {found.path}: requests go to the server's root")
        if not model.words and found.external is None:
            where = f":{found.port}" if found.port is not None else ""
            return ProxyAddress(external=f"http://127.0.0.1{where}")
        if found.external is None and found.port is None and not any(PORT in word for word in model.words):
            port = stated_port(model.words)
            if port is not None:
                return ProxyAddress(port=port)
            if program_at(model.words) is None and not any(PORT in value for value in model.env.values()):
                detail = (
                    "its command states no port: fleetd assigns one and passes it as PORT; write {port} in the command"
                )
                self.report.warn(model.name, "cmd", detail)
        return found

    def entry(self, model: SwapModel, moved: set[int]) -> dict[str, Any]:
        """Return the entry of a model; ports in `moved` become assigned ones."""
        raw, name = model.raw, model.name
        port = model.at.port
        if port in moved and port is not None:
            self._move_port(model, port)
            port = None
        entry: dict[str, Any] = {"engine": "process"}
        if model.at.external is not None:
            entry["external"] = written(model.at.external)
            if model.words:
                self.report.refused(name, "cmd", "fleetd does not start a server that proxy places on another machine")
            elif not raw.get("proxy"):
                self.report.warn(name, "cmd", "is missing: state the command or the address")
        else:
            self._command(model, entry, port)
        self._device(model, entry)
        self._probe(raw, entry)
        if "external" not in entry:
            self._stop(model, entry)
        self._rest(model, entry)
        return entry

    def _move_port(self, model: SwapModel, port: int) -> None:
        before = (model.words, dict(model.env))
        model.words = with_assigned_port(model.words, port)
        model.env = {key: PORT if value == str(port) else value for key, value in model.env.items()}
        if (model.words, model.env) != before or program_at(model.words) is not None:
            self.report.approximated(model.name, "proxy", f"port {port} is also another's: fleetd assigns one instead")
        else:
            detail = f"port {port} is also another's, and the command does not state it: write {{port}} where the program reads it"
            self.report.warn(model.name, "proxy", detail)

    def _command(self, model: SwapModel, entry: dict[str, Any], port: int | None) -> None:
        typed = read_llama_server(model.words, model.env) if program_at(model.words) is not None else None
        if isinstance(typed, LlamaServer) and any(PORT in text for text in _texts(typed.options)):
            typed = "has ${PORT} in another flag than --port"
        if isinstance(typed, LlamaServer):
            self._typed(model, typed, entry)
        else:
            entry["command"] = [written_word(word) for word in model.words]
            if model.env:
                entry["env"] = {variable: written_word(value) for variable, value in model.env.items()}
            if typed is not None:
                self.report.warn(model.name, "cmd", f"stays a command of the engine process: it {typed}")
            else:
                engine = _TYPED.get(PurePosixPath(model.words[0]).name)
                if engine is not None:
                    self.report.warn(
                        model.name, "cmd", f"with engine: {engine} and its options, fleetd estimates its memory"
                    )
        if port is not None:
            entry["port"] = port

    def _typed(self, model: SwapModel, typed: LlamaServer, entry: dict[str, Any]) -> None:
        entry["engine"] = "llamacpp"
        entry["command"] = [written_word(word) for word in typed.program]
        options = {option: _written(value) for option, value in typed.options.items()}
        if "context_length" not in options:
            trained = self.trained_context(str(options["model"])) if self.trained_context is not None else None
            if trained is not None:
                options["context_length"] = max(1, trained // int(options.get("parallel", 1)))
                self.report.approximated(
                    model.name, "cmd", f"context_length: {trained}, which the model was trained for"
                )
            else:
                detail = "no context length is stated, and the file is not here: fleetd takes 4096 tokens; llama-server the model's own"
                self.report.warn(model.name, "cmd", detail)
        entry["options"] = options
        if typed.env:
            entry["env"] = {variable: written_word(value) for variable, value in typed.env.items()}
        if typed.alias:
            entry["served_as"] = written(typed.alias)
        if typed.host not in (None, "127.0.0.1", "localhost"):
            self.report.approximated(
                model.name, "cmd", f"--host {typed.host}: it listens on loopback; clients use the gateway"
            )
        for option, detail in typed.notes:
            self.report.approximated(model.name, option, detail)
        self.report.mapped(model.name, "cmd", f"engine: llamacpp with {', '.join(options)}")
        self.sized.add(model.key)

    def _device(self, model: SwapModel, entry: dict[str, Any]) -> None:
        card = model.env.get("CUDA_VISIBLE_DEVICES", "")
        if card.isdecimal() and 0 < int(card) < 1000 and "external" not in entry:
            entry["device"] = f"gpu{int(card)}"

    def _probe(self, raw: Mapping[str, Any], entry: dict[str, Any]) -> None:
        endpoint = raw.get("checkEndpoint")
        endpoint = "/health" if endpoint is None else str(endpoint)
        probe: dict[str, Any] = {"tcp": True}
        if endpoint not in ("none", ""):
            probe = {"http": written(endpoint if endpoint.startswith("/") else f"/{endpoint}")}
        if "external" not in entry:
            probe["deadline"] = f"{health_timeout(self.document)}s"
        entry["probes"] = {"startup": probe}

    def _stop(self, model: SwapModel, entry: dict[str, Any]) -> None:
        raw, name = model.raw, model.name
        stop: dict[str, Any] = {}
        words = split(raw["cmdStop"]) if isinstance(raw.get("cmdStop"), str) else []
        if words and any("${PID}" in word for word in words):
            signal = _signal_of(words)
            if signal is None:
                self.report.refused(name, "cmdStop", "names the process: fleetd signals the whole process set itself")
            elif signal != "SIGTERM":
                stop["signal"] = signal
        elif words:
            port = model.at.port
            if port is not None and "port" not in entry:
                words = with_assigned_port(words, port)
            stop["command"] = [written_word(word) for word in words]
        seconds = _whole(raw.get("unloadTimeout")) or _whole(self.document.get("unloadTimeout")) or _UNLOAD_TIMEOUT_S
        if seconds != _UNLOAD_TIMEOUT_S:
            stop["timeout"] = f"{min(seconds, 86_400)}s"
        if stop:
            entry["stop"] = stop
            self.report.mapped(name, "cmdStop" if words else "unloadTimeout", f"stop: {', '.join(stop)}")

    def _rest(self, model: SwapModel, entry: dict[str, Any]) -> None:
        raw, name = model.raw, model.name
        ttl = _whole(raw.get("ttl"))
        if ttl is not None and ttl >= 0:
            entry["ttl"] = f"{min(ttl, 31_536_000)}s" if ttl else 0
        limit = _whole(raw.get("concurrencyLimit")) or 0
        if limit > 0:
            entry["concurrency"] = min(limit, 10_000)
        elif entry["engine"] == "process":
            entry["concurrency"] = CONCURRENCY
        if raw.get("useModelName"):
            entry["served_as"] = written(str(raw["useModelName"]))
        elif model.key != name:
            entry.setdefault("served_as", written(name))
        if entry.get("served_as") == model.key:
            del entry["served_as"]
        filters = _mapping(raw.get("filters"))
        by_id = _mapping(filters.get("setParamsByID"))
        aliases = self.names.aliases(name, [str(one) for one in (*_list(raw.get("aliases")), *by_id)])
        if aliases:
            entry["aliases"] = aliases
        self._filters(name, filters, entry)
        for field_name in raw:
            if field_name in LEFT_OUT:
                self.left_out.setdefault(field_name, []).append(name)
            elif field_name not in _READ:
                self.report.refused(name, field_name, "not understood")
            elif field_name in ("ttl", "concurrencyLimit", "useModelName", "aliases", "env", "checkEndpoint"):
                self.report.mapped(name, field_name, "carried over")

    def _filters(self, name: str, filters: Mapping[str, Any], entry: dict[str, Any]) -> None:
        stripped = str(filters.get("stripParams") or filters.get("strip_params") or "")
        strip = [one.strip() for one in stripped.split(",") if one.strip() not in ("", "model")]
        stated = filters.get("setParams")
        values = {key: value for key, value in stated.items() if key != "model"} if isinstance(stated, dict) else {}
        request = {**({"set": _written(values)} if values else {}), **({"strip": strip} if strip else {})}
        if request and is_unsupported(("models", "*", "request")):
            what = ", ".join([*values, *strip])
            self.report.refused(
                name, "filters", f"fleetd passes requests on as they are, with {what} as the client sends it"
            )
        elif request:
            entry["request"] = request
            self.report.mapped(name, "filters", f"request: {', '.join(request)}")
        for alias, settings in _mapping(filters.get("setParamsByID")).items():
            what = ", ".join(settings) if isinstance(settings, dict) else ""
            detail = (
                f"requests for {shown(str(alias))} reach the model without {what or 'changes'}: the client must send it"
            )
            self.report.refused(name, "filters.setParamsByID", detail)


def health_timeout(document: Mapping[str, Any]) -> int:
    """Return the seconds that llama-swap waits for a server to become ready."""
    stated = _whole(document.get("healthCheckTimeout"))
    return min(max(15, 120 if stated is None else stated), 7 * 86_400)


def _signal_of(words: list[str]) -> str | None:
    """Return the signal of `kill -SIGNAL ${PID}`; None for another command."""
    if PurePosixPath(words[0]).name != "kill" or words[-1] != "${PID}" or len(words) > 4:
        return None
    found = _KILL.fullmatch(" ".join(words[1:-1]) or "-TERM")
    if found is None:
        return None
    name = _SIGNALS.get(found[1], found[1])
    return f"SIG{name}" if name in _SIGNALS.values() else None


def _written(value: Any) -> Any:
    if isinstance(value, str):
        return written(value)
    if isinstance(value, dict):
        return {written(str(key)): _written(item) for key, item in value.items()}
    return [_written(item) for item in value] if isinstance(value, list) else value


def _texts(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value]
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [text for item in items for text in _texts(item)]


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value] if isinstance(value, str) else []


def _whole(value: Any) -> int | None:
    """Return a whole number, also one that a macro wrote as text."""
    if isinstance(value, bool):
        return None
    if isinstance(value, str) and re.fullmatch(r"-?\d{1,9}", value.strip()):
        return int(value)
    return int(value) if isinstance(value, int | float) and abs(value) < 1e12 else None
