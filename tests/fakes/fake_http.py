"""A small threaded HTTP/1.1 server for the fake engines: standard library only, imported in milliseconds.

Invariants:
- One thread per connection, keep-alive, bodies by Content-Length or chunked. This module knows no engine.
- An `Exchange` is one request and the ways to answer it, correctly (`send`, `begin`/`chunk`/`end`) or not (`reset`,
  `garbage`, `hang`).
"""

from __future__ import annotations

import _thread
import json
import select
import socket
import struct
import time
from collections.abc import Callable
from typing import Any

REASONS = {
    200: "OK",
    201: "Created",
    400: "Bad Request",
    401: "Unauthorized",
    404: "Not Found",
    405: "Method Not Allowed",
}
REASONS |= {499: "Client Closed Request", 500: "Internal Server Error", 503: "Service Unavailable"}
MAX_BODY_BYTES = 1 << 30


class Gone(Exception):
    """The client left."""


class Reader:
    """Buffered reading from a socket."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock, self.buffer = sock, b""

    def until(self, mark: bytes, limit: int = 65536) -> bytes:
        while mark not in self.buffer:
            data = self.sock.recv(65536)
            if not data or len(self.buffer) > limit:
                raise Gone
            self.buffer += data
        head, self.buffer = self.buffer.split(mark, 1)
        return head

    def exactly(self, count: int) -> bytes:
        parts, have = [self.buffer[:count]], len(self.buffer[:count])
        self.buffer = self.buffer[count:]
        while have < count:
            data = self.sock.recv(min(1 << 20, count - have))
            if not data:
                raise Gone
            parts.append(data)
            have += len(data)
        return b"".join(parts)


class Exchange:
    """One request. `path` has no query; header names are lower case."""

    def __init__(self, sock: socket.socket, method: str, target: str, headers: dict[str, str], body: bytes) -> None:
        self.sock, self.method, self.headers, self.body = sock, method, headers, body
        self.path, _, query = target.partition("?")
        self.query: dict[str, list[str]] = {}
        for pair in filter(None, query.split("&")):
            key, _, value = pair.partition("=")
            self.query.setdefault(key, []).append(value)
        self.begun = False

    def json(self) -> dict[str, Any]:
        """Return the body as an object; ValueError otherwise."""
        value = json.loads(self.body)
        if not isinstance(value, dict):
            raise ValueError("not an object")
        return value

    def write(self, data: bytes) -> None:
        try:
            self.sock.sendall(data)
        except OSError:
            raise Gone from None

    def _head(self, status: int, ctype: str, extra: str) -> bytes:
        reason = REASONS.get(status, "Status")
        return f"HTTP/1.1 {status} {reason}\r\nContent-Type: {ctype}\r\nServer: fake\r\n{extra}\r\n".encode()

    def send(self, status: int, payload: Any = None, ctype: str = "") -> None:
        """Answer whole: a dict or list becomes JSON, text and bytes go as they are, None is an empty body."""
        if payload is None:
            body, ctype = b"", ctype or "text/plain"
        elif isinstance(payload, (dict, list)):
            body, ctype = json.dumps(payload).encode(), ctype or "application/json"
        else:
            body, ctype = payload.encode() if isinstance(payload, str) else payload, ctype or "text/plain"
        head = self._head(status, ctype, f"Content-Length: {len(body)}\r\n")
        self.begun = True
        self.write(head if self.method == "HEAD" else head + body)

    def begin(self, ctype: str, status: int = 200) -> None:
        self.begun = True
        self.write(self._head(status, ctype, "Transfer-Encoding: chunked\r\n"))

    def chunk(self, data: bytes) -> None:
        self.write(b"%x\r\n%s\r\n" % (len(data), data))

    def end(self) -> None:
        self.write(b"0\r\n\r\n")

    def client_gone(self) -> bool:
        """Return True once the client has closed, without reading what it may have sent."""
        try:
            if not select.select([self.sock], [], [], 0)[0]:
                return False
            return self.sock.recv(1, socket.MSG_PEEK) == b""
        except (OSError, ValueError):
            return True

    def wait(self, seconds: float) -> None:
        """Wait, noticing a client that leaves. Raises Gone."""
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            if self.client_gone():
                raise Gone
            time.sleep(min(0.01, left))

    def hang(self) -> None:
        """Never answer, for as long as the client stays."""
        while not self.client_gone():
            time.sleep(0.02)
        raise Gone

    def garbage(self) -> None:
        self.write(b"\x16\x03\x01\x02not http at all\r\n\x00\xff\r\n\r\n")
        raise Gone

    def reset(self) -> None:
        """End the connection with a TCP RST."""
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        raise Gone


def read_exchange(sock: socket.socket, reader: Reader) -> Exchange:
    lines = reader.until(b"\r\n\r\n").decode("latin-1").split("\r\n")
    method, target, _ = lines[0].split(" ", 2)
    headers = {}
    for line in lines[1:]:
        name, _, value = line.partition(":")
        headers[name.strip().lower()] = value.strip()
    if headers.get("expect", "").lower() == "100-continue":
        sock.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
    body = b""
    if "chunked" in headers.get("transfer-encoding", ""):
        while size := int(reader.until(b"\r\n").split(b";")[0], 16):
            body += reader.exactly(size)
            reader.until(b"\r\n")
        reader.until(b"\r\n")
    elif length := int(headers.get("content-length", "0")):
        if length > MAX_BODY_BYTES:
            raise Gone
        body = reader.exactly(length)
    return Exchange(sock, method, target, headers, body)


def serve_connection(sock: socket.socket, handle: Callable[[Exchange], None]) -> None:
    reader = Reader(sock)
    try:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        while True:
            exchange = read_exchange(sock, reader)
            handle(exchange)
            if exchange.headers.get("connection", "").lower() == "close":
                return
    except (Gone, OSError, ValueError):
        return
    finally:
        sock.close()


def bind(host: str, port: int) -> socket.socket:
    """Bind without listening: connections are refused until `listen`."""
    sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.bind((host, port))
    return sock


def serve(listener: socket.socket, handle: Callable[[Exchange], None]) -> None:
    """Accept for ever, on the calling thread. `listener` must be listening."""
    while True:
        sock, _ = listener.accept()
        _thread.start_new_thread(serve_connection, (sock, handle))
