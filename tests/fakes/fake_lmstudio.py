"""`--api lmstudio`: one server with many models; an unknown route returns 200 with an error in the body.

Copied from LM Studio: the model lists of /api/v0 and /api/v1, explicit load and unload by instance id. A request for a model
that is not loaded loads it just in time and evicts the model that was loaded that way before.
"""

from __future__ import annotations

import threading
import time
from typing import Any

from fake_http import Exchange
from fake_openai import OpenAI
from fake_state import State, log


class LMStudio(OpenAI):
    """Loaded models by instance id."""

    def __init__(self, state: State) -> None:
        super().__init__(state)
        self.store: dict[str, int] = {}
        self.loaded: dict[str, dict[str, Any]] = {}  # instance id -> {key, config, jit}
        self.guard = threading.RLock()
        for entry in filter(None, (state.args.models or state.args.model).split(",")):
            name, _, size = entry.partition("=")
            self.store[name] = int(size or state.args.memory or 1000)

    def start(self) -> bool:
        self.ready = True
        log(f"[INFO] Success! HTTP server listening on port {self.args.port}")
        return True

    def unknown(self, exchange: Exchange) -> None:
        message = f"Unexpected endpoint or method. ({exchange.method} {exchange.path}). Returning 200 anyway"
        exchange.send(200, {"error": message})

    def health(self, exchange: Exchange) -> None:
        self.unknown(exchange)

    def model_names(self) -> list[str]:
        return list(self.store)

    def knows(self, model: str) -> bool:
        return True

    def prepare(self, exchange: Exchange, body: dict[str, Any]) -> bool:
        model = str(body.get("model") or "")
        with self.guard:
            if model in self.loaded or any(entry["key"] == model for entry in self.loaded.values()):
                return True
            if model not in self.store:
                self.error(exchange, 404, f'Model "{model}" not found', "model_not_found")
                return False
            for instance in [name for name, entry in self.loaded.items() if entry["jit"]]:
                self.drop(instance)
        return self.bring(exchange, model, model, {}, jit=True)

    def bring(
        self, exchange: Exchange, model: str, instance: str, config: dict[str, Any], *, jit: bool = False
    ) -> bool:
        time.sleep(self.args.load_time)
        if self.args.fail_load:
            error = {"type": "model_load_failed", "message": f'Failed to load model "{model}": insufficient resources'}
            exchange.send(500, {"error": error})
            return False
        self.state.take(instance, self.args.memory)
        with self.guard:
            self.loaded[instance] = {"key": model, "config": config, "jit": jit}
        return True

    def drop(self, instance: str) -> None:
        self.loaded.pop(instance)
        self.state.release(instance)

    def extra(self, exchange: Exchange) -> bool:
        path, method = exchange.path, exchange.method
        if path == "/lmstudio-greeting":
            exchange.send(200, {"lmstudio": True})
        elif path == "/api/v0/models" and method == "GET":
            exchange.send(200, {"object": "list", "data": [self.entry_v0(name) for name in self.store]})
        elif path.startswith("/api/v0/models/") and method == "GET":
            exchange.send(200, self.entry_v0(path.removeprefix("/api/v0/models/")))
        elif path == "/api/v1/models" and method == "GET":
            exchange.send(200, {"models": [self.entry_v1(name) for name in self.store]})
        elif path == "/api/v1/models/load" and method == "POST":
            self.load(exchange)
        elif path == "/api/v1/models/unload" and method == "POST":
            self.unload(exchange)
        else:
            return False
        return True

    def kind(self, name: str) -> str:
        return "embedding" if "embed" in name else "llm"

    def entry_v0(self, name: str) -> dict[str, Any]:
        state = "loaded" if any(entry["key"] == name for entry in self.loaded.values()) else "not-loaded"
        kind = "embeddings" if self.kind(name) == "embedding" else "llm"
        return {
            "id": name,
            "type": kind,
            "arch": "llama",
            "compatibility_type": "gguf",
            "state": state,
            "max_context_length": 4096,
        }

    def entry_v1(self, name: str) -> dict[str, Any]:
        with self.guard:
            instances = [
                {"id": instance, "config": {"context_length": 4096, "parallel": 4} | entry["config"]}
                for instance, entry in self.loaded.items()
                if entry["key"] == name
            ]
        return {
            "type": self.kind(name), "publisher": "fake", "key": name, "display_name": name, "architecture": "llama", "format": "gguf",
            "quantization": {"name": "F16", "bits_per_weight": 16}, "size_bytes": self.store[name], "params_string": None,
            "loaded_instances": instances, "max_context_length": 4096,
            "capabilities": {"vision": False, "trained_for_tool_use": False},
        }  # fmt: skip

    def load(self, exchange: Exchange) -> None:
        begun = time.monotonic()
        body = exchange.json()
        model = str(body.get("model"))
        if model not in self.store:
            error = {"type": "model_not_found", "message": f'Model "{model}" not found'}
            return exchange.send(404, {"error": error})
        instance, count = model, 2
        while instance in self.loaded:
            instance, count = f"{model}:{count}", count + 1
        config = {key: value for key, value in body.items() if key not in ("model", "echo_load_config")}
        if self.bring(exchange, model, instance, config):
            took = time.monotonic() - begun
            answer = {"type": self.kind(model), "instance_id": instance, "load_time_seconds": took, "status": "loaded"}
            exchange.send(200, answer)
        return None

    def unload(self, exchange: Exchange) -> None:
        instance = str(exchange.json().get("instance_id"))
        with self.guard:
            if instance not in self.loaded:
                error = {"type": "model_not_found", "message": f'Instance "{instance}" not found'}
                return exchange.send(404, {"error": error})
            self.drop(instance)
        exchange.send(200, {"instance_id": instance})
        return None
