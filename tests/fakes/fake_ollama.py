"""`--api ollama`: one server with many models and the surprising behavior of the real one.

Copied from Ollama: keep_alive is a number of seconds or a Go duration ("-1" and "300" are rejected); an unload is answered
before it happens; the server loads one model at a time; a load is aborted when its client disconnects; a loading model is
not in /api/ps; OLLAMA_MAX_LOADED_MODELS evicts the shortest keep_alive, not the oldest; more than OLLAMA_MAX_QUEUE pending
loads get 503; after the first byte an error is a line with status 200; /v1 cannot set keep_alive; streaming is the default.
"""

# os.path, since pathlib would double the start-up time.
# ruff: noqa: PTH110, PTH118, PTH202

from __future__ import annotations

import hashlib
import os
import re
import threading
import time
from datetime import UTC, datetime, timedelta
from json import dumps
from typing import Any

from fake_http import Exchange, Gone
from fake_openai import OpenAI
from fake_state import Aborted, State, log

FOREVER_S = 9e9
BUSY = "server busy, please try again.  maximum pending requests exceeded"
UNITS = {"h": 3600.0, "m": 60.0, "s": 1.0, "ms": 1e-3, "us": 1e-6, "µs": 1e-6, "ns": 1e-9}


class BadRequest(Exception):
    """Answered with 400."""


def go_duration(text: str) -> float:
    """Read a Go duration; ValueError for anything else, a bare number included."""
    sign, body = (-1.0, text[1:]) if text[:1] == "-" else (1.0, text.removeprefix("+"))
    if body == "0":
        return 0.0
    parts = re.findall(r"(\d+(?:\.\d*)?|\.\d+)(h|ms|us|µs|ns|m|s)", body)
    if not parts or "".join(number + unit for number, unit in parts) != body:
        raise ValueError(f'time: missing unit in duration "{text}"')
    return sign * sum(float(number) * UNITS[unit] for number, unit in parts)


def keep_alive_s(value: Any) -> float | None:
    """Read the request's keep_alive: None unset, negative for ever."""
    if value is None:
        return None
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        seconds = float(value)
    elif isinstance(value, str):
        seconds = go_duration(value)
    else:
        raise ValueError(f"Unsupported type: {value!r}")
    return FOREVER_S if seconds < 0 else seconds


def canonical(name: str) -> str:
    name = name.strip()
    if not name or "@" in name or " " in name:
        raise BadRequest("invalid model name")
    return name if ":" in name.rpartition("/")[2] else f"{name}:latest"


def rfc3339(when: datetime) -> str:
    return when.isoformat().replace("+00:00", "Z")


class Runner:
    """A loaded model."""

    def __init__(self, name: str, size: int, context: int, keep: float) -> None:
        self.name, self.size, self.context, self.keep = name, size, context, keep
        self.users = 0
        self.leaving = False
        self.idle_since = time.monotonic()

    def expires(self) -> datetime:
        now = datetime.now(UTC)
        if self.keep >= FOREVER_S:
            return now.replace(year=2319)
        return now + timedelta(seconds=self.keep - (0 if self.users else time.monotonic() - self.idle_since))


class Ollama(OpenAI):
    """The server: store, runners, one load at a time."""

    def __init__(self, state: State) -> None:
        super().__init__(state)
        env = os.environ.get
        self.max_loaded = int(env("OLLAMA_MAX_LOADED_MODELS") or 0) or 3
        self.max_queue = int(env("OLLAMA_MAX_QUEUE") or 512)
        self.context = int(env("OLLAMA_CONTEXT_LENGTH") or 4096)
        state.args.slots = state.args.slots or int(env("OLLAMA_NUM_PARALLEL") or 1)
        self.keep = self._default_keep(env("OLLAMA_KEEP_ALIVE") or "5m")
        self.store: dict[str, dict[str, Any]] = {}
        self.blobs: dict[str, int] = {}
        self.runners: dict[str, Runner] = {}
        self.guard = threading.RLock()
        self.loading = threading.Lock()  # one load at a time
        self.pending = 0
        for entry in filter(None, (state.args.models or state.args.model).split(",")):
            name, _, size = entry.partition("=")
            self.store[canonical(name)] = {"size": int(size or state.args.memory or 1000), "from": name}

    @staticmethod
    def _default_keep(text: str) -> float:
        try:
            seconds = float(text)
        except ValueError:
            try:
                seconds = go_duration(text)
            except ValueError:
                seconds = 300.0
        return FOREVER_S if seconds < 0 else seconds

    def start(self) -> bool:
        self.ready = True
        log(
            f'time=2026-08-01T12:00:00.000Z level=INFO source=routes.go:2000 msg="Listening on {self.args.host}:{self.args.port}"'
        )
        threading.Thread(target=self._expire, daemon=True).start()
        return True

    # -- loading and unloading -----------------------------------------------------------------------------------------

    def _expire(self) -> None:
        while True:
            time.sleep(0.005)
            with self.guard:
                for runner in list(self.runners.values()):
                    idle = time.monotonic() - runner.idle_since
                    due = self.args.unload_time if runner.keep <= 0 else runner.keep
                    if not runner.users and idle >= due:
                        self._drop(runner)

    def _drop(self, runner: Runner) -> None:
        self.runners.pop(runner.name, None)
        self.state.release(runner.name)

    def acquire(
        self, exchange: Exchange, name: str, keep: float | None, options: dict[str, Any]
    ) -> tuple[Runner, float]:
        """Return the runner of a model, used by this request, and the seconds its load took. Raises Gone or RuntimeError."""
        begun = time.monotonic()
        runner = self._use(name, keep, options)
        if runner:
            return runner, 0.0
        with self.guard:
            if self.args.busy or self.pending >= self.max_queue:
                raise BufferError(BUSY)
            self.pending += 1
        try:
            while not self.loading.acquire(timeout=0.01):
                if exchange.client_gone():
                    raise Gone
            try:
                runner = self._use(name, keep, options) or self._load(exchange, name, keep, options)
            finally:
                self.loading.release()
        finally:
            with self.guard:
                self.pending -= 1
        return runner, time.monotonic() - begun

    def _use(self, name: str, keep: float | None, options: dict[str, Any]) -> Runner | None:
        with self.guard:
            runner = self.runners.get(name)
            if runner is None or (options.get("num_ctx") or runner.context) != runner.context:
                return None
            runner.users += 1
            runner.keep = runner.keep if keep is None else keep
            return runner

    def _load(self, exchange: Exchange, name: str, keep: float | None, options: dict[str, Any]) -> Runner:
        with self.guard:
            old = self.runners.get(name)
        while old or len(self.runners) >= self.max_loaded:
            with self.guard:
                idle = [runner for runner in self.runners.values() if not runner.users]
                if old and not old.users:
                    self._drop(old)
                    old = None
                elif not old and idle:
                    self._drop(min(idle, key=lambda runner: (runner.keep, runner.name)))
            exchange.wait(0.005)
        log(f'time=2026-08-01T12:00:00.000Z level=INFO source=llama_server.go:1 msg="starting runner" model={name}')
        exchange.wait(self.args.load_time)  # Gone here is the aborted load: nothing is kept
        if self.args.fail_load:
            raise RuntimeError("llama runner process has terminated: exit status 2")
        size = self.store[name]["size"]
        self.state.take(name, self.args.memory)
        runner = Runner(name, size, int(options.get("num_ctx") or self.context), self.keep if keep is None else keep)
        runner.users = 1
        with self.guard:
            self.runners[name] = runner
        return runner

    def done(self, runner: Runner) -> None:
        with self.guard:
            runner.users -= 1
            runner.idle_since = time.monotonic()

    # -- routes --------------------------------------------------------------------------------------------------------

    def handle(self, exchange: Exchange) -> None:
        route = (exchange.method.replace("HEAD", "GET"), exchange.path)
        if exchange.path.startswith("/api/blobs/"):
            return self.blob(exchange)
        if exchange.path.startswith("/v1/"):
            return super().handle(exchange)
        table = {
            ("GET", "/"): lambda e: e.send(200, "Ollama is running"),
            ("GET", "/api/version"): lambda e: e.send(200, {"version": self.args.version}),
            ("GET", "/api/tags"): self.tags,
            ("GET", "/api/ps"): self.ps,
            ("POST", "/api/show"): self.show,
            ("POST", "/api/generate"): self.native,
            ("POST", "/api/chat"): self.native,
            ("POST", "/api/embed"): self.native,
            ("POST", "/api/create"): self.create,
            ("DELETE", "/api/delete"): self.delete,
        }
        action = table.get(route)
        if action is None:
            known = any(path == exchange.path for _, path in table)
            return exchange.send(405 if known else 404, "405 method not allowed" if known else "404 page not found")
        try:
            action(exchange)
        except BadRequest as error:
            exchange.send(400, {"error": str(error)})

    def body(self, exchange: Exchange) -> dict[str, Any]:
        if not exchange.body:
            raise BadRequest("missing request body")
        try:
            return exchange.json()
        except ValueError as error:
            raise BadRequest(str(error)) from None

    def details(self) -> dict[str, Any]:
        return {
            "format": "gguf",
            "family": "llama",
            "families": ["llama"],
            "parameter_size": "1M",
            "quantization_level": "F16",
        }

    def tags(self, exchange: Exchange) -> None:
        models = [
            {"name": name, "model": name, "size": entry["size"], "digest": hashlib.sha256(name.encode()).hexdigest()}
            | {"modified_at": rfc3339(datetime.now(UTC)), "details": self.details()}
            for name, entry in self.store.items()
        ]
        exchange.send(200, {"models": models})

    def ps(self, exchange: Exchange) -> None:
        with self.guard:
            models = [
                {"name": runner.name, "model": runner.name, "size": runner.size, "size_vram": 0}
                | {"digest": hashlib.sha256(runner.name.encode()).hexdigest(), "details": self.details()}
                | {"expires_at": rfc3339(runner.expires()), "context_length": runner.context}
                for runner in self.runners.values()
            ]
        exchange.send(200, {"models": sorted(models, key=lambda model: str(model["expires_at"]), reverse=True)})

    def find(self, body: dict[str, Any]) -> str | None:
        name = canonical(str(body.get("model") or body.get("name") or ""))
        return next((known for known in self.store if known.lower() == name.lower()), None)

    def show(self, exchange: Exchange) -> None:
        body = self.body(exchange)
        name = self.find(body)
        if name is None:
            return exchange.send(404, {"error": f"model '{body.get('model')}' not found"})
        embedding = "embed" in name
        capabilities = ["embedding"] if embedding else ["completion"]
        info = {"general.architecture": "llama", "llama.context_length": 4096}
        exchange.send(
            200, {"details": self.details(), "capabilities": capabilities, "model_info": info, "modelfile": ""}
        )
        return None

    def create(self, exchange: Exchange) -> None:
        body = self.body(exchange)
        name = canonical(str(body.get("model") or ""))
        files: dict[str, str] = body.get("files") or {}
        missing = [digest for digest in files.values() if digest not in self.blobs]
        if missing or not (files or body.get("from")):
            raise BadRequest(
                "neither 'from' or 'files' was specified" if not files else f"blob not found: {missing[0]}"
            )
        size = sum(self.blobs[digest] for digest in files.values()) or self.store.get(
            canonical(body.get("from") or name), {}
        ).get("size", 1000)
        steps = ["parsing GGUF", "validating GGUF model", f"creating new layer sha256:{'0' * 64}", "writing manifest"]
        if body.get("stream", True):
            exchange.begin("application/x-ndjson")
            for step in steps:
                exchange.chunk(dumps({"status": step}).encode() + b"\n")
            if self.args.fail_load:
                exchange.chunk(dumps({"error": "unsupported architecture"}).encode() + b"\n")
                return exchange.end()
        self.store[name] = {"size": size, "parameters": body.get("parameters") or {}, "quantize": body.get("quantize")}
        if not body.get("stream", True):
            return exchange.send(200, {"status": "success"})
        exchange.chunk(dumps({"status": "success"}).encode() + b"\n")
        exchange.end()
        return None

    def delete(self, exchange: Exchange) -> None:
        body = self.body(exchange)
        name = self.find(body)
        if name is None:
            return exchange.send(404, {"error": f"model '{body.get('model')}' not found"})
        self.store.pop(name)
        exchange.send(200)
        return None

    def blob(self, exchange: Exchange) -> None:
        digest = exchange.path.removeprefix("/api/blobs/").replace("sha256-", "sha256:")
        if not re.fullmatch(r"sha256:[0-9a-fA-F]{64}", digest):
            return exchange.send(400, {"error": "invalid digest format"})
        present = digest in self.blobs or self.linked(digest)
        if exchange.method == "HEAD":
            return exchange.send(200 if present else 404)
        if hashlib.sha256(exchange.body).hexdigest() != digest.removeprefix("sha256:").lower():
            return exchange.send(400, {"error": "digest mismatch"})
        self.blobs[digest] = len(exchange.body)
        exchange.send(200 if present else 201)
        return None

    def linked(self, digest: str) -> bool:
        """Find a blob that was put into the store's folder from outside, as a link."""
        path = os.path.join(os.environ.get("OLLAMA_MODELS", ""), "blobs", digest.replace(":", "-"))
        if not os.environ.get("OLLAMA_MODELS") or not os.path.exists(path):
            return False
        self.blobs[digest] = os.path.getsize(path)
        return True

    # -- inference -----------------------------------------------------------------------------------------------------

    def native(self, exchange: Exchange) -> None:
        body = self.body(exchange)
        name = self.find(body)
        if name is None:
            return exchange.send(404, {"error": f"model '{body.get('model')}' not found"})
        try:
            keep = keep_alive_s(body.get("keep_alive"))
        except ValueError as error:
            raise BadRequest(str(error)) from None
        what = exchange.path.rpartition("/")[2]
        if "embed" in name and what != "embed" and not (keep == 0 and not body.get("prompt")):
            raise BadRequest(f'"{name}" does not support {what}')
        empty = not body.get({"generate": "prompt", "chat": "messages", "embed": "input"}[what])
        if empty and keep == 0:
            return self.unload(exchange, name)
        number = 0 if empty else self.state.begin_inference(exchange, name)
        complete = False
        try:
            self.run(exchange, body, name, what, keep, number)
            complete = True
        except Aborted:
            raise Gone from None
        finally:
            if number:
                self.state.end_inference(complete, name)

    def unload(self, exchange: Exchange, name: str) -> None:
        with self.guard:
            if runner := self.runners.get(name):
                runner.keep = 0.0
                runner.idle_since = time.monotonic()
        stamp = {"model": name, "created_at": rfc3339(datetime.now(UTC))}
        exchange.send(200, stamp | {"response": "", "done": True, "done_reason": "unload"})

    def run(self, exchange: Exchange, body: Any, name: str, what: str, keep: float | None, number: int) -> None:
        try:
            runner, load_s = self.acquire(exchange, name, keep, body.get("options") or {})
        except BufferError as error:
            return exchange.send(503, {"error": str(error)})
        except RuntimeError as error:
            return exchange.send(500, {"error": str(error)})
        try:
            self.write_native(exchange, body, name, what, number, load_s)
        finally:
            self.done(runner)

    def write_native(self, exchange: Exchange, body: Any, name: str, what: str, number: int, load_s: float) -> None:
        head = {"model": name, "created_at": rfc3339(datetime.now(UTC))}
        load_ns = int(load_s * 1e9) or 1000

        def part(text: str) -> dict[str, Any]:
            return {"message": {"role": "assistant", "content": text}} if what == "chat" else {"response": text}

        if what == "embed":
            inputs = body.get("input") or []
            vectors = [[0.1, 0.2, 0.3] for _ in (inputs if isinstance(inputs, list) else [inputs])]
            return exchange.send(
                200, {"model": name, "embeddings": vectors, "load_duration": load_ns, "prompt_eval_count": len(vectors)}
            )
        if not number:
            return exchange.send(200, head | part("") | {"done": True, "done_reason": "load"})
        limit = int((body.get("options") or {}).get("num_predict") or -1)
        count = self.args.tokens if limit < 0 else min(limit, self.args.tokens)
        last = {
            "done": True,
            "done_reason": "length" if 0 <= limit < self.args.tokens else "stop",
            "load_duration": load_ns,
        }
        last |= {
            "total_duration": load_ns + 1000,
            "prompt_eval_count": 1,
            "prompt_eval_duration": 1,
            "eval_count": count,
            "eval_duration": 1,
        }
        words = self.state.tokens(exchange, number, count)
        if not body.get("stream", True):
            return exchange.send(200, head | part("".join(words)) | last)
        exchange.begin("application/x-ndjson")
        for index, word in enumerate(words):
            if self.args.error_after is not None and index >= self.args.error_after:
                exchange.chunk(dumps({"error": "an error was encountered while running the model"}).encode() + b"\n")
                return exchange.end()
            exchange.chunk(dumps(head | part(word) | {"done": False}).encode() + b"\n")
        exchange.chunk(dumps(head | part("") | last).encode() + b"\n")
        exchange.end()
        return None

    # -- the OpenAI side -----------------------------------------------------------------------------------------------

    def model_names(self) -> list[str]:
        return list(self.store)

    def slot_group(self, model: str) -> str:
        return self.find({"model": model}) or ""

    def knows(self, model: str) -> bool:
        try:
            return self.find({"model": model}) is not None
        except BadRequest:
            return False

    def answer(self, exchange: Exchange, body: dict[str, Any], model: str, number: int) -> None:
        name = self.find({"model": model}) or model
        try:
            runner, _ = self.acquire(exchange, name, None, {})  # /v1 cannot say keep_alive
        except BufferError as error:
            return self.error(exchange, 503, str(error), "api_error")
        except RuntimeError as error:
            return self.error(exchange, 500, str(error), "api_error")
        try:
            super().answer(exchange, body, model, number)
        finally:
            self.done(runner)
