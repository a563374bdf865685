"""What is outside fleetd and not as fleet.yaml says: servers that are unreachable, refuse our key, are too old or answer in
another shape, and files that are not there. Said in `status` and in the error of a request, with the key of fleet.yaml."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tests.daemon.rig import fake, fleetd, free_port, until


@contextmanager
def answering(status: int, body: object) -> Iterator[int]:
    """Yield the port of a server that gives one answer to everything."""
    data = json.dumps(body).encode()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.send_header("Connection", "close")
            self.end_headers()
            self.wfile.write(data)

        do_POST = do_GET  # noqa: N815

        def log_message(self, *_: object) -> None:
            return

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield server.server_address[1]
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def fleet(port: int, engine: str = "ollama") -> str:
    entry = f"{{engine: {engine}, external: 'http://127.0.0.1:{port}'}}"
    return f"instances: {{away: {entry}}}\nmodels: {{m: {{instance: [away], queue: {{timeout: 1s}}}}}}\n"


def test_an_unreachable_server_is_waited_for_and_said(tmp_path: Path) -> None:
    port = free_port()
    with fleetd(tmp_path, fleet(port)).start() as daemon:
        until(lambda: "connection refused" in daemon.process_row("away")["reason"], "it says why")
        assert f"waiting for it: connection refused on port {port}" in daemon.process_row("away")["reason"]
        assert daemon.chat("m").status in (503, 504)


def test_a_wrong_key_is_said_with_its_place(tmp_path: Path) -> None:
    with answering(401, {"error": "no such key"}) as port, fleetd(tmp_path, fleet(port)).start() as daemon:
        until(lambda: "401" in daemon.process_row("away")["reason"], "it says why")
        assert "instances.away.options.api_key" in daemon.process_row("away")["reason"]


@pytest.mark.parametrize("body", [["hello"], {"models": "none"}, {"models": [1, None, {"name": 3}]}])
def test_answers_of_another_shape_are_an_error_and_no_crash(tmp_path: Path, body: object) -> None:
    with answering(200, body) as port, fleetd(tmp_path, fleet(port)).start() as daemon:
        daemon.until_state("away", "READY")
        answer = daemon.chat("m")
        assert answer.status >= 400, answer.body
        assert "Traceback" not in daemon.log()
        assert "unexpected failure" not in daemon.log()
        assert daemon.get("/health").status == 200


def test_a_file_that_is_not_there_is_said_with_the_key_that_names_it(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(b"")
    fleet = f"""
        models:
          m:
            engine: llamacpp
            command: {fake(api="llamacpp")}
            options: {{model: ./m.gguf, mmproj: ./projector.gguf}}
            queue: {{timeout: 1s}}
    """
    where = f"models.m.options.mmproj: {tmp_path / 'projector.gguf'}"
    with fleetd(tmp_path, fleet).start() as daemon:
        blocked = daemon.until_state("m", "BLOCKED")
        assert f"requires {where}" in blocked["reason"]
        answer = daemon.chat("m")
        assert answer.status == 503
        assert where in answer.json["error"]["message"]
        assert daemon.control("GET", "/v1/processes/m").json["requires"][str(tmp_path / "projector.gguf")] is False
        (tmp_path / "projector.gguf").write_bytes(b"")
        daemon.until_state("m", "STOPPED", "STARTING", "READY")
