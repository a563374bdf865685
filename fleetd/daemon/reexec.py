"""Replace the daemon's program in place: same PID, same children, same locks.

Invariants:
- The state for the new program is passed in two unnamed files, whose descriptors an environment variable names. All
  descriptors keep their numbers.
- The new program gets the same command line, with the active configuration file; when it fails, systemd or the operator
  sees an ordinary exit.
- Starts and stops in progress are waited for, within bounds; a restart that is not done by then is passed on.
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
SETTLE_S = 20.0  # shorter than the timeout of `fleetctl daemon-reexec`
REST_S = 3.0  # for what begins while the listeners are closed


@dataclass(frozen=True, slots=True)
class PendingOrders:
    """Unfinished restarts with reasons (`turns`: rolling), and a requested shutdown."""

    restarts: Mapping[str, str] = field(default_factory=dict)
    turns: Mapping[str, str] = field(default_factory=dict)
    stop: bool = False

    def events(self, names: Collection[str]) -> Iterator[RestartDue]:
        """Yield the restarts of adopted processes; all others start again anyway."""
        for name in names:
            if name in self.restarts:
                yield RestartDue(name, self.restarts[name])
            elif name in self.turns:
                yield RestartDue(name, self.turns[name], in_turn=True)


@dataclass(frozen=True, slots=True)
class Handover:
    """The state that the former program passed to this one."""

    lock_fds: list[int]
    records: list[HandleRecord]
    orders: PendingOrders


def handover() -> Handover | None:
    """Return the state that the former program passed on; None for an ordinary start."""
    text = os.environ.pop(VARIABLE, None)
    if text is None:
        return None
    content = json.loads(text)
    with open(content["records_fd"], "rb") as file:  # noqa: PTH123 - a descriptor
        records = decode_records(file.read())
    fds = content["lock_fds"] if "lock_fds" in content else [content["lock_fd"]]  # of a version with one lock
    orders = content.get("wishes", {})  # of a version that had few, or none
    if "wishes_fd" in content:
        with open(content["wishes_fd"], "rb") as file:  # noqa: PTH123 - a descriptor
            orders = json.load(file)
    return Handover(
        [int(fd) for fd in fds],
        records,
        PendingOrders(orders.get("restarts", {}), orders.get("turns", {}), bool(orders.get("stop"))),
    )


def in_progress(process: Process) -> bool:
    """Return whether a start, a stop or a restart of this process is in progress."""
    starting = process.state is ProcessState.STARTING and not process.spawned
    return starting or process.state is ProcessState.STOPPING or process.restart_wanted is not None


def pending_orders(queries: FleetQueries, stop: bool) -> PendingOrders:
    """Return the restarts in progress.

    A process that is being stopped may live on for a while: the new program stops it again, and then starts it.
    """
    return PendingOrders(queries.pending_restarts(), queries.rolling_restarts(), stop)


async def settle(daemon: Daemon) -> None:
    """Wait until nothing is in progress, a shutdown comes, or SETTLE_S is over."""

    def settled() -> bool | None:
        return daemon.state.stopping or not any(map(in_progress, daemon.fleet.queries.processes())) or None

    await daemon.changes.wait_for(settled, SETTLE_S)


def command_line(words: Sequence[str], config: Path) -> list[str]:
    """Return the words of a `fleetd run` command with another file."""
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
    orders: PendingOrders,
    environ: Mapping[str, str],
    config: Path,
    stack: AsyncExitStack,
) -> NoReturn:
    """Execute this program again. Raises OSError when the kernel refuses.

    Nothing on `stack` may be closed: children, locks and pipes continue.
    """
    del stack
    records_fd = _unnamed_file(encode_records(list(records)))
    orders_fd = _unnamed_file(json.dumps(asdict(orders)).encode())
    content = {"lock_fds": list(lock_fds), "records_fd": records_fd, "wishes_fd": orders_fd}
    env = {**os.environ, **environ, VARIABLE: json.dumps(content)}
    argv = [sys.executable, *command_line(sys.orig_argv[1:], config)]
    sys.stdout.flush()
    sys.stderr.flush()
    os.execve(sys.executable, argv, env)


def _unnamed_file(content: bytes) -> int:
    """Return the descriptor of an unnamed file that the next program can read."""
    fd, name = tempfile.mkstemp(prefix="fleetd-")
    Path(name).unlink()
    with open(fd, "wb", closefd=False) as file:
        file.write(content)
    os.lseek(fd, 0, os.SEEK_SET)
    os.set_inheritable(fd, True)
    return fd
