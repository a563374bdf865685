"""Probe a process: http, tcp, exec, a log line, or a request of its engine.

Invariants:
- One check at a time per probe, each with its timeout. This module reports results; the core decides.
- A startup probe checks every few milliseconds at first, since a small server is up in 80 ms, and at its period later.
  Its failures are reported when they change, and once per period; every other probe reports each result.
- A first success counts only when the listener belongs to our own process set: another server on the port is a failure.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol
from urllib.parse import urlsplit

from fleetd.core.data.specs import ProbeKind, ProbeSpec
from fleetd.errors import HostError
from fleetd.host.logs.match import LogScanner
from fleetd.host.process.command import CommandResult
from fleetd.host.process.handle import ProcessHandle
from fleetd.host.types import Execution, PortOwner, Program

_FIRST_DELAY_S = 0.005
_FAST_DELAY_S = 0.025
_FAST_FOR_S = 5.0
_SLOW_DELAY_S, _SLOW_SHARE = 2.0, 0.05  # later it finds out at most 5 % of the load late
_ANSWER_BYTES = 16 * 1024
_DETAIL_CHARS = 200


@dataclass(frozen=True, slots=True)
class Answer:
    """The result of one check. `detail` is a sentence, above all when `ok` is False."""

    ok: bool
    detail: str = ""
    final: bool = False  # waiting cannot help


@dataclass(frozen=True, slots=True)
class Target:
    """The probed process. `own_listener` False: another process holds the port."""

    name: str
    generation: int
    host: str = "127.0.0.1"
    port: int | None = None
    env: Mapping[str, str] = field(default_factory=dict)
    cwd: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    own_listener: bool = True
    tls: bool = False
    handle: ProcessHandle | None = None


class ProbeHost(Protocol):
    """The part of the host that a probe needs."""

    async def probe_command(self, program: Program, timeout_s: float) -> CommandResult: ...

    async def answers_on(self, handle: ProcessHandle, port: int) -> bool: ...

    async def port_owner(self, port: int) -> PortOwner | None: ...

    def log_scanner(self, handle: ProcessHandle, pattern: re.Pattern[bytes]) -> LogScanner: ...


Completion = Callable[[float], Awaitable[Answer]]


class Prober:
    """One probe of one run, which checks until it is closed."""

    def __init__(
        self,
        host: ProbeHost,
        target: Target,
        kind: ProbeKind,
        spec: ProbeSpec,
        on_result: Callable[[Answer], None],
        completion: Completion | None = None,
    ) -> None:
        self._host, self.target, self.kind, self.spec = host, target, kind, spec
        self._on_result, self._completion = on_result, completion
        self._scanner: LogScanner | None = None
        self._owned = not (kind == ProbeKind.STARTUP and target.own_listener and target.handle is not None)
        self._task = asyncio.get_running_loop().create_task(self._run(), name=f"probe-{target.name}-{kind}")

    def close(self) -> None:
        """Stop the checks; no result is reported afterwards."""
        self._task.cancel()

    async def wait_closed(self) -> None:
        await asyncio.gather(self._task, return_exceptions=True)

    async def _run(self) -> None:
        began, delay = time.monotonic(), _FIRST_DELAY_S
        reported, reported_s = "", -1e9
        try:
            while True:
                asked = time.monotonic()
                answer = await self.ask()
                now = time.monotonic()
                if answer.ok or self.kind != ProbeKind.STARTUP or answer.detail != reported:
                    reported, reported_s = answer.detail, now
                    self._on_result(answer)
                elif now - reported_s >= self.spec.period_s:
                    reported_s = now
                    self._on_result(answer)
                if self.kind == ProbeKind.STARTUP and not answer.ok and now - began < _FAST_FOR_S:
                    pause = min(delay, self.spec.period_s)
                    delay = min(delay * 1.3, _FAST_DELAY_S)
                else:
                    pause = max(0.001, self._period_s(answer, now - began) - (now - asked))
                await asyncio.sleep(pause)
        finally:
            if self._scanner is not None:
                self._scanner.close()

    def _period_s(self, answer: Answer, age_s: float) -> float:
        """Return the pause between checks. A startup probe of a long load slows down: each check is a line in the log."""
        if self.kind != ProbeKind.STARTUP or answer.ok:
            return self.spec.period_s
        return max(self.spec.period_s, min(_SLOW_DELAY_S, age_s * _SLOW_SHARE))

    async def ask(self) -> Answer:
        """Check once; the first startup success must come from our own process."""
        # An exec has a limit of its own, at which it is killed with its family.
        limit_s = None if self.spec.exec else self.spec.timeout_s
        try:
            async with asyncio.timeout(limit_s):
                answer = await self._question()
        except TimeoutError:
            return Answer(False, f"no answer within {self.spec.timeout_s:g} s")
        if (answer.ok or answer.final) and not self._owned:
            return await self._check_listener(answer)
        return answer

    async def _question(self) -> Answer:
        spec, target = self.spec, self.target
        if spec.completion and self._completion is not None:
            return await self._completion(spec.timeout_s)
        if spec.http is not None:
            return await ask_http(spec.http, target)
        if spec.tcp:
            return await ask_tcp(target)
        if spec.exec:
            return await self._ask_exec()
        if spec.log_line is not None:
            return await self._ask_log(spec.log_line)
        if spec.message is not None:
            return ask_message(spec.message, target.handle)
        return Answer(True, "nothing to ask")

    async def _check_listener(self, answer: Answer) -> Answer:
        port, handle = self.target.port, self.target.handle
        asks_port = self.spec.http is not None or self.spec.tcp or self.spec.completion
        if port is None or handle is None or not asks_port or await self._host.answers_on(handle, port):
            self._owned = True
            return answer
        owner = await self._host.port_owner(port)
        who = str(owner) if owner is not None else "no process any more"
        return Answer(False, f"port {port} is answered by {who}, not by {self.target.name}")

    async def _ask_exec(self) -> Answer:
        spec, target = self.spec, self.target
        try:
            result = await self._host.probe_command(
                Program(spec.exec, target.env, Execution(cwd=target.cwd)), spec.timeout_s
            )
        except HostError as error:
            return Answer(False, str(error))
        if result.timed_out:
            return Answer(False, f"{spec.exec[0]} was killed after {spec.timeout_s:g} s")
        if result.ok:
            return Answer(True, result.output[-_DETAIL_CHARS:])
        how = f"exit code {result.status.code}" if result.status.code is not None else str(result.status.signal)
        return Answer(
            False, f"{spec.exec[0]}: {how}" + (f": {result.output[-_DETAIL_CHARS:]}" if result.output else "")
        )

    async def _ask_log(self, pattern: str) -> Answer:
        if self.target.handle is None:
            return Answer(False, "there is no log")
        if self._scanner is None:
            try:
                compiled = re.compile(pattern.encode())
            except re.error as error:
                return Answer(False, f"log_line {pattern!r} is not a regular expression: {error}")
            self._scanner = self._host.log_scanner(self.target.handle, compiled)
        line = await self._scanner.advance()
        if line is None:
            return Answer(False, f"no line matches {pattern!r} yet")
        return Answer(True, line[:_DETAIL_CHARS])


def ask_message(message: str, handle: ProcessHandle | None) -> Answer:
    """Check whether a program has sent a message, to this or an earlier daemon."""
    channel = handle.channel if handle is not None else None
    if channel is None or channel.adopted:
        return Answer(True, "its channel is older than this daemon")
    if message in channel.received:
        return Answer(True, f"it sent {message!r}")
    return Answer(False, f"it has not sent {message!r} yet" if channel.open else "it closed its channel")


async def ask_tcp(target: Target) -> Answer:
    """Check whether a port accepts connections."""
    if target.port is None:
        return Answer(False, "there is no port to connect to")
    try:
        _, writer = await asyncio.open_connection(target.host, target.port)
    except OSError as error:
        return Answer(False, _refusal(error, target.port))
    writer.transport.abort()
    return Answer(True, f"port {target.port} accepts connections")


def _refusal(error: OSError, port: int) -> str:
    if isinstance(error, ConnectionRefusedError):
        return f"connection refused on port {port}"
    return f"port {port}: {error.strerror or error}"


async def ask_http(path: str, target: Target) -> Answer:
    """GET a path (or a whole http URL); a status of 200 to 399 is success."""
    url = urlsplit(path) if path.startswith("http://") else None
    host = url.hostname or target.host if url else target.host
    port = (url.port or 80) if url else target.port
    if port is None:
        return Answer(False, "there is no port to ask")
    where = (url.path or "/") + (f"?{url.query}" if url.query else "") if url else path
    headers = {"Host": f"{host}:{port}", "Connection": "close", "User-Agent": "fleetd-probe", **target.headers}
    lines = [
        f"GET {where if where.startswith('/') else '/' + where} HTTP/1.1",
        *(f"{k}: {v}" for k, v in headers.items()),
    ]
    try:
        reader, writer = await asyncio.open_connection(host, port, limit=_ANSWER_BYTES, ssl=target.tls or None)
    except OSError as error:
        return Answer(False, _refusal(error, port))
    try:
        writer.write(("\r\n".join(lines) + "\r\n\r\n").encode())
        head = await reader.readuntil(b"\r\n\r\n")
        status = head.split(b"\r\n", 1)[0].decode("latin-1").split(" ", 2)
        code = int(status[1]) if len(status) > 1 and status[1].isdigit() else 0
        if 200 <= code < 400:
            return Answer(True, f"{code}")
        body = await _some_body(reader)
    except (OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError) as error:
        return Answer(False, f"GET {where}: no HTTP answer ({type(error).__name__})")
    finally:
        writer.transport.abort()
    reason = " ".join(status[1:]) or "no HTTP answer"
    return Answer(False, f"GET {where}: {reason}" + (f": {body}" if body else ""))


async def _some_body(reader: asyncio.StreamReader) -> str:
    """Return the start of a body for the message, waiting a moment at most."""
    try:
        async with asyncio.timeout(0.05):
            data = await reader.read(1024)
    except TimeoutError:
        return ""
    return " ".join(data.decode("utf-8", "replace").split())[:_DETAIL_CHARS]
