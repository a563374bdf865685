"""Replacing the daemon's program in place: same PID, same children, same locks.

The rules of this file
- What the new program needs crosses in the environment as one small JSON; descriptors keep their numbers.
- The new program starts from the same command line; where that fails, systemd or the operator sees an exit as any other.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from fleetd.host.handle import decode_records, encode_records
from fleetd.host.types import HandleRecord

VARIABLE = "FLEETD_TAKE_OVER"


@dataclass(frozen=True, slots=True)
class TakenOver:
    """What the program before left to this one."""

    lock_fds: list[int]
    records: list[HandleRecord]


def taken_over() -> TakenOver | None:
    """Return what the program before this one left; None for an ordinary start."""
    text = os.environ.pop(VARIABLE, None)
    if text is None:
        return None
    content = json.loads(text)
    with open(content["records_fd"], "rb") as file:  # noqa: PTH123 - a descriptor
        records = decode_records(file.read())
    fds = content["lock_fds"] if "lock_fds" in content else [content["lock_fd"]]  # of a version with one lock
    return TakenOver([int(fd) for fd in fds], records)


def execute(
    lock_fds: Sequence[int], records: Sequence[HandleRecord], environ: Mapping[str, str], stack: AsyncExitStack
) -> NoReturn:
    """Execute this program anew. Raises OSError when the kernel refuses."""
    del stack  # nothing on it may run: children, lock and pipes go on
    fd, name = tempfile.mkstemp(prefix="fleetd-")
    Path(name).unlink()
    os.write(fd, encode_records(list(records)))
    os.lseek(fd, 0, os.SEEK_SET)
    os.set_inheritable(fd, True)
    env = {**os.environ, **environ, VARIABLE: json.dumps({"lock_fds": list(lock_fds), "records_fd": fd})}
    argv = [sys.executable, *sys.orig_argv[1:]]
    sys.stdout.flush()
    sys.stderr.flush()
    os.execve(sys.executable, argv, env)
