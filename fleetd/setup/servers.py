"""Ask the usual ports of this machine which model server listens, and which models it has.

Invariants:
- Loopback only, no proxies, no redirects; each answer has a limit in seconds and bytes.
- Every byte is untrusted: a name that fleet.yaml could not hold is left out.
"""

from __future__ import annotations

import http.client
import json
import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

ANSWER_S = 2.0
ANSWER_MAX_BYTES = 4 * 1024 * 1024
MAX_MODELS = 500
# port → the server that usually has it
PORTS: Mapping[int, str] = {11434: "ollama", 1234: "lmstudio", 8000: "external"}
_NAME = re.compile(r"[\x21-\x7e](?:[\x20-\x7e]{0,198}[\x21-\x7e])?")


@dataclass(frozen=True, slots=True)
class Listed:
    """One model that a server lists."""

    name: str
    size_bytes: int | None = None
    embedding: bool = False


@dataclass(frozen=True, slots=True)
class Running:
    """A model server that answers. `engine` is ollama, lmstudio or external; `locked`: it asks for a key."""

    engine: str
    port: int
    version: str | None = None
    models: tuple[Listed, ...] = ()
    locked: bool = False
    owner: str | None = None  # who the server says its models are owned by, such as vllm


def look(port: int) -> Running | None:
    """Return the model server on a port of 127.0.0.1; None if there is none."""
    if not _listens(port):
        return None
    version = _get(port, "/api/version")
    if version.status == 200 and isinstance(version.data, Mapping) and isinstance(version.data.get("version"), str):
        tags = _get(port, "/api/tags").data
        return Running("ollama", port, version.data["version"][:60], _ollama_models(tags))
    greeting = _get(port, "/lmstudio-greeting")
    listed = _get(port, "/v1/models")
    if listed.status in (401, 403):
        return Running("external", port, locked=True)
    rows = listed.data.get("data") if isinstance(listed.data, Mapping) else None
    if listed.status != 200 or not isinstance(rows, list):
        return None
    engine = (
        "lmstudio"
        if greeting.status == 200 and isinstance(greeting.data, Mapping) and greeting.data.get("lmstudio")
        else "external"
    )
    owners = [row.get("owned_by") for row in rows if isinstance(row, Mapping)]
    owner = next((str(one)[:60] for one in owners if isinstance(one, str)), None)
    return Running(engine, port, None, _openai_models(rows), owner=owner)


@dataclass(frozen=True, slots=True)
class _Reply:
    status: int
    data: Any = None


def _listens(port: int) -> bool:
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=ANSWER_S):
            return True
    except OSError:
        return False


def _get(port: int, path: str) -> _Reply:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=ANSWER_S)
    try:
        connection.request("GET", path, headers={"Accept": "application/json"})
        response = connection.getresponse()
        body = response.read(ANSWER_MAX_BYTES + 1)
        if len(body) > ANSWER_MAX_BYTES:
            return _Reply(response.status)
        try:
            return _Reply(response.status, json.loads(body))
        except (ValueError, RecursionError):
            return _Reply(response.status)
    except (OSError, http.client.HTTPException, ValueError):
        return _Reply(0)
    finally:
        connection.close()


def _ollama_models(tags: Any) -> tuple[Listed, ...]:
    """Return the local models of GET /api/tags; those on Ollama's own servers are left out."""
    rows = tags.get("models") if isinstance(tags, Mapping) else None
    found = []
    for row in rows if isinstance(rows, list) else ():
        if not isinstance(row, Mapping) or row.get("remote_host") or not _usable(row.get("name")):
            continue
        details = row.get("details")
        families = details.get("families") if isinstance(details, Mapping) else None
        embedding = isinstance(families, list) and any("bert" in str(family) for family in families)
        size = row.get("size")
        found.append(Listed(row["name"], size if isinstance(size, int) and size > 0 else None, embedding))
    return tuple(found[:MAX_MODELS])


def _openai_models(rows: list[Any]) -> tuple[Listed, ...]:
    found: dict[str, Listed] = {}
    for row in rows:
        name = row.get("id") if isinstance(row, Mapping) else None
        if isinstance(name, str) and _usable(name):
            found[name] = Listed(name, embedding="embed" in name.lower())
    return tuple(found.values())[:MAX_MODELS]


def _usable(name: Any) -> bool:
    return isinstance(name, str) and _NAME.fullmatch(name) is not None
