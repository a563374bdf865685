"""Proxying to a healthy engine: what passes unchanged, and which headers are added."""

from __future__ import annotations

import asyncio
import hashlib
import json
import random
import re
from pathlib import Path

import openai
import pytest

from fleetd.gateway import ModelEntry
from tests.support.gateway import CHAT, STREAM, EngineRequest, post, rig, run
from tests.support.waiting import until_async as until

ANSWER = b'{"id":"1","object":"chat.completion","choices":[]}'


async def plain(request: EngineRequest) -> None:
    await request.answer(ANSWER)


def test_proxy_answer_passes_with_fleet_headers_added() -> None:
    async def scenario() -> None:
        async def script(request: EngineRequest) -> None:
            extra = "Server: engine\r\nX-Engine: yes\r\nAccess-Control-Allow-Origin: *\r\nKeep-Alive: timeout=5\r\n"
            await request.answer(ANSWER, extra=extra)

        async with rig(script) as it:
            client = await it.client()
            status, headers, body = await client.ask(CHAT)
            assert (status, body) == (200, ANSWER)
            assert headers["x-engine"] == "yes"
            assert headers["x-fleet-model"] == "m"
            assert headers["x-fleet-instance"] == "engine-1"
            assert headers["x-fleet-queue-ms"] == headers["x-fleet-load-ms"] == "0"
            assert headers["x-request-id"]
            assert not {"server", "access-control-allow-origin", "keep-alive"} & headers.keys()

    run(scenario())


def test_headers_credentials_and_hop_by_hop_are_not_forwarded() -> None:
    async def scenario() -> None:
        async with rig(plain) as it:
            client = await it.client()
            extra = (
                "Authorization: Bearer secret\r\nX-Api-Key: secret\r\nCookie: secret\r\nProxy-Authorization: secret\r\n"
                "X-Forwarded-For: 1.2.3.4\r\nTE: trailers\r\nKeep-Alive: 5\r\nX-Hop: 1\r\nConnection: keep-alive, x-hop\r\n"
                "X-Trace: kept\r\nX-Request-ID: my-id.1\r\nUser-Agent: test\r\n"
            )
            status, headers, _ = await client.ask(CHAT, extra=extra)
            assert status == 200
            assert headers["x-request-id"] == "my-id.1"
            seen = it.engines[0].requests[0].headers()
            assert "secret" not in str(seen)
            assert seen["x-trace"] == "kept"
            assert seen["user-agent"] == "test"
            assert seen["x-request-id"] == "my-id.1"
            assert seen["host"] == f"127.0.0.1:{it.engines[0].port}"
            assert not {"connection", "te", "keep-alive", "x-hop", "x-forwarded-for"} & seen.keys()

    run(scenario())


@pytest.mark.parametrize("sent", ["a b", "x" * 129, "caf\u00e9", "a;b", ""])
def test_context_invalid_request_id_is_replaced(sent: str) -> None:
    async def scenario() -> None:
        async with rig(plain) as it:
            client = await it.client()
            await client.send(post(CHAT, extra=f"X-Request-Id: {sent}\r\n"))
            _, headers, _ = await client.read_response()
            assert re.fullmatch(r"[0-9a-f-]+", headers["x-request-id"])

    run(scenario())


def test_proxy_body_unchanged_unless_served_name_differs() -> None:
    body = b'{ "model" :  "m",\n "messages":[{"role":"user","content":"\\u00e9 \\"model\\": \\"m\\""}], "x": 1.0e3}'

    async def scenario() -> None:
        async with rig(plain) as it:
            await it.engine(plain, model="n", served_name="other:7b")
            client = await it.client()
            assert (await client.ask(body))[0] == 200
            assert it.engines[0].requests[0].body == body
            renamed = body.replace(b'"m",', b'"n",')
            assert (await client.ask(renamed))[0] == 200
            assert it.engines[1].requests[0].body == renamed.replace(b'"n",', b'"other:7b",')

    run(scenario())


@pytest.mark.parametrize("framing", ["chunked", "length", "close"])
def test_proxy_stream_passes_byte_for_byte(framing: str) -> None:
    rng = random.Random(7)
    pieces = [b"data: " + rng.randbytes(rng.randint(1, 40_000)).hex().encode() + b"\n\n" for _ in range(60)]
    whole = b"".join(pieces)

    async def script(request: EngineRequest) -> None:
        head = "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"
        if framing == "length":
            head += f"Content-Length: {len(whole)}\r\n"
        if framing == "chunked":
            head += "Transfer-Encoding: chunked\r\n"
        await request.send(head.encode() + b"\r\n")
        for piece in pieces:
            await (request.send_chunk(piece) if framing == "chunked" else request.send(piece))
        if framing == "chunked":
            await request.end_stream()
        if framing == "close":
            request.writer.close()

    async def scenario() -> None:
        async with rig(script) as it:
            for _ in range(2):
                client = await it.client()
                status, _, body = await client.ask(STREAM)
                assert status == 200
                assert hashlib.sha256(body).digest() == hashlib.sha256(whole).digest()

    run(scenario())


@pytest.mark.parametrize("sent", [b"", b"x-accel-buffering: no\r\n"])
def test_headers_stream_has_x_accel_buffering_once(sent: bytes) -> None:
    async def script(request: EngineRequest) -> None:
        head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n%bTransfer-Encoding: chunked\r\n\r\n"
        await request.send(head % sent + b"0\r\n\r\n")

    async def scenario() -> None:
        async with rig(script) as it:
            client = await it.client()
            await client.send(post(STREAM))
            head = await client.reader.readuntil(b"\r\n\r\n")
            assert head.lower().count(b"x-accel-buffering: no\r\n") == 1

    run(scenario())


def test_proxy_stream_relays_each_piece_at_once() -> None:
    async def scenario() -> None:
        seen = asyncio.Event()

        async def script(request: EngineRequest) -> None:
            await request.start_stream()
            await request.send_chunk(b"data: 1\n\n")
            await seen.wait()
            await request.send_chunk(b"data: 2\n\n")
            await request.end_stream()

        async with rig(script) as it:
            client = await it.client()
            await client.send(post(STREAM))
            await client.read_head()
            assert await client.read_chunk() == b"data: 1\n\n"
            seen.set()
            assert await client.read_chunk() == b"data: 2\n\n"
            assert await client.read_chunk() == b""

    run(scenario())


def test_proxy_connections_are_kept_alive_on_both_sides() -> None:
    async def scenario() -> None:
        async with rig(plain) as it:
            client = await it.client()
            for _ in range(20):
                assert (await client.ask(CHAT))[0] == 200
            assert it.engines[0].connections == 1

    run(scenario())


def test_pools_idle_connection_is_closed_before_engine_does() -> None:
    async def scenario() -> None:
        async with rig(plain, upstream_keepalive_s=0.1) as it:
            client = await it.client()
            await client.ask(CHAT)
            await until(lambda: it.gateway.stats().upstream_connections == 0)
            assert (await client.ask(CHAT))[0] == 200
            assert it.engines[0].connections == 2

    run(scenario())


def test_http1_http10_and_connection_close() -> None:
    async def scenario() -> None:
        async def script(request: EngineRequest) -> None:
            await request.start_stream()
            await request.send_chunk(b"data: 1\n\n")
            await request.end_stream()

        async with rig(script) as it:
            old = await it.client()
            body = json.dumps(STREAM).encode()
            head = b"POST /v1/chat/completions HTTP/1.0\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
            await old.send(head % len(body) + body)
            answer = await old.closed()
            assert b"Transfer-Encoding" not in answer
            assert answer.endswith(b"\r\n\r\ndata: 1\n\n")
            closing = await it.client()
            _, headers, _ = await closing.ask(STREAM, extra="Connection: close\r\n")
            assert headers["connection"] == "close"
            assert await closing.closed() == b""

    run(scenario())


def test_http1_upgrade_request_is_answered_without_upgrade() -> None:
    async def scenario() -> None:
        async with rig(plain) as it:
            client = await it.client()
            extra = (
                "Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAARAAAAAAAIAAAAA\r\n"
            )
            for _ in range(2):
                status, _, body = await client.ask(CHAT, extra=extra)
                assert (status, body) == (200, ANSWER)
            assert it.engines[0].requests[1].json == CHAT
            assert "upgrade" not in it.engines[0].requests[1].headers()

    run(scenario())


def test_proxy_large_body_is_renamed() -> None:
    image = "A" * 3_000_000
    body = {"messages": [{"role": "user", "content": image}], "model": "m", "stream": False}

    async def scenario() -> None:
        async with rig() as it:
            await it.engine(plain, served_name="renamed")
            client = await it.client()
            status, _, _ = await client.ask(body)
            assert status == 200
            assert it.engines[0].requests[0].json == {**body, "model": "renamed"}

    run(scenario())


def test_proxy_openai_client_works(tmp_path: Path) -> None:
    async def script(request: EngineRequest) -> None:
        if request.head.startswith(b"POST /v1/embeddings"):
            await request.answer(
                b'{"object":"list","data":[{"object":"embedding","index":0,"embedding":[0.5]}],"model":"m"}'
            )
        elif request.json.get("stream"):
            await request.start_stream()
            for word in ("Hello", " you"):
                event = {"id": "1", "object": "chat.completion.chunk", "created": 1, "model": "m"}
                event["choices"] = [{"index": 0, "delta": {"content": word}, "finish_reason": None}]
                await request.send_chunk(b"data: " + json.dumps(event).encode() + b"\n\n")
            await request.send_chunk(b"data: [DONE]\n\n")
            await request.end_stream()
        else:
            message = {"role": "assistant", "content": "Hello"}
            answer = {"id": "1", "object": "chat.completion", "created": 1, "model": "m"}
            answer["choices"] = [{"index": 0, "message": message, "finish_reason": "stop"}]
            await request.answer(json.dumps(answer).encode())

    async def scenario() -> None:
        async with rig(script) as it:
            it.fleet.entries = [
                ModelEntry("m", "LOADED", "llamacpp", "engine-1", 5),
                ModelEntry("org/name:7b", "ABSENT"),
            ]
            it.fleet.hold = False
            base = f"http://127.0.0.1:{it.port}/v1"
            async with openai.AsyncOpenAI(base_url=base, api_key="none", max_retries=0) as client:
                messages = [{"role": "user", "content": "hi"}]
                answer = await client.chat.completions.create(model="m", messages=messages)  # type: ignore[arg-type]
                assert answer.choices[0].message.content == "Hello"
                stream = await client.chat.completions.create(model="m", messages=messages, stream=True)  # type: ignore[arg-type]
                assert "".join([event.choices[0].delta.content or "" async for event in stream]) == "Hello you"
                assert (await client.embeddings.create(model="m", input="x", encoding_format="float")).data[
                    0
                ].embedding == [0.5]
                assert [model.id async for model in client.models.list()] == ["m", "org/name:7b"]
                assert (await client.models.retrieve("org/name:7b")).id == "org/name:7b"
                with pytest.raises(openai.NotFoundError) as missing:
                    await client.chat.completions.create(model="nope", messages=messages)  # type: ignore[arg-type]
                assert missing.value.code == "model_not_found"

    run(scenario())
