"""Servers and files that are not as fleet.yaml says: unreachable, wrong key, too old, another answer shape, missing.

`status` and the error of a request report each with its key of fleet.yaml."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tests.support.daemon import fake, fleetd
from tests.support.ports import free_port
from tests.support.waiting import until


@contextmanager
def answering(status: int, body: object) -> Iterator[int]:
    """Yield the port of a server with one answer, which `answering.now` changes."""
    data = json.dumps(body).encode()
    answering.now = None  # type: ignore[attr-defined]

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            status_now, data_now = answering.now or (status, data)  # type: ignore[attr-defined]
            self.send_response(status_now)
            self.send_header("Content-Length", str(len(data_now)))
            self.send_header("Connection", "close")
            self.end_headers()
            self.wfile.write(data_now)

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


def test_unreachable_server_is_awaited_and_reported(tmp_path: Path) -> None:
    port = free_port()
    with fleetd(tmp_path, fleet(port)).start() as daemon:
        until(lambda: "waiting for it" in daemon.process_row("away")["reason"], "the reason is shown")
        assert f"127.0.0.1:{port}" in daemon.process_row("away")["reason"]
        answer = daemon.chat("m")
        assert answer.status in (503, 504)
        assert f"127.0.0.1:{port}" in answer.json["error"]["message"]


@pytest.mark.parametrize("status", [401, 403])
@pytest.mark.parametrize("engine", ["external", "ollama", "lmstudio"])
def test_wrong_api_key_is_reported_with_its_place(engine: str, status: int, tmp_path: Path) -> None:
    reason = f"HTTP {status}: no such key (instances.away.options.api_key)"
    with answering(status, {"error": "no such key"}) as port, fleetd(tmp_path, fleet(port, engine)).start() as daemon:
        until(lambda: reason in daemon.process_row("away")["reason"], "the reason is shown")
        assert f"http://127.0.0.1:{port}/" in daemon.process_row("away")["reason"]
        answer = daemon.chat("m")
        assert answer.status in (503, 504)
        assert reason in answer.json["error"]["message"]


def test_api_key_that_turns_wrong_is_reported(tmp_path: Path) -> None:
    """The key was right at the start; the readiness probe detects the change."""
    good = {"data": [{"id": "m"}]}
    probes = "probes: {readiness: {http: /v1/models, period: 50ms, failures: 1}}"
    with answering(200, good) as port:
        text = fleet(port, "external").replace("{engine: external", f"{{engine: external, {probes}")
        with fleetd(tmp_path, text).start() as daemon:
            daemon.until_state("away", "READY")
            answering.now = (401, b'{"error": "expired"}')  # type: ignore[attr-defined]
            try:
                reason = daemon.until_state("away", "UNHEALTHY")["reason"]
            finally:
                answering.now = None  # type: ignore[attr-defined]
    assert "401" in reason
    assert "(instances.away.options.api_key)" in reason


def test_https_address_is_probed_by_tls(tmp_path: Path) -> None:
    with answering(200, {"version": "0.33.0", "models": []}) as port:
        plain = fleet(port)
        probes = "probes: {startup: {http: /api/version, period: 50ms}}"
        text = plain.replace("http://", "https://").replace("{engine: ollama", f"{{engine: ollama, {probes}")
        with fleetd(tmp_path, text).start() as daemon:
            until(lambda: "waiting for it: " in daemon.process_row("away")["reason"], "the reason is shown")
            reason = daemon.process_row("away")["reason"].lower()
            assert "ssl" in reason or "tls" in reason or "record" in reason or "version" in reason, reason
            assert daemon.process_row("away")["state"] == "STARTING"


def test_own_server_too_old_fails_with_both_versions(tmp_path: Path) -> None:
    text = f"instances: {{o: {{engine: ollama, command: {fake('--version', '0.1.48', api='ollama')}}}}}\n"
    with fleetd(tmp_path, text).start() as daemon:
        failed = daemon.until_state("o", "FAILED")
        assert "reports Ollama 0.1.48; fleetd needs 0.5.5 or newer (instances.o.command)" in failed["reason"]
        assert failed["restarts"] == 0


def test_external_server_too_old_is_awaited(tmp_path: Path) -> None:
    with answering(200, {"version": "0.1.48", "models": []}) as port, fleetd(tmp_path, fleet(port)).start() as daemon:
        reason = "reports Ollama 0.1.48; fleetd needs 0.5.5 or newer (instances.away.external)"
        until(lambda: reason in daemon.process_row("away")["reason"], "the reason is shown")
        assert reason in daemon.chat("m").json["error"]["message"]


@pytest.mark.parametrize("body", [["hello"], {"models": "none"}, {"models": [1, None, {"name": 3}]}])
def test_answer_of_another_shape_is_an_error(tmp_path: Path, body: object) -> None:
    with answering(200, body) as port, fleetd(tmp_path, fleet(port)).start() as daemon:
        reason = f"http://127.0.0.1:{port}/api/ps did not answer with a"
        until(lambda: reason in daemon.process_row("away")["reason"], "the reason is shown")
        answer = daemon.chat("m")
        assert answer.status in (503, 504), answer.body
        assert reason in answer.json["error"]["message"]
        assert "Traceback" not in daemon.log()
        assert "unexpected failure" not in daemon.log()
        assert daemon.get("/health").status == 200


@pytest.mark.parametrize(
    "body", [b"<html>hello</html>", b'{"models": [{"name": "m", "size": "big"}]}', b"x" * 9_000_000]
)
def test_server_changing_its_answers_fails_only_its_loads(tmp_path: Path, body: bytes) -> None:
    with answering(200, {"version": "0.33.0", "models": [], "done": True}) as port:
        with fleetd(tmp_path, fleet(port)).start() as daemon:
            daemon.until_state("away", "READY")
            answering.now = (200, body)  # type: ignore[attr-defined]
            answer = daemon.chat("m")
            assert answer.status >= 500, answer.body
            assert f"http://127.0.0.1:{port}/api/" in answer.json["error"]["message"]
            assert "Traceback" not in daemon.log()
            assert "unexpected failure" not in daemon.log()
            assert daemon.get("/health").status == 200


def test_missing_file_is_reported_with_its_key(tmp_path: Path) -> None:
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
        assert f"missing: {where}" in blocked["reason"]
        answer = daemon.chat("m")
        assert answer.status == 503
        assert where in answer.json["error"]["message"]
        assert daemon.control("GET", "/v1/processes/m").json["requires"][str(tmp_path / "projector.gguf")] is False
        (tmp_path / "projector.gguf").write_bytes(b"")
        daemon.until_state("m", "STOPPED", "STARTING", "READY")


@pytest.mark.parametrize("engine", ["llamacpp", "vllm"])
@pytest.mark.parametrize("listed", ["m", "other"])
def test_external_server_of_one_model_serves_what_it_lists(engine: str, listed: str, tmp_path: Path) -> None:
    body = {"data": [{"id": listed}], "choices": [{"text": "a"}], "is_sleeping": False}
    with answering(200, body) as port:
        text = fleet(port, engine).replace("external:", "options: {model: ./m.gguf}, external:")
        with fleetd(tmp_path, text).start() as daemon:
            daemon.until_state("away", "READY")
            answer = daemon.chat("m")
            if listed == "m":
                assert answer.status == 200
            else:
                assert answer.status >= 500
                assert "has no model m; it lists other" in answer.json["error"]["message"]
