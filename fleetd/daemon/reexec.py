"""Replacing the daemon's program in place: same PID, same children, same locks.

The rules of this file
- What the new program needs crosses in two files without a name; the environment says which descriptors they are. All descriptors
  keep their numbers.
- The new program starts from the same command line, with the file that is the daemon's now; where that fails, systemd or the
  operator sees an exit as any other.
- What is being started or stopped is waited for, within bounds; a restart that is under way even then is a wish passed on.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from fleetd.core.data.events import RestartDue
from fleetd.core.data.state import Process, ProcessState
from fleetd.host.process.handle import decode_records, encode_records
from fleetd.host.types import HandleRecord

if TYPE_CHECKING:
    from fleetd.core.queries import FleetQueries
    from fleetd.daemon.wiring import Daemon

VARIABLE = "FLEETD_TAKE_OVER"
SETTLE_S = 20.0  # shorter than the patience of `fleetctl daemon-reexec`
REST_S = 3.0  # for what begins while the listeners are closed


@dataclass(frozen=True, slots=True)
class Wishes:
    """What was begun and is not done: `restarts` and `turns` are reasons by name; `stop`: the daemon was told to end."""

    restarts: Mapping[str, str] = field(default_factory=dict)
    turns: Mapping[str, str] = field(default_factory=dict)
    stop: bool = False

    def events(self, names: Collection[str]) -> Iterator[RestartDue]:
        """Yield the restarts of those that were adopted: whatever else there was has ended, and starts anew anyway."""
        for name in names:
            if name in self.restarts:
                yield RestartDue(name, self.restarts[name])
            elif name in self.turns:
                yield RestartDue(name, self.turns[name], in_turn=True)


@dataclass(frozen=True, slots=True)
class TakenOver:
    """What the program before left to this one."""

    lock_fds: list[int]
    records: list[HandleRecord]
    wishes: Wishes


def taken_over() -> TakenOver | None:
    """Return what the program before this one left; None for an ordinary start."""
    text = os.environ.pop(VARIABLE, None)
    if text is None:
        return None
    content = json.loads(text)
    with open(content["records_fd"], "rb") as file:  # noqa: PTH123 - a descriptor
        records = decode_records(file.read())
    fds = content["lock_fds"] if "lock_fds" in content else [content["lock_fd"]]  # of a version with one lock
    wishes = content.get("wishes", {})  # of a version that had few, or none
    if "wishes_fd" in content:
        with open(content["wishes_fd"], "rb") as file:  # noqa: PTH123 - a descriptor
            wishes = json.load(file)
    return TakenOver(
        [int(fd) for fd in fds],
        records,
        Wishes(wishes.get("restarts", {}), wishes.get("turns", {}), bool(wishes.get("stop"))),
    )


def under_way(process: Process) -> bool:
    """Return whether a start, a stop or a restart of this process is ordered and not done."""
    starting = process.state is ProcessState.STARTING and not process.spawned
    return starting or process.state is ProcessState.STOPPING or process.restart_wanted is not None


def wishes_of(queries: FleetQueries, stop: bool) -> Wishes:
    """Return what the fleet has begun. What is being stopped may run on a while: it is stopped again, and then starts anew."""
    return Wishes(queries.pending_restarts(), queries.rolling_restarts(), stop)


async def settled(daemon: Daemon, timeout_s: float = SETTLE_S) -> None:
    """Return once nothing is under way, or the daemon is told to stop, or when the time is over."""

    def look() -> bool | None:
        return daemon.facts.stopping or not any(map(under_way, daemon.fleet.queries.processes())) or None

    await daemon.changes.wait_for(look, timeout_s)


def command_line(words: Sequence[str], config: Path) -> list[str]:
    """Return the words of a `fleetd run` with another file."""
    at = words.index("run") + 1 if "run" in words else len(words)
    kept, rest = list(words[:at]), list(words[at:])
    while rest:
        word = rest.pop(0)
        if word in ("--config", "-c"):
            del rest[:1]
        elif not word.startswith(("--config=", "-c")):
            kept.append(word)
    return [*kept, "--config", str(config)]


def execute(
    lock_fds: Sequence[int],
    records: Sequence[HandleRecord],
    wishes: Wishes,
    environ: Mapping[str, str],
    config: Path,
    stack: AsyncExitStack,
) -> NoReturn:
    """Execute this program anew. Raises OSError when the kernel refuses."""
    del stack  # nothing on it may run: children, locks and pipes go on
    records_fd = _handed_on(encode_records(list(records)))
    wishes_fd = _handed_on(json.dumps(asdict(wishes)).encode())
    content = {"lock_fds": list(lock_fds), "records_fd": records_fd, "wishes_fd": wishes_fd}
    env = {**os.environ, **environ, VARIABLE: json.dumps(content)}
    argv = [sys.executable, *command_line(sys.orig_argv[1:], config)]
    sys.stdout.flush()
    sys.stderr.flush()
    os.execve(sys.executable, argv, env)


def _handed_on(content: bytes) -> int:
    """Return the descriptor of a file without a name that the next program can read."""
    fd, name = tempfile.mkstemp(prefix="fleetd-")
    Path(name).unlink()
    with open(fd, "wb", closefd=False) as file:
        file.write(content)
    os.lseek(fd, 0, os.SEEK_SET)
    os.set_inheritable(fd, True)
    return fd
