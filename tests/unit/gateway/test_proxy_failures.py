"""Engines that refuse connections, break off, send invalid answers, or do not answer."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable
from unittest.mock import ANY

import openai
import pytest

from fleetd.core.data.commands import Reject
from tests.support.gateway import CHAT, STREAM, EngineRequest, get, post, rig, run
from tests.support.ports import free_port
from tests.support.waiting import until_async as until


async def fine(request: EngineRequest) -> None:
    await request.answer(b'{"fine":true}')


async def reset_at_once(request: EngineRequest) -> None:
    request.reset()
    await asyncio.sleep(0)
    raise ConnectionResetError


async def close_at_once(request: EngineRequest) -> None:
    raise ConnectionResetError


@pytest.mark.parametrize("first", ["refused", "reset", "closed"])
def test_proxy_failure_before_answer_fails_over(first: str) -> None:
    async def scenario() -> None:
        async with rig() as it:
            if first == "refused":
                it.fleet.add("m", "a", free_port())
            else:
                await it.engine(reset_at_once if first == "reset" else close_at_once, name="a")
            await it.engine(fine, name="b")
            client = await it.client()
            status, headers, _ = await client.ask(CHAT)
            assert (status, headers["x-fleet-instance"]) == (200, "b")
            assert it.fleet.admitted == [("m", ()), ("m", () if first == "refused" else ("a",))]
            assert it.fleet.finished == [(1, True), (2, False)]
            assert it.fleet.down == ({"a"} if first == "refused" else set())

    run(scenario())


@pytest.mark.parametrize("attempts", [1, 2])
def test_proxy_last_attempt_failed_gives_502(attempts: int) -> None:
    async def scenario() -> None:
        async with rig(retry_attempts=attempts) as it:
            for name in ("a", "b", "c"):
                await it.engine(reset_at_once, name=name)
            client = await it.client()
            status, headers, body = await client.ask(CHAT)
            assert (status, json.loads(body)["error"]["code"]) == (502, "upstream_failed")
            assert headers["x-should-retry"] == "false"
            assert len(it.fleet.admitted) == attempts
            assert (await client.ask({"model": "nope"}))[0] == 404  # the connection stays open

    run(scenario())


def test_proxy_refused_connection_costs_no_attempt() -> None:
    async def scenario() -> None:
        async with rig(retry_attempts=1) as it:
            for name in ("a", "b", "c"):
                it.fleet.add("m", name, free_port())
            await it.engine(fine, name="d")
            client = await it.client()
            status, headers, _ = await client.ask(CHAT)
            assert (status, headers["x-fleet-instance"]) == (200, "d")
            assert len(it.fleet.refused) == 3
            assert "no connection" in it.fleet.refused[0]

    run(scenario())


def test_proxy_unreachable_engine_gives_503_after_limit() -> None:
    async def scenario() -> None:
        async with rig(unreachable_s=0.0) as it:
            it.fleet.add("m", "a", free_port())
            client = await it.client()
            status, headers, body = await client.ask(CHAT)
            assert (status, json.loads(body)["error"]["code"]) == (503, "model_failed")
            assert "a cannot be reached: no connection" in json.loads(body)["error"]["message"]
            assert (headers["retry-after"], headers.get("x-should-retry")) == ("2", None)
            assert it.fleet.finished == [(1, True)]
            assert (await client.ask({"model": "nope"}))[0] == 404  # the connection stays open

    run(scenario())


def test_proxy_no_other_process_reports_first_failure() -> None:
    async def scenario() -> None:
        async with rig(reset_at_once) as it:
            client = await it.client()
            status, _, body = await client.ask(CHAT)
            assert (status, json.loads(body)["error"]["code"]) == (502, "upstream_failed")
            assert "engine-1" in json.loads(body)["error"]["message"]

    run(scenario())


def test_proxy_stale_pooled_connection_is_retried() -> None:
    async def scenario() -> None:
        async def script(request: EngineRequest) -> None:
            if len(it.engines[0].requests) == 2:
                raise ConnectionResetError  # closes as if the keep-alive time had just ended
            await request.answer(b"{}")

        async with rig(script) as it:
            client = await it.client()
            assert (await client.ask(CHAT))[0] == 200
            assert (await client.ask(CHAT))[0] == 200
            assert len(it.engines[0].requests) == 3
            assert it.fleet.finished == [(1, False), (2, False)]

    run(scenario())


Break = Callable[[EngineRequest], Awaitable[None]]


async def by_reset(request: EngineRequest) -> None:
    await asyncio.sleep(0.02)
    request.reset()


async def by_closing(request: EngineRequest) -> None:
    request.writer.close()


async def by_nonsense(request: EngineRequest) -> None:
    await request.send(b"zz\r\nnonsense\r\n")


@pytest.mark.parametrize("ending", [by_reset, by_closing, by_nonsense])
def test_proxy_broken_stream_ends_with_error_event(ending: Break) -> None:
    async def scenario() -> None:
        async def script(request: EngineRequest) -> None:
            await request.start_stream()
            await request.send_chunk(b'data: {"a":1}\n\n')
            await ending(request)
            await request.gone()

        async with rig(script) as it:
            await it.engine(fine, name="spare")
            client = await it.client()
            await client.send(post(STREAM))
            _, headers = await client.read_head()
            events = (await client.read_body(headers)).split(b"\n\n")
            assert events[0] == b'data: {"a":1}'
            error = json.loads(events[-2].strip().removeprefix(b"data: "))
            assert error["error"]["code"] == "upstream_failed"
            assert not any(b"[DONE]" in event or b"finish_reason" in event for event in events)
            assert await client.closed() == b""
            assert it.fleet.finished == [(1, True)]
            assert it.engines[1].requests == []

    run(scenario())


def test_proxy_broken_stream_raises_in_openai_client() -> None:
    async def scenario() -> None:
        async def script(request: EngineRequest) -> None:
            await request.start_stream()
            choices = [{"index": 0, "delta": {"content": "x"}, "finish_reason": None}]
            event = {"id": "1", "object": "chat.completion.chunk", "created": 1, "model": "m", "choices": choices}
            await request.send_chunk(b"data: " + json.dumps(event).encode() + b"\n\n")
            request.writer.close()

        async with rig(script) as it:
            base = f"http://127.0.0.1:{it.port}/v1"
            async with openai.AsyncOpenAI(base_url=base, api_key="none", max_retries=0) as client:
                stream = await client.chat.completions.create(
                    model="m", messages=[{"role": "user", "content": "hi"}], stream=True
                )
                with pytest.raises(openai.APIError, match="did not answer"):
                    async for _ in stream:
                        pass

    run(scenario())


@pytest.mark.parametrize("framing", ["Content-Length: 1000", "Transfer-Encoding: chunked"])
@pytest.mark.parametrize("ending", [by_reset, by_closing])
def test_proxy_broken_plain_answer_is_cut_short(framing: str, ending: Break) -> None:
    async def scenario() -> None:
        async def script(request: EngineRequest) -> None:
            await request.send(f"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n{framing}\r\n\r\n".encode())
            await (request.send_chunk(b'{"a":') if "chunked" in framing else request.send(b'{"a":'))
            await ending(request)

        async with rig(script) as it:
            client = await it.client()
            await client.send(post(CHAT))
            assert (await client.read_head())[0] == 200
            rest = await client.closed()
            assert b'{"a":' in rest
            assert not rest.endswith(b"0\r\n\r\n")
            assert it.fleet.finished == [(1, True)]

    run(scenario())


@pytest.mark.parametrize(
    "answer",
    [
        b"garbage\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n",
        b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: x\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nX: " + b"a" * 300_000,
    ],
)
def test_proxy_invalid_http_answer_gives_502_without_retry(answer: bytes) -> None:
    async def scenario() -> None:
        async def script(request: EngineRequest) -> None:
            await request.send(answer)
            await request.gone()

        async with rig(script) as it:
            await it.engine(fine, name="spare")
            client = await it.client()
            status, _, body = await client.ask(CHAT)
            assert (status, json.loads(body)["error"]["code"]) == (502, "upstream_failed")
            assert it.engines[1].requests == []
            assert it.fleet.finished == [(1, True)]

    run(scenario())


@pytest.mark.parametrize("status", [204, 304, 400, 429, 500, 503])
def test_proxy_engine_status_passes_through(status: int) -> None:
    async def scenario() -> None:
        async def script(request: EngineRequest) -> None:
            length = "" if status in (204, 304) else "Content-Length: 2\r\n"
            await request.send(
                f"HTTP/1.1 {status} X\r\n{length}Retry-After: 7\r\n\r\n".encode() + (b"{}" if length else b"")
            )

        async with rig(script) as it:
            client = await it.client()
            for _ in range(2):
                got, headers, _ = await client.ask(CHAT)
                assert (got, headers["retry-after"]) == (status, "7")
            assert it.engines[0].connections == 1

    run(scenario())


def test_proxy_interim_answers_of_engine_are_skipped() -> None:
    async def scenario() -> None:
        async def script(request: EngineRequest) -> None:
            await request.send(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n")
            await request.answer(b"{}")

        async with rig(script) as it:
            client = await it.client()
            status, headers, _ = await client.ask(CHAT)
            assert status == 200
            assert "link" not in headers

    run(scenario())


def test_proxy_surplus_bytes_close_only_the_connection() -> None:
    async def scenario() -> None:
        async def script(request: EngineRequest) -> None:
            await request.send(
                b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\nforged"
            )

        async with rig(script) as it:
            client = await it.client()
            for _ in range(3):
                assert (await client.ask(CHAT))[2] == b"{}"
            await client.send(get("/health", "Connection: close\r\n"))
            assert (await client.closed()).startswith(b"HTTP/1.1 200 ")  # no byte of a second answer precedes it

    run(scenario())


def test_proxy_silent_engine_times_out() -> None:
    async def scenario() -> None:
        async def script(request: EngineRequest) -> None:
            if request.json.get("stream"):
                await request.start_stream()
            await request.gone()

        async with rig(script, first_byte_timeout_s=0.1, idle_timeout_s=0.1) as it:
            client = await it.client()
            status, _, body = await client.ask(CHAT)
            assert (status, json.loads(body)["error"]["code"]) == (502, "upstream_failed")
            _, _, body = await client.ask(STREAM)
            assert b"upstream_failed" in body
            assert it.fleet.finished == [(1, True), (2, True)]

    run(scenario())


@pytest.mark.parametrize(
    ("code", "status", "final"),
    [
        ("model_not_found", 404, True),
        ("model_too_large", 422, True),
        ("queue_full", 429, False),
        ("queue_timeout", 504, False),
        ("model_failed", 503, False),
        ("model_blocked", 503, False),
        ("draining", 503, False),
    ],
)
def test_proxy_core_rejection_has_status_and_headers(code: str, status: int, final: bool) -> None:
    async def scenario() -> None:
        async with rig() as it:
            it.fleet.rejects["m"] = Reject(0, code, "Because.", 1000.0 if status == 429 else None)
            client = await it.client()
            got, headers, body = await client.ask(CHAT)
            assert got == status
            error = json.loads(body)["error"]
            assert error["code"] == code
            assert error["message"] == "Because."
            assert (headers.get("x-should-retry") == "false") is final
            if status in (429, 503):
                assert 1 <= int(headers["retry-after"]) <= 120
            assert it.fleet.finished == it.fleet.cancelled == []

    run(scenario())


def labels(headers: dict[str, str]) -> dict[str, str]:
    """Return the headers that say where the request of an answer went."""
    return {name.removeprefix("x-fleet-"): text for name, text in headers.items() if name.startswith("x-fleet-")}


def test_proxy_error_names_model_and_process_if_known() -> None:
    async def scenario() -> None:
        async with rig() as it:
            it.fleet.aliases = {"m": "real"}
            it.fleet.rejects["m"] = Reject(0, "queue_full", "Full.")
            await it.engine(reset_at_once, model="broken", name="a")
            client = await it.client()
            refused = labels((await client.ask(CHAT))[1])
            assert refused == {"error-source": "gateway", "model": "real", "queue-ms": ANY}
            assert labels((await client.ask({"model": "nope"}))[1]) == {"error-source": "gateway"}
            assert labels((await client.ask({"model": 7}))[1]) == {"error-source": "gateway"}
            broken = labels((await client.ask({"model": "broken"}))[1])
            where = {"model": "broken", "instance": "a", "queue-ms": ANY, "load-ms": ANY}
            assert broken == {"error-source": "gateway", **where}
            assert all(int(found[name]) < 5000 for found in (refused, broken) for name in found if name.endswith("-ms"))
            it.fleet.hold = True
            await client.send(post(CHAT))
            await until(lambda: bool(it.fleet.held))
            began = time.monotonic()
            await until(lambda: time.monotonic() - began > 0.005)
            it.fleet.hold = False
            it.fleet.grant_held()
            waited = labels((await client.read_response())[1])
            assert (waited["model"], int(waited["queue-ms"]) >= 5) == ("real", True)

    run(scenario())


def test_proxy_waiting_stream_gets_comments_then_answer() -> None:
    async def scenario() -> None:
        async def script(request: EngineRequest) -> None:
            await request.start_stream()
            await request.send_chunk(b"data: 1\n\n")
            await request.end_stream()

        async with rig(script, loading_comment_s=0.05) as it:
            it.fleet.hold = True
            client = await it.client()
            await client.send(post(STREAM))
            status, headers = await client.read_head()
            assert (status, headers["content-type"]) == (200, "text/event-stream")
            assert [await client.read_chunk() for _ in range(3)] == [b": loading\n\n"] * 3
            it.fleet.grant_held()
            rest = b""
            while piece := await client.read_chunk():
                rest += piece
            assert rest.replace(b": loading\n\n", b"") == b"data: 1\n\n"

    run(scenario())


@pytest.mark.parametrize("failure", ["rejected", "refused", "engine says 500"])
def test_proxy_waiting_stream_gets_failure_as_event(failure: str) -> None:
    async def scenario() -> None:
        async def script(request: EngineRequest) -> None:
            await request.send(b"HTTP/1.1 500 X\r\nContent-Length: 9\r\n\r\nno memory")

        async with rig(loading_comment_s=0.02) as it:
            if failure == "refused":
                it.fleet.add("m", "a", free_port())
            else:
                await it.engine(script)
            it.fleet.hold = True
            client = await it.client()
            await client.send(post(STREAM))
            _, headers = await client.read_head()
            await client.read_chunk()
            if failure == "rejected":
                it.fleet.rejects["m"] = Reject(0, "model_failed", "It crashed.")
            it.fleet.hold = failure == "rejected"
            it.fleet.grant_held()
            body = await client.read_body(headers)
            error = json.loads(body.split(b"data: ")[1])["error"]
            expected = {
                "rejected": "It crashed.",
                "refused": "No other process is left",
                "engine says 500": "no memory",
            }[failure]
            assert expected in error["message"]
            assert b"[DONE]" not in body
            assert await client.closed() == b""

    run(scenario())


def test_proxy_waiting_plain_request_gets_no_early_bytes() -> None:
    async def scenario() -> None:
        async with rig(fine, loading_comment_s=0.02) as it:
            it.fleet.hold = True
            client = await it.client()
            await client.send(post(CHAT))
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(client.reader.read(1), 0.3)
            it.fleet.grant_held()
            assert (await client.read_response())[0] == 200

    run(scenario())


def test_proxy_process_gone_at_grant_fails_over() -> None:
    async def scenario() -> None:
        async with rig() as it:
            it.fleet.processes["m"] = ["ghost"]
            await it.engine(fine, name="b")
            client = await it.client()
            status, headers, _ = await client.ask(CHAT)
            assert (status, headers["x-fleet-instance"]) == (200, "b")

    run(scenario())


def test_pools_changed_address_is_used_by_next_request() -> None:
    async def scenario() -> None:
        async with rig(fine) as it:
            client = await it.client()
            await client.ask(CHAT)
            other = await it.engine(fine, model="x", name="other")
            it.fleet.upstreams["engine-1"] = it.fleet.upstreams["other"]
            await client.ask(CHAT)
            assert len(other.requests) == 1
            await until(lambda: it.gateway.stats().upstream_connections == 1)

    run(scenario())


def test_proxy_stream_cut_by_a_stop_says_so() -> None:
    async def scenario() -> None:
        async with rig() as it:

            async def script(request: EngineRequest) -> None:
                await request.start_stream()
                await request.send_chunk(b'data: {"a":1}\n\n')
                it.fleet.stopped["a"] = "shutting down"
                await by_closing(request)

            await it.engine(script, name="a")
            client = await it.client()
            await client.send(post(STREAM))
            _, headers = await client.read_head()
            events = (await client.read_body(headers)).split(b"\n\n")
            error = json.loads(events[-2].strip().removeprefix(b"data: "))["error"]
            assert error["code"] == "draining"
            assert error["message"] == "The answer was cut off: a was stopped (shutting down)."

    run(scenario())
