"""Check from outside of fleetd what must be true after chaos. Each check returns a list of problems."""

from __future__ import annotations

import gzip
import re
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

LINE = re.compile(rb"([a-z]+-\d+) ([0-9a-f]+-\d+) (\d{8}) (z*)")
ADMITTED = re.compile(rb"--- (\d+) lines lost: the disk rejected them ---")
RSS_MAX_BYTES = 160 << 20
RSS_GROWTH_BYTES = 12 << 20
FDS_GROWTH = 20  # a reading process that stays for the next edit, connections, processes that were down at first
FDS_PER_PROCESS = 6  # of one that edits added: its handle, its pipe, its log and what it has in hand


def _environ(pid: str) -> dict[bytes, bytes]:
    pairs = (entry.partition(b"=") for entry in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"))
    return {key: value for key, _, value in pairs}


def _state(pid: str) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def census(folder: Path) -> dict[str, dict[int, str]]:
    """Return the living processes of each instance of this run, with their command lines."""
    found: dict[str, dict[int, str]] = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        with suppress(OSError, IndexError):
            environ = _environ(entry.name)
            tag = environ.get(b"FLEETD_INSTANCE")
            if tag is None or environ.get(b"CHAOS_FOLDER") != str(folder).encode() or _state(entry.name) in "ZX":
                continue
            name = environ.get(b"FLEETD_NAME", tag).decode()
            line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode("utf-8", "replace")
            found.setdefault(_name(name, line), {})[int(entry.name)] = line
    return found


def leaders(found: dict[str, dict[int, str]], name: str) -> list[int]:
    """Return who of a census runs the program of an instance: more than one for as long as its child has been forked and not yet
    become another program."""
    return [pid for pid, line in found.get(name, {}).items() if "chaos_child" in line]


def _name(tag: str, line: str) -> str:
    """The tag holds the name of the instance: NAME, with what tells its runs apart around it."""
    match = re.search(r"(?:writer|tree)-\d+", tag) or re.search(r"(?:writer|tree)-\d+", line)
    return match[0] if match else tag


def living_with(folder: Path) -> dict[int, str]:
    """Return everything alive that carries the tag of this run."""
    return {pid: line for instance in census(folder).values() for pid, line in instance.items()}


class Counters:
    """Restart counters: for as long as a name stays in the file, they never go down, whatever happens to the daemon."""

    def __init__(self) -> None:
        self._last: dict[str, int] = {}
        self._gone = 0
        self.wrong: list[str] = []

    def read(self, status: dict[str, Any], names: set[str]) -> None:
        for row in status["processes"]:
            name, count = row["name"], row["restarts"]
            if name not in names:
                continue
            if count < self._last.get(name, 0):
                self.wrong.append(f"{name}: its restarts went from {self._last[name]} to {count}")
            self._last[name] = count

    def forget(self, name: str) -> None:
        self._gone += self._last.pop(name, 0)

    def total(self) -> int:
        return self._gone + sum(self._last.values())


@dataclass(slots=True)
class Gauge:
    """The daemon's memory and descriptors, at the beginning and the end of its quiet part."""

    samples: list[tuple[int, int, int]] = field(default_factory=list)
    processes: list[int] = field(default_factory=list)

    def read(self, pid: int, processes: int) -> None:
        """Note what the daemon holds while it runs this many processes."""
        status = Path(f"/proc/{pid}/status").read_text()
        rss = int(re.search(r"VmRSS:\s+(\d+)", status)[1]) << 10  # type: ignore[index]
        self.processes.append(processes)
        self.samples.append((pid, rss, len(list(Path(f"/proc/{pid}/fd").iterdir()))))

    def wrong(self) -> list[str]:
        (pid, rss_before, fds_before), (pid_after, rss_after, fds_after) = self.samples
        found = []
        if pid != pid_after:
            found.append("the daemon was not left alone")
        if rss_after > RSS_MAX_BYTES or rss_after - rss_before > RSS_GROWTH_BYTES:
            found.append(f"the daemon's memory went from {rss_before >> 20} to {rss_after >> 20} MiB")
        added = self.processes[1] - self.processes[0]
        if fds_after - fds_before > FDS_GROWTH + max(0, added) * FDS_PER_PROCESS:
            found.append(f"the daemon's descriptors went from {fds_before} to {fds_after} with {added} more processes")
        return found

    def text(self) -> str:
        if len(self.samples) < 2:
            return "the daemon was not measured"
        (_, rss_before, fds_before), (_, rss_after, fds_after) = self.samples
        return f"memory {rss_before >> 20} -> {rss_after >> 20} MiB, descriptors {fds_before} -> {fds_after}"


def log_content(logs: Path, name: str) -> bytes:
    """Return all that a log holds, archives first, freed heads left out. Raises FileNotFoundError when a file moves under the look."""
    before = _log_files(logs, name)
    paths, _ = before
    parts = [gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes() for path in paths]
    if _log_files(logs, name) != before:
        raise FileNotFoundError(f"the log of {name} was rotated under the look")
    return b"".join(part.lstrip(b"\0") for part in parts)


def _log_files(logs: Path, name: str) -> tuple[dict[Path, int], bytes]:
    """Return the files of a log, the oldest first, each with its inode, and what was noted of its rotation."""

    def number(path: Path) -> int:
        return int(path.name.removesuffix(".gz").rsplit(".", 1)[1])

    archives = [
        path for path in logs.glob(f"{name}.log.*") if path.name.removesuffix(".gz").rsplit(".", 1)[1].isdigit()
    ]
    current = logs / f"{name}.log"
    files = [*sorted(archives, key=number, reverse=True), *([current] if current.exists() else [])]
    noted = logs / f"{name}.log.json"
    return {path: path.stat().st_ino for path in files}, noted.read_bytes() if noted.exists() else b""


def lines(folder: Path, logs: Path) -> list[str]:
    """Compare the lines in the logs with what every run had written when it ended.

    A line captured by pipe that a full disk refused may be missing if the log itself says so, with the number.
    """
    written: dict[str, dict[str, int]] = {}
    for path in (folder / "progress").iterdir():
        name, _, run = path.name.partition(".")
        written.setdefault(name, {})[run] = int(path.read_bytes() or b"0")
    found: list[str] = []
    total = excused = 0
    for name, runs in sorted(written.items()):
        seen: dict[str, list[int]] = {}
        content = log_content(logs, name)
        admitted = sum(int(match[1]) for match in ADMITTED.finditer(content))
        excused += admitted
        for match in LINE.finditer(content):
            if len(match[4]) == int(match[3]) % 97:  # else cut
                seen.setdefault(match[2].decode(), []).append(int(match[3]))
        for run, last in runs.items():
            numbers = seen.get(run, [])
            total += last
            missing = sorted(set(range(1, last + 1)) - set(numbers))
            admitted -= len(missing)
            if missing and admitted < 0:
                found.append(
                    f"{name}, run {run}: {len(missing)} of {last} lines lost or cut: {missing[:3]} ... {missing[-1]}"
                )
            if len(numbers) != len(set(numbers)):
                found.append(f"{name}, run {run}: {len(numbers) - len(set(numbers))} lines twice")
            elif numbers != sorted(numbers):
                found.append(f"{name}, run {run}: lines out of order")
    print(
        f"  {total} lines of {sum(map(len, written.values()))} runs counted; {excused} lines reported as lost to a full disk"
    )
    return found


def log_errors(path: Path) -> list[str]:
    """Return what the daemon itself calls a failure of its own."""

    def _own(line: str, signs: tuple[str, ...]) -> bool:
        return any(sign in line for sign in signs) and '"last_lines"' not in line  # those are of the child

    text = path.read_text("utf-8", "replace")
    signs = (
        "Traceback",
        "unexpected failure",
        "InvalidTransition",
        "a task failed",
        "could not handle an event",
        "invalid transition",
    )
    return [f"the daemon says: {line[:600]}" for line in text.splitlines() if _own(line, signs)][:10]
