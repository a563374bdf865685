"""The log files of a process, and the state that is kept about them.

Invariants:
- NAME.log is the live file; NAME.log.1 is the youngest archive, .gz when compressed; NAME.log.json has the offset of the live
  lines. Names are escaped.
- In a live file everything before `start` is archived and freed; freed bytes read as NUL. Offsets only grow.
"""

from __future__ import annotations

import json
import os
import stat
from dataclasses import asdict, dataclass
from pathlib import Path

from fleetd.errors import HostError
from fleetd.host.filenames import escape
from fleetd.host.process.handle import write_atomically


@dataclass(frozen=True, slots=True)
class LogState:
    """`start`: first live byte of the file with this inode; `pending`: open archive."""

    inode: int = 0
    start: int = 0
    since: float = 0.0  # wall clock at which the live lines begin
    pending: str = ""


@dataclass(frozen=True, slots=True)
class LogFiles:
    """The files of one process."""

    folder: Path
    name: str

    @property
    def live(self) -> Path:
        return self.folder / f"{escape(self.name)}.log"

    @property
    def state_path(self) -> Path:
        return self.folder / f"{escape(self.name)}.log.json"

    def archive(self, number: int, *, compressed: bool = False) -> Path:
        return self.folder / f"{escape(self.name)}.log.{number}{'.gz' if compressed else ''}"

    def archives(self) -> list[Path]:
        """Return the archives that exist, youngest first."""
        prefix = f"{self.live.name}."
        found: list[tuple[int, Path]] = []
        try:
            names = os.listdir(self.folder)  # noqa: PTH208
        except OSError:
            return []
        for name in names:
            number = name.removeprefix(prefix).removesuffix(".gz")
            if name.startswith(prefix) and number.isdigit():
                found.append((int(number), self.folder / name))
        return [path for _, path in sorted(found)]

    def read_state(self) -> LogState:
        """Return the state; None if it is missing, torn or foreign: no line is lost."""
        try:
            content = json.loads(self.state_path.read_bytes())
            state = LogState(
                int(content["inode"]), max(0, int(content["start"])), float(content["since"]), str(content["pending"])
            )
            if state.inode == self.live.stat().st_ino:
                return state
        except (OSError, ValueError, TypeError, KeyError):
            pass
        return LogState()

    def write_state(self, state: LogState, *, durable: bool = True) -> None:
        """Write the state by rename. Raises OSError."""
        write_atomically(self.state_path, json.dumps(asdict(state)).encode(), durable=durable)

    def open_for_append(self) -> int:
        """Open the live file for writing by a child or the pump. Raises HostError."""
        path = self.live
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            fd = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK, 0o640)
        except IsADirectoryError:
            raise HostError(f"the log file {path} is a directory", recoverable=False) from None
        except OSError as error:
            raise HostError(f"the log file {path} cannot be written: {error.strerror}", recoverable=True) from error
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            os.close(fd)
            raise HostError(f"the log file {path} is not a regular file", recoverable=False)
        os.set_blocking(fd, True)
        return fd
