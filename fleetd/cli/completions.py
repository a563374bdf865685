"""Chat completions from the gateway as a stream, from the standard library alone.

Invariants:
- Every failure is a CliError with the gateway's own sentence and hint. None prints a traceback.
- Closing the generator closes the connection, which cancels the request.
"""

from __future__ import annotations

import http.client
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fleetd.cli.client import EXIT_FAILED, EXIT_TIMEOUT, EXIT_UNKNOWN, EXIT_UNREACHABLE, LINE_MAX_BYTES, CliError

SILENCE_S = 600.0  # the gateway has limits of its own
_ERROR_MAX_BYTES = 1 << 20
_EXITS = {404: EXIT_UNKNOWN, 504: EXIT_TIMEOUT}
_ANY_HOST = {"0.0.0.0": "127.0.0.1", "[::]": "[::1]", "::": "::1"}


@dataclass
class Stats:
    """How an answer was generated. `tokens` are counted by the engine where it says so, else by chunks."""

    began_s: float = field(default_factory=time.monotonic)
    first_s: float | None = None
    last_s: float = 0.0
    tokens: int = 0
    finish: str = ""

    @property
    def text(self) -> str:
        """The statistics as one line: tokens, speed, time to the first token."""
        if self.first_s is None:
            return "no tokens"
        took_s = self.last_s - self.first_s
        speed = f", {(self.tokens - 1) / took_s:.1f} tokens/s" if took_s > 0 and self.tokens > 1 else ""
        cut = ", cut at the token limit" if self.finish == "length" else ""
        unit = "token" if self.tokens == 1 else "tokens"
        return f"{self.tokens} {unit}{speed}, first after {self.first_s - self.began_s:.2f} s{cut}"


def split_address(gateway: str) -> tuple[str, int]:
    """Return host and port of a gateway address as `status` has it; a wildcard becomes loopback."""
    host, _, port = gateway.rpartition(":")
    host = _ANY_HOST.get(host, host)
    return host.strip("[]"), int(port)


def stream(gateway: str, body: Mapping[str, Any], stats: Stats) -> Iterator[tuple[str, str]]:
    """Yield (`content` or `reasoning`, text) as the model generates. Raises CliError."""
    host, port = split_address(gateway)
    connection = http.client.HTTPConnection(host, port, timeout=SILENCE_S)
    response: http.client.HTTPResponse | None = None
    asked = {**body, "stream": True, "stream_options": {"include_usage": True}}
    try:
        try:
            headers = {"Content-Type": "application/json", "Accept": "text/event-stream"}
            connection.request("POST", "/v1/chat/completions", json.dumps(asked).encode(), headers)
            response = connection.getresponse()
            if response.status != 200:
                raise error_of(response.status, response.read(_ERROR_MAX_BYTES))
            yield from _chunks(response, stats)
        except TimeoutError:
            raise CliError(f"no answer from the gateway within {SILENCE_S:g} s", EXIT_TIMEOUT) from None
        except (OSError, http.client.HTTPException) as error:
            why = str(error) or type(error).__name__
            raise CliError(f"the connection to the gateway {gateway} was lost: {why}", EXIT_UNREACHABLE) from None
    finally:
        if response is not None:
            response.close()
        connection.close()


def error_of(status: int, content: bytes) -> CliError:
    """Return the error of a response in OpenAI's format, or of any other."""
    try:
        error = json.loads(content)["error"]
        message, hint = (error["message"], error.get("hint")) if isinstance(error, dict) else (str(error), None)
    except (ValueError, KeyError, TypeError, RecursionError):
        message, hint = f"the engine answered {status}: {content[:200].decode('utf-8', 'replace')}", None
    return CliError(str(message), _EXITS.get(status, EXIT_FAILED), str(hint) if hint else None)


def _chunks(response: http.client.HTTPResponse, stats: Stats) -> Iterator[tuple[str, str]]:
    while True:
        raw = response.readline(LINE_MAX_BYTES)
        if not raw:
            raise http.client.HTTPException("the answer was cut off")
        if not raw.startswith(b"data:"):
            continue
        data = raw[5:].strip()
        if data == b"[DONE]":
            return
        try:
            chunk = json.loads(data)
        except (ValueError, RecursionError):
            raise http.client.HTTPException("the answer is not JSON") from None
        if not isinstance(chunk, dict):
            raise http.client.HTTPException("the answer is not a stream of completions")
        if chunk.get("error"):
            raise error_of(500, data)
        yield from _parts(chunk, stats)


def _parts(chunk: Mapping[str, Any], stats: Stats) -> Iterator[tuple[str, str]]:
    usage = chunk.get("usage")
    choices: Sequence[Any] = chunk.get("choices") or ()
    for choice in choices[:1]:
        delta = choice.get("delta") or {}
        stats.finish = choice.get("finish_reason") or stats.finish
        for kind, key in (("reasoning", "reasoning_content"), ("reasoning", "reasoning"), ("content", "content")):
            text = delta.get(key)
            if isinstance(text, str) and text:
                stats.last_s = time.monotonic()
                stats.first_s = stats.first_s or stats.last_s
                stats.tokens += 1
                yield kind, text
    if isinstance(usage, dict) and isinstance(usage.get("completion_tokens"), int) and usage["completion_tokens"]:
        stats.tokens = usage["completion_tokens"]
