"""Rejected input: ambiguous framing, foreign hosts and origins, oversized and slow input, random bytes."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import re

import pytest

from fleetd.gateway.checks import HostPolicy, split_host
from tests.support.gateway import CHAT, STREAM, Client, EngineRequest, get, post, rig, run
from tests.support.waiting import until_async as until

HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
BODY = json.dumps(CHAT).encode()


async def fine(request: EngineRequest) -> None:
    await request.answer(b'{"fine":true}')


def ask(*lines: bytes, body: bytes = b"") -> bytes:
    return HEAD + b"".join(line + b"\r\n" for line in lines) + b"\r\n" + body


SMUGGLING = {
    "length and chunks": ask(b"Content-Length: 5", b"Transfer-Encoding: chunked", body=b"0\r\n\r\n"),
    "chunks and length": ask(b"Transfer-Encoding: chunked", b"Content-Length: 5", body=b"0\r\n\r\n"),
    "two lengths": ask(b"Content-Length: 2", b"Content-Length: 3", body=b"{} "),
    "equal lengths": ask(b"Content-Length: 2", b"Content-Length: 2", body=b"{}"),
    "length list": ask(b"Content-Length: 2, 2", body=b"{}"),
    "length with plus": ask(b"Content-Length: +2", body=b"{}"),
    "negative length": ask(b"Content-Length: -2", body=b"{}"),
    "hex length": ask(b"Content-Length: 0x2", body=b"{}"),
    "huge length": ask(b"Content-Length: 99999999999999999999999", body=b"{}"),
    "xchunked": ask(b"Transfer-Encoding: xchunked", body=b"0\r\n\r\n"),
    "identity": ask(b"Transfer-Encoding: identity", body=b"0\r\n\r\n"),
    "two codings": ask(b"Transfer-Encoding: chunked", b"Transfer-Encoding: chunked", body=b"0\r\n\r\n"),
    "space before colon": ask(b"Content-Length : 2", body=b"{}"),
    "folded line": ask(b"X: a\r\n b", b"Content-Length: 2", body=b"{}"),
    "bare LF": HEAD.replace(b"\r\n", b"\n") + b"\n",
    "one bare LF": ask(b"X: a\nContent-Length: 2", body=b"{}"),
    "bare CR": ask(b"X: a\rY: b", b"Content-Length: 2", body=b"{}"),
    "NUL": ask(b"X: a\0b", b"Content-Length: 2", body=b"{}"),
    "bad chunk size": ask(b"Transfer-Encoding: chunked", body=b"zz\r\n{}\r\n0\r\n\r\n"),
    "chunk size overflow": ask(b"Transfer-Encoding: chunked", body=b"fffffffffffffffff\r\n{}\r\n0\r\n\r\n"),
    "chunk longer than declared": ask(b"Transfer-Encoding: chunked", body=b"2\r\n{}{}\r\n0\r\n\r\n"),
    "chunk with LF": ask(b"Transfer-Encoding: chunked", body=b"2\n{}\n0\n\n"),
    "no host": b"GET /health HTTP/1.1\r\nConnection: close\r\n\r\n",
    "two hosts": b"GET /health HTTP/1.1\r\nConnection: close\r\nHost: localhost\r\nHost: localhost\r\n\r\n",
    "empty host": b"GET /health HTTP/1.1\r\nConnection: close\r\nHost:\r\n\r\n",
    "unknown method": b"FOO /health HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "HTTP/1.2": b"GET /health HTTP/1.2\r\nHost: localhost\r\n\r\n",
    "HTTP/0.9": b"GET /health\r\n\r\n",
    "HTTP/2 preface": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "garbage": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\x00" * 50,
    "high byte in the target": b"GET /\xff HTTP/1.1\r\nHost: localhost\r\n\r\n",
}


@pytest.mark.parametrize("name", SMUGGLING)
@pytest.mark.parametrize("step", [0, 1], ids=["whole", "bytewise"])
def test_http1_ambiguous_framing_ends_connection(name: str, step: int) -> None:
    async def scenario() -> None:
        async with rig(fine) as it:
            client = await it.client()
            # A wrong Host header does not spoil the framing: the next request would be answered.
            data = SMUGGLING[name] + (b"" if "host" in name else get("/smuggled"))
            try:
                for at in range(0, len(data), step or len(data)):
                    await client.send(data[at : at + (step or len(data))])
            except ConnectionError:
                pass  # it may close before everything was sent
            answer = await client.closed()
            assert len(re.findall(rb"HTTP/1\.1 \d{3} ", answer)) == 1
            assert answer.split(b" ")[1] in (b"400", b"501", b"505")
            assert b'"code":' in answer
            assert b"Traceback" not in answer
            assert b"server:" not in answer.lower()
            assert it.engines[0].requests == []

    run(scenario())


@pytest.mark.parametrize(
    ("host", "allowed"),
    [
        ("localhost", True),
        ("LOCALHOST:8484", True),
        ("localhost.", True),
        ("127.0.0.1:1", True),
        ("127.9.9.9", True),
        ("[::1]:8484", True),
        ("app.localhost", True),
        ("evil.com", False),
        ("localhost.evil.com", False),
        ("evil.com:8484", False),
        ("127.0.0.1.evil.com", False),
        ("192.168.0.1", False),
        ("[::1", False),
        ("localhost:port", False),
        ("localhost@evil.com", False),
        ("a/b", False),
        ("[2001:db8::1]", False),
        ("notlocalhost", False),
    ],
)
def test_checks_hosts_by_default(host: str, allowed: bool) -> None:
    assert HostPolicy("127.0.0.1").allows(host.encode()) is allowed


def test_checks_hosts_of_configuration() -> None:
    policy = HostPolicy("0.0.0.0", ["fleet.example", "*.lan"])
    for host in ("fleet.example:80", "a.lan", "192.168.0.1", "[2001:db8::1]:5"):
        assert policy.allows(host.encode()), host
    for host in ("lan", "x.fleet.example", "evil.com"):
        assert not policy.allows(host.encode()), host
    assert HostPolicy("127.0.0.1", ["*"]).allows(b"anything.example")
    assert split_host(b"caf\xc3\xa9") is None


@pytest.mark.parametrize(
    ("request_bytes", "status"),
    [
        (b"GET /health HTTP/1.1\r\nHost: evil.com\r\n\r\n", 403),
        (b"GET http://evil.com/health HTTP/1.1\r\nHost: localhost\r\n\r\n", 403),
        (b"GET http://localhost/health HTTP/1.1\r\nHost: evil.com\r\n\r\n", 403),
        (b"GET http://localhost/health HTTP/1.1\r\nHost: localhost\r\n\r\n", 200),
        (b"GET http://LOCALHOST:99/health HTTP/1.1\r\nHost: localhost\r\n\r\n", 200),
        (b"GET http://a@localhost/health HTTP/1.1\r\nHost: localhost\r\n\r\n", 400),
        (b"GET ftp://localhost/health HTTP/1.1\r\nHost: localhost\r\n\r\n", 400),
        (b"CONNECT evil.com:80 HTTP/1.1\r\nHost: localhost\r\n\r\n", 400),
        (post(CHAT, extra="Origin: http://evil.com\r\n"), 403),
        (post(CHAT, extra="Origin: null\r\n"), 403),
        (post(CHAT, extra="Origin: http://localhost\r\n"), 200),
        (post(CHAT, extra="Origin: http://localhost:1\r\n"), 403),
        (
            b"OPTIONS /v1/models HTTP/1.1\r\nHost: localhost\r\nOrigin: http://e.com\r\nAccess-Control-Request-Method: POST\r\n\r\n",
            403,
        ),
        (b"OPTIONS * HTTP/1.1\r\nHost: localhost\r\n\r\n", 204),
        (get("/health", "Origin: http://evil.com\r\n"), 200),
        (post(CHAT).replace(b"application/json", b"text/plain"), 415),
        (post(CHAT).replace(b"application/json", b"application/x-www-form-urlencoded"), 415),
        (post(CHAT).replace(b"application/json", b"Application/JSON; charset=UTF-8"), 200),
        (post(CHAT).replace(b"Content-Type: application/json\r\n", b""), 415),
        (post(CHAT, extra="Content-Type: text/plain\r\n"), 415),
        (post(CHAT, extra="Content-Encoding: gzip\r\n"), 415),
        (ask(b"Transfer-Encoding: gzip, chunked", body=b"0\r\n\r\n"), 501),
    ],
)
def test_checks_reject_with_status(request_bytes: bytes, status: int) -> None:
    async def scenario() -> None:
        async with rig(fine) as it:
            for _ in range(2):  # the cache of the first request must not help the second
                client = await it.client()
                await client.send(request_bytes)
                got, headers, _ = await client.read_response()
                assert got == status
                assert not any(name.startswith("access-control-") for name in headers)

    run(scenario())


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        (b"", 400, "invalid_request"),
        (b"{", 400, "invalid_request"),
        (b"[]", 400, "invalid_request"),
        (b"[" * 100_000, 400, "invalid_request"),
        (b'{"model":1}', 400, "invalid_request"),
        (b'{"model":""}', 400, "invalid_request"),
        (b'{"Model":"m"}', 400, "invalid_request"),
        (b'{"model":"m","MODEL":"other"}', 400, "invalid_request"),
        (b'{"messages":[]}', 400, "invalid_request"),
        (b'{"model":"m\\u0000"}', 400, "invalid_request"),
        (b'{"model":"m\\r\\nX-Evil: 1"}', 400, "invalid_request"),
        ('{"model":"\u202em"}'.encode(), 400, "invalid_request"),
        ('{"model":"🦙"}'.encode(), 404, "model_not_found"),
        (b'{"model":"../../etc/passwd"}', 404, "model_not_found"),
        (b'{"model":"' + b"a" * 10_240 + b'"}', 404, "model_not_found"),
        (b'{"model":"m"}\xff', 400, "invalid_request"),
    ],
)
@pytest.mark.parametrize("large", [False, True], ids=["small", "large"])
def test_body_invalid_content_has_status_and_code(body: bytes, status: int, code: str, large: bool) -> None:
    if large:
        if not body.startswith(b"{") or len(body) < 3 or body.endswith(b"\xff"):
            return  # the scan reads only the top level, and nothing behind it
        body = b'{"pad":"' + b"x" * 1_100_000 + b'",' + body[1:]

    async def scenario() -> None:
        async with rig(fine) as it:
            client = await it.client()
            got, headers, answer = await client.ask(body)
            assert (got, json.loads(answer)["error"]["code"]) == (status, code)
            assert headers["x-should-retry"] == "false"
            assert len(answer) < 1000
            assert (await client.ask(CHAT))[0] == 200  # the connection stays open
            assert len(it.engines[0].requests) == 1

    run(scenario())


# -- limits --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("request_bytes", "status"),
    [
        (get("/" + "a" * 9000), 414),
        (b"GET /" + b"a" * 200_000, 414),
        (get("/health", "X: " + "a" * 70_000 + "\r\n"), 431),
        (b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * 200_000, 431),
        (get("/health", "".join(f"X{n}: 1\r\n" for n in range(200))), 431),
        (b"GET /health HTTP/1.1\r\n" + b"A: b\r\n" * 50_000, 431),
        (ask(b"Content-Length: 100000001"), 413),
        (ask(b"Content-Length: 100000001", b"Expect: 100-continue"), 413),
        (
            ask(
                b"Transfer-Encoding: chunked",
                body=b"186a0\r\n" + b"x" * 100_000 + b"\r\n" + b"186a0\r\n" + b"x" * 100_000,
            ),
            413,
        ),
        (ask(b"Transfer-Encoding: chunked", body=b"1;" + b"x" * 300_000), 400),
    ],
)
def test_http1_oversized_request_gets_readable_early_error(request_bytes: bytes, status: int) -> None:
    async def scenario() -> None:
        async with rig(fine, max_body_bytes=150_000) as it:
            client = await it.client()
            with contextlib.suppress(ConnectionError):
                await client.send(request_bytes)
            got, headers, _ = await client.read_response()
            assert got == status
            assert headers["x-should-retry"] == "false"
            assert it.fleet.admitted == []

    run(scenario())


def test_http1_expect_continue() -> None:
    async def scenario() -> None:
        async with rig(fine) as it:
            client = await it.client()
            for _ in range(2):
                await client.send(ask(b"Expect: 100-continue", b"Content-Length: %d" % len(BODY)))
                assert (await client.read_head())[0] == 100
                await client.send(BODY)
                assert (await client.read_response())[0] == 200
            # A foreign origin gets its error at once instead of 100 Continue.
            await client.send(
                ask(b"Expect: 100-continue", b"Origin: http://evil.com", b"Content-Length: %d" % len(BODY))
            )
            assert (await client.read_head())[0] == 403

    run(scenario())


def test_http1_unknown_expectation_is_rejected() -> None:
    async def scenario() -> None:
        async with rig(fine) as it:
            client = await it.client()
            await client.send(ask(b"Expect: foo", b"Content-Length: %d" % len(BODY)))
            status, headers = await client.read_head()
            error = json.loads(await client.read_body(headers))["error"]
            assert (status, error["code"], headers["x-should-retry"]) == (417, "expectation_failed", "false")
            assert it.fleet.admitted == []

    run(scenario())


def test_http1_buffered_bodies_have_total_limit() -> None:
    async def scenario() -> None:
        async with rig(fine, max_buffered_bytes=300_000) as it:
            first, second = await it.client(), await it.client()
            await first.send(post(b"x" * 200_001)[:200_000])
            await until(lambda: it.gateway.stats().buffered_bytes > 150_000)
            await second.send(post(b"x" * 200_001)[:200_000])
            status, headers, _ = await second.read_response()
            assert status == 503
            assert int(headers["retry-after"]) >= 1
            first.close()
            await until(lambda: it.gateway.stats().buffered_bytes == 0)

    run(scenario())


@pytest.mark.parametrize("drip", [0, 1])
def test_http1_slow_headers_time_out(drip: int) -> None:
    async def scenario() -> None:
        async with rig(fine, head_timeout_s=0.2) as it:
            client = await it.client()
            await client.send(b"GET /health HTTP/1.1\r\nX: ")
            reading = asyncio.ensure_future(client.closed())
            while not reading.done():
                try:
                    await client.send(b"a" * drip)
                except ConnectionError:
                    break
                await asyncio.sleep(0.02)
            assert b" 408 " in await reading

    run(scenario())


def test_http1_silent_connection_is_closed() -> None:
    async def scenario() -> None:
        async with rig(fine, head_timeout_s=0.1, keepalive_timeout_s=0.1) as it:
            silent = await it.client()
            assert await silent.closed() == b""
            kept = await it.client()
            await kept.send(get("/health"))
            assert (await kept.read_response())[0] == 200
            assert await kept.closed() == b""

    run(scenario())


def test_http1_stopped_body_times_out_slow_body_does_not() -> None:
    async def scenario() -> None:
        async with rig(fine, body_idle_timeout_s=0.4) as it:
            stopped, dripping = await it.client(), await it.client()
            await stopped.send(post(CHAT)[:-1])
            data = post(CHAT)
            await dripping.send(data[:-40])
            for at in range(len(data) - 40, len(data)):
                await dripping.send(data[at : at + 1])
                await asyncio.sleep(0.02)
            assert (await dripping.read_response())[0] == 200
            assert b" 408 " in await stopped.closed()

    run(scenario())


def test_http1_request_in_single_bytes_is_answered() -> None:
    async def scenario() -> None:
        async with rig(fine) as it:
            client = await it.client()
            client.writer.get_extra_info("socket").setsockopt(6, 1, 1)  # TCP_NODELAY
            data = post(CHAT) + get("/health")
            for at in range(len(data)):
                await client.send(data[at : at + 1])
                await asyncio.sleep(0)
            assert (await client.read_response())[2] == b'{"fine":true}'
            assert (await client.read_response())[2] == b'{"status":"ok"}'
            assert it.engines[0].requests[0].json == CHAT

    run(scenario())


def test_http1_pipelined_requests_are_answered_in_order() -> None:
    async def scenario() -> None:
        async def script(request: EngineRequest) -> None:
            await asyncio.sleep(random.random() * 0.01)
            await request.answer(json.dumps({"n": request.json["n"]}).encode())

        async with rig(script, max_pipelined=4) as it:
            client = await it.client()
            sending = asyncio.ensure_future(client.send(b"".join(post({"model": "m", "n": n}) for n in range(50))))
            for n in range(50):
                assert json.loads((await client.read_response())[2]) == {"n": n}
            await sending
            await client.send(get("/health") * 3000)
            for _ in range(3000):
                assert (await client.read_response())[0] == 200

    run(scenario())


def test_http1_bad_pipelined_request_is_answered_last() -> None:
    async def scenario() -> None:
        async with rig(fine) as it:
            client = await it.client()
            await client.send(post(CHAT) + get("/health") + b"nonsense\r\n\r\n" + get("/health"))
            assert [(await client.read_response())[0] for _ in range(3)] == [200, 200, 400]
            assert await client.closed() == b""

    run(scenario())


def test_listener_connection_over_limit_replaces_idle_one() -> None:
    async def scenario() -> None:
        async def script(request: EngineRequest) -> None:
            await request.start_stream()
            await request.gone()

        async with rig(script, max_connections=8) as it:
            idle = [await it.client() for _ in range(8)]
            await until(lambda: it.gateway.stats().connections == 8)
            busy: list[Client] = []
            for _ in range(8):
                client = await it.client()
                await client.send(post(STREAM))
                assert (await client.read_head())[0] == 200
                busy.append(client)
            for client in idle:
                assert await client.closed() == b""
            late = await it.client()
            status, headers, _ = await late.read_response()
            assert (status, headers["connection"]) == (503, "close")
            assert it.gateway.stats().refused_connections == 1

    run(scenario())


def test_listener_five_thousand_idle_connections_leave_room() -> None:
    import resource

    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    count = min(5000, (soft - 600) // 4)  # both ends are in this process

    async def scenario() -> None:
        async with rig(fine, head_timeout_s=60.0) as it:
            loop = asyncio.get_running_loop()
            idle = []
            for _ in range(count):
                idle.append((await loop.create_connection(asyncio.Protocol, "127.0.0.1", it.port))[0])
            await until(lambda: it.gateway.stats().connections >= min(count, 3900))
            client = await it.client()
            began = loop.time()
            for _ in range(50):
                assert (await client.ask(CHAT))[0] == 200
            assert loop.time() - began < 5
            for transport in idle:
                transport.abort()
            await until(lambda: it.gateway.stats().connections == 1)

    run(scenario())


def test_http1_random_input_never_breaks_gateway() -> None:
    rng = random.Random(11)
    base = [post(CHAT), get("/v1/models"), *SMUGGLING.values()]

    def mutated() -> bytes:
        data = bytearray(rng.choice(base) * rng.randint(1, 3))
        for _ in range(rng.randint(1, 8)):
            at = rng.randrange(len(data))
            kind = rng.randrange(3)
            if kind == 0:
                data[at] = rng.randrange(256)
            elif kind == 1:
                del data[at : at + rng.randint(1, 20)]
            else:
                data[at:at] = rng.randbytes(rng.randint(1, 20))
            data = data or bytearray(b"x")
        return bytes(data)

    async def scenario() -> None:
        async with rig(fine) as it:
            for _ in range(400):
                client = await it.client()
                try:
                    await client.send(mutated())
                    client.writer.write_eof()
                    answer = await client.closed()
                except ConnectionError:
                    continue
                assert b" 500 " not in answer
                client.close()
            client = await it.client()
            assert (await client.ask(CHAT))[0] == 200

    run(scenario())
