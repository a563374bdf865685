"""The gateway's own routes, methods, draining, and the gateway as an object."""

from __future__ import annotations

import asyncio
import json

import pytest

from fleetd.errors import HostError
from fleetd.gateway import Gateway, GatewayOptions, ModelEntry
from tests.support.gateway import CHAT, EngineRequest, ScriptedFleet, get, post, rig, run
from tests.support.waiting import until_async as until


def test_handlers_list_and_show_models() -> None:
    async def scenario() -> None:
        async with rig() as it:
            it.fleet.entries = [
                ModelEntry("org/a:7b", "LOADED", "vllm", "gpu", 7, 1700000000),
                ModelEntry("b", "ABSENT"),
            ]
            client = await it.client()
            await client.send(get("/v1/models"))
            _, _, body = await client.read_response()
            first, second = json.loads(body)["data"]
            assert first["fleet"] == {"state": "LOADED", "engine": "vllm", "instance": "gpu", "memory_bytes": 7}
            assert (first["id"], first["object"], first["created"]) == ("org/a:7b", "model", 1700000000)
            for path in ("/v1/models/org/a:7b", "/v1/models/org%2Fa%3A7b", "/v1/models/org/a:7b?x=1"):
                await client.send(get(path))
                status, _, body = await client.read_response()
                assert (status, json.loads(body)) == (200, first)
            assert second["fleet"]["instance"] is None
            for path in ("/v1/models/nope", "/v1/models/../b", "/v1/models/%00", "/v1/models/" + "x" * 5000):
                await client.send(get(path))
                status, _, body = await client.read_response()
                assert (status, json.loads(body)["error"]["code"]) == (404, "model_not_found")
                assert len(body) < 400
            assert it.fleet.admitted == []

    run(scenario())


def test_handlers_health_and_ready() -> None:
    async def scenario() -> None:
        async with rig() as it:
            client = await it.client()
            await client.send(get("/health") + get("/ready"))
            assert [(await client.read_response())[0] for _ in range(2)] == [200, 200]
            it.fleet.is_ready = (False, ["ai-bot is in BACKOFF."])
            await client.send(get("/ready"))
            status, headers, body = await client.read_response()
            assert status == 503
            assert json.loads(body) == {"ready": False, "reasons": ["ai-bot is in BACKOFF."]}
            assert int(headers["retry-after"]) >= 1

    run(scenario())


@pytest.mark.parametrize(
    ("method", "path", "status", "allow"),
    [
        ("GET", "/nope", 404, None),
        ("POST", "/v1/chat/completions/", 404, None),
        ("GET", "//v1/models", 404, None),
        ("GET", "/v1/%6dodels", 404, None),
        ("GET", "/v1/models/", 404, None),
        ("GET", "/v1/chat/completions", 405, "POST, OPTIONS"),
        ("DELETE", "/v1/models", 405, "GET, HEAD, OPTIONS"),
        ("POST", "/health", 405, "GET, HEAD, OPTIONS"),
        ("OPTIONS", "/v1/embeddings", 204, "POST, OPTIONS"),
        ("OPTIONS", "/health", 204, "GET, HEAD, OPTIONS"),
        ("TRACE", "/health", 405, "GET, HEAD, OPTIONS"),
    ],
)
def test_routes_methods_and_allow(method: str, path: str, status: int, allow: str | None) -> None:
    async def scenario() -> None:
        async with rig() as it:
            client = await it.client()
            await client.send(f"{method} {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
            got, headers, body = await client.read_response()
            assert got == status
            assert headers.get("allow") == allow
            assert status == 204 or json.loads(body)["error"]["message"]
            await client.send(get("/health"))
            assert (await client.read_response())[0] == 200

    run(scenario())


def test_handlers_head_is_get_without_body() -> None:
    async def scenario() -> None:
        async with rig() as it:
            client = await it.client()
            await client.send(b"HEAD /health HTTP/1.1\r\nHost: localhost\r\n\r\n" + get("/health"))
            status, headers = await client.read_head()
            assert (status, headers["content-length"]) == (200, "15")
            assert (await client.read_response())[2] == b'{"status":"ok"}'

    run(scenario())


def test_listener_drain_finishes_requests_in_progress() -> None:
    async def scenario() -> None:
        go = asyncio.Event()

        async def script(request: EngineRequest) -> None:
            await go.wait()
            await request.answer(b"{}")

        async with rig(script) as it:
            idle, busy, pipelining = [await it.client() for _ in range(3)]
            await busy.send(post(CHAT))
            await pipelining.send(post(CHAT) + post(CHAT))
            await until(lambda: len(it.engines[0].requests) == 2)
            closing = asyncio.ensure_future(it.gateway.close(grace_s=10))
            assert await idle.closed() == b""
            with pytest.raises(OSError, match=r"."):
                await it.client()
            go.set()
            status, headers, _ = await busy.read_response()
            assert (status, headers["connection"]) == (200, "close")
            assert (await pipelining.read_response())[0] == 200
            await closing

    run(scenario())


def test_listener_close_cuts_endless_requests() -> None:
    async def scenario() -> None:
        async def script(request: EngineRequest) -> None:
            await request.gone()

        async with rig(script) as it:
            client = await it.client()
            await client.send(post(CHAT))
            await until(lambda: len(it.engines[0].requests) == 1)
            await it.gateway.close(grace_s=0.05)
            assert await client.closed() == b""
            assert it.fleet.finished == [(1, False)]

    run(scenario())


def test_listener_address_in_use_raises_host_error() -> None:
    async def scenario() -> None:
        async with rig() as it:
            other = Gateway(ScriptedFleet(), GatewayOptions(port=it.port))
            with pytest.raises(HostError, match=r"cannot listen on 127\.0\.0\.1"):
                await other.start()
            await other.close()

    run(scenario())


def test_proxy_fleet_exception_fails_only_its_request() -> None:
    async def scenario() -> None:
        async def fine(request: EngineRequest) -> None:
            await request.answer(b"{}")

        async with rig(fine) as it:
            it.fleet.models = lambda: 1 / 0  # type: ignore[assignment,return-value]
            client = await it.client()
            await client.send(get("/v1/models") + post(CHAT))
            status, _, body = await client.read_response()
            assert (status, json.loads(body)["error"]["code"]) == (500, "internal_error")
            assert b"ZeroDivision" not in body
            assert (await client.read_response())[0] == 200

    run(scenario())
