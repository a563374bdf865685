"""Server-sent events to a reader that may be slow, stuck or disconnected.

Invariants:
- The daemon waits for a reader only briefly: items pass through a queue of QUEUE_ITEMS; a reader that reads nothing for STALL_S
  while it is full is disconnected, and the source is closed.
- A finished stream ends with `event: end`, a failed one with `event: error`. A stream without either was cut.
- A comment every PING_S keeps the connection alive.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from typing import Any

from aiohttp import web

from fleetd.control import wire
from fleetd.control.answers import describe_error, encode
from fleetd.errors import FleetError

QUEUE_ITEMS = 256
STALL_S = 10.0
PING_S = 10.0

log = logging.getLogger("fleetd.control")


STREAMS: web.AppKey[set[asyncio.Task[object]]] = web.AppKey("streams", set)


class _StalledReader(Exception):
    """The reader has read nothing for STALL_S."""


def _frame(event: str, body: Mapping[str, Any], number: object = None) -> bytes:
    head = f"id: {number}\n" if number is not None else ""
    return f"{head}event: {event}\ndata: ".encode() + encode(body) + b"\n\n"


async def _close(source: AsyncIterator[Mapping[str, Any]]) -> None:
    if isinstance(source, AsyncGenerator):
        try:
            await source.aclose()
        except Exception:
            log.exception("source of a stream failed to close")


async def _pump(source: AsyncIterator[Mapping[str, Any]], event: str, queue: asyncio.Queue[bytes | None]) -> None:
    """Move items from the source to the queue, None at the end. Raises _StalledReader.

    The source is closed here, before the connection is cut: a cut cancels the tasks that wait.
    """

    async def put(frame: bytes | None) -> None:
        try:
            async with asyncio.timeout(STALL_S):
                await queue.put(frame)
        except TimeoutError:
            raise _StalledReader from None

    try:
        async for item in source:
            await put(_frame(event, wire.document(item), item.get("seq")))
        await put(_frame("end", wire.document({})))
    except FleetError as error:
        await put(_frame("error", describe_error(error)[1]))
    except (_StalledReader, ConnectionError):
        raise
    except Exception:
        log.exception("stream of %s events failed", event)
        await put(_frame("error", wire.error_document("internal", "A bug in fleetd: the stream failed.")))
    finally:
        await _close(source)
    await put(None)


async def _write(response: web.StreamResponse, queue: asyncio.Queue[bytes | None]) -> None:
    while True:
        try:
            async with asyncio.timeout(PING_S):
                frame = await queue.get()
        except TimeoutError:
            await response.write(b": ping\n\n")
            continue
        if frame is None:
            return
        await response.write(frame)


async def stream(request: web.Request, source: AsyncIterator[Mapping[str, Any]], event: str) -> web.StreamResponse:
    """Send the items of `source` as SSE until it ends or the reader leaves; close it."""
    response = web.StreamResponse(
        headers={"Content-Type": "text/event-stream", "Cache-Control": "no-store", "X-Accel-Buffering": "no"}
    )
    queue: asyncio.Queue[bytes | None] = asyncio.Queue(QUEUE_ITEMS)
    tasks: list[asyncio.Task[None]] = []
    streams, this = request.app[STREAMS], asyncio.current_task()
    assert this is not None
    streams.add(this)
    try:
        await response.prepare(request)
        await response.write(b": fleetctl/v1\n\n")
        tasks = [asyncio.create_task(_pump(source, event, queue)), asyncio.create_task(_write(response, queue))]
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
        for task in done:
            task.result()
        await response.write_eof()
    except _StalledReader:
        log.warning("reader of %s read nothing for %g s: disconnected", request.path, STALL_S)
        if request.transport is not None:
            request.transport.abort()
    except ConnectionError:
        pass  # the reader disconnected
    finally:
        streams.discard(this)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await _close(source)  # the pump may never have started
    return response


async def cut_all(app: web.Application) -> None:
    """Cancel every stream: followers would otherwise delay the shutdown."""
    streams: set[asyncio.Task[object]] = app[STREAMS]
    for task in tuple(streams):
        task.cancel()
