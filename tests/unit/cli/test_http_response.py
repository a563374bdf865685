"""A response is parsed alike however the network cuts it, and one that is cut short is an error."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fleetd.cli.http_response import InvalidResponse, Response, ResponseError, send

LIMIT = 1 << 20
BODIES = st.binary(max_size=200)
CUTS = st.lists(st.integers(1, 40), max_size=12)


@contextmanager
def served(parts: Sequence[bytes]) -> Iterator[socket.socket]:
    """Yield a connection whose other side sends `parts` and closes."""
    ours, theirs = socket.socketpair()
    ours.settimeout(5)

    def serve() -> None:
        with theirs:
            theirs.recv(65536)
            for part in parts:
                theirs.sendall(part)

    thread = threading.Thread(target=serve)
    thread.start()
    with ours:
        yield ours
    thread.join(5)


def with_length(body: bytes) -> bytes:
    return b"HTTP/1.1 200 OK\r\nContent-Type: text/plain; charset=x\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)


def chunked(body: bytes) -> bytes:
    parts = [b"%x\r\n%b\r\n" % (len(part), part) for part in (body[:7], body[7:]) if part]
    return b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + b"".join(parts) + b"0\r\n\r\n"


def pieces(raw: bytes, cuts: Sequence[int]) -> list[bytes]:
    found = []
    for size in cuts:
        found.append(raw[:size])
        raw = raw[size:]
    return [part for part in (*found, raw) if part]


def answer(connection: socket.socket) -> Response:
    send(connection, "GET", "/", {"Host": "fleetd"})
    return Response.read(connection)


@settings(max_examples=40, deadline=None)
@given(BODIES, CUTS)
def test_body_is_the_same_for_every_cut(body: bytes, cuts: list[int]) -> None:
    for raw in (with_length(body), chunked(body)):
        with served(pieces(raw, cuts)) as connection:
            response = answer(connection)
            assert (response.status, response.body(LIMIT, time.monotonic() + 5, 5)) == (200, body)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.binary(max_size=20).filter(lambda line: not set(line) & {10, 13}), max_size=5), CUTS)
def test_lines_are_the_same_for_every_cut(lines: list[bytes], cuts: list[int]) -> None:
    body = b"".join(line + b"\r\n" for line in lines)
    with served(pieces(chunked(body), cuts)) as connection:
        assert list(answer(connection).lines(LIMIT)) == lines


@pytest.mark.parametrize("raw", [with_length(b"0123456789"), chunked(b"0123456789")], ids=["length", "chunked"])
def test_body_cut_anywhere_raises(raw: bytes) -> None:
    for size in range(len(raw)):
        with served(pieces(raw[:size], [])) as connection, pytest.raises(ResponseError):
            answer(connection).body(LIMIT, time.monotonic() + 5, 5)


def test_interim_response_is_skipped() -> None:
    with served([b"HTTP/1.1 102 Processing\r\n\r\n" + with_length(b"x")]) as connection:
        response = answer(connection)
        assert (response.status, response.content_type, response.body(LIMIT, time.monotonic() + 5, 5)) == (
            200,
            "text/plain",
            b"x",
        )


@pytest.mark.parametrize("raw", [b"SSH-2.0-x\r\n", b"\x00\x01", b"HTTP/1.1 200 OK\r\n" + b"a: b\r\n" * 20_000])
def test_other_protocol_raises_invalid_response(raw: bytes) -> None:
    with served([raw]) as connection, pytest.raises(InvalidResponse):
        answer(connection)


def test_body_above_the_limit_raises() -> None:
    with served([with_length(b"x" * 5000)]) as connection, pytest.raises(ResponseError, match="too large"):
        answer(connection).body(100, time.monotonic() + 5, 5)


def test_line_above_the_limit_raises() -> None:
    with served([chunked(b"x" * 5000)]) as connection, pytest.raises(ResponseError, match="too long"):
        list(answer(connection).lines(100))


def test_body_after_the_deadline_raises_timeout_error() -> None:
    with served([with_length(b"x")]) as connection:
        response = answer(connection)
        response._complete = False
        with pytest.raises(TimeoutError):
            response.body(LIMIT, time.monotonic() - 1, 5)


def test_body_that_pauses_too_long_raises_timeout_error() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(with_length(b"xy")[:-1])
        began = time.monotonic()
        with pytest.raises(TimeoutError):
            answer(ours).body(LIMIT, began + 60, 0.05)
        assert time.monotonic() - began < 30
