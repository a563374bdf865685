"""The worker process that reads fleet.yaml for the daemon: read, check, resolve, compare, answer.

Invariants:
- Two messages in, two out: the file and its environment for the folders of the fleet, then ReadInputs for the Reading.
  After that, or after a Refusal, the next file may come; the worker exits when the pipe is closed.
- Every failure is an answer. Nothing else is written to the pipe: output of libraries goes to stderr.
- When the daemon is gone, the worker exits silently.
"""

from __future__ import annotations

import json
import os
import pickle
import sys
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

from fleetd.config.diff import diff
from fleetd.config.load import LoadedConfig, load
from fleetd.config.schema.change_effects import DAEMON_KEYS
from fleetd.config.schema.fleet import FleetConfig
from fleetd.config.secrets import redact
from fleetd.daemon.reload.messages import Failure, Places, Reading, ReadInputs, Refusal, pack, unpack
from fleetd.errors import ConfigError, FleetError
from fleetd.host.system.ports import is_free
from fleetd.resolver import check
from fleetd.resolver.build import checked, resolve_fleet
from fleetd.resolver.port_assignment import kept_ports
from fleetd.resolver.resolved import Edit, paths_of

_HEAD_BYTES = 8
_FASTEST = 1


def read(loaded: LoadedConfig, given: ReadInputs) -> Reading:
    """Resolve and compare a loaded file. Raises ConfigError with every problem."""
    ports = {**kept_ports(paths_of(loaded).state), **given.around.ports}

    def usable(name: str, port: int) -> bool:
        return name in given.running or is_free("127.0.0.1", port)

    resolved = checked(resolve_fleet(loaded, replace(given.around, ports=ports), usable, given.hostname))
    before = _kept(given.before) if given.before is not None else None
    config = loaded.config if before is None else applicable(before, loaded.config)
    return Reading(
        resolved=resolved,
        edits=edits(before, loaded.config) if before is not None else (),
        kept=zlib.compress(pickle.dumps(config, pickle.HIGHEST_PROTOCOL), _FASTEST),
        shown=zlib.compress(json.dumps(shown(config)).encode(), _FASTEST),
    )


def applicable(before: FleetConfig, config: FleetConfig) -> FleetConfig:
    """Return a configuration with old values of keys that need a daemon restart.

    So every comparison shows them as changed until the daemon restarts.
    """
    found = config
    for key, _, below in (path.partition(".") for path in DAEMON_KEYS):
        old = getattr(before, key)
        if below:
            old = getattr(found, key).model_copy(update={below: getattr(old, below)})
        found = found.model_copy(update={key: old})
    return found


def _kept(content: bytes) -> FleetConfig:
    config: FleetConfig = pickle.loads(zlib.decompress(content))  # noqa: S301 - from an earlier Reading of a worker
    return config


def shown(config: FleetConfig) -> Any:
    """Return a configuration without the defaults, secrets hidden."""
    return redact(config.model_dump(mode="json", by_alias=True, exclude_none=True, exclude_defaults=True))


def edits(old: FleetConfig, new: FleetConfig) -> tuple[Edit, ...]:
    """Return the differences in the terms of the control API."""
    return tuple(
        Edit(
            change.kind,
            change.name or "fleet",
            str(change.action),
            tuple(
                {
                    "path": field.path,
                    "before": field.old,
                    "after": field.new,
                    "effect": str(field.effect),
                }
                for field in change.fields
            ),
        )
        for change in diff(old, new)
    )


def main() -> None:
    """Read files on request, over stdin and stdout."""
    answers = os.dup(1)
    os.dup2(2, 1)
    try:
        while True:
            _serve(answers)
    except (BrokenPipeError, EOFError, KeyboardInterrupt):
        sys.stderr.flush()
        os._exit(0)  # let the kernel free the memory of thousands of entries


def _serve(answers: int) -> None:
    try:
        path, env = pickle.loads(_message())  # noqa: S301 - from the daemon that started us
        loaded = load(Path(path), env, check.finder(env))
        _answer(answers, Places(paths_of(loaded)))
        _answer(answers, read(loaded, unpack(_message(), ReadInputs)))
    except (BrokenPipeError, EOFError):
        raise
    except ConfigError as error:
        _answer(answers, Refusal(error.problems, error.hint, error.files))
    except FleetError as error:
        _answer(answers, Failure(str(error)))
    except Exception as error:  # noqa: BLE001 - an answer, so that the daemon can report it
        _answer(answers, Failure(f"the configuration could not be read, please report it: {_located(error)}"))


def _located(error: Exception) -> str:
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    where = f" ({Path(trace.tb_frame.f_code.co_filename).name}:{trace.tb_lineno})" if trace is not None else ""
    return f"{type(error).__name__}: {error}{where}"


def _message() -> bytes:
    size = int.from_bytes(_read(_HEAD_BYTES), "big")
    return _read(size)


def _read(size: int) -> bytes:
    data = sys.stdin.buffer.read(size)
    if len(data) < size:
        raise EOFError
    return data


def _answer(fd: int, value: Any) -> None:
    content = pack(value)
    left = memoryview(len(content).to_bytes(_HEAD_BYTES, "big") + content)
    while left:
        left = left[os.write(fd, left) :]


if __name__ == "__main__":
    main()
