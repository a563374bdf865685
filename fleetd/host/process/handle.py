"""The handle of a live process, and its record on disk.

Invariants:
- A record is written before the spawn (without a pid) and again after it, by rename; it goes when the set is empty.
- Records matter only until the next boot, so they are not fsynced beyond what rename gives; torn ones are set aside.
- An unreadable record is moved to *.corrupt, never deleted, and kills no process.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from fleetd.host.filenames import escape
from fleetd.host.process.exit_watch import ExitWatch
from fleetd.host.process.node_ipc import NodeChannel
from fleetd.host.process.process_set import Lineage
from fleetd.host.types import HandleRecord, LogPolicy, RawExit, StopCommandResult

_VERSION = 1

OnExit = Callable[[RawExit], None]


@dataclass(slots=True, eq=False)
class ProcessHandle:
    """One run of a process; valid until stop or sweep reports an empty set."""

    record: HandleRecord
    lineage: Lineage
    on_exit: OnExit
    child: bool = True
    started: float = field(default_factory=time.monotonic)  # monotonic
    exited: asyncio.Event = field(default_factory=asyncio.Event)
    force: asyncio.Event = field(default_factory=asyncio.Event)
    exit: RawExit | None = None
    killed_by_us: bool = False
    stop_command: StopCommandResult | None = None
    guest: int | None = None  # first process of its container: counted in usage, never signalled
    watch: ExitWatch | None = None
    channel: NodeChannel | None = None
    stopping: asyncio.Task[tuple[int, ...]] | None = None
    sweeping: asyncio.Task[tuple[int, ...]] | None = None
    background: set[asyncio.Future[Any]] = field(default_factory=set)

    @property
    def name(self) -> str:
        return self.record.name

    @property
    def generation(self) -> int:
        return self.record.generation

    @property
    def pid(self) -> int:
        return self.lineage.pid

    @property
    def alive(self) -> bool:
        """Return whether the leader lives, as far as the loop knows."""
        return self.exit is None

    @property
    def uptime_s(self) -> float:
        return time.monotonic() - self.started


def write_atomically(path: Path, data: bytes, *, durable: bool) -> None:
    """Write a file by rename. `durable` also waits for the disk. Raises OSError."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        with os.fdopen(fd, "wb") as file:
            file.write(data)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    if durable:
        folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def quarantine(path: Path) -> Path | None:
    """Move an unreadable file out of the way; returns its new place."""
    target = path.with_name(f"{path.name}.corrupt")
    try:
        path.replace(target)
    except OSError:
        return None
    return target


class Records:
    """The records state/handles/NAME.json, each with a copy for the case of damage.

    A full disk loses the record, not the process: `problem` reports it.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.place = str(folder)  # marks the processes of this daemon
        self.problem: str | None = None

    def _path(self, name: str, suffix: str = "json") -> Path:
        return self._folder / f"{escape(name)}.{suffix}"

    def pipe_path(self, token: str) -> Path:
        """Return where the pipe of a captured run is."""
        return self._folder / f"{token}.pipe"

    def spool_path(self, token: str) -> Path:
        """Return the path for bytes read from the pipe of a run and not yet logged."""
        return self._folder / f"{token}.hand"

    def write(self, record: HandleRecord) -> None:
        content = json.dumps({"version": _VERSION, **asdict(record)}).encode()
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            write_atomically(self._path(record.name), content, durable=False)
            if record.pid is not None:
                write_atomically(self._path(record.name, "copy"), content, durable=False)
        except OSError as error:
            self.problem = f"the record of {record.name} could not be written: {error.strerror}"
        else:
            self.problem = None

    def remove(self, record: HandleRecord) -> None:
        """Forget a record and its pipe, unless a later run has replaced it."""
        try:
            self.pipe_path(record.token).unlink(missing_ok=True)
            self.spool_path(record.token).unlink(missing_ok=True)
        except OSError:
            pass
        for path in (self._path(record.name, "copy"), self._path(record.name)):
            try:
                current = parse_record(path.read_bytes())
            except (OSError, ValueError):
                current = None
            if current is None or current.token == record.token:
                try:
                    path.unlink(missing_ok=True)
                except OSError:
                    pass

    def load(self, carried: Sequence[HandleRecord] = ()) -> tuple[list[HandleRecord], list[Path]]:
        """Return all records and the places to which unreadable ones were moved.

        The pipes of `carried` are kept too, whose records a full disk may have lost.
        """
        records: list[HandleRecord] = []
        moved: list[Path] = []
        for path in sorted(self._folder.glob("*.json")):
            if path.name.startswith("."):
                continue
            try:
                records.append(parse_record(path.read_bytes()))
            except (OSError, ValueError):
                place = quarantine(path)
                if place is not None:
                    moved.append(place)
        records += self._copies({record.name for record in records})
        kept = (*records, *carried)
        known = {of(record.token) for record in kept for of in (self.pipe_path, self.spool_path)}
        for left in {*self._folder.glob("*.pipe"), *self._folder.glob("*.hand")} - known:
            left.unlink(missing_ok=True)
        return records, moved

    def _copies(self, known: Collection[str]) -> Iterator[HandleRecord]:
        """Yield what only a copy still tells, and write its record again."""
        for path in sorted(self._folder.glob("*.copy")):
            try:
                record = parse_record(path.read_bytes())
            except (OSError, ValueError):
                continue
            if record.name not in known:
                self.write(record)
                yield record


def encode_records(records: Sequence[HandleRecord]) -> bytes:
    """Return records as JSON, with descriptors, which survive an execv."""
    return json.dumps([{"version": _VERSION, **asdict(record)} for record in records]).encode()


def decode_records(data: bytes) -> list[HandleRecord]:
    """Read what `encode_records` wrote. Raises ValueError."""
    return [parse_record(json.dumps(entry).encode()) for entry in json.loads(data)]


def parse_record(data: bytes) -> HandleRecord:
    """Read a record. Raises ValueError if it is damaged or of another version."""
    try:
        content = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ValueError("not JSON") from error
    if not isinstance(content, dict) or content.pop("version", None) != _VERSION:
        raise ValueError("unknown version")
    known = {key: content[key] for key in HandleRecord.__dataclass_fields__ if key in content}
    strings = ("name", "token", "boot_id", "host", "exe", "log_path")
    if not all(isinstance(known.get(key, ""), str) for key in strings) or not known.get("name"):
        raise ValueError("a field has the wrong type")
    if not isinstance(known.get("generation"), int) or not re.fullmatch(r"[\w-]+", known.get("token", "")):
        raise ValueError("a field is missing")
    pid = known.get("pid")
    if not (pid is None or (isinstance(pid, int) and pid > 1)) or not isinstance(known.get("start_ticks", 0), int):
        raise ValueError("an impossible pid")
    try:
        known["logs"] = LogPolicy(**known.get("logs", {}))
        known["argv"] = tuple(known.get("argv", ()))
        return HandleRecord(**known)
    except TypeError as error:
        raise ValueError("a field has the wrong type") from error
