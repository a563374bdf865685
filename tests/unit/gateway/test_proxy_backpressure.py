"""Slow readers and slow senders: memory stays bounded, and other clients do not wait."""

from __future__ import annotations

import asyncio
import socket

import psutil

from tests.support.gateway import CHAT, STREAM, EngineRequest, post, rig, run
from tests.support.waiting import until_async as until

PIECE = b"data: " + b"x" * 65_000 + b"\n\n"


def test_proxy_slow_client_pauses_engine_with_bounded_memory() -> None:
    async def scenario() -> None:
        sent = 0

        async def script(request: EngineRequest) -> None:
            nonlocal sent
            if not request.json.get("stream"):
                await request.answer(b"{}")
                return
            request.writer.transport.set_write_buffer_limits(high=0)
            await request.start_stream()
            for _ in range(2000):  # 130 MB
                await request.send_chunk(PIECE)
                sent += len(PIECE)
            await request.end_stream()

        async with rig(script) as it:
            before = psutil.Process().memory_info().rss
            sock = socket.create_connection(("127.0.0.1", it.port))
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
            sock.setblocking(False)
            loop = asyncio.get_running_loop()
            await loop.sock_sendall(sock, post(STREAM))
            last = -1
            while sent != last or not sent:  # until the engine is stuck
                last = sent
                await asyncio.sleep(0.3)
            assert sent < 40_000_000
            assert psutil.Process().memory_info().rss - before < 64_000_000
            other = await it.client()
            assert (await other.ask(CHAT))[0] == 200
            got = 0
            while got < 40_000_000:  # it continues as soon as the client reads
                got += len(await loop.sock_recv(sock, 1 << 20))
            sock.close()
            await until(lambda: len(it.fleet.finished) == 2)

    run(scenario())


def test_proxy_stalled_client_is_disconnected() -> None:
    async def scenario() -> None:
        cut = asyncio.Event()

        async def script(request: EngineRequest) -> None:
            await request.start_stream()
            try:
                while True:
                    await request.send_chunk(PIECE)
            except ConnectionError:
                cut.set()
                raise

        async with rig(script, write_timeout_s=0.3) as it:
            client = await it.client(limit=1024)
            client.writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            await client.send(post(STREAM))
            await cut.wait()
            await until(lambda: it.fleet.finished == [(1, False)])

    run(scenario())


def test_http1_pipelining_without_reading_stops_being_served() -> None:
    async def scenario() -> None:
        async with rig(write_timeout_s=0.3) as it:
            sock = socket.create_connection(("127.0.0.1", it.port))
            sock.setblocking(False)
            loop = asyncio.get_running_loop()
            request = b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\n\r\n" * 500
            try:
                async with asyncio.timeout(20):
                    while True:
                        await loop.sock_sendall(sock, request)
            except ConnectionError:
                pass
            sock.close()
            await until(lambda: it.gateway.stats().connections == 0)

    run(scenario())


def test_proxy_large_body_reaches_slow_engine_complete() -> None:
    async def scenario() -> None:
        async def script(request: EngineRequest) -> None:
            await request.answer(b'{"length":%d}' % len(request.body))

        async with rig(script) as it:
            client = await it.client()
            body = b'{"model":"m","x":"' + b"y" * 20_000_000 + b'"}'
            _, _, answer = await client.ask(body)
            assert answer == b'{"length":%d}' % len(body)

    run(scenario())
