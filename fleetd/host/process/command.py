"""Run short programs (exec probes, stop commands) with a timeout, and kill everything that they started.

Invariants:
- The exit of the leader ends the command; the rest of its group is killed then, while the pid is still ours.
- At the timeout the whole set is killed. At most 16 KiB of output is kept: its end.
"""

from __future__ import annotations

import asyncio
import os
import signal as signals
from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from secrets import token_hex

from fleetd.host.process.exit_watch import CHILDREN, ExitStatus, ExitWatch
from fleetd.host.process.process_set import TOKEN_VARIABLE, Lineage, carriers
from fleetd.host.process.spawn import kill_and_forget, kill_group, launch
from fleetd.host.process.table import ProcessTable
from fleetd.host.types import Program, StopCommandResult

_KEPT_BYTES = 16 * 1024
_SHOWN_CHARS = 300
_HUNTS = 20


@dataclass(frozen=True, slots=True)
class CommandResult:
    """The result of a command. `output` is the end of stdout and stderr together."""

    status: ExitStatus
    output: str = ""
    timed_out: bool = False

    @property
    def ok(self) -> bool:
        return self.status.code == 0 and not self.timed_out


class _Output:
    """The last output of a pipe, read at once so that the writer never blocks."""

    def __init__(self, loop: asyncio.AbstractEventLoop, fd: int) -> None:
        self._loop, self._fd, self._data = loop, fd, b""
        os.set_blocking(fd, False)
        loop.add_reader(fd, self._read)

    def _read(self) -> None:
        try:
            data = os.read(self._fd, 65536)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._loop.remove_reader(self._fd)
        self._data = (self._data + data)[-_KEPT_BYTES:]

    def text(self) -> str:
        """Return the last output and what the pipe still holds from live writers."""
        for _ in range(16):
            before = self._data
            self._read()
            if self._data == before:
                break
        return self._data.decode("utf-8", "replace").strip()

    def close(self) -> None:
        self._loop.remove_reader(self._fd)
        os.close(self._fd)


async def run_command(
    program: Program,
    timeout_s: float,
    *,
    pool: Executor,
    table: ProcessTable,
    end_lineage: Callable[[Lineage], asyncio.Future[tuple[int, ...]]],
) -> CommandResult:
    """Run a program until exit or timeout. Raises HostError if it cannot start.

    `end_lineage` begins at once to end a whole set, whether or not its result is awaited.
    """
    loop = asyncio.get_running_loop()
    token = token_hex(8)
    program = replace(program, env={**program.env, TOKEN_VARIABLE: token})
    reader, writer = os.pipe()
    starting = loop.run_in_executor(pool, launch, program, writer, writer)
    try:
        pid = await asyncio.shield(starting)
    except asyncio.CancelledError:
        starting.add_done_callback(lambda done: _abandon(done, token, end_lineage))
        os.close(reader)
        raise
    except BaseException:
        os.close(reader)
        raise
    finally:
        os.close(writer)
    ended = asyncio.Event()
    watch = ExitWatch(loop, pid, ended.set)
    output = _Output(loop, reader)
    entry = table.entry(pid)
    lineage = Lineage(pid, entry.start if entry else 0, token)
    try:
        timed_out = await _wait_ended(ended, timeout_s)
        if timed_out:
            table.send(lineage.pid, lineage.start, signals.SIGKILL)  # over its time: no grace
            await asyncio.shield(end_lineage(lineage))
        kill_group(pid)
        return CommandResult(_collect(pid), output.text(), timed_out)
    except asyncio.CancelledError:
        kill_and_forget(pid)
        end_lineage(lineage)  # goes on without us
        raise
    finally:
        watch.close()
        output.close()


async def _wait_ended(ended: asyncio.Event, timeout_s: float) -> bool:
    """Return True at a timeout."""
    try:
        async with asyncio.timeout(timeout_s):
            await ended.wait()
    except TimeoutError:
        return True
    return False


def stop_command_result(result: CommandResult, took_s: float) -> StopCommandResult:
    """Return the result of a stop command in one line."""
    last = (result.output.strip().splitlines()[-1:] or ["it printed nothing"])[0][:_SHOWN_CHARS]
    if result.ok:
        return StopCommandResult(True, last, took_s)
    how = f"exit code {result.status.code}" if result.status.code is not None else f"killed by {result.status.signal}"
    if result.timed_out:
        how = f"killed after {took_s:.1f} s"
    return StopCommandResult(False, f"{how}: {last}; the signal was sent instead", took_s)


def end_marked(table: ProcessTable, variable: str, mark: str) -> list[int]:
    """Kill processes with a mark in their environment; return the pids. Blocks."""
    killed: list[int] = []
    for _ in range(_HUNTS):
        found = [entry for entry, _ in carriers(table, variable, mark) if entry.pid != os.getpid()]
        for entry in found:
            table.send(entry.pid, entry.start, signals.SIGKILL)
        killed += [entry.pid for entry in found]
        if not found:
            break
    return killed


def _collect(pid: int) -> ExitStatus:
    status = CHILDREN.collect(pid)
    if status is None:  # it hangs in the kernel: it is reaped later, like an orphan
        CHILDREN.disown(pid)
        return ExitStatus()
    return status


def _abandon(
    starting: asyncio.Future[int], token: str, end_lineage: Callable[[Lineage], asyncio.Future[tuple[int, ...]]]
) -> None:
    """Undo a start whose caller has gone."""
    if not starting.cancelled() and starting.exception() is None:
        kill_and_forget(starting.result())
        end_lineage(Lineage(-1, 0, token))
