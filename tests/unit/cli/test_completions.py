"""Streams of chat completions: answers, usage, errors before and inside the stream, and cut connections."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from fleetd.cli.client import EXIT_FAILED, EXIT_TIMEOUT, EXIT_UNKNOWN, EXIT_UNREACHABLE, CliError
from fleetd.cli.completions import Stats, error_of, split_address, stream

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n"


@contextmanager
def gateway(answer: bytes) -> Iterator[str]:
    """Answer one request with these bytes; yield the address."""
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        connection, _ = listener.accept()
        with connection, connection.makefile("rb") as reader:
            length = 0
            while (line := reader.readline()).strip():
                if line.lower().startswith(b"content-length:"):
                    length = int(line.split(b":")[1])
            reader.read(length)  # closing with unread bytes would reset the connection
            connection.sendall(answer)

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        yield f"127.0.0.1:{listener.getsockname()[1]}"
    finally:
        listener.close()
        thread.join(5)


def chunks(*data: str) -> bytes:
    return HEAD + b"".join(b"data: %b\n\n" % line.encode() for line in data)


def test_stream_yields_thoughts_and_text_and_counts_tokens() -> None:
    answer = chunks(
        '{"choices":[{"delta":{"role":"assistant"}}]}',
        '{"choices":[{"delta":{"reasoning_content":"hm"}}]}',
        '{"choices":[{"delta":{"content":"He"}}]}',
        '{"choices":[{"delta":{"content":"llo"},"finish_reason":"length"}]}',
        '{"choices":[],"usage":{"completion_tokens":7}}',
        "[DONE]",
    )
    stats = Stats()
    with gateway(answer) as address:
        assert list(stream(address, {}, stats)) == [("reasoning", "hm"), ("content", "He"), ("content", "llo")]
    assert stats.tokens == 7
    assert "7 tokens, " in stats.text
    assert stats.text.endswith("cut at the token limit")


@pytest.mark.parametrize(
    ("answer", "words", "hint", "code"),
    [
        (
            b'HTTP/1.1 503 S\r\nConnection: close\r\n\r\n{"error":{"message":"m failed","code":"model_failed","hint":"fleetctl logs m"}}',
            "m failed",
            "fleetctl logs m",
            EXIT_FAILED,
        ),
        (chunks('{"error":{"message":"out of context"}}'), "out of context", None, EXIT_FAILED),
        (chunks('{"choices":[{"delta":{"content":"He"}}]}'), "cut off", None, EXIT_UNREACHABLE),
        (chunks("{"), "not JSON", None, EXIT_UNREACHABLE),
        (chunks("[1]"), "not a stream", None, EXIT_UNREACHABLE),
        (b"", "was lost", None, EXIT_UNREACHABLE),
        (b"\x00\x01\r\n\r\n", "was lost", None, EXIT_UNREACHABLE),
    ],
)
def test_stream_failure_is_one_sentence(answer: bytes, words: str, hint: str | None, code: int) -> None:
    with gateway(answer) as address, pytest.raises(CliError) as caught:
        list(stream(address, {}, Stats()))
    assert words in str(caught.value)
    assert (caught.value.hint, caught.value.exit_code) == (hint, code)


@pytest.mark.parametrize(
    ("status", "content", "message", "code"),
    [
        (404, b'{"error":{"message":"no such model"}}', "no such model", EXIT_UNKNOWN),
        (504, b'{"error":"slow"}', "slow", EXIT_TIMEOUT),
        (500, b"<html>", "the engine answered 500: <html>", EXIT_FAILED),
    ],
)
def test_error_of_any_body_is_readable(status: int, content: bytes, message: str, code: int) -> None:
    found = error_of(status, content)
    assert (str(found), found.exit_code) == (message, code)


@pytest.mark.parametrize(
    ("gateway_", "expected"),
    [
        ("127.0.0.1:8080", ("127.0.0.1", 8080)),
        ("0.0.0.0:1", ("127.0.0.1", 1)),
        ("[::]:8080", ("::1", 8080)),
        ("[fe80::1]:9", ("fe80::1", 9)),
    ],
)
def test_address_of_wildcard_is_loopback(gateway_: str, expected: tuple[str, int]) -> None:
    assert split_address(gateway_) == expected


def test_stats_without_tokens_say_so() -> None:
    assert Stats().text == "no tokens"
