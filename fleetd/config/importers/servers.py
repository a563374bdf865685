"""Recognise a model server in a command line, for importers of process managers.

Invariants:
- llama-server, `vllm serve` and `ollama serve` become typed entries that run always, as the other manager ran them; every other
  command is a service. The program's path stays.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any

from fleetd.config.importers.llama_server import LlamaServer, program_at, read_llama_server
from fleetd.config.importers.pm2.ollama import is_ollama, to_instance
from fleetd.config.importers.report import Report
from fleetd.config.importers.vllm_server import read_vllm

_ALWAYS = {"start": "always", "preload": True, "ttl": 0}


def server_entry(name: str, words: Sequence[str], env: Mapping[str, str], report: Report) -> tuple[str, dict[str, Any]]:
    """Return the section and the entry of a command line."""
    typed: tuple[str, dict[str, Any]] | str | None = None
    if is_ollama(list(words)):
        return "instances", to_instance(name, list(words), env, report)
    if program_at(words) is not None:
        typed = _llamacpp(words, env, report, name)
    elif _vllm_at(words):
        typed = _vllm(words, env)
    if isinstance(typed, tuple):
        return typed
    if isinstance(typed, str):
        report.warn(name, "command", f"stays a service: it {typed}")
    return "services", {"command": list(words), **({"env": dict(env)} if env else {})}


def _llamacpp(
    words: Sequence[str], env: Mapping[str, str], report: Report, name: str
) -> tuple[str, dict[str, Any]] | str:
    found = read_llama_server(words, env)
    if not isinstance(found, LlamaServer):
        return found
    entry: dict[str, Any] = {"engine": "llamacpp", "command": found.program, "options": found.options}
    if found.env:
        entry["env"] = found.env
    entry["port"] = int(found.port) if found.port and found.port.isdecimal() else 8080
    if found.alias:
        entry |= {"served_as": found.alias, "aliases": [found.alias]} if found.alias != name else {}
    if found.context is None:
        report.warn(name, "command", "states no context length: fleetd takes 4096 tokens; llama-server the model's own")
    if found.host not in (None, "127.0.0.1", "localhost"):
        report.approximated(name, "command", f"--host {found.host}: it listens on loopback; clients use the gateway")
    for option, detail in found.notes:
        report.approximated(name, option, detail)
    return "models", entry | _ALWAYS


def _vllm_at(words: Sequence[str]) -> int | None:
    """Return the number of words of the program: `vllm serve`, or Python with the module of its server."""
    for index, word in enumerate(words[:4]):
        if PurePosixPath(word).name == "vllm" and list(words[index + 1 : index + 2]) == ["serve"]:
            return index + 2 if index == 0 else None
        if word == "vllm.entrypoints.openai.api_server":
            return index + 1
    return None


def _vllm(words: Sequence[str], env: Mapping[str, str]) -> tuple[str, dict[str, Any]] | str:
    count = _vllm_at(words) or 0
    read = read_vllm(words[count:])
    if isinstance(read, str):
        return read
    options, served = read
    entry: dict[str, Any] = {"engine": "vllm", "options": options}
    if words[0] != "vllm":
        entry["command"] = list(words[:count])
    if env:
        entry["env"] = dict(env)
    if served:
        entry |= {"served_as": served[0], "aliases": served}
    else:
        entry["aliases"] = [str(options["model"])]
    entry["port"] = _port(words)
    return "models", entry | _ALWAYS


def _port(words: Sequence[str]) -> int:
    for word, following in zip(words, (*words[1:], ""), strict=True):
        flag, equals, value = word.partition("=")
        if flag == "--port" and (value if equals else following).isdecimal():
            return int(value if equals else following)
    return 8000
