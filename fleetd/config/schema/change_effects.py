"""The effect of changing each key of fleet.yaml.

Invariants:
- hot: applies to the running process. restart: the process restarts. reload: a held model is loaded again.
  scale: replicas are added or removed. daemon: applies when the daemon starts.
- The longest matching path decides. Every key of the schema has an effect; a test walks the schema.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum


class Effect(StrEnum):
    HOT = "hot"
    RELOAD = "reload"
    SCALE = "scale"
    RESTART = "restart"
    DAEMON = "daemon"


_HOT, _RELOAD, _SCALE, _RESTART, _DAEMON = Effect.HOT, Effect.RELOAD, Effect.SCALE, Effect.RESTART, Effect.DAEMON

_PROCESS: dict[str, Effect] = {
    "command": _RESTART, "args": _RESTART, "env": _RESTART, "env_file": _RESTART, "cwd": _RESTART, "user": _RESTART,
    "umask": _RESTART, "port": _RESTART, "replicas": _SCALE, "depends_on": _HOT, "requires": _HOT, "restart": _HOT,
    "stop": _HOT, "stop.message": _RESTART, "probes": _HOT, "probes.startup.message": _RESTART,
    "logs": _HOT, "logs.capture": _RESTART, "limits.memory": _HOT, "limits.nofile": _RESTART,
    "limits.nice": _RESTART, "limits.cpu": _RESTART, "schedule": _HOT, "watch": _HOT, "max_age": _HOT, "hooks": _HOT,
    "enabled": _HOT,
}  # fmt: skip
_ENGINE: dict[str, Effect] = {
    "engine": _RESTART, "device": _RESTART, "options": _RESTART, "runtime": _RESTART, "external": _RESTART, "start": _HOT,
}  # fmt: skip
_MODEL: dict[str, Effect] = {
    "memory": _HOT, "preload": _HOT, "pin": _HOT, "priority": _HOT, "ttl": _HOT, "min_resident": _HOT, "concurrency": _HOT,
    "queue": _HOT, "load_timeout": _HOT, "request": _HOT, "fallback": _HOT, "aliases": _HOT,
}  # fmt: skip
_HELD: dict[str, Effect] = {
    "instance": _RELOAD, "served_as": _RELOAD, "from": _RELOAD, "quantize": _RELOAD, "modelfile": _RELOAD,
    "embedding": _RELOAD, "options": _RELOAD,
}  # fmt: skip

EFFECTS: Mapping[str, Mapping[str, Effect]] = {
    "service": _PROCESS,
    "instance": {**_PROCESS, **_ENGINE},
    "held model": {**_MODEL, **_HELD},
    "engine model": {**_PROCESS, **_ENGINE, **_MODEL, "served_as": _RESTART},
    "route": {"route": _HOT, "aliases": _HOT, "fallback": _HOT},
    "fleet": {
        "version": _HOT, "name": _HOT, "include": _HOT, "paths": _DAEMON, "gateway": _HOT, "gateway.listen": _DAEMON,
        "gateway.tls": _DAEMON, "gateway.allowed_hosts": _DAEMON, "gateway.max_body": _DAEMON, "gateway.retry": _DAEMON,
        "gateway.keys_file": _HOT, "admin": _DAEMON, "devices": _HOT, "watch": _HOT, "defaults": _HOT,
    },
}  # fmt: skip
DAEMON_KEYS = tuple(path for path, effect in EFFECTS["fleet"].items() if effect is _DAEMON)


def effect_of(kind: str, path: tuple[str, ...]) -> Effect:
    """Return the effect of a change below an entry of a kind. Raises KeyError."""
    table = EFFECTS[kind]
    for length in range(len(path), 0, -1):
        found = table.get(".".join(path[:length]))
        if found is not None:
            return found
    raise KeyError(f"no effect is given for {kind}: {'.'.join(path)}")
