"""One start from beginning to end: port, log, record, program, record again. Blocks: runs in a thread.

Invariants:
- The record is on disk before the program runs, so that a daemon that dies in between can find it by its token.
- Whatever fails leaves nothing behind: no descriptor, no record, no process.
"""

from __future__ import annotations

import os
import socket
import time
from dataclasses import dataclass, replace
from secrets import token_hex

from fleetd.host.logs.fifo import open_pair
from fleetd.host.logs.registry import LogRegistry
from fleetd.host.process.cgroup import CgroupTree
from fleetd.host.process.command import kill_and_forget
from fleetd.host.process.handle import Records
from fleetd.host.process.node_ipc import channel_env
from fleetd.host.process.process_set import Lineage
from fleetd.host.process.program import Program, launch, tagged_env
from fleetd.host.process.table import ProcessTable, executable_of
from fleetd.host.system import ports
from fleetd.host.types import Capture, HandleRecord, SpawnRequest


@dataclass(frozen=True, slots=True)
class Started:
    """A running program. `pipe` is our end of its output where the daemon captures it, `channel` of its Node IPC."""

    record: HandleRecord
    lineage: Lineage
    pipe: int | None = None
    channel: socket.socket | None = None


class Spawner:
    """Starts programs for one host."""

    def __init__(
        self, table: ProcessTable, records: Records, logs: LogRegistry, cgroups: CgroupTree | None, boot_id: str
    ) -> None:
        self._table, self._records, self._logs = table, records, logs
        self._cgroups, self._boot_id = cgroups, boot_id

    def spawn(self, request: SpawnRequest) -> Started:
        """Start one program. Raises HostError."""
        if request.port is not None:
            ports.check_free(request.host, request.port)
        log_fd = self._logs.open_for_child(request.name, request.logs)
        opened, reader, channel = [log_fd], None, None
        try:
            record = HandleRecord(
                name=request.name,
                generation=request.generation,
                token=token_hex(8),
                boot_id=self._boot_id,
                argv=request.argv,
                host=request.host,
                port=request.port,
                cgroup=str(self._cgroups.leaf(request.name, request.generation).path) if self._cgroups else None,
                log_path=str(self._logs.files(request.name).live),
                log_start=os.fstat(log_fd).st_size,
                logs=request.logs,
                spawned_at=time.time(),
                extra=dict(request.extra),
            )
            self._records.write(record)
            output = log_fd
            if request.logs.capture == Capture.PIPE:
                reader, output = open_pair(self._records.pipe_path(record.token))
                opened.append(output)
            env = tagged_env(request, record.token, self._records.place)
            passed: tuple[int, ...] = ()
            if request.ipc:
                channel, theirs = socket.socketpair()
                opened.append(theirs.detach())
                env.update(channel_env(opened[-1]))
                passed = (opened[-1],)
            try:
                pid = launch(_program(request, env, passed), output, output)
            except BaseException:
                self._records.remove(record)
                raise
            return self._started(record, pid, reader, channel)
        except BaseException:
            if reader is not None:
                os.close(reader)
            if channel is not None:
                channel.close()
            raise
        finally:
            for fd in opened:
                os.close(fd)

    def _started(self, record: HandleRecord, pid: int, reader: int | None, channel: socket.socket | None) -> Started:
        entry = self._table.entry(pid)
        start = entry.start if entry is not None else 0
        record = replace(record, pid=pid, start_ticks=start, exe=executable_of(pid))
        self._records.write(record)
        return Started(record, Lineage(pid, start, record.token), reader, channel)

    def abandon(self, started: Started) -> None:
        """Kill what was just started and forget it; whatever fled from its group is hunted by the caller."""
        kill_and_forget(started.lineage.pid)
        if started.pipe is not None:
            os.close(started.pipe)
        if started.channel is not None:
            started.channel.close()
        self._records.remove(started.record)


def _program(request: SpawnRequest, env: dict[str, str], passed: tuple[int, ...]) -> Program:
    return Program(
        argv=request.argv,
        env=env,
        cwd=request.cwd,
        user=request.user,
        umask=request.umask,
        nice=request.nice,
        cpu=request.cpu,
        nofile=request.nofile,
        pass_fds=passed,
    )
