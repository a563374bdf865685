"""No daemon, the wrong one, a broken one, a silent one: always a sentence and exit code 5."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest

from fleetd.cli.client import BEFORE_HEADER, Client, StreamCut, Unreachable, socket_candidates
from tests.support.cli import fleetctl, raw_server

VERBS = [
    ["status"],
    ["status", "web"],
    ["status", "-o", "json"],
    ["ps"],
    ["start", "web"],
    ["stop", "all"],
    ["load", "m"],
    ["pin", "m"],
    ["logs", "web"],
    ["logs", "web", "-f"],
    ["events"],
    ["events", "-f"],
    ["story", "web"],
    ["explain", "m"],
    ["dump"],
    ["diff"],
    ["apply", "-y"],
    ["reload"],
    ["signal", "HUP", "web"],
    ["daemon-reexec"],
    ["shutdown"],
    ["pm2-jlist"],
]


@pytest.mark.parametrize("verb", VERBS, ids=lambda value: " ".join(value))
def test_no_daemon(short: Path, verb: list[str]) -> None:
    path = short / "fleetd.sock"
    ran = fleetctl("--socket", str(path), *verb)
    assert (ran.code, ran.out) == (5, "")
    assert len(ran.err.splitlines()) == 1
    assert str(path) in ran.err
    assert "fleetd run" in ran.err


def test_default_sockets_are_named(short: Path) -> None:
    err = fleetctl("status", HOME=str(short)).err
    assert f"{short}/.fleetd/run/fleetd.sock or /run/fleetd/fleetd.sock" in err


def test_where_the_socket_is_looked_for() -> None:
    env = {"HOME": "/h", "FLEETD_SOCKET": "/e"}
    assert socket_candidates("/given", env) == [Path("/given")]
    assert socket_candidates(None, env) == [Path("/e")]
    assert socket_candidates(None, {"HOME": "/h"})[0] == Path("/h/.fleetd/run/fleetd.sock")
    assert socket_candidates(None, {}) == [Path("/run/fleetd/fleetd.sock")]


def test_version_and_completion_need_no_daemon(short: Path) -> None:
    path = str(short / "fleetd.sock")
    ran = fleetctl("--socket", path, "version")
    assert (ran.code, "not running" in ran.out) == (0, True)
    assert fleetctl("--socket", path, "completion", "bash").code == 0


def test_socket_path_invalid_or_too_long_is_an_error(short: Path) -> None:
    file = short / "file"
    file.write_text("")
    for path in (str(file), str(short), "/" + "x" * 300):
        ran = fleetctl("--socket", path, "status")
        assert (ran.code, len(ran.err.splitlines())) == (5, 1)


def test_socket_without_permission_is_an_error(short: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(socket.socket, "connect", denied)
    with pytest.raises(Unreachable, match="permission denied for the socket"):
        Client([short / "fleetd.sock"]).connect()


def answering(raw: bytes) -> Callable[[socket.socket], None]:
    def answer(connection: socket.socket) -> None:
        connection.settimeout(5)
        connection.recv(65536)
        connection.sendall(raw)

    return answer


def http(body: bytes, status: str = "200 OK", kind: str = "application/json", length: int | None = None) -> bytes:
    head = f"HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {len(body) if length is None else length}\r\n\r\n"
    return head.encode() + body


GARBAGE = {
    "nothing": b"",
    "noise": b"\x00\xff\xfe SSH-2.0-OpenSSH\r\n\r\n",
    "half a head": b"HTTP/1.1 200 OK\r\nContent-",
    "a page": http(b"<html></html>", kind="text/html"),
    "not an object": http(b"[]"),
    "no schema": http(b'{"name": "x"}'),
    "a later schema": http(b'{"schema": "fleetctl/v2"}'),
    "half a body": http(b'{"schema": "fleetctl/v1"', length=1000),
    "a bad length": b"HTTP/1.1 200 OK\r\nContent-Length: many\r\n\r\n{}",
    "a bad chunk": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzzz\r\n",
    "a deep document": http(b"[" * 200_000),
    "endless headers": b"HTTP/1.1 200 OK\r\n" + b"A: b\r\n" * 1000 + b"\r\n",
}


@pytest.mark.parametrize("raw", GARBAGE.values(), ids=GARBAGE.keys())
def test_garbage(short: Path, raw: bytes) -> None:
    with raw_server(short / "s", answering(raw)) as path:
        for verb in (["status"], ["events"]):
            ran = fleetctl("--socket", str(path), *verb)
            assert (ran.code, ran.out) == (5, ""), ran
            assert ran.err.count("\n") == 1


@pytest.mark.parametrize(
    "verb", [["status"], ["ps"], ["start", "x"], ["story", "x"], ["diff"], ["explain", "x"], ["reload"]]
)
def test_document_without_keys_is_an_error(short: Path, verb: list[str]) -> None:
    with raw_server(short / "s", answering(http(b'{"schema": "fleetctl/v1"}'))) as path:
        ran = fleetctl("--socket", str(path), *verb)
        assert ran.code in (0, 1)
        assert len(ran.err.splitlines()) <= 2


def test_error_page_without_a_message_is_an_error(short: Path) -> None:
    body = json.dumps({"schema": "fleetctl/v1", "error": "strange"}).encode()
    with raw_server(short / "s", answering(http(body, "500 Oops"))) as path:
        ran = fleetctl("--socket", str(path), "status")
        assert (ran.code, ran.err) == (1, "fleetctl: the daemon answered 500\n")


def test_names_cannot_steer_the_terminal(short: Path) -> None:
    row = {"name": "\x1b]0;evil\x07\x1b[2Jx\r\n", "state": "READY", "reason": "\u202e"}
    body = json.dumps({"schema": "fleetctl/v1", "processes": [row], "models": []}).encode()
    with raw_server(short / "s", answering(http(body))) as path:
        ran = fleetctl("--socket", str(path), "status", "-o", "wide")
        assert ran.code == 0
        assert not any(character in ran.out for character in "\x1b\x07\r\u202e")


def test_hanging_server_is_a_timeout(short: Path) -> None:
    def hang(connection: socket.socket) -> None:
        connection.settimeout(5)
        while connection.recv(65536):
            pass

    with raw_server(short / "s", hang) as path:
        client = Client([path], answer_s=0.2)
        started = time.monotonic()
        with pytest.raises(Unreachable, match=r"did not respond within 0\.2 s"):
            client.get("/v1/status")
        with pytest.raises(StreamCut, match="stopped responding"):
            list(client.stream("/v1/events"))
        assert time.monotonic() - started < 4


def test_order_expires_before_the_client_gives_up(short: Path) -> None:
    path = short / "fleetd.sock"
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(os.fspath(path))
        listener.listen(0)  # the client's question whether it still answers fails at once
        with pytest.raises(Unreachable, match="does not answer"):
            Client([path]).post("/v1/shutdown", {"force": False})
        gave_up_s = time.monotonic()
        connection, _ = listener.accept()
        with connection:
            head = connection.recv(65536).decode().split("\r\n")
    before_s = next(line.split(": ")[1] for line in head if line.startswith(BEFORE_HEADER))
    assert float(before_s) <= gave_up_s < float(before_s) + 5


def test_dripping_server_is_a_timeout(short: Path) -> None:
    def drip(connection: socket.socket) -> None:
        connection.recv(65536)
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n")
        while True:
            connection.sendall(b" ")
            time.sleep(0.02)

    with raw_server(short / "s", drip) as path, pytest.raises(Unreachable, match="did not respond"):
        Client([path], answer_s=0.3).get("/v1/status")


STREAM = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n"
EVENT = (
    b'id: 1\nevent: event\ndata: {"schema": "fleetctl/v1", "seq": 1, "at": "x", "event": "spawn", "name": "web"}\n\n'
)


def test_cut_stream_is_an_error(short: Path) -> None:
    with raw_server(short / "s", answering(STREAM + EVENT)) as path:
        ran = fleetctl("--socket", str(path), "events", "-f")
        assert ran.code == 5
        assert "spawn" in ran.out
        assert "connection to fleetd lost" in ran.err


@pytest.mark.parametrize(
    ("tail", "code"),
    [
        (b"event: end\ndata: {}\n\n", 0),
        (b"data: nonsense\n\n", 5),
        (b'event: error\ndata: {"error": {"code": "unknown_name", "message": "gone"}}\n\n', 4),
        (b": ping\n\n: ping\n\nevent: end\ndata: {}\n\n", 0),
    ],
)
def test_ends_of_streams(short: Path, tail: bytes, code: int) -> None:
    with raw_server(short / "s", answering(STREAM + EVENT + tail)) as path:
        ran = fleetctl("--socket", str(path), "events")
        assert ran.code == code
        assert "spawn" in ran.out


def test_client_waits_for_a_reexecuting_daemon(short: Path) -> None:
    """fleetctl waits for a daemon that holds its lock, and not for one with a free lock."""
    path = short / "fleetd.sock"
    answer = answering(http(b'{"schema": "fleetctl/v1", "processes": [], "models": []}'))
    with path.with_name("fleetd.lock").open("w") as lock:
        lock.write(f"{os.getpid()}\n")
        lock.flush()
        fcntl.flock(lock, fcntl.LOCK_EX)
        server = threading.Timer(0.4, lambda: stack.enter_context(raw_server(path, answer)))
        with ExitStack() as stack:
            server.start()
            assert Client([path]).get("/v1/status")["processes"] == []
            server.join()
        path.unlink(missing_ok=True)
        began = time.monotonic()
        with pytest.raises(Unreachable, match="not running"):
            Client([path]).connect()
        assert 4 < time.monotonic() - began < 20
    began = time.monotonic()
    with pytest.raises(Unreachable, match="not running"):
        Client([path]).connect()
    assert time.monotonic() - began < 1


def test_request_is_repeated_after_a_reexec_hang_up(short: Path) -> None:
    answers = iter([b"", http(b'{"schema": "fleetctl/v1", "n": 2}')])
    with raw_server(short / "fleetd.sock", lambda connection: answering(next(answers))(connection)) as path:
        with path.with_name("fleetd.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            assert Client([path]).get("/v1/status")["n"] == 2
            answers = iter([b"", http(b'{"schema": "fleetctl/v1", "n": 3}')])
            with pytest.raises(Unreachable, match="hung up"):
                Client([path]).post("/v1/reload")
