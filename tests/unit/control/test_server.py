"""The control API over a real Unix socket, with a fleet in memory."""

from __future__ import annotations

import asyncio
import io
import json
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp.test_utils import TestClient, TestServer

from fleetd.control import routes, sse
from fleetd.control.port import ControlPort
from fleetd.control.server import SHUTDOWN_S, ControlServer, create_app
from tests.fakes.fake_control_port import FAILURES, FakePort
from tests.support.waiting import until_async as until

Test = Callable[[FakePort, aiohttp.ClientSession], Awaitable[None]]


@pytest.fixture
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("s") / "run" / "f.sock"


@asynccontextmanager
async def served(place: Path, **options: Any) -> AsyncIterator[tuple[FakePort, aiohttp.ClientSession]]:
    port = FakePort()
    _: ControlPort = port  # the fake matches the protocol
    server = ControlServer(port, place, **options)
    await server.start()
    connector = aiohttp.UnixConnector(str(place))
    try:
        async with aiohttp.ClientSession("http://fleetd", connector=connector) as session:
            yield port, session
    finally:
        await server.close()


def with_server(place: Path, test: Test, **options: Any) -> None:
    async def run() -> None:
        async with asyncio.timeout(30), served(place, **options) as (port, session):
            await test(port, session)

    asyncio.run(run())


READS = [
    ("/v1/status", "processes"),
    ("/v1/processes", "processes"),
    ("/v1/processes/web", "process"),
    ("/v1/models", "models"),
    ("/v1/models/ulysses", "model"),
    ("/v1/models/gpt-3.5-turbo", "model"),
    ("/v1/models/org/coder:7b", "model"),
    ("/v1/models/org%2Fcoder:7b", "model"),
    ("/v1/devices", "devices"),
    ("/v1/names", "models"),
    ("/v1/events?follow=0", "events"),
    ("/v1/logs/web", "lines"),
    ("/v1/logs/ollama?lines=3&grep=says", "lines"),
    ("/v1/story/web", "events"),
    ("/v1/explain/ulysses", "text"),
    ("/v1/config", "config"),
    ("/v1/dump", "journal"),
]


def test_routes_get_answers_every_document(place: Path) -> None:
    async def test(_: FakePort, session: aiohttp.ClientSession) -> None:
        for path, key in READS:
            async with session.get(aiohttp.client.URL(path, encoded=True)) as response:
                body = await response.json()
                assert (path, response.status) == (path, 200)
                assert next(iter(body)) == "schema"
                assert body["schema"] == "fleetctl/v1"
                assert key in body, path
                assert response.headers["Server"] == "fleetd"

    with_server(place, test)


BAD = [
    ("GET", "/v1/nothing", None, 404, "unknown_route"),
    ("GET", "/", None, 404, "unknown_route"),
    ("POST", "/v1/status", None, 405, "wrong_method"),
    ("GET", "/v1/processes/nope", None, 404, "unknown_name"),
    ("GET", "/v1/status?verbose=1", None, 400, "invalid_request"),
    ("GET", "/v1/logs/web?lines=many", None, 400, "invalid_request"),
    ("GET", "/v1/logs/web?lines=-1", None, 400, "invalid_request"),
    ("GET", "/v1/logs/web?lines=nan", None, 400, "invalid_request"),
    ("GET", "/v1/logs/web?lines=99999999", None, 400, "invalid_request"),
    ("GET", "/v1/logs/web?grep=(", None, 400, "invalid_request"),
    ("GET", "/v1/logs/web,nope", None, 404, "unknown_name"),
    ("GET", "/v1/events?follow=maybe", None, 400, "invalid_request"),
    ("POST", "/v1/processes/web/start", "{", 400, "invalid_request"),
    ("POST", "/v1/processes/web/start", "[]", 400, "invalid_request"),
    ("POST", "/v1/processes/web/start", '{"wat": 1}', 400, "invalid_request"),
    ("POST", "/v1/processes/web/start", '{"wait": 1}', 400, "invalid_request"),
    ("POST", "/v1/processes/web/start", '{"timeout_s": true}', 400, "invalid_request"),
    ("POST", "/v1/processes/web/start", '{"timeout_s": -1}', 400, "invalid_request"),
    ("POST", "/v1/processes/web/start", '{"signal": "HUP"}', 400, "invalid_request"),
    ("POST", "/v1/processes/web/signal", "{}", 400, "invalid_request"),
    ("POST", "/v1/processes/web/signal", '{"signal": "NOPE"}', 400, "invalid_request"),
    ("POST", "/v1/processes/web/signal", '{"signal": "0"}', 400, "invalid_request"),
    ("POST", "/v1/processes/start", '{"names": []}', 400, "invalid_request"),
    ("POST", "/v1/processes/start", '{"names": [1]}', 400, "invalid_request"),
    ("POST", "/v1/processes/start", '{"names": ["web", "nope"]}', 404, "unknown_name"),
    ("POST", "/v1/processes/web/dance", "{}", 404, "unknown_route"),
    ("POST", "/v1/models/web/load", "{}", 404, "unknown_name"),
    ("POST", "/v1/models/org/coder:7b/load", "{}", 409, "does_not_fit"),
    ("POST", "/v1/plan", '{"path": "relative.yaml"}', 400, "invalid_request"),
    ("POST", "/v1/plan", '{"path": "/a", "text": "b"}', 400, "invalid_request"),
    ("POST", "/v1/plan", '{"text": "bad"}', 422, "invalid_config"),
    ("POST", "/v1/plan", '{"text": "' + "x" * (5 * 1024 * 1024) + '"}', 413, "body_too_large"),
]


def test_routes_invalid_input_is_json_and_changes_nothing(place: Path) -> None:
    async def test(port: FakePort, session: aiohttp.ClientSession) -> None:
        for method, path, data, status, code in BAD:
            async with session.request(method, path, data=data and io.BytesIO(data.encode())) as response:
                body = await response.json()
                assert (path, data and data[:40], response.status) == (path, data and data[:40], status)
                assert body["schema"] == "fleetctl/v1"
                assert body["error"]["code"] == code, path
                assert body["error"]["message"]
                assert "Traceback" not in json.dumps(body)
        assert [verb for verb, _, _ in port.acted] == ["load"]  # the one that did not fit

    with_server(place, test)


def test_routes_plan_of_bad_file_lists_every_problem(place: Path) -> None:
    async def test(_: FakePort, session: aiohttp.ClientSession) -> None:
        async with session.post("/v1/plan", json={"text": "bad"}) as response:
            problems = (await response.json())["error"]["problems"]
            assert [(problem["line"], problem["column"]) for problem in problems] == [(4, 7), (9, 1)]

    with_server(place, test)


@pytest.mark.parametrize(
    ("failure", "status", "code"),
    [
        ("engine", 502, "engine_failed"),
        ("host", 500, "host_refused"),
        ("busy", 503, "draining"),
        ("bug", 500, "internal"),
    ],
)
def test_answers_daemon_failures_have_status_and_code(
    place: Path, failure: str, status: int, code: str, caplog: pytest.LogCaptureFixture
) -> None:
    async def test(port: FakePort, session: aiohttp.ClientSession) -> None:
        port.raising = FAILURES[failure]
        async with session.get("/v1/status") as response:
            body = await response.json()
            assert (response.status, body["error"]["code"]) == (status, code)
            assert "secret detail" not in json.dumps(body)
            if failure == "busy":
                assert response.headers["Retry-After"] == "120"
        port.raising = None
        async with session.get("/v1/status") as response:
            assert response.status == 200

    with_server(place, test)
    assert ("secret detail" in caplog.text) == (failure == "bug")


def test_routes_actions_reach_port_with_options(place: Path) -> None:
    async def test(port: FakePort, session: aiohttp.ClientSession) -> None:
        cases = [
            ("/v1/processes/web/start", {"timeout_s": 3}, 200),
            ("/v1/processes/ollama/restart", {"wait": False}, 202),
            ("/v1/processes/stop", {"names": ["ollama-2", "web"], "force": True}, 200),
            ("/v1/processes/web/signal", {"signal": "hup"}, 200),
            ("/v1/processes/web/signal", {"signal": "15"}, 200),
            ("/v1/models/gpt-3.5-turbo/pin", {}, 200),
            ("/v1/processes/start", {"names": ["web", "broken"]}, 409),
            ("/v1/processes/slow/start", {"timeout_s": 0.01}, 504),
        ]
        for path, body, status in cases:
            async with session.post(path, json=body) as response:
                assert (path, response.status) == (path, status)
                assert (await response.json())["results"]
        seen = [(verb, names) for verb, names, _ in port.acted]
        assert seen[:4] == [
            ("start", ("web",)),
            ("restart", ("ollama-1", "ollama-2")),
            ("stop", ("ollama-2", "web")),
            ("signal", ("web",)),
        ]
        assert [options.signal for _, _, options in port.acted[3:5]] == ["SIGHUP", "SIGTERM"]
        assert port.acted[0][2].timeout_s == 3
        assert port.acted[1][2].wait is False
        assert port.acted[2][2].force is True
        assert port.acted[5][1] == ("ulysses",)

    with_server(place, test)


def test_routes_silent_port_times_out(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routes, "GRACE_S", 0.05)

    async def test(port: FakePort, session: aiohttp.ClientSession) -> None:
        async def never(*_: Any) -> Any:
            await asyncio.Event().wait()

        monkeypatch.setattr(port, "act", never)
        async with session.post("/v1/processes/web/start", json={"timeout_s": 0.01}) as response:
            assert response.status == 504
            assert (await response.json())["results"][0]["result"] == "timeout"

    with_server(place, test)


def test_server_disconnected_caller_cancels_wait(place: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def test(port: FakePort, session: aiohttp.ClientSession) -> None:
        cancelled = asyncio.Event()

        async def act(*_: Any) -> Any:
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                cancelled.set()
                raise

        port.act = act  # type: ignore[method-assign]
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.2):
                await session.post("/v1/processes/web/start")
        await asyncio.wait_for(cancelled.wait(), 10)

    with caplog.at_level(logging.DEBUG):
        with_server(place, test)
    assert "Traceback" not in caplog.text


def test_server_other_users_are_rejected(place: Path) -> None:
    async def test(port: FakePort, session: aiohttp.ClientSession) -> None:
        for method, path in (("GET", "/v1/status"), ("POST", "/v1/shutdown")):
            async with session.request(method, path) as response:
                assert response.status == 403
                assert (await response.json())["error"]["code"] == "forbidden"
        assert port.calls == []

    with_server(place, test, allowed_uids={987_654})


def test_server_close_removes_socket_and_start_recreates_it(place: Path) -> None:
    async def test(_: FakePort, session: aiohttp.ClientSession) -> None:
        async with session.get("/v1/status") as response:
            assert response.status == 200

    with_server(place, test)
    assert not place.exists()
    with_server(place, test)


def test_server_malformed_request_logs_one_line(place: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def test(_: FakePort, session: aiohttp.ClientSession) -> None:
        reader, writer = await asyncio.open_unix_connection(str(place))
        writer.write(b"GET / HTTP/1.1\r\nHost : x\r\nbroken\r\n\r\n")
        assert (await reader.read(12)) in (b"HTTP/1.0 400", b"HTTP/1.1 400")
        writer.close()
        await writer.wait_closed()
        async with session.get("/v1/status") as response:
            assert response.status == 200

    with_server(place, test)
    assert "Traceback" not in caplog.text


# -- streams ------------------------------------------------------------------------------------------------------------


async def frames(response: aiohttp.ClientResponse) -> list[tuple[str, dict[str, Any]]]:
    found, event = [], ""
    async for raw in response.content:
        line = raw.decode().rstrip("\n")
        if line.startswith("event: "):
            event = line[7:]
        elif line.startswith("data: "):
            found.append((event, json.loads(line[6:])))
    return found


def test_sse_finished_stream_sends_end(place: Path) -> None:
    async def test(port: FakePort, session: aiohttp.ClientSession) -> None:
        accept = {"Accept": "text/event-stream"}
        async with session.get("/v1/events?follow=0&after=1", headers=accept) as response:
            assert response.content_type == "text/event-stream"
            found = await frames(response)
        assert [event for event, _ in found] == ["event"] * 3 + ["end"]
        assert [body["seq"] for _, body in found[:-1]] == [2, 3, 4]
        assert all(body["schema"] == "fleetctl/v1" for _, body in found)
        async with session.get("/v1/logs/web?lines=2", headers=accept) as response:
            assert "red" in (await response.text())
        assert port.closed_streams == 2

    with_server(place, test)


def test_sse_disconnected_reader_closes_source(place: Path) -> None:
    async def test(port: FakePort, session: aiohttp.ClientSession) -> None:
        async with session.get("/v1/events") as response:
            assert await response.content.readline()
            response.close()
        await until(lambda: port.closed_streams == 1)

    with_server(place, test)


def test_sse_failed_stream_sends_error(place: Path) -> None:
    async def test(port: FakePort, session: aiohttp.ClientSession) -> None:
        async def events(*_: Any) -> AsyncIterator[Any]:
            yield {"seq": 1}
            raise FAILURES["engine"]

        port.events = events  # type: ignore[method-assign,assignment]
        async with session.get("/v1/events") as response:
            found = await frames(response)
        assert [event for event, _ in found] == ["event", "error"]
        assert found[1][1]["error"]["code"] == "engine_failed"

    with_server(place, test)


def test_sse_stalled_reader_is_disconnected(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sse, "STALL_S", 0.1)
    monkeypatch.setattr(sse, "QUEUE_ITEMS", 4)
    produced = 0

    async def test(port: FakePort, session: aiohttp.ClientSession) -> None:
        async def events(*_: Any) -> AsyncIterator[Any]:
            nonlocal produced
            try:
                while True:
                    produced += 1
                    yield {"seq": produced, "padding": "x" * 10_000}
            finally:
                port.closed_streams += 1

        port.events = events  # type: ignore[method-assign,assignment]
        _, writer = await asyncio.open_unix_connection(str(place), limit=1024)
        writer.write(b"GET /v1/events HTTP/1.1\r\nHost: f\r\n\r\n")
        await until(lambda: port.closed_streams == 1)
        assert produced < 2000  # bounded: the queue, and the buffers of the sockets
        async with session.get("/v1/status") as response:
            assert response.status == 200
        writer.transport.abort()
        with suppress(ConnectionError):
            await writer.wait_closed()

    with_server(place, test)


def test_sse_silence_is_filled_with_comments(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sse, "PING_S", 0.02)

    async def test(port: FakePort, session: aiohttp.ClientSession) -> None:
        async def events(*_: Any) -> AsyncIterator[Any]:
            await asyncio.Event().wait()
            yield {}

        port.events = events  # type: ignore[method-assign,assignment]
        async with session.get("/v1/events") as response:
            async for line in response.content:
                if line.startswith(b": ping"):
                    break
            response.close()

    with_server(place, test)


def test_server_close_cuts_followers(place: Path) -> None:
    async def run() -> None:
        port = FakePort()
        server = ControlServer(port, place)
        await server.start()
        async with aiohttp.ClientSession("http://fleetd", connector=aiohttp.UnixConnector(str(place))) as session:
            async with session.get("/v1/events") as response:
                assert await response.content.readline()
                started = asyncio.get_running_loop().time()
                await server.close()
                assert asyncio.get_running_loop().time() - started < SHUTDOWN_S
                assert port.closed_streams == 1
                response.close()

    asyncio.run(run())


# -- metrics ----------------------------------------------------------------------------------------------------------------


def test_server_without_metrics_has_no_metrics_route() -> None:
    async def metrics() -> bytes:
        return b"fleetd_up 1\n"

    async def run() -> None:
        async with TestClient(TestServer(create_app(FakePort(), metrics=metrics))) as client:
            assert (await client.get("/v1/status")).status == 200
            assert await (await client.get("/metrics")).text() == "fleetd_up 1\n"
        async with TestClient(TestServer(create_app(FakePort()))) as client:
            assert (await client.get("/metrics")).status == 404

    asyncio.run(run())
