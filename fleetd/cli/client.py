"""A client of the control API over the Unix socket that loads in milliseconds, because every `fleetctl` waits for it.

Invariants:
- Every wait has a deadline, every response a size limit.
- A daemon that holds its lock and does not listen is starting or re-executing: the client waits for it before reporting an error.
- Every failure is Unreachable (no daemon, or an incompatible one), RequestRefused (an error response) or StreamCut (a stream
  without its end). None prints a traceback.
"""

from __future__ import annotations

import json
import os
import select
import socket
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

from fleetd.cli.http_response import InvalidResponse, Response, ResponseError, send
from fleetd.units import expand_home

ANSWER_MAX_BYTES = 512 * 1024 * 1024  # a dump contains the whole journal
TARGET_MAX = 8000  # the server accepts request lines up to 8190 bytes
LINE_MAX_BYTES = 4 * 1024 * 1024
CONNECT_S = 3.0
ANSWER_S = 15.0
# For a daemon that holds its lock and does not listen. A re-execution takes a second, and ten on a busy machine.
RETURN_S, RETRY_S = 4.5, 0.05
# A daemon that hangs is reported within five seconds, the start of this program included.
PING_EVERY_S, PING_S, HANG_S = 0.7, 2.6, 3.5
BEFORE_HEADER = "X-Fleetctl-Before"  # monotonic seconds, which all processes of a machine share
SILENCE_S = 45.0  # the server sends a comment every ten seconds

EXIT_OK, EXIT_FAILED, EXIT_USAGE, EXIT_NOT_RUNNING = 0, 1, 2, 3
EXIT_UNKNOWN, EXIT_UNREACHABLE, EXIT_TIMEOUT, EXIT_INTERRUPTED = 4, 5, 6, 130


class CliError(Exception):
    """An error for the user: one sentence, an exit code and a hint."""

    def __init__(self, message: str, exit_code: int = EXIT_FAILED, hint: str | None = None) -> None:
        super().__init__(message)
        self.exit_code = exit_code
        self.hint = hint


class Unreachable(CliError):
    """No daemon, or an incompatible one. Message and hint are one line."""

    def __init__(self, message: str, hint: str | None = "start it with: fleetd run") -> None:
        super().__init__(f"{message} ({hint})" if hint else message, EXIT_UNREACHABLE)


class HungUp(Unreachable):
    """The daemon closed the connection without a response."""


class NotRunning(Unreachable):
    """No daemon listens on the socket."""


class StreamCut(CliError):
    def __init__(self, message: str) -> None:
        super().__init__(message, EXIT_UNREACHABLE)


class RequestRefused(CliError):
    """The daemon returned an error; `body` is its whole document."""

    def __init__(self, status: int, body: Mapping[str, Any]) -> None:
        error = body.get("error")
        found: Mapping[str, Any] = error if isinstance(error, dict) else {}
        self.status, self.body = status, body
        self.code = str(found.get("code", "failed"))
        message = str(found.get("message") or f"the daemon answered {status}")
        exits = {
            "unknown_name": EXIT_UNKNOWN,
            "unknown_route": EXIT_UNKNOWN,  # a name such as `..`, which is not a path
            "model_not_found": EXIT_UNKNOWN,
            "invalid_config": EXIT_USAGE,
            "invalid_request": EXIT_USAGE,
            "forbidden": EXIT_UNREACHABLE,
            "wait_timeout": EXIT_TIMEOUT,
        }
        hint = found.get("hint")
        super().__init__(message, exits.get(self.code, EXIT_FAILED), str(hint) if hint else None)


def socket_candidates(given: str | None, env: Mapping[str, str]) -> list[Path]:
    """Return the sockets to try: the given one, else $FLEETD_SOCKET, else the two default paths."""
    chosen = given or env.get("FLEETD_SOCKET")
    if chosen:
        return [Path(expand_home(chosen))]
    home = env.get("HOME")
    usual = [Path(home) / ".fleetd/run/fleetd.sock"] if home else []
    return [*usual, Path("/run/fleetd/fleetd.sock")]


def is_locked(path: Path) -> bool:
    """Return whether a running daemon holds the lock next to the socket `path`.

    The lock of a dead holder is not touched: a daemon that starts at this moment would find it taken.
    """
    import fcntl

    try:
        with path.with_name("fleetd.lock").open("rb") as file:
            holder = file.read(32).strip()
            if holder.isdigit():
                os.kill(int(holder), 0)
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except (OSError, ValueError):
        return False  # no lock file, or no holder
    return False


class Client:
    """A client with one connection per request, since the daemon may re-execute between two requests."""

    def __init__(
        self,
        candidates: list[Path],
        *,
        connect_s: float = CONNECT_S,
        answer_s: float = ANSWER_S,
    ) -> None:
        self.candidates = candidates
        self.connect_s = connect_s
        self.answer_s = answer_s

    # -- connecting -----------------------------------------------------------------------------------------------------

    def connect(self) -> tuple[socket.socket, Path]:
        """Return a connected socket and its path, from the first candidate that accepts. Raises Unreachable."""
        deadline = time.monotonic() + RETURN_S
        while True:
            try:
                return self._connect()
            except NotRunning:
                if time.monotonic() >= deadline or not any(map(is_locked, self.candidates)):
                    raise
                time.sleep(RETRY_S)

    def _connect(self) -> tuple[socket.socket, Path]:
        denied: Path | None = None
        for path in self.candidates:
            connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            connection.settimeout(self.connect_s)
            try:
                connection.connect(os.fspath(path))
            except OSError as error:
                connection.close()
                if isinstance(error, PermissionError):
                    denied = path
                elif isinstance(error, TimeoutError | BlockingIOError):
                    raise Unreachable(
                        f"fleetd on {path} does not answer: it hangs, or is stopped by a signal", hint=None
                    ) from None
                elif "too long" in str(error):
                    raise Unreachable(f"the socket path is too long: {path}", hint=None) from None
            else:
                return connection, path
        if denied is not None:
            raise Unreachable(
                f"permission denied for the socket {denied}", hint="run fleetctl as the user that runs fleetd"
            )
        tried = " or ".join(str(path) for path in self.candidates)
        raise NotRunning(f"fleetd is not running: no daemon listens on {tried}")

    # -- requests -------------------------------------------------------------------------------------------------------

    def get(self, path: str, **query: Any) -> dict[str, Any]:
        """Return the document at `path`; retry when the daemon re-executed in between. Raises Unreachable, RequestRefused."""
        try:
            return self.call("GET", target(path, query))
        except HungUp:
            if not any(map(is_locked, self.candidates)):
                raise
            return self.call("GET", target(path, query))

    def post(self, path: str, body: Mapping[str, Any] | None = None, wait_s: float = 0.0) -> dict[str, Any]:
        """Post and return the response; the server may take `wait_s`. Raises Unreachable, RequestRefused."""
        return self.call("POST", target(path), body or {}, wait_s)

    def call(
        self, method: str, target_: str, body: Mapping[str, Any] | None = None, wait_s: float = 0.0
    ) -> dict[str, Any]:
        connection, path = self.connect()
        limit_s = self.answer_s + wait_s
        deadline = time.monotonic() + limit_s
        try:
            connection.settimeout(min(limit_s, HANG_S))
            raw = None if body is None else json.dumps(body).encode("ascii")
            headers = {"Accept": "application/json", "Host": "fleetd", "Connection": "close"}
            if raw is not None:
                headers["Content-Type"] = "application/json"
                # The daemon does not carry it out once fleetctl has given up, which is never earlier than this.
                headers[BEFORE_HEADER] = f"{min(time.monotonic() + HANG_S, deadline):.6f}"
            send(connection, method, target_, headers, raw)
            self._await_answer(connection, path, deadline)
            connection.settimeout(min(limit_s, HANG_S))
            response = Response.read(connection)
            content = response.body(ANSWER_MAX_BYTES, deadline, HANG_S)
        except TimeoutError:
            raise Unreachable(f"fleetd on {path} did not respond within {limit_s:g} s", hint=None) from None
        except InvalidResponse:
            raise _not_fleetd(path) from None
        except (OSError, ResponseError) as error:
            raise HungUp(f"fleetd on {path} hung up: {str(error) or type(error).__name__}", hint=None) from None
        finally:
            connection.close()
        return self._understand(response.status, content, path)

    def _await_answer(self, connection: socket.socket, path: Path, deadline: float) -> None:
        """Wait for the first byte of a response; ask on another connection meanwhile whether the daemon still answers.

        Raises Unreachable when it does not, but never before `HANG_S`; TimeoutError at the deadline.
        """
        hangs_s = time.monotonic() + HANG_S
        while True:
            left_s = deadline - time.monotonic()
            if left_s <= 0:
                raise TimeoutError
            if select.select([connection], [], [], min(PING_EVERY_S, left_s))[0]:
                return
            if time.monotonic() < deadline and not self._answers(path):
                if select.select([connection], [], [], max(0.0, min(hangs_s, deadline) - time.monotonic()))[0]:
                    return
                raise Unreachable(f"fleetd on {path} does not answer: it hangs, or is stopped by a signal", hint=None)

    @staticmethod
    def _answers(path: Path) -> bool:
        """Return whether the daemon answers a small request within `PING_S`; True for one that is being replaced."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as asking:
            asking.settimeout(PING_S)
            try:
                asking.connect(os.fspath(path))
                asking.sendall(b"GET /v1/devices HTTP/1.1\r\nHost: fleetd\r\nConnection: close\r\n\r\n")
                return bool(asking.recv(1))
            except (TimeoutError, BlockingIOError):
                return False
            except OSError:
                return True  # the first connection reports what became of it

    def _understand(self, status: int, content: bytes, path: Path) -> dict[str, Any]:
        try:
            body = json.loads(content)
        except (ValueError, RecursionError):
            raise _not_fleetd(path) from None
        if not isinstance(body, dict) or not str(body.get("schema", "")).startswith("fleetctl/"):
            raise _not_fleetd(path)
        if body["schema"] != "fleetctl/v1":
            raise Unreachable(f"fleetd on {path} speaks {body['schema']}, this fleetctl speaks fleetctl/v1", hint=None)
        if status >= 400 and "results" not in body:
            raise RequestRefused(status, body)
        return body

    # -- streams --------------------------------------------------------------------------------------------------------

    def stream(self, path: str, **query: Any) -> Iterator[dict[str, Any]]:
        """Yield the documents of a stream until its end. Raises Unreachable, RequestRefused, StreamCut."""
        connection, where = self.connect()
        try:
            connection.settimeout(self.answer_s)
            headers = {"Accept": "text/event-stream", "Host": "fleetd"}
            send(connection, "GET", target(path, query), headers)
            self._await_answer(connection, where, time.monotonic() + self.answer_s)
            response = Response.read(connection)
            if response.content_type != "text/event-stream":
                content = response.body(ANSWER_MAX_BYTES, time.monotonic() + self.answer_s, HANG_S)
                self._understand(response.status, content, where)
                raise _not_fleetd(where)
            connection.settimeout(SILENCE_S)
            yield from _events(response.lines(LINE_MAX_BYTES))
        except TimeoutError:
            raise StreamCut(f"fleetd on {where} stopped responding") from None
        except (OSError, ResponseError):
            raise StreamCut("connection to fleetd lost (it stopped or was replaced)") from None
        finally:
            connection.close()


def target(path: str, query: Mapping[str, Any] | None = None) -> str:
    """Return path and query, quoted. `path` keeps its slashes; None values are omitted, booleans are 1 and 0."""
    pairs = {
        key: int(value) if isinstance(value, bool) else value
        for key, value in (query or {}).items()
        if value is not None
    }
    found = quote(path, safe="/:,", errors="surrogateescape")
    if pairs:
        found += "?" + urlencode(pairs, errors="surrogateescape")
    if len(found) > TARGET_MAX:
        raise CliError("the names are too long, or too many", EXIT_UNKNOWN)
    return found


def _not_fleetd(path: Path) -> Unreachable:
    return Unreachable(f"the server on {path} is not fleetd, or an incompatible version", hint=None)


def _events(lines: Iterable[bytes]) -> Iterator[dict[str, Any]]:
    """Parse server-sent events; return at `event: end`. Raises RequestRefused for `event: error`, StreamCut without an end."""
    event = ""
    for line in lines:
        if line.startswith(b"event: "):
            event = line[7:].decode("utf-8", "replace")
        elif line.startswith(b"data: "):
            if event == "end":
                return
            try:
                body = json.loads(line[6:])
            except (ValueError, RecursionError):
                raise ResponseError("not JSON") from None
            if not isinstance(body, dict):
                raise ResponseError("not an object")
            if event == "error":
                raise RequestRefused(500, body)
            yield body
    raise ResponseError("closed without an end")
