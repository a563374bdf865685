"""Start a process: port, log, record, program, record again. Blocks: call it in a thread.

Invariants:
- The record is on disk before the program runs, so that a daemon that dies in between can find it by its token.
- A start that fails leaves nothing behind: no descriptor, no record, no process.
- Every child leads its own session, has /dev/null as stdin, and stdout and stderr in one log.
- No preexec_fn: with it Python forks (97 ms with a 2 GiB heap) instead of vforking (1 ms).
- nice and CPU affinity are set on a thread that lives for this one spawn, since a child inherits them from its thread.
- A failure is a HostError with a full sentence; `recoverable` says whether time alone can help.
"""

from __future__ import annotations

import errno
import os
import shutil
import signal as signals
import socket
import stat
import subprocess
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from secrets import token_hex
from typing import Any, TypeVar

from fleetd.errors import HostError
from fleetd.host.logs.fifo import open_pair
from fleetd.host.logs.registry import LogRegistry
from fleetd.host.process.cgroup import CgroupTree
from fleetd.host.process.exit_watch import CHILDREN
from fleetd.host.process.handle import Records
from fleetd.host.process.node_ipc import channel_env
from fleetd.host.process.process_set import INSTANCE_VARIABLE, STATE_VARIABLE, TOKEN_VARIABLE, Lineage
from fleetd.host.process.table import ProcessTable, executable_of
from fleetd.host.system import ports
from fleetd.host.types import NEVER_PASSED, Capture, HandleRecord, Program, SpawnRequest

_SHELL = "/bin/sh"
_WITH_NOFILE = 'ulimit -n "$1" || exit 126; shift; exec "$@"'
_LATER = frozenset({errno.EAGAIN, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EIO, errno.ETXTBSY, errno.ENOSPC})

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Started:
    """A running program. `pipe` and `channel` are our ends of output and Node IPC."""

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
        logs = request.program.execution.logs
        log_fd = self._logs.open_for_child(request.name, logs)
        opened, reader, channel = [log_fd], None, None
        try:
            record = HandleRecord(
                name=request.name,
                generation=request.generation,
                token=token_hex(8),
                boot_id=self._boot_id,
                argv=request.program.argv,
                host=request.host,
                port=request.port,
                cgroup=str(self._cgroups.leaf(request.name, request.generation).path) if self._cgroups else None,
                log_path=str(self._logs.files(request.name).live),
                log_start=os.fstat(log_fd).st_size,
                logs=logs,
                spawned_at=time.time(),
                extra=dict(request.extra),
            )
            self._records.write(record)
            output = log_fd
            if logs.capture == Capture.PIPE:
                reader, output = open_pair(self._records.pipe_path(record.token))
                opened.append(output)
            env = _tagged_env(request, record.token, self._records.place)
            passed: tuple[int, ...] = ()
            if request.ipc:
                channel, theirs = socket.socketpair()
                opened.append(theirs.detach())
                env.update(channel_env(opened[-1]))
                passed = (opened[-1],)
            try:
                pid = launch(replace(request.program, env=env, pass_fds=passed), output, output)
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
        """Kill a new process with its group and forget it; leave the rest to the caller."""
        kill_and_forget(started.lineage.pid)
        if started.pipe is not None:
            os.close(started.pipe)
        if started.channel is not None:
            started.channel.close()
        self._records.remove(started.record)


def _tagged_env(request: SpawnRequest, token: str, place: str) -> dict[str, str]:
    """Return the child's environment: no daemon variables, with the tags of the run."""
    env = {key: value for key, value in request.program.env.items() if key not in NEVER_PASSED}
    env[INSTANCE_VARIABLE] = f"{request.name}:{request.generation}"
    env[TOKEN_VARIABLE] = token
    env[STATE_VARIABLE] = place
    return env


def kill_group(pid: int) -> None:
    """Kill a group. Call it before the leader's status is collected: pids are reused."""
    try:
        os.killpg(pid, signals.SIGKILL)
    except OSError:
        pass


def kill_and_forget(pid: int) -> None:
    """Kill a child of ours with its group; the reaper collects its status later."""
    kill_group(pid)
    CHILDREN.disown(pid)


def launch(program: Program, stdout: int, stderr: int) -> int:
    """Start the program; return its claimed pid once it is executed. Raises HostError."""
    _check_words(program)
    _check_cwd(program.execution.cwd)
    _check_program(program)
    if program.execution.nice is None and not program.execution.cpu:
        return _popen(program, stdout, stderr)

    def scheduled() -> int:
        _set_scheduling(program)
        return _popen(program, stdout, stderr)

    return _in_own_thread(scheduled)


def _in_own_thread(call: Callable[[], T]) -> T:
    outcome: list[Any] = []

    def body() -> None:
        try:
            outcome.append((call(), None))
        except BaseException as error:  # noqa: BLE001 (raised in the caller's thread)
            outcome.append((None, error))

    thread = threading.Thread(target=body, name="fleetd-spawn", daemon=True)
    thread.start()
    thread.join()
    result, error = outcome[0]
    if error is not None:
        raise error
    value: T = result
    return value


def _set_scheduling(program: Program) -> None:
    if program.execution.cpu and hasattr(os, "sched_setaffinity"):
        try:
            os.sched_setaffinity(0, program.execution.cpu)
        except (OSError, ValueError, OverflowError) as error:
            have = ", ".join(map(str, sorted(os.sched_getaffinity(0))))
            wanted = ", ".join(map(str, program.execution.cpu))
            raise HostError(f"cannot run on CPUs {wanted}: this daemon may use {have}", recoverable=False) from error
    if program.execution.nice is not None and hasattr(os, "sched_setaffinity"):
        try:
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), program.execution.nice)
        except OSError as error:
            raise HostError(
                f"cannot set nice {program.execution.nice}: {os.strerror(error.errno or 0)}",
                hint="a negative nice needs root or CAP_SYS_NICE",
                recoverable=False,
            ) from error


def _command_line(program: Program) -> list[str]:
    argv = list(program.argv)
    if program.execution.nice is not None and not hasattr(os, "sched_setaffinity"):
        argv = ["/usr/bin/nice", "-n", str(program.execution.nice), *argv]
    if program.execution.nofile is not None:
        argv = [_SHELL, "-c", _WITH_NOFILE, "fleetd", str(program.execution.nofile), *argv]
    return argv


def _popen(program: Program, stdout: int, stderr: int) -> int:
    credentials, env = _credentials(program.execution.user), dict(program.env)
    if credentials:
        env.update(_home_of(program.execution.user, env))
    try:
        with CHILDREN.spawning():
            process = subprocess.Popen(
                _command_line(program),
                env=env,
                cwd=program.execution.cwd,
                stdin=subprocess.DEVNULL,
                stdout=stdout,
                stderr=stderr,
                start_new_session=True,
                umask=-1 if program.execution.umask is None else program.execution.umask,
                pass_fds=program.pass_fds,
                **credentials,
            )
            CHILDREN.claim(process.pid)
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        raise _explain(program, error) from error
    process.returncode = 0  # the status is ours to collect: keeps Popen from waiting for the pid behind our back
    _set_autogroup(process.pid, program.execution.nice)
    return process.pid


def _set_autogroup(pid: int, nice: int | None) -> None:
    """Set nice of the session's scheduling group: a process' nice counts within it."""
    if nice:
        try:
            Path(f"/proc/{pid}/autogroup").write_text(str(nice))
        except OSError:
            pass


def _credentials(user: str | None) -> dict[str, Any]:
    if user is None:
        return {}
    import pwd

    try:
        entry = pwd.getpwuid(int(user)) if user.isdigit() else pwd.getpwnam(user)
    except KeyError:
        raise HostError(f"there is no user {user!r} on this machine", recoverable=False) from None
    if entry.pw_uid == os.geteuid():
        return {}
    if os.geteuid() != 0:
        raise HostError(
            f"only root can run a process as {user!r}", hint="drop `user`, or run fleetd as root", recoverable=False
        )
    groups = os.getgrouplist(entry.pw_name, entry.pw_gid)
    return {"user": entry.pw_uid, "group": entry.pw_gid, "extra_groups": groups}


def _home_of(user: str | None, env: Mapping[str, str]) -> dict[str, str]:
    """Return HOME and its like for another user, except explicitly set ones."""
    import pwd

    assert user is not None
    entry = pwd.getpwuid(int(user)) if user.isdigit() else pwd.getpwnam(user)
    theirs = {"HOME": entry.pw_dir, "USER": entry.pw_name, "LOGNAME": entry.pw_name}
    return {key: value for key, value in theirs.items() if env.get(key) in (None, os.environ.get(key))}


def _check_words(program: Program) -> None:
    if not program.argv or not program.argv[0]:
        raise HostError("the command is empty", recoverable=False)
    for word in program.argv:
        if "\0" in word:
            raise HostError("the command contains a NUL character", recoverable=False)
    for key, value in program.env.items():
        if not key or "=" in key or "\0" in key or "\0" in value:
            raise HostError(f"the environment variable {key!r} has an invalid name or value", recoverable=False)
    if program.execution.nofile is not None and os.geteuid() != 0:
        import resource

        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        if hard != resource.RLIM_INFINITY and program.execution.nofile > hard:
            raise HostError(
                f"nofile {program.execution.nofile} is above this user's hard limit of {hard}", recoverable=False
            )


def _check_cwd(cwd: str | None) -> None:
    if cwd is None:
        return
    try:
        mode = Path(cwd).stat().st_mode
    except FileNotFoundError:
        raise HostError(f"the working directory {cwd} does not exist", recoverable=False) from None
    except OSError as error:
        raise HostError(f"the working directory {cwd} cannot be used: {error.strerror}", recoverable=False) from error
    if not stat.S_ISDIR(mode):
        raise HostError(f"the working directory {cwd} is not a directory", recoverable=False)


def _check_program(program: Program) -> None:
    name = program.argv[0]
    if "/" not in name:
        path = program.env.get("PATH", os.defpath)
        if shutil.which(name, path=path) is not None:
            return
        for folder in path.split(os.pathsep):
            candidate = Path(folder or ".") / name
            if candidate.is_file():
                raise HostError(f"{candidate} is not executable", hint=f"chmod +x {candidate}", recoverable=False)
        raise HostError(f"program {name!r} not found on PATH ({path})", recoverable=False)
    file = Path(program.execution.cwd or ".") / name
    try:
        mode = file.stat().st_mode
    except FileNotFoundError:
        raise HostError(f"program {file} does not exist", recoverable=False) from None
    except OSError as error:
        raise HostError(f"program {file} cannot be run: {error.strerror}", recoverable=False) from error
    if stat.S_ISDIR(mode):
        raise HostError(f"program {file} is a directory", recoverable=False)
    if not mode & 0o111:
        raise HostError(f"{file} is not executable", hint=f"chmod +x {file}", recoverable=False)


def _explain(program: Program, error: Exception) -> HostError:
    name, code = program.argv[0], getattr(error, "errno", None)
    if code == errno.ENOEXEC:
        return HostError(
            f"{name} cannot run on this machine: another architecture, or a script without a #! line",
            recoverable=False,
        )
    if code == errno.ENOENT:
        return HostError(f"{name} cannot be started: the interpreter in its #! line does not exist", recoverable=False)
    if code == errno.E2BIG:
        return HostError(f"{name}: command line and environment are longer than the kernel allows", recoverable=False)
    if code in _LATER:
        hint = "raise the limit of open files of fleetd" if code in (errno.EMFILE, errno.ENFILE) else None
        return HostError(f"{name} cannot be started now: {os.strerror(code)}", hint=hint, recoverable=True)
    text = os.strerror(code) if code else str(error)
    return HostError(f"{name} cannot be started: {text}", recoverable=False)
