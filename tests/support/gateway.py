"""A gateway on a real socket with a scripted fleet, and engines and clients scripted byte by byte."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from typing import Any

import uvloop

from fleetd.core.data.commands import Grant, Reject
from fleetd.gateway import Gateway, GatewayOptions, ModelEntry, ModelTarget, Upstream

DEADLINE_S = 20.0

uvloop.new_event_loop().close()  # libuv opens a pipe with the first loop of a process and keeps it: not a leak of a test


class ScriptedFleet:
    """A FleetPort that grants models at once on their processes, in order; with `hold` only at `grant_held`."""

    def __init__(self) -> None:
        self.upstreams: dict[str, Upstream] = {}
        self.processes: dict[str, list[str]] = {}
        self.served: dict[tuple[str, str], str] = {}
        self.aliases: dict[str, str] = {}
        self.hold = False
        self.targets: dict[tuple[str, str, Upstream, str], ModelTarget] = {}
        self.rejects: dict[str, Reject] = {}
        self.held: dict[int, tuple[str, Any, Any, tuple[str, ...]]] = {}
        self.admitted: list[tuple[str, tuple[str, ...]]] = []
        self.granted: list[int] = []
        self.cancelled: list[int] = []
        self.stopped: dict[str, str] = {}
        self.finished: list[tuple[int, bool]] = []
        self.refused: list[str] = []
        self.down: set[str] = set()
        self._last_process = ""
        self.is_ready: tuple[bool, list[str]] = (True, [])
        self.entries: list[ModelEntry] = []
        self._last_id = 0

    def add(self, model: str, process: str, port: int, served_name: str | None = None, **upstream: Any) -> None:
        self.upstreams[process] = Upstream("127.0.0.1", port, **upstream)
        self.processes.setdefault(model, []).append(process)
        self.served[model, process] = served_name or model

    def take(self, model: str) -> tuple[int, ModelTarget] | None:
        """Grant a model with a process at once; other scripts go through `admit`."""
        if self.hold or model in self.rejects or not self.processes.get(model):
            return None
        process = self._last_process = self.processes[model][0]
        if process not in self.upstreams or process in self.down:
            return None
        self._last_id += 1
        self.admitted.append((model, ()))
        self.granted.append(self._last_id)
        return self._last_id, self.target(model, process)

    def admit(self, model: str, on_grant: Any, on_reject: Any, avoid: tuple[str, ...] = ()) -> int:
        self._last_id += 1
        request_id = self._last_id
        self.admitted.append((model, avoid))
        if self.hold:
            self.held[request_id] = (model, on_grant, on_reject, avoid)
        else:
            self._answer(request_id, model, on_grant, on_reject, avoid)
        return request_id

    def _answer(self, request_id: int, model: str, on_grant: Any, on_reject: Any, avoid: tuple[str, ...]) -> None:
        processes = [name for name in self.processes.get(model, []) if name not in avoid and name not in self.down]
        if model in self.rejects:
            code, reason, wait = self.rejects[model].code, self.rejects[model].reason, self.rejects[model].retry_after_s
            on_reject(Reject(request_id, code, reason, wait))
        elif processes:
            self.granted.append(request_id)
            self._last_process = processes[0]
            on_grant(Grant(request_id, model, processes[0], 1))
        elif self.processes.get(model):
            on_reject(Reject(request_id, "model_failed", "No other process is left."))
        else:
            on_reject(Reject(request_id, "model_not_found", f"There is no model {model!r}."))

    def grant_held(self) -> None:
        held, self.held = self.held, {}
        for request_id, (model, on_grant, on_reject, avoid) in held.items():
            self._answer(request_id, model, on_grant, on_reject, avoid)

    def stop_reason(self, process: str) -> str | None:
        return self.stopped.get(process)

    def cancel(self, request_id: int) -> None:
        self.cancelled.append(request_id)
        self.held.pop(request_id, None)

    def finish(self, request_id: int, failed: bool = False, refused: str = "") -> None:
        self.finished.append((request_id, failed))
        if refused:  # by the process granted last: these tests send one request after the other
            self.refused.append(refused)
            self.down.add(self._last_process)

    def target(self, model: str, process: str) -> ModelTarget:
        upstream, served_name = self.upstreams[process], self.served[model, process]
        key = (model, process, upstream, served_name)
        return self.targets.setdefault(key, ModelTarget(model, process, upstream, served_name))

    def models(self) -> list[ModelEntry]:
        return self.entries

    def names(self) -> dict[str, str]:
        return {name: name for name in self.processes} | self.aliases

    def ready(self) -> tuple[bool, list[str]]:
        return self.is_ready

    def check_balanced(self) -> None:
        """Assert that every granted request was finished exactly once, and no other."""
        assert sorted(self.granted) == sorted(request_id for request_id, _ in self.finished)


class EngineRequest:
    """A request that an engine received, with methods to answer it."""

    def __init__(self, head: bytes, body: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.head = head
        self.body = body
        self.reader = reader
        self.writer = writer

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    def headers(self) -> dict[str, str]:
        lines = self.head.decode("latin-1").split("\r\n")[1:]
        return {name.lower(): value for name, _, value in (line.partition(": ") for line in lines) if name}

    async def send(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    async def answer(self, body: bytes, content_type: str = "application/json", extra: str = "") -> None:
        head = f"HTTP/1.1 200 OK\r\nContent-Type: {content_type}\r\nContent-Length: {len(body)}\r\n{extra}\r\n"
        await self.send(head.encode() + body)

    async def start_stream(self) -> None:
        await self.send(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n")

    async def send_chunk(self, data: bytes) -> None:
        await self.send(b"%x\r\n%b\r\n" % (len(data), data))

    async def end_stream(self) -> None:
        await self.send(b"0\r\n\r\n")

    def reset(self) -> None:
        """Close the connection with a reset."""
        _reset(self.writer)

    async def gone(self) -> None:
        """Wait until the gateway has closed this connection."""
        with contextlib.suppress(ConnectionError):
            while await self.reader.read(65536):
                pass


def _reset(writer: asyncio.StreamWriter) -> None:
    sock = writer.get_extra_info("socket")
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


Script = Callable[[EngineRequest], Awaitable[None]]


class Engine:
    """A server on a real socket that runs one script per request."""

    def __init__(self, script: Script) -> None:
        self.script = script
        self.requests: list[EngineRequest] = []
        self.connections = 0
        self.port = 0
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0, limit=1 << 20)
        self.port = self._server.sockets[0].getsockname()[1]

    async def stop(self) -> None:
        assert self._server is not None
        self._server.close()
        for task in tuple(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._server.wait_closed()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self.connections += 1
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                length = 0
                for line in head.split(b"\r\n"):
                    if line.lower().startswith(b"content-length:"):
                        length = int(line.split(b":")[1])
                request = EngineRequest(head[:-4], await reader.readexactly(length), reader, writer)
                self.requests.append(request)
                await self.script(request)
        except (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            pass  # the client disconnected, or the test is over
        finally:
            self._tasks.discard(task)
            writer.close()


class Client:
    """A client that sends exactly the given bytes."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    async def send(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    async def read_head(self) -> tuple[int, dict[str, str]]:
        raw = (await self.reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        lines = raw.split("\r\n")
        headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines[1:]) if name}
        return int(lines[0].split()[1]), headers

    async def read_response(self) -> tuple[int, dict[str, str], bytes]:
        status, headers = await self.read_head()
        while status == 100:
            status, headers = await self.read_head()
        return status, headers, await self.read_body(headers)

    async def read_body(self, headers: dict[str, str]) -> bytes:
        if headers.get("transfer-encoding") == "chunked":
            body = b""
            while (piece := await self.read_chunk()) != b"":
                body += piece
            return body
        if "content-length" in headers:
            return await self.reader.readexactly(int(headers["content-length"]))
        return await self.reader.read() if headers.get("connection") == "close" else b""

    async def read_chunk(self) -> bytes:
        size = int(await self.reader.readuntil(b"\r\n"), 16)
        data = await self.reader.readexactly(size + 2)
        return data[:-2]

    async def ask(
        self, body: Any, path: str = "/v1/chat/completions", extra: str = ""
    ) -> tuple[int, dict[str, str], bytes]:
        await self.send(post(body, path, extra))
        return await self.read_response()

    async def closed(self) -> bytes:
        """Return everything until the gateway closes the connection."""
        try:
            return await self.reader.read()
        except ConnectionError:
            return b""

    def close(self) -> None:
        self.writer.close()

    def reset(self) -> None:
        _reset(self.writer)


def post(body: Any, path: str = "/v1/chat/completions", extra: str = "") -> bytes:
    """Return one POST as bytes."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n{extra}Content-Length: {len(data)}\r\n\r\n"
    return head.encode() + data


def get(path: str, extra: str = "") -> bytes:
    """Return one GET as bytes."""
    return f"GET {path} HTTP/1.1\r\nHost: localhost\r\n{extra}\r\n".encode()


CHAT = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
STREAM = {**CHAT, "stream": True}


class Rig:
    """A gateway with its fleet, engines and clients."""

    def __init__(self, **options: Any) -> None:
        self.fleet = ScriptedFleet()
        self.gateway = Gateway(self.fleet, GatewayOptions(**{"port": 0, "tick_s": 0.02, **options}))
        self.engines: list[Engine] = []
        self.clients: list[Client] = []
        self.port = 0

    async def engine(self, script: Script, model: str = "m", name: str | None = None, **more: Any) -> Engine:
        engine = Engine(script)
        await engine.start()
        self.engines.append(engine)
        self.fleet.add(model, name or f"engine-{len(self.engines)}", engine.port, **more)
        return engine

    async def client(self, **more: Any) -> Client:
        client = Client(*await asyncio.open_connection("127.0.0.1", self.port, **more))
        self.clients.append(client)
        return client


@contextlib.asynccontextmanager
async def rig(script: Script | None = None, **options: Any) -> AsyncIterator[Rig]:
    """Run a gateway; with `script`, one engine serves the model `m`. At exit every grant must be finished."""
    running = Rig(**options)
    if script is not None:
        await running.engine(script)
    [(_, running.port)] = await running.gateway.start()
    try:
        yield running
    finally:
        for client in running.clients:
            client.close()
        await running.gateway.close()
        for engine in running.engines:
            await engine.stop()
    running.fleet.check_balanced()
    stats = running.gateway.stats()
    assert stats.buffered_bytes == 0
    assert stats.connections == 0


def run(coroutine: Coroutine[Any, Any, None]) -> None:
    """Run a test on the loop that the daemon uses, with a deadline."""

    async def bounded() -> None:
        async with asyncio.timeout(90):
            await coroutine

    uvloop.run(bounded())
