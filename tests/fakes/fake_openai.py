"""The OpenAI routes of all fake engines, and the engines with one process per model: openai, llamacpp, vllm.

Invariants:
- An API has `start()`, called after the socket is bound, which returns whether to listen at once, and `handle(exchange)`.
- A stream ends with a usage chunk (if requested) and `[DONE]`. An interrupted answer has neither.
"""

from __future__ import annotations

import json
import os
import threading
import time
from typing import Any

from fake_http import Exchange, Gone
from fake_state import Aborted, State, log

INFERENCE = {
    "/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses", "/v1/rerank", "/v1/messages",
    "/chat/completions", "/completions", "/completion", "/embeddings", "/rerank", "/tokenize", "/detokenize",
}  # fmt: skip


class OpenAI:
    """`--api openai`: /health is 503 until ready; any model name is served."""

    def __init__(self, state: State) -> None:
        self.state, self.args = state, state.args
        self.ready = False

    def start(self) -> bool:
        if not self.args.load_time:
            self._load()
            return True
        threading.Thread(target=self._load, daemon=True).start()
        return True

    def _load(self) -> None:
        time.sleep(self.args.load_time)
        self.state.take("model", self.args.memory)
        if self.args.fail_load:
            self.fail_load()
        self.announce()
        self.ready = True

    def fail_load(self) -> None:
        log("error: failed to load model")
        os._exit(0 if self.args.exit_zero_on_death else self.args.exit_code)

    def announce(self) -> None:
        log(f"fake: serving {self.args.model} on port {self.args.port}")

    # -- routes --------------------------------------------------------------------------------------------------------

    def error(self, exchange: Exchange, status: int, message: str, kind: str = "invalid_request_error") -> None:
        exchange.send(status, {"error": {"message": message, "type": kind, "param": None, "code": status}})

    def handle(self, exchange: Exchange) -> None:
        path = exchange.path
        if path == "/health":
            return self.health(exchange)
        if path in ("/v1/models", "/models"):
            return self.models(exchange)
        if not self.ready:
            return self.loading(exchange)
        if path in INFERENCE and exchange.method == "POST":
            return self.infer(exchange)
        if not self.extra(exchange):
            self.unknown(exchange)
        return None

    def extra(self, exchange: Exchange) -> bool:
        """Answer a route of this engine alone; False when it is none."""
        return False

    def unknown(self, exchange: Exchange) -> None:
        self.error(exchange, 404, "File Not Found", "not_found_error")

    def loading(self, exchange: Exchange) -> None:
        self.error(exchange, 503, "Loading model", "unavailable_error")

    def health(self, exchange: Exchange) -> None:
        if self.ready:
            exchange.send(200, {"status": "ok"})
        else:
            self.loading(exchange)

    def model_names(self) -> list[str]:
        return [self.args.model]

    def models(self, exchange: Exchange) -> None:
        data = [
            {"id": name, "object": "model", "created": 1700000000, "owned_by": "fake"} for name in self.model_names()
        ]
        exchange.send(200, {"object": "list", "data": data})

    def knows(self, model: str) -> bool:
        return True

    def slot_group(self, model: str) -> str:
        """Return what shares slots: the whole server, or one model of it."""
        return ""

    def prepare(self, exchange: Exchange, body: dict[str, Any]) -> bool:
        """Make the model ready; False when an error was sent."""
        return True

    def text(self, word: str) -> str:
        return word

    # -- inference -----------------------------------------------------------------------------------------------------

    def infer(self, exchange: Exchange) -> None:
        try:
            body = exchange.json()
        except ValueError as error:
            return self.error(exchange, 400, f"bad JSON: {error}")
        model = str(body.get("model") or self.args.model)
        if not self.knows(model):
            return self.error(exchange, 404, f"The model `{model}` does not exist.", "NotFoundError")
        group = self.slot_group(model)
        number = self.state.begin_inference(exchange, group)
        complete = False
        try:
            if self.prepare(exchange, body):
                self.answer(exchange, body, model, number)
            complete = True
        except Aborted:
            if exchange.begun:
                raise Gone from None
            self.error(exchange, 500, "request aborted", "server_error")
        finally:
            self.state.end_inference(complete, group)

    def answer(self, exchange: Exchange, body: dict[str, Any], model: str, number: int) -> None:
        route = exchange.path.removeprefix("/v1")
        if route == "/embeddings":
            return self.embeddings(exchange, body, model)
        if route in ("/tokenize", "/detokenize"):
            return exchange.send(200, {"tokens": list(range(len(str(body.get("content", "")).split())))})
        if route == "/rerank":
            results = [{"index": i, "relevance_score": 1.0 / (i + 1)} for i, _ in enumerate(body.get("documents", []))]
            return exchange.send(200, {"model": model, "object": "list", "results": results})
        limit = body.get("max_tokens") or body.get("max_completion_tokens") or body.get("n_predict") or self.args.tokens
        count = min(int(limit), self.args.tokens)
        prompt = max(1, len(json.dumps(body.get("messages", body.get("prompt", "")))) // 4)
        usage = {"prompt_tokens": prompt, "completion_tokens": count, "total_tokens": prompt + count}
        words = self.state.tokens(exchange, number, count)
        finish = "length" if count < self.args.tokens else "stop"
        write = self.stream if body.get("stream") else self.whole
        write(exchange, body, model, words, usage, finish)
        return None

    def embeddings(self, exchange: Exchange, body: dict[str, Any], model: str) -> None:
        inputs = body.get("input", "")
        inputs = inputs if isinstance(inputs, list) else [inputs]
        data = [{"object": "embedding", "index": i, "embedding": [0.1, 0.2, 0.3]} for i, _ in enumerate(inputs)]
        usage = {"prompt_tokens": len(inputs), "total_tokens": len(inputs)}
        exchange.send(200, {"object": "list", "data": data, "model": model, "usage": usage})

    def whole(self, exchange: Exchange, body: Any, model: str, words: Any, usage: Any, finish: str) -> None:
        chat = exchange.path.endswith("/chat/completions")
        if self.args.rst_mid_stream:
            exchange.begin("application/json")
        text = "".join(self.text(word) for word in words)
        choice: dict[str, Any] = {"index": 0, "finish_reason": finish}
        choice |= {"message": {"role": "assistant", "content": text}} if chat else {"text": text}
        kind = "chat.completion" if chat else "text_completion"
        answer = {"id": "cmpl-fake", "object": kind, "created": int(time.time()), "model": model}
        exchange.send(200, answer | {"choices": [choice], "usage": usage})

    def stream(self, exchange: Exchange, body: Any, model: str, words: Any, usage: Any, finish: str) -> None:
        chat = exchange.path.endswith("/chat/completions")
        kind = "chat.completion.chunk" if chat else "text_completion"
        head = {"id": "cmpl-fake", "object": kind, "created": int(time.time()), "model": model}

        def send(choices: list[Any], **more: Any) -> None:
            exchange.chunk(b"data: " + json.dumps(head | {"choices": choices} | more).encode() + b"\n\n")

        def choice(text: str | None, finish: str | None = None, **delta: str) -> dict[str, Any]:
            content = ({"content": text} if text is not None else {}) | delta
            return {"index": 0, "finish_reason": finish} | ({"delta": content} if chat else {"text": text or ""})

        exchange.begin("text/event-stream")
        if chat:
            send([choice("", role="assistant")])
        for word in words:
            send([choice(self.text(word))])
        send([choice(None, finish)])
        if (body.get("stream_options") or {}).get("include_usage"):
            send([], usage=usage)
        exchange.chunk(b"data: [DONE]\n\n")
        exchange.end()


class LlamaCpp(OpenAI):
    """`--api llamacpp`: llama-server's extra routes and its log lines."""

    def announce(self) -> None:
        log("main: model loaded")
        log(f"main: server is listening on http://{self.args.host}:{self.args.port}")

    def fail_load(self) -> None:
        log("llama_model_load: error loading model: invalid magic characters: 'nope', expected 'GGUF'")
        log(f"srv    load_model: failed to load model, '{self.args.model}'")
        log("main: exiting due to model loading error")
        os._exit(0 if self.args.exit_zero_on_death else self.args.exit_code)

    def extra(self, exchange: Exchange) -> bool:
        stats = self.state.stats()
        if exchange.path == "/props":
            exchange.send(200, {"total_slots": self.args.slots or 1, "model_alias": self.args.model})
        elif exchange.path == "/slots":
            busy = stats["in_flight"]
            if "fail_on_no_slot" in exchange.query and self.args.slots and busy >= self.args.slots:
                self.error(exchange, 503, "no slot available", "unavailable_error")
                return True
            exchange.send(200, [{"id": i, "is_processing": i < busy} for i in range(self.args.slots or 1)])
        elif exchange.path == "/metrics":
            lines = (
                f"llamacpp:requests_processing {stats['in_flight']}\nllamacpp:requests_deferred {stats['waiting']}\n"
            )
            exchange.send(200, lines, "text/plain; version=0.0.4")
        else:
            return False
        return True
