"""State that outlives the daemon.

Invariants:
- `remembered.json` (durable stops, restart counters) is small and written by rename with fsync: it decides what runs. A
  boot of the machine leaves only the stops and the counts: what had given up, or ended, gets a new chance.
- `fleetd.db` (sqlite, WAL) holds learned footprints, history and small facts; losing it costs knowledge, never correctness.
- One thread does all writing and reading, in order. Writers never wait; at most 10 000 writes may be pending, older
  history is dropped then. A full disk is a `problem` that goes away by itself.
- A corrupt file is moved to *.corrupt-TIME and created again.
"""

from __future__ import annotations

import asyncio
import json
import sqlite3
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from fleetd.core.data.specs import ExitKind, ExitReport, Remembered
from fleetd.errors import HostError
from fleetd.host.process.handle import write_atomically
from fleetd.host.process.table import boot_id

T = TypeVar("T")

_VERSION = 1
_PENDING_MAX = 10_000
_HISTORY_MAX = 100_000
_PRUNE_EVERY = 1_000
_AGAIN_S = 5.0
_LOOKED_THROUGH = 20_000  # entries, from the newest back, for what happened last to each subject
_SCHEMA = """
CREATE TABLE IF NOT EXISTS footprint (hash TEXT PRIMARY KEY, model TEXT NOT NULL, bytes TEXT NOT NULL, at REAL NOT NULL);
CREATE TABLE IF NOT EXISTS history
  (id INTEGER PRIMARY KEY, at REAL NOT NULL, kind TEXT NOT NULL, subject TEXT NOT NULL, data TEXT NOT NULL);
CREATE INDEX IF NOT EXISTS history_subject ON history (subject, id);
CREATE TABLE IF NOT EXISTS fact (key TEXT PRIMARY KEY, value TEXT NOT NULL);
"""
_LAST_OF_EACH = """
SELECT id, at, kind, subject, data FROM history WHERE id IN
  (SELECT id FROM (SELECT id, ROW_NUMBER() OVER (PARTITION BY subject ORDER BY id DESC) AS place FROM history
    WHERE id > (SELECT MAX(id) FROM history) - ?) WHERE place <= ?)
ORDER BY id DESC LIMIT ?
"""


_OF_ONE_BOOT: Mapping[str, Any] = {
    "failed": None,
    "exited": None,
    "code": None,
    "deaths": 0,
    "died_s": (),
    "slow": False,
    "again": False,
    "last_exit": None,
    "last_exit_s": None,
}


def _remembered(entry: Mapping[str, Any]) -> Remembered:
    last = entry.get("last_exit")
    found = {**entry, "died_s": tuple(float(time_s) for time_s in entry.get("died_s", ()))}
    if last is not None:
        found["last_exit"] = ExitReport(**{**last, "kind": ExitKind(last["kind"]), "log_tail": ()})
    return Remembered(**found)


@dataclass(frozen=True, slots=True)
class HistoryEntry:
    """One line of the past. `at` is wall clock; `data` is what the writer gave."""

    id: int
    at: float
    kind: str
    subject: str
    data: Mapping[str, Any]


def _entries(rows: Sequence[tuple[Any, ...]]) -> list[HistoryEntry]:
    return [HistoryEntry(row[0], row[1], row[2], row[3], json.loads(row[4])) for row in reversed(rows)]


class StateStore:
    """state/remembered.json and state/fleetd.db."""

    def __init__(self, state: Path) -> None:
        self._state = state
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="fleetd-store")
        self._db: sqlite3.Connection | None = None
        self._remembered: dict[str, Remembered] = {}
        self._unsaved = self._closing = False
        self._again: threading.Timer | None = None
        self._pending = 0
        self._unrecorded: deque[tuple[float, str, str, Mapping[str, Any]]] = deque()
        self._since_prune = 0
        self.dropped = 0
        self._problems: dict[str, str] = {}
        self.quarantined: list[Path] = []

    # -- life ------------------------------------------------------------------------------------------------------

    async def open(self) -> None:
        """Open or create all files. Raises HostError if the folder cannot be created."""
        await self._ask(self._open)

    def _open(self) -> None:
        try:
            self._state.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise HostError(
                f"the state folder {self._state} cannot be created: {error.strerror}", recoverable=False
            ) from error
        self._remembered = self._load_remembered()
        self._connect()

    def _connect(self) -> None:
        path = self._state / "fleetd.db"
        for _ in range(2):
            db = None
            try:
                db = sqlite3.connect(path, timeout=5.0, isolation_level=None, check_same_thread=False)
                db.execute("PRAGMA journal_mode=WAL")
                db.execute("PRAGMA synchronous=NORMAL")
                if db.execute("PRAGMA quick_check(1)").fetchone() != ("ok",):
                    raise sqlite3.DatabaseError("quick_check failed")
                db.executescript(_SCHEMA)
            except sqlite3.OperationalError as error:
                if db is not None:
                    db.close()
                self._problems["db"] = f"{path} cannot be used: {error}"
                return
            except sqlite3.DatabaseError:
                if db is not None:
                    db.close()
                for suffix in ("", "-wal", "-shm"):
                    self._set_aside(path.with_name(path.name + suffix))
                continue
            self._db = db
            self._problems.pop("db", None)
            return

    def _set_aside(self, path: Path) -> None:
        target = path.with_name(f"{path.name}.corrupt-{int(time.time())}")
        try:
            path.replace(target)
        except OSError:
            return
        self.quarantined.append(target)

    @property
    def problem(self) -> str | None:
        """What does not work now, for people; None when all is well."""
        return "; ".join(self._problems.values()) or None

    async def close(self) -> None:
        """Write everything that is pending and let go."""
        self._closing = True
        if self._again is not None:
            self._again.cancel()
        await self._ask(self._close)
        self._thread.shutdown(wait=True)

    def _close(self) -> None:
        if self._unsaved or "remembered" in self._problems:
            self._save_remembered()
        if self._db is not None:
            self._db.close()
            self._db = None

    # -- desired state ---------------------------------------------------------------------------------------------

    @property
    def remembered(self) -> Mapping[str, Remembered]:
        """What is remembered about each process, by name. A copy."""
        return dict(self._remembered)

    def remember(self, name: str, value: Remembered) -> None:
        """Keep this over a restart. Returns at once; the file follows within milliseconds."""
        self._remembered[name] = value
        self._save_soon()

    def forget(self, name: str) -> None:
        if self._remembered.pop(name, None) is not None:
            self._save_soon()

    def _save_soon(self) -> None:
        if not self._unsaved and not self._closing:  # writes that come before the thread's turn go into one
            self._unsaved = True
            self._thread.submit(self._save_remembered)

    def _save_remembered(self) -> None:
        self._unsaved = False
        content = {
            "version": _VERSION,
            "boot_id": boot_id(),
            "processes": {name: asdict(value) for name, value in list(self._remembered.items())},
        }
        try:
            write_atomically(self._state / "remembered.json", json.dumps(content, indent=1).encode(), durable=True)
        except OSError as error:
            text = f"{self._state / 'remembered.json'} could not be written: {error.strerror}"
            self._problems["remembered"] = text
            self._try_again()
        else:
            self._problems.pop("remembered", None)

    def _try_again(self) -> None:
        """Retry to write the durable state, in case no later change does."""
        if self._closing:
            return
        if self._again is not None:
            self._again.cancel()
        self._again = threading.Timer(_AGAIN_S, self._save_soon)
        self._again.daemon = True
        self._again.start()

    def _load_remembered(self) -> dict[str, Remembered]:
        path = self._state / "remembered.json"
        try:
            data = path.read_bytes()
        except OSError:
            return {}
        try:
            content = json.loads(data)
            if content["version"] != _VERSION:
                raise ValueError("unknown version")
            fields = Remembered.__dataclass_fields__
            found = {
                str(name): _remembered({key: value for key, value in entry.items() if key in fields})
                for name, entry in content["processes"].items()
            }
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            self._set_aside(path)
            return {}
        if content.get("boot_id") in (None, boot_id()):
            return found
        return {name: replace(one, **_OF_ONE_BOOT) for name, one in found.items()}

    # -- learned footprints ----------------------------------------------------------------------------------------

    def learn(self, footprint_hash: str, model: str, device_bytes: Mapping[str, int]) -> None:
        """Keep a measured footprint, filed under its hash."""
        row = (footprint_hash, model, json.dumps(dict(device_bytes)), time.time())
        self._write("INSERT OR REPLACE INTO footprint (hash, model, bytes, at) VALUES (?, ?, ?, ?)", row)

    async def learned(self) -> dict[str, dict[str, int]]:
        """Return all learned footprints: bytes per device, by footprint hash."""
        rows = await self._ask(lambda: self._rows("SELECT hash, bytes FROM footprint"))
        found = {}
        for key, text in rows:
            try:
                found[str(key)] = {str(device): int(count) for device, count in json.loads(text).items()}
            except (ValueError, AttributeError, TypeError):
                continue
        return found

    # -- history and facts -----------------------------------------------------------------------------------------

    def record(self, kind: str, subject: str, data: Mapping[str, Any]) -> None:
        """Append to the history. `data` must be JSON, and stay as it is."""
        if len(self._unrecorded) >= _PENDING_MAX:
            self._unrecorded.popleft()
            self.dropped += 1
        self._unrecorded.append((time.time(), kind, subject, data))
        if len(self._unrecorded) == 1:  # entries that come before the thread's turn go into one transaction
            self._thread.submit(self._record_all)
        self._since_prune += 1
        if self._since_prune >= _PRUNE_EVERY:
            self._since_prune = 0
            self._write(
                "DELETE FROM history WHERE id <= (SELECT MAX(id) FROM history) - ?",
                (_HISTORY_MAX,),
            )

    def _record_all(self) -> None:
        rows = []
        while self._unrecorded:
            at, kind, subject, data = self._unrecorded.popleft()
            rows.append((at, kind, subject, json.dumps(data, default=str)))
        self._execute("INSERT INTO history (at, kind, subject, data) VALUES (?, ?, ?, ?)", rows)

    async def last_of_each(self, of_each: int, in_all: int) -> list[HistoryEntry]:
        """Return the newest entries, oldest first, at most `of_each` of a subject."""
        return _entries(await self._ask(lambda: self._rows(_LAST_OF_EACH, (_LOOKED_THROUGH, of_each, in_all))))

    def put(self, key: str, value: Any) -> None:
        """Keep one small fact. `value` must be JSON."""
        self._write("INSERT OR REPLACE INTO fact (key, value) VALUES (?, ?)", (key, json.dumps(value)))

    async def get(self, key: str, default: Any = None) -> Any:
        rows = await self._ask(lambda: self._rows("SELECT value FROM fact WHERE key = ?", (key,)))
        return json.loads(rows[0][0]) if rows else default

    async def facts(self, prefix: str) -> dict[str, Any]:
        """Return the facts whose key begins with `prefix`."""
        rows = await self._ask(
            lambda: self._rows("SELECT key, value FROM fact WHERE substr(key, 1, ?) = ?", (len(prefix), prefix))
        )
        return {str(key): json.loads(value) for key, value in rows}

    async def flush(self) -> None:
        """Return when everything written so far is in the files."""
        await self._ask(lambda: None)

    async def kept(self) -> str | None:
        """Wait until the desired state is on disk; return the disk's error, or None."""
        await self.flush()
        return self._problems.get("remembered")

    # -- the one thread --------------------------------------------------------------------------------------------

    async def _ask(self, call: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, call)

    def _rows(self, query: str, arguments: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
        if self._db is None:
            return []
        try:
            return self._db.execute(query, arguments).fetchall()
        except sqlite3.Error as error:
            self._failed(error)
            return []

    def _write(self, query: str, row: tuple[Any, ...]) -> None:
        if self._pending >= _PENDING_MAX:
            self.dropped += 1
            return
        self._pending += 1
        self._thread.submit(self._execute, query, [row]).add_done_callback(self._written)

    def _written(self, _done: Future[None]) -> None:
        self._pending -= 1

    def _execute(self, query: str, rows: Sequence[tuple[Any, ...]]) -> None:
        if self._db is None:
            self._connect()
        if self._db is None:
            self.dropped += len(rows)
            return
        try:
            self._transact(self._db, query, rows)
        except sqlite3.Error as error:
            self.dropped += len(rows)
            self._failed(error)
        else:
            self._problems.pop("db", None)

    def _transact(self, db: sqlite3.Connection, query: str, rows: Sequence[tuple[Any, ...]]) -> None:
        db.execute("BEGIN")
        try:
            db.executemany(query, rows)
            db.execute("COMMIT")
        except sqlite3.Error:
            if db.in_transaction:
                db.execute("ROLLBACK")
            raise

    def _failed(self, error: sqlite3.Error) -> None:
        self._problems["db"] = f"{self._state / 'fleetd.db'}: {error}"
        if isinstance(error, sqlite3.DatabaseError) and "malformed" in str(error) and self._db is not None:
            self._db.close()
            self._db = None
            for suffix in ("", "-wal", "-shm"):
                self._set_aside(self._state / f"fleetd.db{suffix}")
            self._connect()
