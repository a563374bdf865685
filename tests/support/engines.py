"""Servers for tests of engines: the fake server in every dialect, and the real Ollama if it is installed."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from fleetd.engines.base import Endpoint

REPOSITORY = Path(__file__).resolve().parents[2]
FAKE = REPOSITORY / "tests" / "fakes" / "fake_model_server.py"
START_TIMEOUT_S = 30.0
_PORT = re.compile(r"^fake: \w+ pid \d+ port (\d+)$", re.MULTILINE)


@dataclass
class Server:
    """A running server and a client for it."""

    process: subprocess.Popen[bytes]
    endpoint: Endpoint
    http: aiohttp.ClientSession
    log: Path

    async def get(self, path: str) -> Any:
        async with self.http.get(self.endpoint.base_url + path) as response:
            return await response.json()

    async def post(self, path: str, body: Mapping[str, Any]) -> Any:
        async with self.http.post(self.endpoint.base_url + path, json=body) as response:
            return await response.json(content_type=None)

    def log_lines(self) -> list[str]:
        return self.log.read_text("utf-8", "replace").splitlines()


@contextlib.asynccontextmanager
async def fake(tmp_path: Path, api: str, *args: str, env: Mapping[str, str] | None = None) -> AsyncIterator[Server]:
    """Run the fake model server on a free port."""
    argv = [sys.executable, str(FAKE), "--api", api, "--port", "0", *args]
    async with _running(argv, tmp_path / f"{api}.log", env or {}) as (process, log):
        port = await _from_log(process, log)
        async with aiohttp.ClientSession() as http:
            yield Server(process, Endpoint(f"http://127.0.0.1:{port}"), http, log)


@contextlib.asynccontextmanager
async def launched(
    tmp_path: Path, argv: Sequence[str], env: Mapping[str, str], port: int, path: str
) -> AsyncIterator[Server]:
    """Run the command line of an engine and wait until `path` answers."""
    async with _running(argv, tmp_path / f"{port}.log", env) as (process, log), aiohttp.ClientSession() as http:
        server = Server(process, Endpoint(f"http://127.0.0.1:{port}"), http, log)
        await _answering(server, path)
        yield server


@contextlib.asynccontextmanager
async def _running(
    argv: Sequence[str], log: Path, env: Mapping[str, str]
) -> AsyncIterator[tuple[subprocess.Popen[bytes], Path]]:
    with log.open("ab") as output:
        process = subprocess.Popen(  # noqa: ASYNC220 - a fork of some milliseconds
            argv,
            stdout=output,
            stderr=output,
            stdin=subprocess.DEVNULL,
            env={**os.environ, **env},
            start_new_session=True,
        )
    try:
        yield process, log
    finally:
        for number in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(10)
        process.wait()


async def _from_log(process: subprocess.Popen[bytes], log: Path) -> int:
    end = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < end:
        match = _PORT.search(log.read_text("utf-8", "replace"))
        if match:
            with contextlib.suppress(OSError):  # it prints the port before it listens
                socket.create_connection(("127.0.0.1", int(match.group(1))), 2).close()
                return int(match.group(1))
        assert process.poll() is None, log.read_text("utf-8", "replace")
        await asyncio.sleep(0.01)
    raise AssertionError(f"no port in {START_TIMEOUT_S:g} s: {log.read_text('utf-8', 'replace')}")


async def _answering(server: Server, path: str) -> None:
    end = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < end:
        assert server.process.poll() is None, server.log.read_text("utf-8", "replace")
        with contextlib.suppress(aiohttp.ClientError, OSError, TimeoutError):
            async with server.http.get(
                server.endpoint.base_url + path, timeout=aiohttp.ClientTimeout(total=2)
            ) as response:
                if response.status == 200:
                    return
        await asyncio.sleep(0.02)
    raise AssertionError(
        f"{path} did not answer in {START_TIMEOUT_S:g} s: {server.log.read_text('utf-8', 'replace')[-2000:]}"
    )


def ollama_program() -> str:
    """Return the path of the real Ollama, or skip the test."""
    stated = os.environ.get("FLEETD_TEST_OLLAMA")
    found = stated if stated and Path(stated).is_file() else shutil.which("ollama")
    if found is None:
        pytest.skip("ollama is not installed (PATH, FLEETD_TEST_OLLAMA)")
    return found
