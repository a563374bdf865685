"""Ollama's model management over HTTP: blobs, create with its progress, show, tags, delete. One method per route.

Invariants:
- No answer, or one of the wrong shape, is an EngineError with one sentence; a missing model is a value.
- A stream may fail after its status 200: each line is checked, and a stream that ends without `success` has failed.
- Files are sent in pieces; nothing of a model's size is held in memory.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fleetd.errors import EngineError, in_words

if TYPE_CHECKING:
    from aiohttp import ClientResponse, ClientSession

LINE_LIMIT_BYTES = 256 * 1024
ANSWER_LIMIT_BYTES = 32 * 1024 * 1024
PIECE_BYTES = 1024 * 1024
CALL_TIMEOUT_S = 30.0

Progress = Callable[[str, int, int], None]  # phase, bytes done, bytes in total (0: unknown)


def ignore_progress(phase: str, done: int, total: int) -> None:
    """Do nothing: the default progress callback."""


class OllamaApi:
    """The management routes of one server, without state between calls."""

    def __init__(self, http: ClientSession, base_url: str, api_key: str | None = None) -> None:
        self.http, self.base_url = http, base_url.rstrip("/")
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}

    async def version(self) -> tuple[int, ...]:
        """Return the server's version as numbers; (0, 0, 0) for a development build."""
        text = str((await self._json("GET", "/api/version"))[1].get("version", ""))
        numbers = text.removeprefix("v").split("-")[0].split("+")[0].split(".")
        return tuple(int(number) for number in numbers if number.isdecimal())

    async def tags(self) -> list[Mapping[str, Any]]:
        """Return every model of the store."""
        _, data = await self._json("GET", "/api/tags")
        models = data.get("models") or []
        if not isinstance(models, list) or not all(isinstance(model, Mapping) for model in models):
            raise EngineError(f"{self.base_url}/api/tags did not answer with a list of models")
        return models

    async def show(self, name: str) -> Mapping[str, Any] | None:
        """Return the server's details of a model; None if it has no such model."""
        status, data = await self._json("POST", "/api/show", {"model": name}, accept=(404, 400))
        if status == 200:
            return data
        message = str(data.get("error", ""))
        if status == 400 and "not found" not in message:
            raise EngineError(f"{self.base_url} cannot show {name}: {message}", recoverable=False)
        return None

    async def has_blob(self, digest: str) -> bool:
        """Return whether the store has (or links to) this blob."""
        async with self._open("HEAD", f"/api/blobs/{digest}") as response:
            if response.status not in (200, 404):
                raise EngineError(f"{self.base_url}/api/blobs/{digest} answered HTTP {response.status}")
            return response.status == 200

    async def upload(self, path: Path, digest: str, progress: Progress, timeout_s: float) -> None:
        """Send a file as a blob. The server checks the digest."""
        total = path.stat().st_size

        async def pieces() -> AsyncIterator[bytes]:
            import asyncio

            done = 0
            with path.open("rb") as file:
                while piece := await asyncio.to_thread(file.read, PIECE_BYTES):
                    yield piece
                    done += len(piece)
                    progress("uploading", done, total)

        async with self._open("POST", f"/api/blobs/{digest}", data=pieces(), timeout_s=timeout_s) as response:
            if response.status not in (200, 201):
                text = (await response.content.read(2000)).decode("utf-8", "replace")
                raise EngineError(f"{self.base_url} refused {path}: HTTP {response.status}: {text.strip()}")

    async def create(self, body: Mapping[str, Any], progress: Progress, timeout_s: float) -> None:
        """Create or replace a model. Raises EngineError with the server's message."""
        name, succeeded = body.get("model"), False
        async with self._open(
            "POST", "/api/create", json_body={**body, "stream": True}, timeout_s=timeout_s
        ) as response:
            async for line in _lines(response):
                message = line.get("error")
                if message:
                    recoverable = response.status >= 500
                    raise EngineError(f"{self.base_url} cannot create {name}: {message}", recoverable=recoverable)
                status = str(line.get("status", ""))
                succeeded = succeeded or status == "success"
                progress(status, _count(line.get("completed")), _count(line.get("total")))
            if response.status != 200:
                raise EngineError(f"{self.base_url} cannot create {name}: HTTP {response.status}")
        if not succeeded:
            raise EngineError(f"{self.base_url} closed the connection while it created {name}")

    async def delete(self, name: str) -> bool:
        """Delete a model; return False if there was none."""
        status, data = await self._json("DELETE", "/api/delete", {"model": name}, accept=(404,))
        if status == 404 and "not found" not in str(data.get("error", "not found")):
            raise EngineError(f"{self.base_url} cannot delete {name}: {data.get('error')}")
        return status == 200

    # -- requests ----------------------------------------------------------------------------------------------------------

    async def _json(
        self, method: str, path: str, payload: Mapping[str, Any] | None = None, accept: tuple[int, ...] = ()
    ) -> tuple[int, Mapping[str, Any]]:
        async with self._open(method, path, json_body=payload) as response:
            body = bytearray()
            async for chunk in response.content.iter_any():
                body += chunk
                if len(body) > ANSWER_LIMIT_BYTES:
                    raise EngineError(f"{self.base_url}{path} answered with more than {ANSWER_LIMIT_BYTES} bytes")
            status = response.status
        try:
            data = json.loads(body) if body else {}
        except (ValueError, RecursionError):
            data = None
        if status != 200 and status not in accept:
            message = data.get("error") if isinstance(data, Mapping) else bytes(body[:300]).decode("utf-8", "replace")
            raise EngineError(f"{method} {self.base_url}{path} answered HTTP {status}: {message}")
        if not isinstance(data, Mapping):
            raise EngineError(f"{method} {self.base_url}{path} did not answer with a JSON object")
        return status, data

    @asynccontextmanager
    async def _open(
        self,
        method: str,
        path: str,
        *,
        json_body: Mapping[str, Any] | None = None,
        data: AsyncIterator[bytes] | None = None,
        timeout_s: float = CALL_TIMEOUT_S,
    ) -> AsyncIterator[ClientResponse]:
        """Yield an open response. Raises EngineError for every failure, also of reading."""
        import aiohttp

        request, answered = f"{method} {self.base_url}{path}", False
        timeout = aiohttp.ClientTimeout(total=timeout_s)
        options: dict[str, Any] = {"json": json_body, "data": data, "headers": self._headers, "allow_redirects": False}
        try:
            async with self.http.request(method, self.base_url + path, timeout=timeout, **options) as response:
                if response.status in (401, 403):
                    reason = f"{request} was refused: HTTP {response.status}"
                    raise EngineError(reason, key="options.api_key", recoverable=False)
                answered = True
                yield response
        except TimeoutError as error:
            problem = "did not finish" if answered else "did not answer"
            raise EngineError(f"{request} {problem} within {timeout_s:g} s") from error
        except (aiohttp.ClientError, OSError, ValueError) as error:
            problem = "failed in the middle of its answer" if answered else "failed"
            raise EngineError(f"{request} {problem}: {in_words(error)}") from error


async def _lines(response: ClientResponse) -> AsyncIterator[Mapping[str, Any]]:
    buffer = b""
    async for chunk in response.content.iter_any():
        *lines, buffer = (buffer + chunk).split(b"\n")
        for line in lines:
            if line.strip():
                yield _object(line)
        if len(buffer) > LINE_LIMIT_BYTES:
            raise EngineError(f"{response.url} sent a line of more than {LINE_LIMIT_BYTES} bytes")
    if buffer.strip():
        yield _object(buffer)


def _object(line: bytes) -> Mapping[str, Any]:
    try:
        data = json.loads(line)
    except (ValueError, RecursionError):
        data = None
    if isinstance(data, Mapping):
        return data
    return {"error": line[:300].decode("utf-8", "replace").strip()}


def _count(value: Any) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else 0
