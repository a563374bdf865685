"""A client that disconnects in every phase, and one that only finished sending."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

import pytest

from tests.support.gateway import CHAT, STREAM, Client, EngineRequest, post, rig, run
from tests.support.waiting import until_async as until

LEAVE: dict[str, Callable[[Client], None]] = {"close": Client.close, "reset": Client.reset}


@pytest.mark.parametrize("how", LEAVE)
@pytest.mark.parametrize("body", [CHAT, STREAM], ids=["plain", "stream"])
def test_proxy_client_leaves_while_queued_cancels_request(how: str, body: dict[str, object]) -> None:
    async def scenario() -> None:
        async def script(request: EngineRequest) -> None:
            raise AssertionError("the engine got a request")

        async with rig(script) as it:
            it.fleet.hold = True
            client = await it.client()
            await client.send(post(body))
            await until(lambda: len(it.fleet.held) == 1)
            LEAVE[how](client)
            await until(lambda: it.fleet.cancelled == [1], "the cancel")
            assert it.fleet.finished == []
            assert it.engines[0].connections == 0

    run(scenario())


@pytest.mark.parametrize("how", LEAVE)
@pytest.mark.parametrize("body", [CHAT, STREAM], ids=["plain", "stream"])
def test_proxy_client_leaves_before_answer_closes_engine_socket(how: str, body: dict[str, object]) -> None:
    async def scenario() -> None:
        gone = asyncio.Event()

        async def script(request: EngineRequest) -> None:
            await request.gone()
            gone.set()

        async with rig(script) as it:
            client = await it.client()
            await client.send(post(body))
            await until(lambda: len(it.engines[0].requests) == 1)
            LEAVE[how](client)
            await gone.wait()
            await until(lambda: it.fleet.finished == [(1, False)], "the finish")
            assert it.fleet.cancelled == []

    run(scenario())


@pytest.mark.parametrize("how", LEAVE)
def test_proxy_client_leaves_in_stream_closes_engine_in_100_ms(how: str) -> None:
    delays: list[float] = []

    async def scenario() -> None:
        gone: asyncio.Queue[float] = asyncio.Queue()

        async def script(request: EngineRequest) -> None:
            await request.start_stream()
            await request.send_chunk(b"data: 1\n\n")
            await request.gone()
            gone.put_nowait(time.monotonic())

        async with rig(script) as it:
            for _ in range(5):
                client = await it.client()
                await client.send(post(STREAM))
                await client.read_head()
                await client.read_chunk()
                left = time.monotonic()
                LEAVE[how](client)
                delays.append(await gone.get() - left)
            await until(lambda: len(it.fleet.finished) == 5)
            assert it.fleet.finished == [(n, False) for n in range(1, 6)]

    run(scenario())
    assert min(delays) < 0.1  # the others may have waited for a busy machine


def test_proxy_client_leaves_while_large_body_is_scanned() -> None:
    async def scenario() -> None:
        async def script(request: EngineRequest) -> None:
            await request.answer(b"{}")

        async with rig(script) as it:
            client = await it.client()
            await client.send(post({"model": "m", "x": ["a"] * 300_000}))
            client.reset()
            await until(lambda: it.gateway.stats().connections == 0)
            assert it.gateway.stats().buffered_bytes == 0

    run(scenario())


def test_http1_client_leaves_while_body_arrives() -> None:
    async def scenario() -> None:
        async with rig() as it:
            client = await it.client()
            await client.send(post(b"x" * 200_000)[:150_000])
            await until(lambda: it.gateway.stats().buffered_bytes > 0)
            client.close()
            await until(lambda: it.gateway.stats().connections == 0)
            assert it.gateway.stats().buffered_bytes == 0
            assert it.fleet.admitted == []

    run(scenario())


def test_proxy_client_leaves_while_connecting_to_engine() -> None:
    """A listener whose backlog is full: connecting hangs."""
    import socket

    async def scenario() -> None:
        with socket.socket() as deaf:
            deaf.bind(("127.0.0.1", 0))
            deaf.listen(0)
            fillers = []
            for _ in range(3):
                filler = socket.socket()
                filler.setblocking(False)
                filler.connect_ex(deaf.getsockname())
                fillers.append(filler)
            async with rig() as it:
                it.fleet.add("m", "deaf", deaf.getsockname()[1])
                client = await it.client()
                await client.send(post(CHAT))
                await until(lambda: it.fleet.granted == [1])
                client.close()
                await until(lambda: it.fleet.finished == [(1, False)])
            for filler in fillers:
                filler.close()

    run(scenario())


@pytest.mark.parametrize("body", [CHAT, STREAM], ids=["plain", "stream"])
def test_half_close_client_gets_its_answer(body: dict[str, object]) -> None:
    async def scenario() -> None:
        async def script(request: EngineRequest) -> None:
            await until(lambda: probed(it.gateway))
            await request.answer(b'{"answer":1}')

        def probed(gateway: object) -> bool:
            return any(c.half_close is not None and c.half_close.looks >= 3 for c in it.gateway._connections)

        async with rig(script) as it:
            client = await it.client()
            await client.send(post(body))
            client.writer.write_eof()
            status, _, answer = await client.read_response()
            assert (status, answer) == (200, b'{"answer":1}')
            assert await client.closed() == b""
            assert it.fleet.finished == [(1, False)]

    run(scenario())


def test_half_close_after_pipelined_requests_notices_departure() -> None:
    async def scenario() -> None:
        async def script(request: EngineRequest) -> None:
            await request.answer(b"{}")

        async with rig(script) as it:
            client = await it.client()
            it.fleet.hold = True
            await client.send(post(CHAT) + post(CHAT))
            client.writer.write_eof()
            await until(lambda: len(it.fleet.held) == 1)
            it.fleet.grant_held()
            assert (await client.read_response())[0] == 200
            await until(lambda: len(it.fleet.held) == 1)
            client.reset()
            await until(lambda: it.fleet.cancelled == [2])

    run(scenario())
